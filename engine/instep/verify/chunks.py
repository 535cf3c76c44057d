"""Which sequences are computed side by side, so that little is padded and memory stays bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from instep.core.typing import F32, I64, Bool
from instep.recording.frames import Sequences
from instep.verify.bound import LEAST_RUNS

WHOLE_ROWS: Final = 16
"""Larger chunks are a multiple of it, where sequences are left for the next: most are padded to one anyway."""
LEAST_FILL: Final = 0.75
"""A sequence shorter than this share of the longest one beside it goes into the next chunk."""


def plan_chunks(lengths: I64, most_rows: int, least_rows: int) -> Iterator[I64]:
    """Split sequences into chunks of similar length.

    Args:
        lengths: frames of each sequence; those without frames are left out.
        most_rows: of a chunk.
        least_rows: below it nothing is gained by a smaller chunk, since rows are padded anyway.

    Yields:
        Indices into `lengths`, the longest first.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int64)
    order = order[lengths[order] > 0]
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        similar = int((lengths[order[first : first + most_rows]] >= LEAST_FILL * longest).sum())
        rows = min(most_rows, max(similar, least_rows))
        if first + rows < len(order):
            rows = _rounded(rows)
        yield order[first : first + rows]
        first += rows


def _rounded(rows: int) -> int:
    return rows // WHOLE_ROWS * WHOLE_ROWS if rows > WHOLE_ROWS else rows


class Chunk:
    """Some sequences side by side, the longest first, as spans of timesteps.

    Args:
        sequences: where they are.
        first_seqs: of the first frames, by the index of the stretch.
        members: which of them.
        most_frames: of a span, counting at least `LEAST_RUNS` rows; a chunk of fewer is one span.
    """

    def __init__(self, sequences: Sequences, first_seqs: I64, members: I64, most_frames: int) -> None:
        self._sequences = sequences
        self._given = first_seqs
        self._members = members
        self._most_frames = most_frames
        self._start = sequences.starts[members]
        self.rows: I64 = sequences.rows[members]
        self.first_seqs: I64 = first_seqs[self.rows]
        self.lengths: I64 = sequences.lengths[members]
        self._steps = max(most_frames // max(len(members), LEAST_RUNS), 1)

    def blocks(self, least_rows: int) -> Iterator[tuple[slice, Chunk]]:
        """The same in pieces of as many rows as fit into a span beside each other, `least_rows` at least.

        A piece of fewer than `LEAST_RUNS` rows, or of one that is too long, may still be several spans.
        """
        first = 0
        while first < len(self._members):
            rows = max(self._most_frames // int(self.lengths[first]), least_rows)
            if first + rows < len(self._members):
                rows = max(_rounded(rows), least_rows)
            of = slice(first, min(first + rows, len(self._members)))
            yield of, Chunk(self._sequences, self._given, self._members[of], self._most_frames)
            first = of.stop

    def spans(self) -> Iterator[Span]:
        """The timesteps in order."""
        longest = int(self.lengths[0])
        for start in range(0, longest, self._steps):
            yield self._span(start, min(start + self._steps, longest))

    def _span(self, start: int, end: int) -> Span:
        timesteps = np.arange(start, end)[:, None]
        valid: Bool = timesteps < self.lengths
        at = self._sequences.order.take(np.where(valid, self._start + timesteps, 0))
        return Span(self._sequences, start + self.first_seqs, at, valid)


class Span:
    """Some timesteps of a chunk; what was recorded in them is put together when it is asked for.

    Args:
        sequences: where they are.
        starts: see below.
        at: [T, R]: where the frames are in `sequences`; anywhere where a row has none.
        valid: see below.

    Attributes:
        starts: [R]: seqs of the first timestep.
        valid: [T, R]: whether the row has a frame.
        answered: [T, R]: whether its outputs were recorded.
        active: [T]: how many rows have one; they are the first ones.
    """

    def __init__(self, sequences: Sequences, starts: I64, at: I64, valid: Bool) -> None:
        self._sequences = sequences
        self._at = at
        self.starts = starts
        self.valid = valid
        self.answered: Bool = valid & sequences.answered[at]
        self.active: I64 = valid.sum(axis=1)

    def __len__(self) -> int:
        """T."""
        return len(self.valid)

    @property
    def x(self) -> F32:
        """[T, R, features], zero where a row has no frame; put together anew each time."""
        x: F32 = self._sequences.x.take(self._at, axis=0)
        x[~self.valid] = 0
        return x

    @property
    def y(self) -> F32:
        """[T, R, outputs] as recorded, meaningless where it was not; put together anew each time."""
        return self._sequences.y.take(self._at, axis=0)

    def parts(self, steps: int) -> Iterator[Span]:
        """The same in pieces of so many timesteps, in order."""
        for start in range(0, len(self), steps):
            of = slice(start, start + steps)
            yield Span(self._sequences, self.starts + start, self._at[of], self.valid[of])
