"""The state of one connection: its requests, the silence of the server, and attempts at another connection.

    lost ── after a delay ──► HELLO sent ── WELCOME ──► streams claimed ── every RESUMED ──► OPEN
     ▲                            │                            │
     └─────── no answer, or a refusal that will pass ──────────┘

Delays double from attempt to attempt and are drawn at random, so that a thousand clients of a server that was restarted
do not come back in one moment. The state of streams is in `streams.py`; `session.py` has the rules.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from enum import Enum
from random import Random
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

import numpy as np

from instep_client.arguments import NOBODY, Indices
from instep_client.protocol import wire
from instep_client.protocol.errors import InstepError, Refused
from instep_client.protocol.wire import MAX_BLOCK_STREAMS, MAX_NAME_BYTES, Frame, Header, Kind, Message, ServerInfo
from instep_client.replies import ErrorReply

if TYPE_CHECKING:
    from asyncio import Future

    from instep_client.streams import StreamHandle

R = TypeVar("R")

MAX_REPLY_BYTES: Final = 64 * 2**20
"""The largest frame the client lets the server send; requests are cut so that no honest reply is larger."""
LEAST_DELAY_S: Final = 0.05
MOST_DELAY_S: Final = 2.0
MAX_ATTEMPT_S: Final = 2.0
"""The longest that one attempt waits for its WELCOME; the next one uses another socket."""

_SAME: Final = ("fingerprint", "features", "outputs", "state")
_NOT_LESS: Final = ("window_frames", "credit_frames", "max_block_frames", "max_message_bytes")


class Call(Generic[R]):
    """A call of the session, which ends once, with a result or an error."""

    done = False
    error: InstepError | None = None
    waiter: Future[None] | None = None
    """The driver's future, which it completes to wake the task that waits for the call."""
    _result: R

    def finish(self, result: R) -> None:
        """End it with a result; the first end counts."""
        if not self.done:
            self._result = result
            self.done = True

    def fail(self, error: InstepError) -> None:
        """End it with an error; the first end counts."""
        if not self.done:
            self.error = error
            self.done = True

    def cancel(self) -> None:
        """Cancel it. Sent messages count as sent, and their replies are dropped."""

    def result(self) -> R:
        """The result of a call that has ended.

        Raises:
            InstepError: whatever it failed with.
        """
        if self.error is not None:
            raise self.error
        return self._result


class Request(Call[R], ABC):
    """A call that is sent in messages of one kind and answered in messages of another.

    A subclass defines its encoding (`ask`) and its handling of a reply, an ERROR and a lost connection.
    """

    kind: Kind
    """The kind of its messages."""
    reply: Kind
    """The kind of the replies; an ERROR may come instead."""

    def ask(self) -> None:
        """Send its messages, perhaps once more after the connection was lost.

        Requests that the session itself makes and sends do not implement this.
        """
        raise NotImplementedError

    @abstractmethod
    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        """Process a reply.

        Args:
            part: indices of the streams that the message was about.
            header: of the reply.
            frames: of the reply, including the header.

        Raises:
            MalformedMessage: when the reply does not follow the protocol.
        """

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        """Process an ERROR that came in place of a reply."""
        self.fail(Refused(refusal.code, refusal.sentence))

    def lost(self) -> bool:
        """Whether to ask again over the next connection, after the connection was lost before all replies."""
        return True


class Asked(NamedTuple):
    """A message that waits for its reply."""

    request: Request[Any]
    part: Indices
    """The indices of the request's streams that it is about."""


class Outbox:
    """Messages to be sent, the requests that wait for replies, and the calls and handles that the driver has to wake.

    STEPs share the numbers of the requests; `frames.SendQueue` keeps them.
    """

    def __init__(self) -> None:
        self.unanswered: dict[int, Asked] = {}
        """Messages without a reply, by number."""
        self.messages: list[Message] = []
        self.woken: list[Call[Any] | StreamHandle] = []
        """Calls that ended or were sent, and handles whose outputs changed; the driver wakes their tasks."""
        self._last_number = 0
        self._last_taken = 0

    def next_number(self) -> int:
        """The number of the next message; numbers rise."""
        self._last_number += 1
        return self._last_number

    def ask(
        self, request: Request[Any], *fields: int | str, frames: Sequence[Frame] = (), part: Indices = NOBODY
    ) -> None:
        """Send a message of a request."""
        number = self.next_number()
        self.unanswered[number] = Asked(request, part)
        self.messages.append([wire.pack_header(request.kind, number, *fields), *frames])

    def waits_for(self, reply: Kind) -> bool:
        """Whether any message waits for a reply of this kind."""
        return any(asked.request.reply is reply for asked in self.unanswered.values())

    def under_way(self, reply: Kind) -> dict[int, Asked]:
        """The requests that the driver has taken and that get a reply of this kind, by number."""
        return {
            number: asked
            for number, asked in self.unanswered.items()
            if asked.request.reply is reply and number <= self._last_taken
        }

    def forget(self) -> list[Request[Any]]:
        """Forget all messages after the loss of a connection; return the requests that were asked, in order."""
        asked = dict.fromkeys(each.request for each in self.unanswered.values())
        self.unanswered.clear()
        self.messages.clear()
        return list(asked)

    def take_messages(self) -> list[Message]:
        """The messages to be sent, in order."""
        messages, self.messages = self.messages, []
        self._last_taken = self._last_number
        return messages

    def take_woken(self) -> list[Call[Any] | StreamHandle]:
        """The calls and handles to wake."""
        woken, self.woken = self.woken, []
        return woken


def parts(count: int, info: ServerInfo) -> list[Indices]:
    """The numbers below `count`, cut so that names and states of each part's streams fit into one message."""
    row_bytes = info.state.row_bytes
    stream_bytes = max(MAX_NAME_BYTES + 1, row_bytes)  # a name ends its line
    most = max(1, min(info.max_message_bytes // stream_bytes, MAX_REPLY_BYTES // row_bytes, MAX_BLOCK_STREAMS))
    return [np.arange(start, min(start + most, count)) for start in range(0, count, most)]


class State(Enum):
    """The phase of a connection."""

    GREETING = "not connected yet"
    OPEN = "connected"
    RECONNECTING = "connection lost, reconnecting"
    ENDED = "closed"


GREETING, OPEN, RECONNECTING, ENDED = State  # to look a member up in its class takes 0.2 µs (Python 3.11)


class Attempts:
    """The attempts to connect again.

    Args:
        reconnect_s: seconds of attempts after a loss; 0 for none.
        timeout_s: the longest that any attempt waits for its WELCOME.
        rng: randomizes the delays.
    """

    def __init__(self, reconnect_s: float, timeout_s: float, rng: Random) -> None:
        self.reconnect_s = reconnect_s
        self._attempt_timeout_s = min(timeout_s, MAX_ATTEMPT_S)
        self._rng = rng
        self.why = ""
        """The reason of the loss, as a sentence."""
        self._lost_at: float | None = None
        self.number = 0
        """The number of the present attempt, or of the next one."""
        self._next_at = 0.0
        """The time to begin the next attempt, or to give the present one up."""

    def lost(self, now: float, why: str) -> bool:
        """Note a lost connection or a failed attempt; return whether there is time for another attempt."""
        if self._lost_at is None:
            self._lost_at, self.number, self.why = now, 0, why
        if now >= self._lost_at + self.reconnect_s:
            return False
        delay_s = min(MOST_DELAY_S, LEAST_DELAY_S * 2.0 ** min(self.number, 6))
        self._next_at = now + delay_s * self._rng.uniform(0.5, 1.0)
        self.number += 1
        return True

    def at_once(self, now: float) -> None:
        """Begin the next attempt without a delay."""
        self._next_at = now

    def begin(self, now: float) -> None:
        """Begin an attempt, for which HELLO is sent."""
        self._next_at = now + self._attempt_timeout_s

    def is_due(self, now: float) -> bool:
        """Whether the delay is over, or the present attempt has waited long enough for its WELCOME."""
        return now >= self._next_at

    def is_over(self, now: float) -> bool:
        """Whether the time for attempts is over."""
        return self._lost_at is not None and now >= self._lost_at + self.reconnect_s

    def deadline(self) -> float:
        """The time of the next attempt, or of giving up."""
        return self._next_at if self._lost_at is None else min(self._next_at, self._lost_at + self.reconnect_s)

    def worked(self) -> None:
        """Note an answer over the new connection, so that the next loss starts a new count."""
        self._lost_at = None

    def why_given_up(self, cure: str) -> str:
        """A sentence with the reason of the loss, which says that no other connection was made in time."""
        if not self.reconnect_s:
            return self.why
        end = " " if self.why.endswith("?") else "; "
        return f"{self.why}{end}attempts to connect again for {self.reconnect_s:g} s have failed: {cure}"


def cannot_continue(former: ServerInfo, info: ServerInfo) -> str:
    """The reason why streams cannot continue on a restarted server; empty if they can."""
    if any(getattr(info, name) != getattr(former, name) for name in _SAME):
        if info.model != former.model:
            return f"another model ({info.model!r})"
        kept = f"{former.model}@{former.fingerprint[:8]}"  # as where model.on_reload is `keep`
        return f"another version of {info.model!r}, which has its streams unless they are kept as {kept!r}"
    smaller = [name for name in _NOT_LESS if getattr(info, name) < getattr(former, name)]
    return f"a smaller {smaller[0]}" if smaller else ""


class Silence(Request[None]):
    """Watches for silence of the server, while something is unanswered and on an unused connection.

    Its message is a PING, to which any answer will do.

    Args:
        outbox: where probes go.
        timeout_s: the longest silence; the server is probed after half of it.
    """

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, outbox: Outbox, timeout_s: float) -> None:
        self._outbox = outbox
        self.timeout_s = timeout_s
        self.heard_at = 0.0
        """The time of the newest message; 0 before the first."""
        self.deadline = math.inf
        """The time of the next check if no message arrives; infinity for never."""
        self._waiting_since = math.inf
        self._is_asked = False
        self._asked_at = 0.0

    def ask(self) -> None:
        self._is_asked = True
        self._outbox.ask(self)

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self._is_asked = False

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        self._is_asked = False

    def lost(self) -> bool:
        """Start the wait again with the next connection."""
        self._waiting_since = self.deadline = math.inf
        self._is_asked = False
        return False

    @property
    def quiet_since(self) -> float:
        """The time since which an answer is missing; infinity if nothing is unanswered."""
        return max(self.heard_at, self._waiting_since)

    def lasts_too_long(self, now: float, is_waiting: bool, may_probe: bool, keep_alive_s: float) -> bool:
        """Whether the server is to be given up; it is probed where that is due.

        Args:
            now: the time.
            is_waiting: whether anything is unanswered.
            may_probe: whether a PING would be understood.
            keep_alive_s: seconds after which a connection without anything unanswered is probed; infinity for never.
        """
        if not is_waiting:
            self._waiting_since = math.inf
            self.deadline = self.heard_at + keep_alive_s
            if now < self.deadline:
                return False
            self.ask()
        self._waiting_since = min(self._waiting_since, now)
        given_up_at, probed_at = self.quiet_since + self.timeout_s, self.quiet_since + self.timeout_s / 2
        if may_probe and not self._is_asked and now >= probed_at:
            self.ask()
            self._asked_at = now
        if self._is_asked and self._asked_at >= given_up_at:  # the client itself was held up until then
            given_up_at = self._asked_at + self.timeout_s / 2
        self.deadline = probed_at if may_probe and not self._is_asked else given_up_at
        return now >= given_up_at
