"""Where a session stands, when a silent server is given up, and when another connection is tried for.

    lost ── after a delay ──► HELLO sent ── WELCOME ──► streams claimed ── every RESUMED ──► OPEN
     ▲                            │                            │
     └─────── no answer, or a refusal that will pass ──────────┘

Delays double from attempt to attempt and are drawn at random, so that a thousand clients of a server that was restarted
do not come back in one moment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from random import Random
from typing import Final

from instep_client.arrays import Indices
from instep_client.calls import Request
from instep_client.pending import Pending
from instep_client.protocol.wire import Frame, Header, Kind, ServerInfo
from instep_client.replies import ErrorReply

LEAST_DELAY_S: Final = 0.05
MOST_DELAY_S: Final = 2.0
MAX_ATTEMPT_S: Final = 2.0
"""The longest that one attempt waits for its WELCOME; the next one uses another socket."""

_SAME: Final = ("fingerprint", "features", "outputs", "state")
_NOT_LESS: Final = ("window_frames", "credit_frames", "max_block_frames", "max_message_bytes")


class State(Enum):
    """Where the session stands."""

    GREETING = "not connected yet"
    OPEN = "connected"
    RECONNECTING = "connection lost, reconnecting"
    ENDED = "closed"


GREETING, OPEN, RECONNECTING, ENDED = State  # to look a member up in its class takes 0.2 µs (Python 3.11)


class Attempts:
    """The attempts at another connection.

    Args:
        reconnect_s: how long attempts are made after the loss; 0 for not at all.
        timeout_s: the longest that any attempt waits for its WELCOME.
        rng: what delays are drawn from.
    """

    def __init__(self, reconnect_s: float, timeout_s: float, rng: Random) -> None:
        self.reconnect_s = reconnect_s
        self._attempt_timeout_s = min(timeout_s, MAX_ATTEMPT_S)
        self._rng = rng
        self.why = ""
        """How the connection was lost, as a sentence."""
        self._lost_at: float | None = None
        self._attempts = 0
        self._next_at = 0.0
        """When to begin the next attempt, or to give the present one up."""

    def lost(self, now: float, why: str) -> bool:
        """The connection is lost, or an attempt failed; whether there is time for another one."""
        if self._lost_at is None:
            self._lost_at, self._attempts, self.why = now, 0, why
        if now >= self._lost_at + self.reconnect_s:
            return False
        delay_s = min(MOST_DELAY_S, LEAST_DELAY_S * 2.0**self._attempts)
        self._next_at = now + delay_s * self._rng.uniform(0.5, 1.0)
        self._attempts += 1
        return True

    def begin(self, now: float) -> None:
        """An attempt begins: HELLO is sent."""
        self._next_at = now + self._attempt_timeout_s

    def is_due(self, now: float) -> bool:
        """Whether the delay is over, or an attempt that has begun has waited for its WELCOME for long enough."""
        return now >= self._next_at

    def is_over(self, now: float) -> bool:
        """Whether the time for attempts is over."""
        return self._lost_at is not None and now >= self._lost_at + self.reconnect_s

    def deadline(self) -> float:
        """When one of these two is so, until an attempt has had its WELCOME."""
        return self._next_at if self._lost_at is None else min(self._next_at, self._lost_at + self.reconnect_s)

    def worked(self) -> None:
        """Something was answered over the new connection: the next loss is one of its own."""
        self._lost_at = None

    def why_given_up(self) -> str:
        """How the connection was lost, and that no other was made in time."""
        if not self.reconnect_s:
            return self.why
        end = " " if self.why.endswith("?") else "; "
        return (
            f"{self.why}{end}this client tried to connect again for {self.reconnect_s:g} s and has given up: "
            "make another one"
        )


def cannot_continue(former: ServerInfo, info: ServerInfo) -> str:
    """Why the streams cannot continue on a restarted server; empty if they can."""
    if any(getattr(info, name) != getattr(former, name) for name in _SAME):
        return f"another model ({info.model!r})"
    smaller = [name for name in _NOT_LESS if getattr(info, name) < getattr(former, name)]
    return f"a smaller {smaller[0]}" if smaller else ""


class Silence(Request[None]):
    """Watches for silence: while something is unanswered, and over a connection that nobody uses.

    Its message is a PING that only asks for a word of the server.

    Args:
        pending: where probes go.
        timeout_s: how long a silent server is waited for; it is probed after half of that.
    """

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, pending: Pending, timeout_s: float) -> None:
        self._pending = pending
        self.timeout_s = timeout_s
        self.heard_at = 0.0
        """When the newest message came; 0 before the first."""
        self.deadline = math.inf
        """When to watch again though no message comes; infinity for never."""
        self._waiting_since = math.inf
        self._is_asked = False
        self._asked_at = 0.0

    def ask(self) -> None:
        self._is_asked = True
        self._pending.ask(self)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self._is_asked = False

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        self._is_asked = False

    def lost(self) -> bool:
        """The connection is lost: the wait begins anew with the next one."""
        self._waiting_since = self.deadline = math.inf
        self._is_asked = False
        return False

    def lasts_too_long(self, now: float, is_waiting: bool, may_probe: bool, keep_alive_s: float) -> bool:
        """Whether the server is to be given up; it is probed where that is due.

        Args:
            now: the time.
            is_waiting: whether anything is unanswered.
            may_probe: whether a PING would be understood.
            keep_alive_s: after how long a connection without anything unanswered is probed; infinity for never.
        """
        if not is_waiting:
            self._waiting_since = math.inf
            self.deadline = self.heard_at + keep_alive_s
            if now < self.deadline:
                return False
            self.ask()
        self._waiting_since = min(self._waiting_since, now)
        quiet_since = max(self.heard_at, self._waiting_since)
        given_up_at, probed_at = quiet_since + self.timeout_s, quiet_since + self.timeout_s / 2
        if may_probe and not self._is_asked and now >= probed_at:
            self.ask()
            self._asked_at = now
        if self._is_asked and self._asked_at >= given_up_at:  # the client itself was held up until then
            given_up_at = self._asked_at + self.timeout_s / 2
        self.deadline = probed_at if may_probe and not self._is_asked else given_up_at
        return now >= given_up_at
