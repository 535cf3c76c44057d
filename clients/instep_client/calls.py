"""Calls: one object for each thing that the user asked for, completed by the session.

Call
├── StepCall, in `handles.py`  frames of one stream handle
└── Request                    anything else, one class for each kind
    ├── Greeting, Claim, Silence, Farewell  the session's own
    ├── Question, PingCall, in `requests.py`
    └── StreamsRequest         about streams, one message for each part of them
        ├── ReadStateCall, in `requests.py`
        ├── OpenCall, ResumeCall, in `openings.py`
        └── TurnCall           waits until everything sent through its handle was answered
            ├── ForkCall, in `openings.py`
            └── ResetCall, CloseCall, in `changes.py`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

from instep_client.arrays import Indices
from instep_client.protocol.errors import InstepError, Refused
from instep_client.protocol.wire import F32, Frame, Header, Kind
from instep_client.replies import ErrorReply

if TYPE_CHECKING:
    from asyncio import Future

R = TypeVar("R")


class Call(Generic[R]):
    """Something asked of the session. `done` once, with a result or an error."""

    done = False
    error: InstepError | None = None
    waiter: Future[None] | None = None
    """The driver's, which hangs it on the call and ends it when the call is to be woken."""
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
        """Nobody waits for it any more. What was sent counts as sent, and its reply is dropped when it comes."""

    def result(self) -> R:
        """The result of a call that is done.

        Raises:
            InstepError: whatever it failed with.
        """
        if self.error is not None:
            raise self.error
        return self._result


class Request(Call[R], ABC):
    """A call that is asked in messages of one kind and answered in messages of another.

    A subclass says how it is encoded (`ask`), and what a reply, an ERROR or a lost connection means to it.
    """

    kind: Kind
    """Of its messages."""
    reply: Kind
    """Of the messages that answer them; an ERROR may come instead."""

    def ask(self) -> None:
        """Send its messages, perhaps once more after the connection was lost.

        Requests that the connection makes by itself, and sends in its own way, are never asked.
        """
        raise NotImplementedError

    @abstractmethod
    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        """A reply came.

        Args:
            part: which of its streams the message was about.
            header: of the reply.
            frames: of the reply, the header included.

        Raises:
            MalformedMessage: when the reply does not follow the protocol.
        """

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        """ERROR came in place of a reply."""
        self.fail(Refused(refusal.code, refusal.sentence))

    def lost(self) -> bool:
        """The connection was lost before all replies came; whether to ask again over the next one."""
        return True


class TimedOutputs(NamedTuple):
    """The outputs of a step and where the server spent its time.

    The three times are the server's, in microseconds; for a step that was sent as several blocks each is the longest of
    any block.
    """

    outputs: F32
    """[outputs], [T, outputs], [N, outputs] or [T, N, outputs], as the frames were given."""
    queue_us: int
    """From the block's admission until its last batch began to be computed."""
    compute_us: int
    """That batch's step."""
    send_us: int
    """From the end of that step until the server began to make the answer; copying the outputs and sending come after.

    0 where no frame of the block was admitted.
    """
