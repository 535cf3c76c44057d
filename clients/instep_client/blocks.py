"""A block on its way: what one STEP message carries, and which calls its columns belong to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instep_client.arrays import Indices
from instep_client.protocol.wire import F32, U64
from instep_client.replies import Stepped
from instep_client.steps import StepCall
from instep_client.streams import ACKED, HANDLE, SEQ, OpenStreams


class StepBlock:
    """T timesteps of N streams: a piece of one call, or single frames of many calls side by side."""

    __slots__ = ("calls", "columns", "request", "rows", "start", "where", "x")

    def __init__(
        self,
        calls: Sequence[StepCall],
        rows: Indices,
        columns: U64,
        x: F32,
        start: int = 0,
        where: Indices | slice | None = None,
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
        """The call's columns that are the block's; None with one call a column."""
        self.request = 0
        """The number it was last sent with; numbers grow."""

    @classmethod
    def of_piece(
        cls, table: OpenStreams, call: StepCall, rows: Indices, x: F32, start: int, where: Indices | slice
    ) -> StepBlock:
        """A piece of a call; its streams' next seqs move on."""
        columns = table.columns[rows]
        table.columns[rows, SEQ] += np.uint64(len(x))
        return cls((call,), rows, columns, x, start, where)

    @classmethod
    def of_singles(cls, table: OpenStreams, calls: Sequence[StepCall]) -> StepBlock:
        """Single frames of distinct streams side by side; their next seqs move on."""
        if len(calls) == 1:
            rows, x = calls[0].rows, calls[0].x
        else:
            rows = np.concatenate([call.rows for call in calls])
            x = np.concatenate([call.x for call in calls], axis=1)
        columns = table.columns[rows]
        table.columns[rows, SEQ] += np.uint64(1)
        return cls(calls, rows, columns, x)

    @property
    def frames(self) -> int:
        """How many frames it carries, T × N."""
        return int(self.x.shape[0]) * int(self.x.shape[1])

    def owner(self, column: int) -> tuple[StepCall, int]:
        """The call that a column belongs to, and which of the call's columns it is."""
        if self.where is None:
            return self.calls[column], 0
        if isinstance(self.where, slice):
            return self.calls[0], int(self.where.start) + column
        return self.calls[0], int(self.where[column])

    def stamps(self) -> int | Indices:
        """When the calls were made, for all columns or one a column."""
        if self.where is None:
            return np.array([call.stamp for call in self.calls], np.int64)
        return self.calls[0].stamp

    def take(self, columns: Indices) -> StepBlock:
        """A block of some of the columns, sent when this one was."""
        calls: Sequence[StepCall] = self.calls
        where: Indices | None = None
        if self.where is None:
            calls = [self.calls[column] for column in columns.tolist()]
        elif isinstance(self.where, slice):
            where = int(self.where.start) + columns
        else:
            where = self.where[columns]
        x = np.ascontiguousarray(self.x[:, columns])
        part = StepBlock(calls, self.rows[columns], self.columns[columns], x, self.start, where)
        part.request = self.request
        return part

    def renew(self, table: OpenStreams) -> None:
        """It is sent again: under the present handles, with what has come until now."""
        present = table.columns[self.rows]
        self.columns[:, HANDLE] = present[:, HANDLE]
        self.columns[:, ACKED] = np.minimum(present[:, ACKED], self.columns[:, SEQ])

    def deliver(self, answer: Stepped) -> None:
        """Every column was answered for good: give each call its outputs."""
        if self.where is not None:
            self.calls[0].put(self.start, self.where, answer.outputs)
        else:
            for column, call in enumerate(self.calls):
                call.put_all(answer.outputs[:, column : column + 1].copy())
        self.settle(answer.times)

    def settle(self, times: tuple[int, int, int] = (0, 0, 0)) -> None:
        """Count its frames as answered in every call and stream handle."""
        share = self.x.shape[0] if self.where is None else self.frames
        for call in self.calls:
            call.left -= share
            call.handle.unanswered -= share
            call.took(times)
