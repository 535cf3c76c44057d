"""Calls: one object for each thing that the user asked for, filled in by the session.

Call
├── Call[ServerInfo]             the greeting
├── PingCall, StatisticsCall, ListCall   one request, one reply
├── Request, in `requests.py`    about streams: one request for each part of them
└── OutputsCall
    └── StepCall, in `steps.py`  frames of one stream handle
"""

from __future__ import annotations

from typing import Generic, NamedTuple, Protocol, TypeVar

from instep_client.protocol.errors import InstepError
from instep_client.protocol.wire import F32

R = TypeVar("R")


class Waiter(Protocol):
    """A driver hangs it on a call to be woken; `asyncio.Future[None]` is one."""

    def done(self) -> bool:
        """Whether it was woken."""
        ...

    def set_result(self, result: None, /) -> None:
        """Wake it."""
        ...


class Call(Generic[R]):
    """Something asked of the session. `done` once, with a result or an error."""

    __slots__ = ("_result", "done", "error", "waiter")

    def __init__(self) -> None:
        self.done = False
        self.error: InstepError | None = None
        self.waiter: Waiter | None = None

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

    def result(self) -> R:
        """The result of a call that is done.

        Raises:
            InstepError: whatever it failed with.
        """
        if self.error is not None:
            raise self.error
        return self._result


class PingCall(Call[float]):
    """One round trip; the result is its seconds."""

    __slots__ = ("sent_at",)

    def __init__(self, now: float) -> None:
        super().__init__()
        self.sent_at = now


class StatisticsCall(Call[dict[str, float]]):
    """The server's numbers by name."""

    __slots__ = ()


class ListedStream(NamedTuple):
    """A stream of the server, whoever has it."""

    name: str
    place: str
    """`connected`, `parked` (its connection is gone) or `hibernating` (in the recording alone)."""
    next_seq: int | None
    """The seq of its next frame; None where it hibernates."""
    pending: int
    """Frames taken and not computed yet."""
    idle_s: float
    """How long it has been idle."""
    left_s: float | None
    """How long the server keeps it if it stays idle; None if it never expires."""


class StreamPage(NamedTuple):
    """Some streams of the server."""

    streams: list[ListedStream]
    cursor: int
    """Where the next page begins; 0 after the last."""


class ListCall(Call[StreamPage]):
    """A page of the server's streams."""

    __slots__ = ("cursor", "most", "place", "prefix")

    def __init__(self, cursor: int, most: int, place: int, prefix: str) -> None:
        super().__init__()
        self.cursor = cursor
        self.most = most
        self.place = place
        self.prefix = prefix


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


class OutputsCall(Call[TimedOutputs]):
    """A call that ends with outputs."""

    __slots__ = ("frames",)

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames
        """How many frames it carries, T × N."""
