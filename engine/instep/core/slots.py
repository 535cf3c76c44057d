"""Rows of the state cache: who may use which."""

from __future__ import annotations

import numpy as np

from instep.core.typing import I64, U32, U64, Bool

SCRATCH_SLOT = 0
"""The slot that padding rows read and write; never given to a stream."""

# Arrays, not scalars: numpy takes twice as long to join a scalar with a small array.
_SLOT_BITS = np.array(32, np.uint64)
_SLOT_MASK = np.array(0xFFFF_FFFF, np.uint64)
_SCRATCH = np.array(SCRATCH_SLOT)


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
        self.generation: U32 = np.full(capacity + 1, first_generation, np.uint32)
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
        self.generation[slots] += np.uint32(1)
        # Generation 0 is skipped on wrap-around, so that handle 0 never names a stream.
        self.generation[slots] = np.maximum(self.generation[slots], np.uint32(1))

    def handles(self, slots: I64) -> U64:
        """The handles of slots in use: uint64 [N]."""
        return (self.generation[slots].astype(np.uint64) << _SLOT_BITS) | slots.astype(np.uint64)

    def resolve(self, handles: U64) -> tuple[I64, Bool]:
        """Slots of handles, and whether each handle's generation is the slot's present one.

        Returns:
            slots: int64 [N], the scratch slot where a handle names no slot.
            current: bool [N].
        """
        slots = (handles & _SLOT_MASK).view(np.int64)
        beyond = slots > self.capacity
        if np.count_nonzero(beyond):
            slots[beyond] = SCRATCH_SLOT
        current = (self.generation[slots] == (handles >> _SLOT_BITS)) & (slots != _SCRATCH)
        return slots, current
