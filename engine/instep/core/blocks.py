"""Blocks that wait for their answer: what was asked, what is still missing, what failed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from instep.core.rings import timesteps
from instep.core.typing import F32, I32, I64
from instep.core.verdict import Admission

_ONE = np.int32(1)

C = TypeVar("C")


@dataclass(slots=True)
class Block(Generic[C]):
    """One STEP message on its way; `client` is whoever sent it."""

    client: C
    request: int
    timesteps: int
    verdict: Admission
    """On this message, and on those that were admitted with it."""
    first: int
    """Its own first column in the verdict."""
    width: int
    """N."""
    frames: int
    """How many were admitted to be computed."""
    came_ns: int
    """When, on the monotonic clock."""
    repeated: F32 | None = None
    """float32 [≤ T, N, outputs] where leading timesteps were applied before: their outputs, as the ring had them on
    admission. The client may acknowledge them before this block is answered, and later frames take their places."""

    @property
    def columns(self) -> slice:
        """Its own in the verdict."""
        return slice(self.first, self.first + self.width)

    def fail(self, failed_rows: I64, codes: I32, expected_seq: I64) -> None:
        """Frames of this block were not applied, nor any after them in their columns; the verdict says so then.

        Args:
            failed_rows: int64 [F], rising.
            codes: int32 [F], why each failed.
            expected_seq: int64 [F], what the stream of each expects now.
        """
        self.verdict.is_whole = False
        verdict = self.verdict.of(self.columns)
        seq, rows = timesteps(self.timesteps), verdict.rows
        at = np.minimum(np.searchsorted(failed_rows, rows), len(failed_rows) - 1)
        fresh = (seq >= verdict.skipped) & (seq < verdict.lengths)
        failed = fresh & (failed_rows[at] == rows)
        columns = np.flatnonzero(failed.any(axis=0))
        first = failed[:, columns].argmax(axis=0)
        which = at[first, columns]
        verdict.lengths[columns] = first
        verdict.codes[columns] = codes[which]
        verdict.expected_seq[columns] = expected_seq[which]


@dataclass(slots=True)
class BlockTable(Generic[C]):
    """Blocks by number; frames of the rings point at them.

    Args:
        capacity: the most blocks at once. A block stays until its answer may go, so it can outlast its frames.
    """

    capacity: int
    _blocks: dict[int, Block[C]] = field(default_factory=dict)
    _remaining: I32 = field(init=False)
    _place: I64 = field(init=False)
    """Scratch space: where a number stands last among those of a batch."""
    _free: I32 = field(init=False)
    """A stack, of which the first `_free_count` count."""
    _free_count: int = field(init=False)

    def __post_init__(self) -> None:
        self._remaining = np.zeros(self.capacity, np.int32)
        self._place = np.zeros(self.capacity, np.int64)
        self._free = np.arange(self.capacity - 1, -1, -1, dtype=np.int32)
        self._free_count = self.capacity

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def room(self) -> int:
        """How many more blocks can be added now."""
        return self._free_count

    def __getitem__(self, number: int) -> Block[C]:
        return self._blocks[number]

    def add(self, blocks: Sequence[Block[C]]) -> I32:
        """Keep blocks until their frames are answered; the number of each: int32 [blocks]."""
        assert len(blocks) <= self.room, "there is no number for another block"
        self._free_count -= len(blocks)
        numbers: I32 = self._free[self._free_count : self._free_count + len(blocks)].copy()
        for number, block in zip(numbers.tolist(), blocks, strict=True):
            self._remaining[number] = block.frames
            self._blocks[number] = block
        return numbers

    def answered(self, numbers: I32) -> list[Block[C]]:
        """Frames of these blocks were answered, one entry a frame; the blocks that are complete now, taken out."""
        if not len(numbers):
            return []
        count = len(numbers)
        if count == 1 or np.count_nonzero(numbers == numbers[:1]) == count:  # a batch of one block, as many are
            first = numbers.item(0)
            left = self._remaining.item(first) - count
            self._remaining[first] = left
            return [] if left else self._complete(numbers[:1])
        at = numbers.astype(np.int64)  # once: numpy does it each time that something else is an index
        np.subtract.at(self._remaining, at, _ONE)  # of the array's own type: another one is 20 times slower
        places = np.arange(len(at))
        self._place[at] = places
        distinct = at[self._place[at] == places]
        return self._complete(distinct[self._remaining[distinct] == 0])

    def _complete(self, complete: I32 | I64) -> list[Block[C]]:
        self._free[self._free_count : self._free_count + len(complete)] = complete
        self._free_count += len(complete)
        return [self._blocks.pop(number) for number in complete.tolist()]
