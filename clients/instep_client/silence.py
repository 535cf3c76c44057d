"""When a server that says nothing is asked for a word, and when it is given up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from instep_client.arrays import Indices
from instep_client.calls import Request
from instep_client.pending import Pending
from instep_client.protocol.wire import Frame, Header, Kind
from instep_client.replies import ErrorReply


class Silence:
    """Watches for silence: while something is unanswered, and over a connection that nobody uses.

    Args:
        pending: where probes go.
        timeout_s: how long a silent server is waited for; it is probed after half of that.
    """

    def __init__(self, pending: Pending, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._heard_at = -math.inf
        self._waiting_since = math.inf
        self.probe = Probe(pending)

    def heard(self, now: float) -> None:
        """A message came."""
        self._heard_at = now

    def lost(self) -> None:
        """The connection is lost: the wait begins anew with the next one."""
        self._waiting_since = math.inf

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
            if now >= self._heard_at + keep_alive_s:
                self.probe.ask(now)
            return False
        self._waiting_since = min(self._waiting_since, now)
        quiet_since = max(self._heard_at, self._waiting_since)
        if (
            may_probe
            and not self.probe.is_unanswered
            and quiet_since + self.timeout_s > now >= (quiet_since + self.timeout_s / 2)
        ):
            self.probe.ask(now)
        return now >= quiet_since + self.timeout_s

    def deadline(self, may_probe: bool, keep_alive_s: float) -> float:
        """When to look again though no message comes; infinity for never."""
        if self._waiting_since == math.inf:
            return self._heard_at + keep_alive_s
        is_probed = not may_probe or self.probe.is_unanswered
        return max(self._heard_at, self._waiting_since) + (self.timeout_s if is_probed else self.timeout_s / 2)


class Probe(Request[None]):
    """A PING that only asks for a word of the server."""

    kind, reply = Kind.PING, Kind.PONG
    is_unanswered = False

    def __init__(self, pending: Pending) -> None:
        self._pending = pending

    def ask(self, now: float) -> None:
        self.is_unanswered = True
        self._pending.ask(self)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        self.is_unanswered = False

    def refused(self, part: Indices, refusal: ErrorReply, now: float) -> None:
        self.is_unanswered = False

    def lost(self) -> bool:
        self.is_unanswered = False
        return False
