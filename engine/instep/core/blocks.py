"""Blocks that wait for their answer: what was asked, what is still missing, what failed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from instep.core.admission import Admission
from instep.core.pending import NONE, PendingFrames
from instep.core.typing import F32, I32, I64

_ONE = np.int32(1)


@dataclass(slots=True)
class Block:
    """One STEP message on its way."""

    client: int
    request: int
    rows: I32
    """int32 [T, N], rows in the pool, `NONE` where a frame was not admitted."""
    admission: Admission
    frames: int
    """Frames admitted."""
    admitted_ns: int
    codes: I32 = field(init=False)
    """int32 [N], 0 where no frame of the column was refused or failed."""
    lengths: I64 = field(init=False)
    """int64 [N], timesteps of the column that were or will be applied."""
    expected_seq: I64 = field(init=False)
    """int64 [N], what the stream expects after those; counts only where `codes` is not 0."""
    queue_ns: int = 0
    compute_ns: int = 0
    stepped_ns: int = 0

    def __post_init__(self) -> None:
        self.codes = self.admission.codes
        self.lengths = self.admission.lengths
        self.expected_seq = self.admission.expected_seq

    def fail(self, why: I32, expected_seq: I64) -> None:
        """Frames of this block were not applied, nor any after them in their columns.

        Args:
            why: int32 [pool], the code of each row that failed, 0 for the others.
            expected_seq: int64 [pool], what the stream of each row that failed expects now.
        """
        self.lengths = self.lengths.copy()  # how many were admitted stays known
        codes = np.where(self.rows != NONE, why[self.rows], 0)
        columns = np.flatnonzero(codes.any(axis=0))
        first = (codes[:, columns] != 0).argmax(axis=0)
        self.expected_seq[columns] = expected_seq[self.rows[first, columns]]
        self.codes[columns] = codes[first, columns]
        self.lengths[columns] = first

    def outputs(self, pending: PendingFrames) -> F32:
        """The answer: float32 [T, N, outputs], NaN where a frame was not applied."""
        y = pending.y.take(self.rows, axis=0)
        if self.codes.any():
            y[np.arange(self.rows.shape[0])[:, None] >= self.lengths] = np.nan
        return y


@dataclass(slots=True)
class BlockTable:
    """Blocks by number; frames of the pool point at them.

    Args:
        capacity: the most blocks at once (each has at least one admitted frame, so the pool's capacity is enough).
    """

    capacity: int
    _blocks: dict[int, Block] = field(default_factory=dict)
    _remaining: I32 = field(init=False)
    _place: I64 = field(init=False)
    """Scratch space: where a number stands last among those of a batch."""
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self._remaining = np.zeros(self.capacity, np.int32)
        self._place = np.zeros(self.capacity, np.int64)
        self._free = list(range(self.capacity - 1, -1, -1))

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, number: int) -> Block:
        return self._blocks[number]

    def reserve(self) -> int:
        """A number for the next block."""
        return self._free.pop()

    def add(self, number: int, client: int, request: int, rows: I32, admission: Admission, now_ns: int) -> None:
        """Keep a block until its frames are answered."""
        frames = int(admission.lengths.sum())
        self._remaining[number] = frames
        self._blocks[number] = Block(client, request, rows, admission, frames, now_ns)

    def answered(self, numbers: I32) -> list[Block]:
        """Frames of these blocks were answered, one entry a frame; the blocks that are complete now, taken out."""
        np.subtract.at(self._remaining, numbers, _ONE)  # of the array's own type: another one is 20 times slower
        places = np.arange(len(numbers))
        self._place[numbers] = places
        distinct = numbers[self._place[numbers] == places]
        complete = distinct[self._remaining[distinct] == 0].tolist()
        self._free.extend(complete)
        return [self._blocks.pop(number) for number in complete]


def admitted_rows(block: Block) -> I32:
    """The rows of the pool that a block holds: int32 [frames]."""
    rows: I32 = block.rows.reshape(-1)
    return rows if block.frames == len(rows) else rows[rows != NONE]
