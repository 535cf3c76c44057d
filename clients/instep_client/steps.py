"""Frames that the user sends by one call: cut into blocks, answered piece by piece, and put together again."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from instep_client.arrays import Indices
from instep_client.calls import OutputsCall, TimedOutputs
from instep_client.protocol.errors import FrameFailure, FramesRefused, StreamEvicted
from instep_client.protocol.wire import F32, Code
from instep_client.streams import ENDING, StreamHandle


class FailedFrames(NamedTuple):
    """From frame `seq` on nothing of one column was applied."""

    seq: int
    code: Code
    sentence: str
    expected_seq: int


class StepCall(OutputsCall):
    """Frames [T, N, features] for some rows of one stream handle."""

    __slots__ = (
        "_outputs",
        "_prefix",
        "failures",
        "handle",
        "height",
        "keep",
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
        handle: StreamHandle,
        rows: Indices,
        x: F32,
        prefix: tuple[int, ...],
        outputs_width: int,
        stamp: int,
        keep: bool,
    ) -> None:
        super().__init__(len(x) * len(rows))
        self.handle = handle
        self.rows = rows
        self.x = x
        self._prefix = prefix
        self.outputs_width = outputs_width
        self.stamp = stamp
        """When it was made, on the session's counter: a stream rewound later takes none of its frames."""
        self.keep = keep
        """Whether the outputs wait to be taken in order (a pipelined send)."""
        self.sent = False
        """Whether every frame was sent, or refused before it could be."""
        self.lone = handle.single and self.frames == 1
        """Whether it is one frame of one stream, to be sent beside others."""
        self.left = self.frames
        """Frames not answered for good."""
        self.failures: dict[int, FailedFrames] = {}
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

    def refuse(self, column: int, failed: FailedFrames) -> None:
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
            self.finish(TimedOutputs(outputs, *self.times))
            return
        ordered = sorted(self.failures.items())
        first = ordered[0][1]
        if self.handle.single and first.code in ENDING:
            self.fail(StreamEvicted(first.code, first.sentence, self.handle.names[0]))
            return
        failures = tuple(
            FrameFailure(self.handle.name_of(self.rows[column]), failed.seq, failed.code, failed.expected_seq)
            for column, failed in ordered
        )
        self.fail(FramesRefused(first.code, first.sentence, failures, outputs))
