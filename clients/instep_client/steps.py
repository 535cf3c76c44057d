"""Frames that the user sends by one call, cut into blocks, and the blocks that carry them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np

from instep_client.arrays import Indices
from instep_client.calls import OutputsCall, TimedOutputs
from instep_client.protocol.errors import FrameFailure, FramesRefused, StreamEvicted
from instep_client.protocol.wire import F32, U64, Code
from instep_client.replies import Stepped
from instep_client.streams import ACKED, HANDLE, SEQ, OpenStreams, StreamHandle

_ONE_COLUMN: Final[Indices] = np.zeros(1, np.int64)


class FailedFrames(NamedTuple):
    """From frame `seq` on nothing of one column was applied."""

    seq: int
    code: Code
    sentence: str
    expected_seq: int


class StepCall(OutputsCall):
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

    def conclude(self, table: OpenStreams) -> None:
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
            row, code = int(self.rows[column]), failed.code
            if table.ended[row]:
                why = table.why_ended(row)
                ended, code = ended or why, why.code
            failures.append(FrameFailure(self.handle.name_of(row), failed.seq, code, failed.expected_seq))
        if ended is not None:
            ended.failures, ended.outputs = tuple(failures), outputs
            self.fail(ended)
        else:
            sentence = self.failures[min(self.failures)].sentence
            self.fail(FramesRefused(failures[0].code, sentence, tuple(failures), outputs))

    def _missing(self) -> F32:
        return np.full((*self.x.shape[:2], self._shape[-1]), np.nan, np.float32)


class StepBlock:
    """What one STEP carries: a piece of one call, or single frames of many calls side by side."""

    def __init__(
        self, calls: Sequence[StepCall], rows: Indices, columns: U64, x: F32, start: int, where: Indices
    ) -> None:
        self.calls = calls
        """The one call, or one call a column."""
        self.rows = rows
        self.columns = columns
        """(handle, seq of the first timestep, seq before which every output has come) of each column, as sent."""
        self.x = x
        """float32 [T, N, features], contiguous."""
        self.start = start
        """The call's timestep that is the block's first."""
        self.where = where
        """Which column of its call each column is."""
        self.frames = len(x) * len(rows)
        """How many frames it carries, T × N."""
        self.number = 0
        """The number it was last sent with; numbers grow."""

    @classmethod
    def of_singles(cls, table: OpenStreams, calls: Sequence[StepCall]) -> StepBlock:
        """Single frames of distinct streams side by side; their next seqs move on."""
        if len(calls) == 1:
            rows, x, where = calls[0].rows, calls[0].x, _ONE_COLUMN
        else:
            rows = np.concatenate([call.rows for call in calls])
            x = np.concatenate([call.x for call in calls], axis=1)
            where = np.zeros(len(rows), np.int64)
        return cls(calls, rows, table.take_columns(rows, 1), x, 0, where)

    def owner(self, column: int) -> tuple[StepCall, int]:
        """The call that a column belongs to, and which of the call's columns it is."""
        return self.calls[column if len(self.calls) > 1 else 0], int(self.where[column])

    def stamps(self) -> Indices:
        """When the calls were made: one number for all columns, or one for each."""
        return np.array([call.stamp for call in self.calls], np.int64)

    def take(self, columns: Indices) -> StepBlock:
        """A block of some of the columns, sent when this one was."""
        calls = [self.calls[column] for column in columns.tolist()] if len(self.calls) > 1 else self.calls
        x = np.ascontiguousarray(self.x[:, columns])
        part = StepBlock(calls, self.rows[columns], self.columns[columns], x, self.start, self.where[columns])
        part.number = self.number
        return part

    def renew(self, table: OpenStreams) -> None:
        """It is sent again: under the present handles, with what has come until now."""
        present = table.columns[self.rows]
        self.columns[:, HANDLE] = present[:, HANDLE]
        self.columns[:, ACKED] = np.minimum(present[:, ACKED], self.columns[:, SEQ])

    def deliver(self, answer: Stepped) -> None:
        """Every column was answered for good: give each call its outputs, and count its frames as answered."""
        first = self.calls[0] if self.calls else None
        if first is not None and not first.lone:
            first.put(self.start, self.where, answer.outputs)
            self.settle(answer.times)
        else:
            for call, outputs in zip(self.calls, answer.outputs[0], strict=False):  # no column where it was held
                call.put_lone(outputs, answer.times)

    def settle(self, times: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Count its frames as answered in every call and stream handle."""
        share = self.frames // len(self.calls) if self.calls else 0
        for call in self.calls:
            call.left -= share
            call.handle.unanswered -= share
            a, b = call.times, times
            call.times = b if call.frames == 1 else (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]))
