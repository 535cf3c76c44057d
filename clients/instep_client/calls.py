"""What the user asked for and how it ended: one object a call, filled in by the session.

Call
├── Greeting, Ping, Statistics   one request, one reply
├── those of `requests.py`       one request a part of the streams
└── StepCall                     frames of one lane, sent as one block, as pieces of several, or as a column of one
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from instep_client.arrays import Indices
from instep_client.protocol.errors import FrameFailure, FramesRefused, InstepError, StreamEvicted
from instep_client.protocol.wire import F32, Code

if TYPE_CHECKING:
    from instep_client.streams import Lane

R = TypeVar("R")

ENDING: Final = frozenset(
    {
        Code.IDLE,
        Code.CLIENT_GONE,
        Code.NEVER_USED,
        Code.EXPIRED,
        Code.FENCED,
        Code.STATE_LOST,
        Code.UNKNOWN_STREAM,
        Code.FOREIGN_STREAM,
        Code.DATA_LOSS,
        Code.OUTPUTS_GONE,
        Code.NUMERICS_CHANGED,
    }
)
"""Codes after which a stream can never be stepped again."""


class Waiter(Protocol):
    """What a driver hangs on a call to be woken; `asyncio.Future[None]` is one."""

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


class Ping(Call[float]):
    """One round trip; the result is its seconds."""

    __slots__ = ("sent_at",)

    def __init__(self, now: float) -> None:
        super().__init__()
        self.sent_at = now


class Statistics(Call[dict[str, float]]):
    """The server's numbers by name."""

    __slots__ = ()


class Answer(NamedTuple):
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


class Failed(NamedTuple):
    """From frame `seq` on nothing of one column was applied."""

    seq: int
    code: Code
    sentence: str
    expected_seq: int


class StepCall(Call[Answer]):
    """Frames [T, N, features] for some rows of one lane."""

    __slots__ = (
        "_outputs",
        "_prefix",
        "failures",
        "frames",
        "height",
        "keep",
        "lane",
        "left",
        "lone",
        "n",
        "outputs_width",
        "rows",
        "sent",
        "stamp",
        "t",
        "times",
        "width",
        "x",
    )

    def __init__(
        self,
        lane: Lane,
        rows: Indices,
        x: F32,
        prefix: tuple[int, ...],
        outputs_width: int,
        stamp: int,
        keep: bool,
    ) -> None:
        super().__init__()
        self.lane = lane
        self.rows = rows
        self.x = x
        self._prefix = prefix
        self.outputs_width = outputs_width
        self.stamp = stamp
        """When it was made, on the session's counter: a stream set back later takes none of its frames."""
        self.keep = keep
        """Whether the outputs wait to be taken in order (a pipelined send)."""
        self.sent = False
        """Whether every frame was sent, or refused before it could be."""
        self.frames = len(x) * len(rows)
        """How many frames it carries, T × N."""
        self.lone = lane.single and self.frames == 1
        """Whether it is one frame of one stream, to be sent beside others."""
        self.left = self.frames
        """Frames not answered for good."""
        self.failures: dict[int, Failed] = {}
        self.times = (0, 0, 0)
        self._outputs: F32 | None = None
        self.t = 0
        self.n = 0
        """`t` and `n` say where the next piece begins; `height` and `width` how large pieces are."""
        self.height = 1
        self.width = 1

    @property
    def started(self) -> bool:
        """Whether any of it was sent."""
        return self.t > 0 or self.n > 0

    def cut(self, most_frames: int, most_columns: int, most_timesteps: int) -> None:
        """Choose pieces within the limits: whole rows of streams where they fit, even parts of a row where not."""
        columns = self.x.shape[1]
        parts = -(-columns // most_columns)
        self.width = -(-columns // parts)
        self.height = min(most_timesteps, max(1, most_frames // columns)) if parts == 1 else 1

    def next_frames(self) -> int:
        """How many frames the next piece has."""
        if self.lone:
            return 1
        return min(self.height, len(self.x) - self.t) * min(self.width, len(self.rows) - self.n)

    def next_rows(self) -> tuple[Indices, int]:
        """The streams of the next piece, and how many timesteps it has."""
        if self.lone:
            return self.rows, 1
        timesteps, columns = self.next_piece()
        return self.rows[columns], timesteps.stop - timesteps.start

    def next_piece(self) -> tuple[slice, slice]:
        """The timesteps and columns of the next piece."""
        return slice(self.t, min(self.t + self.height, self.x.shape[0])), slice(
            self.n, min(self.n + self.width, self.x.shape[1])
        )

    def advance(self) -> None:
        """The next piece was sent."""
        self.n += self.width
        if self.n >= self.x.shape[1]:
            self.n = 0
            self.t += self.height
            self.sent = self.t >= self.x.shape[0]

    def put_all(self, outputs: F32) -> None:
        """Outputs for all of it, in an array that nobody else uses."""
        self._outputs = outputs

    def put(self, t: int, columns: slice | Indices, outputs: F32) -> None:
        """Outputs of the timesteps from `t` on for some columns; they are copied."""
        if outputs.shape[:2] == self.x.shape[:2]:
            self._outputs = outputs.copy()
            return
        if self._outputs is None:
            self._outputs = np.full((*self.x.shape[:2], self.outputs_width), np.nan, np.float32)
        self._outputs[t : t + len(outputs), columns] = outputs

    def took(self, times: tuple[int, int, int]) -> None:
        """The server's split of one block of it."""
        if self.frames == 1:
            self.times = times
        else:
            a, b = self.times, times
            self.times = (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]))

    def refuse(self, column: int, failed: Failed) -> None:
        """Frames of a column were not applied; the earliest refusal of a column is the one that is told."""
        known = self.failures.get(column)
        if known is None or failed.seq < known.seq:
            self.failures[column] = failed

    def conclude(self) -> None:
        """Every frame was answered: make the result of it."""
        if self._outputs is None:
            self._outputs = np.full((*self.x.shape[:2], self.outputs_width), np.nan, np.float32)
        outputs = self._outputs.reshape(*self._prefix, self.outputs_width)
        if not self.failures:
            self.finish(Answer(outputs, *self.times))
            return
        ordered = sorted(self.failures.items())
        first = ordered[0][1]
        if self.lane.single and first.code in ENDING:
            self.fail(StreamEvicted(first.code, first.sentence, self.lane.names[0]))
            return
        failures = tuple(
            FrameFailure(self.lane.name_of(self.rows[column]), failed.seq, failed.code, failed.expected_seq)
            for column, failed in ordered
        )
        self.fail(FramesRefused(first.code, first.sentence, failures, outputs))
