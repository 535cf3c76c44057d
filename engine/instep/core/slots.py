"""Slots: rows of the state store, and the handles under which streams use them."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.tables import Tables
from instep.core.typing import I64, U32, U64

_SLOT_BITS: Final = np.uint64(32)
_SLOT_MASK: Final = np.uint64(0xFFFF_FFFF)


class SlotAllocator:
    """Allocates slots 1 … `capacity`.

    A slot has a generation that grows when it is released, and a handle consists of both (`generation << 32 | slot`),
    so a handle of a slot's former stream never matches its next one.

    Generations begin at `first_generations`, uint32 [capacity + 1]. If these are random at each start, old handles are
    unknown and handles are hard to guess.
    """

    def __init__(self, tables: Tables, first_generations: U32) -> None:
        self.capacity = len(tables.streams) - 1
        self._handles: U64 = tables.streams["handle"]
        self._handles[:] = first_generations.astype(np.uint64) << _SLOT_BITS | np.arange(
            self.capacity + 1, dtype=np.uint64
        )
        self._free = np.arange(self.capacity, 0, -1, dtype=np.uint32)  # a stack; slot 1 on top
        self.free_count = self.capacity

    def allocate(self, count: int) -> I64:
        """Allocate up to `count` free slots: int64 [≤ count]."""
        taken = min(count, self.free_count)
        slots = self._free[self.free_count - taken : self.free_count][::-1].astype(np.int64)
        self.free_count -= taken
        return slots

    def release(self, slots: I64) -> None:
        """Free slots; their handles are invalid from now on."""
        self.renew(slots)
        self._free[self.free_count : self.free_count + len(slots)] = slots
        self.free_count += len(slots)

    def renew(self, slots: I64) -> None:
        """Make the handles of slots in use invalid; `handles` returns new ones."""
        generations = self.generations(slots) + np.uint32(1)  # wraps round
        self._handles[slots] = (generations.astype(np.uint64) << _SLOT_BITS) | slots.astype(np.uint64)

    def generations(self, slots: I64) -> U32:
        """The present generations of slots: uint32 [N]."""
        return (self._handles[slots] >> _SLOT_BITS).astype(np.uint32)

    def handles(self, slots: I64) -> U64:
        """The handles of slots in use: uint64 [N]."""
        handles: U64 = self._handles[slots]
        return handles

    @staticmethod
    def slots_named(handles: U64) -> I64:
        """The slots in handles of any generation: int64 [N]."""
        return (handles & _SLOT_MASK).astype(np.int64)
