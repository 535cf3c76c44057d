"""Rows of the state cache: who may use which."""

from __future__ import annotations

import numpy as np

from instep.core.typing import I64, U32, U64, Bool

SCRATCH_SLOT = 0
"""The slot that padding rows read and write; never given to a stream."""

# Arrays, not scalars: numpy takes twice as long to join a scalar with a small array.
_SLOT_BITS = np.array(32, np.uint64)
_SLOT_MASK = np.array(0xFFFF_FFFF, np.uint64)


class SlotAllocator:
    """Gives out slots 1 … `capacity` and takes them back.

    A slot carries a generation that grows when it is released, and a handle names both (`generation << 32 | slot`):
    a handle of a slot's former stream never matches its next one.

    Args:
        capacity: the number of slots beside the scratch slot.
        first_generation: where generations begin (1 … 2^31); another value after a restart makes old handles unknown.
    """

    def __init__(self, capacity: int, first_generation: int = 1) -> None:
        self.capacity = capacity
        self._last = np.array(capacity, np.uint64)
        self._handle: U64 = np.full(capacity + 1, first_generation, np.uint64) << _SLOT_BITS | np.arange(
            capacity + 1, dtype=np.uint64
        )
        """Of the present generation of each slot; that of the scratch slot names another one, so that none is its."""
        self._handle[SCRATCH_SLOT] = ~np.uint64(0)
        self._free = np.arange(capacity, 0, -1, dtype=np.uint32)  # a stack; slot 1 on top
        self.free_count = capacity

    def allocate(self, count: int) -> I64:
        """Take `count` slots, fewer when fewer are free: int64 [≤ count]."""
        taken = min(count, self.free_count)
        slots = self._free[self.free_count - taken : self.free_count][::-1].astype(np.int64)
        self.free_count -= taken
        return slots

    def release(self, slots: I64) -> None:
        """Give slots back; their handles are void from now on."""
        self.renew(slots)
        self._free[self.free_count : self.free_count + len(slots)] = slots
        self.free_count += len(slots)

    def renew(self, slots: I64) -> None:
        """Void the handles of slots that stay in use; `handles` gives new ones."""
        # Generation 0 is skipped on wrap-around, so that handle 0 never names a stream.
        generations = np.maximum(self.generations(slots) + np.uint32(1), np.uint32(1))
        self._handle[slots] = (generations.astype(np.uint64) << _SLOT_BITS) | slots.astype(np.uint64)

    def generations(self, slots: I64) -> U32:
        """The present generations of slots: uint32 [N]."""
        return (self._handle[slots] >> _SLOT_BITS).astype(np.uint32)

    def handles(self, slots: I64) -> U64:
        """The handles of slots in use: uint64 [N]."""
        handles: U64 = self._handle[slots]
        return handles

    def named(self, handles: U64) -> I64:
        """The slot that each handle names, of whatever generation: int64 [N], the scratch slot where there is none."""
        slots = (handles & _SLOT_MASK).view(np.int64)
        slots[slots > self.capacity] = SCRATCH_SLOT
        return slots

    def resolve(self, handles: U64) -> tuple[I64, Bool]:
        """Slots of handles, and whether each handle is the slot's present one.

        Returns:
            slots: int64 [N], any where a handle is not.
            current: bool [N].
        """
        slots = np.minimum(handles & _SLOT_MASK, self._last).view(np.int64)
        current: Bool = self._handle[slots] == handles
        return slots, current
