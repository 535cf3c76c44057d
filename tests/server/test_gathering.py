"""Everything that is open at the cut is in it as it is then, whatever came and went while it was gathered."""

from __future__ import annotations

import numpy as np
from instep.core.rings import Rings
from instep.server.gathering import Gathering

from instep.core.streams import StreamTable
from instep.core.typing import F32, I64

WINDOW = 4


class Some:
    """Streams of one feature and one output; each steps as often as it is told to, without a network."""

    def __init__(self) -> None:
        self.table = StreamTable(6, 6)
        self.rings = Rings(self.table, WINDOW, 6, 1, 1, 100)
        self.gathering = Gathering(self.table, self.rings)
        self._last = 0

    def open(self, name: str, frames: int = 0) -> int:
        slot = int(self.table.open([name], 0, 0)[0][0])
        self._last += 1
        self.table.recording_id[slot] = self._last
        self.table.next_seq[slot] = self.table.step_seq[slot] = frames
        for seq in range(max(0, frames - WINDOW), frames):
            row = self.rings.rows(np.array([slot]), np.array([seq]))
            self.rings.x[row], self.rings.y[row] = 10 * self._last + seq, -10 * self._last - seq
        return slot

    def close(self, slot: int) -> None:
        self.table.release(np.array([slot]))

    def read(self, most: int, state: float) -> list[int]:
        """Read the next states, all of them this number."""
        slots = self.gathering.next_slots(most)
        self.add(slots, state)
        return list(slots.tolist())

    def add(self, slots: I64, state: float) -> None:
        if len(slots):
            states: F32 = np.full((len(slots), 1, 1), state, np.float32)
            self.gathering.add(slots, self.gathering.extents(slots).rows(self.rings, states))


def test_all_open_streams_are_read_in_parts_in_the_order_of_their_numbers() -> None:
    some = Some()
    slots = [some.open("a", 2), some.open("gone"), some.open("b", 6)]
    some.close(slots[1])
    assert some.open("c") == slots[1]
    some.table.acked[slots[0]] = 1
    assert some.read(2, 0.5) == [slots[0], slots[2]]
    assert some.read(2, 0.25) == [slots[1]]
    assert some.read(2, 0) == []
    gathered = some.gathering.all()
    assert (gathered.slots.tolist(), gathered.names) == ([slots[0], slots[2], slots[1]], ["a", "b", "c"])
    first, second = gathered.parts
    assert (first.streams.tolist(), first.seqs.tolist(), first.tail_seqs.tolist()) == ([1, 3], [2, 6], [1, 2])
    assert first.tail_x.ravel().tolist() == [11, 32, 33, 34, 35]
    assert first.tail_y.ravel().tolist() == [-11, -32, -33, -34, -35]
    assert first.states.ravel().tolist() == [0.5, 0.5]
    assert (second.streams.tolist(), second.seqs.tolist(), len(second.tail_x)) == ([4], [0], 0)


def test_what_ends_begins_and_changes_meanwhile_is_as_it_is_at_the_end() -> None:
    some = Some()
    a, b, c, d, z = (some.open(name, frames) for name, frames in (("a", 1), ("b", 2), ("c", 3), ("d", 1), ("z", 1)))
    assert some.read(2, 1) == [a, b]
    under_way = some.gathering.next_slots(1)
    assert under_way.tolist() == [c]
    extents = some.gathering.extents(under_way)
    some.close(c)
    assert some.open("e", 2) == c, "in the slot whose former stream is just being read"
    some.gathering.add(under_way, extents.rows(some.rings, np.full((1, 1, 1), 9, np.float32)))
    some.close(z)
    assert some.open("y") == z, "in the slot of a stream that was about to be read"
    some.close(a)
    assert some.open("f") == a, "in the slot of a stream that was read"
    some.gathering.forget(np.array([b]))
    assert some.read(5, 2) == [d]
    assert some.read(5, 3) == [b, c, z, a]
    assert some.read(5, 0) == []
    gathered = some.gathering.all()
    assert (gathered.slots.tolist(), gathered.names) == ([b, d, c, z, a], ["b", "d", "e", "y", "f"])
    found = [
        [part.streams.tolist(), *(f.ravel().tolist() for f in (part.states, part.tail_x))] for part in gathered.parts
    ]
    assert found == [[[2], [3], [20, 21]], [[4], [2], [40]], [[6, 7, 8], [3, 3, 3], [60, 61]]]
