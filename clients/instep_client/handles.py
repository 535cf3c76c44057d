"""Stream handles, through which frames and requests about their streams are sent in turn.

A `Stream` has a stream handle of one row, a `Group` one of many. Calls of one stream handle are sent in the order in
which they were made; there is no order between the calls of different stream handles.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from instep_client.arrays import Indices
from instep_client.calls import Call, Request, TimedOutputs
from instep_client.protocol.errors import FrameFailure, FramesRefused, StreamEvicted
from instep_client.protocol.wire import F32, U64, Code

if TYPE_CHECKING:
    from asyncio import Future


class StreamHandle:
    """One stream or group: its rows, the calls that wait to be sent in order, and their outputs."""

    unanswered = 0
    """Frames sent and not answered for good (BUSY is not for good)."""
    rewound_at = 0
    """When the next seq of any of the rows was last rewound, on the session's counter."""
    has_ended = False
    """Whether the server ended any of the streams."""
    has_sleepers = False
    """Whether any of the streams hibernates."""
    closing = False
    closed = False
    finished = False
    """Whether the user said that nothing more will be sent."""
    unread = 0
    """Frames in `results` that were sent."""
    last_seqs: U64 | None = None
    last_epochs: U64 | None = None
    """The next seqs and the epochs as they were when the rows were given back."""
    waiter: Future[None] | None = None
    is_idle = True
    """Whether it is not in line to send, and not held up by a request that was asked, by streams that hibernate or by
    outputs that nobody takes. What is to be sent waits for answers then."""

    def __init__(self, names: Sequence[str], rows: Indices, single: bool) -> None:
        self.names = tuple(names)
        self.rows = rows
        self.single = single
        self.steps: deque[StepCall] = deque()
        """Calls that were not sent, or not sent completely."""
        self.requests: deque[TurnRequest] = deque()
        """Those that wait for their turn among `steps`."""
        self.results: deque[StepCall] = deque()
        """Pipelined sends whose outputs were not taken, oldest first."""

    def name_of(self, row: int | np.int64) -> str:
        """The name of the stream in one of its rows, which are in ascending order."""
        return self.names[int(np.searchsorted(self.rows, row))]


class TurnRequest(Request[Any]):
    """A request that waits until everything sent through its handle was answered, and comes before anything later."""

    handle: StreamHandle
    stamp: int
    """When it was queued, on the session's counter."""
    needs_all_awake: ClassVar[bool] = True
    """Whether it is asked only when no stream of its handle hibernates."""

    @abstractmethod
    def woke(self, which: Indices) -> None:
        """These of its streams, for which it was held, are awake or have ended."""

    def streams_ended(self, error: StreamEvicted) -> bool:
        """Streams of its handle have ended before its turn came; whether it is given up, and fails with that error."""
        return True


class FailedFrames(NamedTuple):
    """From frame `seq` on nothing of one column was applied."""

    seq: int
    code: Code
    sentence: str
    expected_seq: int


class StepCall(Call[TimedOutputs]):
    """Frames [T, N, features] for some rows of one stream handle."""

    sent = False
    """Whether every frame was sent, or refused before it could be."""
    times = (0, 0, 0)
    t = n = 0
    """Where the next piece begins: timestep and column."""
    height = width = 1
    """How large pieces are."""
    _outputs: F32 | None = None

    def __init__(
        self,
        withdraw: Callable[[StepCall], None],
        handle: StreamHandle,
        rows: Indices,
        x: F32,
        shape: tuple[int, ...],
        stamp: int,
        keep: bool,
    ) -> None:
        self._withdraw = withdraw
        """Takes back what was not sent."""
        self.handle = handle
        self.rows = rows
        self.x = x
        self._shape = shape
        """Of the outputs, as the user gets them."""
        self.stamp = stamp
        """When it was made, on the session's counter: a stream rewound later takes none of its frames."""
        self.keep = keep
        """Whether the outputs wait to be taken in order (a pipelined send)."""
        self.frames = self.left = len(x) * len(rows)
        """`left` are those not answered for good."""
        self.lone = handle.single and self.frames == 1
        """Whether it is one frame of one stream, to be sent beside others."""
        self.failures: dict[int, FailedFrames] = {}
        """By column; the earliest of each."""

    def cancel(self) -> None:
        self._withdraw(self)

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

    def next_piece(self) -> tuple[slice, slice]:
        """The timesteps and columns of the next piece."""
        timesteps, columns = self.x.shape[:2]
        return slice(self.t, min(self.t + self.height, timesteps)), slice(self.n, min(self.n + self.width, columns))

    def next_rows(self) -> tuple[Indices, int]:
        """The streams of the next piece, and how many timesteps it has."""
        timesteps, columns = self.next_piece()
        return self.rows[columns], timesteps.stop - timesteps.start

    def advance(self) -> None:
        """The next piece was sent."""
        self.n += self.width
        if self.n >= self.x.shape[1]:
            self.n = 0
            self.t += self.height
            self.sent = self.t >= len(self.x)

    def put(self, t: int, columns: Indices, outputs: F32) -> None:
        """Outputs of the timesteps from `t` on for some columns; they are copied."""
        if outputs.shape[:2] == self.x.shape[:2]:
            self._outputs = outputs.copy()
            return
        if self._outputs is None:
            self._outputs = self._missing()
        self._outputs[t : t + len(outputs), columns] = outputs

    def put_lone(self, outputs: F32, times: tuple[int, int, int]) -> None:
        """Outputs [outputs] of its only frame; they are copied."""
        self._outputs = outputs.copy()
        self.times = times
        self.left = 0
        self.handle.unanswered -= 1

    def refuse(self, column: int, failed: FailedFrames) -> None:
        """Frames of a column were not applied; the earliest refusal of a column is the one that is told."""
        known = self.failures.get(column)
        if known is None or failed.seq < known.seq:
            self.failures[column] = failed

    def conclude(self, why_any_ended: Callable[[Indices], StreamEvicted | None]) -> None:
        """Every frame was answered: make the result of it."""
        outputs = self._missing() if self._outputs is None else self._outputs
        if outputs.shape != self._shape:
            outputs = outputs.reshape(self._shape)
        if not self.failures:
            self.finish(TimedOutputs(outputs, *self.times))
            return
        failures: list[FrameFailure] = []
        ended: StreamEvicted | None = None
        for column, failed in sorted(self.failures.items()):
            row = self.rows[column]
            why = why_any_ended(self.rows[[column]])
            ended = ended or why
            code = failed.code if why is None else why.code
            failures.append(FrameFailure(self.handle.name_of(row), failed.seq, code, failed.expected_seq))
        if ended is not None:
            ended.failures, ended.outputs = tuple(failures), outputs
            self.fail(ended)
        else:
            sentence = self.failures[min(self.failures)].sentence
            self.fail(FramesRefused(failures[0].code, sentence, tuple(failures), outputs))

    def _missing(self) -> F32:
        return np.full((*self.x.shape[:2], self._shape[-1]), np.nan, np.float32)
