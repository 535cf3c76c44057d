"""Names of slots, and slots of names, in few bytes."""

from __future__ import annotations

from array import array
from collections.abc import Callable

from instep.core.slots import SCRATCH_SLOT


class Names:
    """What a dictionary of names and a list of them would do, in a third of the memory.

    Names are kept as UTF-8, which is smaller than text. A table of slots, by their names' hashes, finds them (open
    addressing, linear probing, at most two thirds full): 6 to 12 bytes a slot.

    Args:
        capacity: slots run from 1 to this.
    """

    def __init__(self, capacity: int) -> None:
        self._names: list[bytes | None] = [None] * (capacity + 1)
        size = 1 << (capacity + capacity // 2).bit_length()
        self._mask = size - 1
        self._slots = array("I", bytes(size * array("I").itemsize))
        self._count = 0
        self._hash: Callable[[bytes], int] = hash

    def __len__(self) -> int:
        return self._count

    def name(self, slot: int) -> str:
        """The name of a slot that has one."""
        return self._name(slot).decode()

    def find(self, name: str) -> int:
        """The slot of that name, the scratch slot where there is none."""
        return self._slots[self._place(name.encode())]

    def add(self, name: str, slot: int) -> None:
        """Name a slot that has no name by one that no slot has."""
        encoded = name.encode()
        self._names[slot] = encoded
        self._slots[self._place(encoded)] = slot
        self._count += 1

    def remove(self, slot: int) -> None:
        """Take a slot's name from it; those that stand behind it in the table, and belong further ahead, move up."""
        names, slots, mask = self._names, self._slots, self._mask
        hole = self._place(self._name(slot))
        at = (hole + 1) & mask
        while (other := slots[at]) != SCRATCH_SLOT:
            home = self._hash(self._name(other)) & mask
            if (at - home) & mask >= (at - hole) & mask:
                slots[hole] = other
                hole = at
            at = (at + 1) & mask
        slots[hole] = SCRATCH_SLOT
        names[slot] = None
        self._count -= 1

    def _name(self, slot: int) -> bytes:
        name = self._names[slot]
        assert name is not None, f"slot {slot} is free"
        return name

    def _place(self, name: bytes) -> int:
        """Where in the table the slot of that name is, or would be."""
        names, slots, mask = self._names, self._slots, self._mask
        at = self._hash(name) & mask
        while (slot := slots[at]) != SCRATCH_SLOT and names[slot] != name:
            at = (at + 1) & mask
        return at
