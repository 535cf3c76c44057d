"""Sequences grouped into chunks that are computed side by side with little padding, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from instep.core.typing import F32, I64, Bool
from instep.recording.frames import Sequences

MOST_ROWS: Final = 256
"""Sequences side by side, at most."""
WHOLE_ROWS: Final = 16
"""Larger chunks are a multiple of it, where sequences are left for the next: so many rows fill the widest vectors."""
LEAST_ROWS: Final = 8
"""Fewer rows side by side take about as long."""
LEAST_FILL: Final = 0.75
"""A sequence shorter than this share of the longest one in a chunk goes into the next chunk."""


def plan_chunks(lengths: I64, most_rows: int = MOST_ROWS) -> Iterator[I64]:
    """Split sequences into chunks of similar length.

    Args:
        lengths: frames of each sequence; those without frames are left out.
        most_rows: per chunk.

    Yields:
        Indices into `lengths`, the longest first.
    """
    order = np.argsort(-lengths, kind="stable").astype(np.int64)
    order = order[lengths[order] > 0]
    first = 0
    while first < len(order):
        longest = int(lengths[order[first]])
        similar = int((lengths[order[first : first + most_rows]] >= LEAST_FILL * longest).sum())
        rows = min(most_rows, max(similar, LEAST_ROWS))
        if first + rows < len(order):
            rows = _rounded(rows)
        yield order[first : first + rows]
        first += rows


def _rounded(rows: int) -> int:
    return rows // WHOLE_ROWS * WHOLE_ROWS if rows > WHOLE_ROWS else rows


class Chunk:
    """Some sequences side by side, the longest first, as spans of timesteps.

    Args:
        sequences: where their frames are.
        first_seqs: the seq of the first frame of every sequence.
        rows: indices of sequences, the longest first.
        most_frames: per span; a chunk of fewer frames is one span.

    Attributes:
        rows: as above.
        first_seqs: [R], seqs of their first frames.
        lengths: [R], their frames.
    """

    def __init__(self, sequences: Sequences, first_seqs: I64, rows: I64, most_frames: int) -> None:
        self._sequences = sequences
        self._all_first_seqs = first_seqs
        self._most_frames = most_frames
        self._starts = sequences.starts[rows]
        self._steps = max(most_frames // len(rows), 1)
        self.rows = rows
        self.first_seqs: I64 = first_seqs[rows]
        self.lengths: I64 = sequences.lengths[rows]

    def only(self, rows: I64) -> Chunk:
        """A chunk of some of its rows: indices, ascending."""
        return Chunk(self._sequences, self._all_first_seqs, self.rows[rows], self._most_frames)

    def blocks(self) -> Iterator[Chunk]:
        """Chunks of consecutive rows, each with as many as fit into one span, but at least `LEAST_ROWS`.

        A chunk of that few rows may still be several spans.
        """
        first = 0
        while first < len(self.rows):
            rows = max(self._most_frames // int(self.lengths[first]), LEAST_ROWS)
            if first + rows < len(self.rows):
                rows = _rounded(rows)
            yield self.only(np.arange(first, min(first + rows, len(self.rows))))
            first += rows

    def spans(self) -> Iterator[Span]:
        """The timesteps in order."""
        longest = int(self.lengths[0])
        for start in range(0, longest, self._steps):
            yield self._span(start, min(start + self._steps, longest))

    def _span(self, start: int, end: int) -> Span:
        timesteps = np.arange(start, end)[:, None]
        valid: Bool = timesteps < self.lengths
        at = self._sequences.order.take(np.where(valid, self._starts + timesteps, 0))
        return Span(self._sequences, self.first_seqs, start, at, valid)


class Span:
    """Some timesteps of a chunk; the recorded values in them are gathered on demand.

    Args:
        sequences: where the frames are.
        first_seqs: [R]: the seq of each row's first frame in the chunk.
        start: its first timestep in the chunk.
        at: [T, R]: where the frames are in `sequences`; anywhere where a row has none.
        valid: see below.

    Attributes:
        start: as above.
        starts: [R]: seqs of the first timestep.
        valid: [T, R]: whether the row has a frame.
        answered: [T, R]: whether its outputs were recorded.
        active: [T]: how many rows have a frame; they are the first ones.
    """

    def __init__(self, sequences: Sequences, first_seqs: I64, start: int, at: I64, valid: Bool) -> None:
        self._sequences = sequences
        self._first_seqs = first_seqs
        self._at = at
        self.start = start
        self.starts: I64 = start + first_seqs
        self.valid = valid
        self.answered: Bool = valid & sequences.answered[at]
        self.active: I64 = valid.sum(axis=1)

    def __len__(self) -> int:
        """T."""
        return len(self.valid)

    @property
    def x(self) -> F32:
        """[T, R, features], zero where a row has no frame; gathered anew each time."""
        x: F32 = self._sequences.x.take(self._at, axis=0)
        x[~self.valid] = 0
        return x

    @property
    def y(self) -> F32:
        """[T, R, outputs] as recorded, meaningless where no outputs were; gathered anew each time."""
        return self._sequences.y.take(self._at, axis=0)

    def parts(self, steps: int) -> Iterator[Span]:
        """The span in parts of `steps` timesteps, in order."""
        for start in range(0, len(self), steps):
            of = slice(start, start + steps)
            yield Span(self._sequences, self._first_seqs, self.start + start, self._at[of], self.valid[of])
