from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.core.residency import Residency
from instep.core.typing import F32, I64, Bool
from instep.runtime.bounded_store import BoundedStore, NoRoom
from instep.runtime.state_cache import StateCache
from instep.runtime.tiers import Tiers
from tests.support.running import CPU

LAYERS, SIZE, PADDED = 2, 3, 4
STREAMS, HOT, WARM = 12, 3, 4


class Book:
    """A recording: what was written down of each slot, and which of it is true."""

    def __init__(self) -> None:
        self.states = np.full((STREAMS + 1, LAYERS, SIZE), np.nan, np.float32)
        self.kept = np.ones(STREAMS + 1, np.bool_)
        self.fails = False
        self.read_count = 0

    def is_kept(self, slots: I64) -> Bool:
        kept: Bool = self.kept[slots]
        return kept

    def read(self, slots: I64) -> F32:
        if self.fails:
            raise OSError("injected")
        self.read_count += len(slots)
        states: F32 = self.states[slots]
        assert not np.isnan(states).any(), "a state was looked for where it never was"
        return states


class Moved:
    """Tiers with a bound, and what their states ought to be."""

    def __init__(self) -> None:
        self.book = Book()
        self.hot = StateCache(HOT, LAYERS, PADDED, CPU)
        self.store = BoundedStore(STREAMS, WARM, LAYERS, PADDED, self.book)
        self.tiers = Tiers(self.hot, self.store, Residency(STREAMS, HOT))
        self.everyone = np.arange(1, STREAMS + 1)
        self.states = np.zeros((STREAMS + 1, LAYERS, SIZE), np.float32)
        self.tiers.load(self.everyone, None)
        self.book.states[:] = 0.0

    def changing(self, slots: I64) -> bool:
        """What the server sees to: no more change than memory holds."""
        unkept = ~self.book.kept
        unkept[slots] = True
        if np.count_nonzero(unkept) > WARM:
            return False
        self.book.kept[slots] = False
        return True

    def step(self, slots: I64) -> None:
        if not self.changing(slots):
            self.snapshot()
            assert self.changing(slots)
        rows = self.tiers.make_hot(slots)
        states = self.hot.read(rows)
        np.testing.assert_array_equal(states[:, :, :SIZE], self.states[slots])
        assert not states[:, :, SIZE:].any(), "padding is not zero any more"
        self.states[slots] = states[:, :, :SIZE] + 1 + slots[:, None, None]
        states[:, :, :SIZE] = self.states[slots]
        self.hot.write(rows, states)

    def load(self, slots: I64, value: float | None) -> None:
        if not self.changing(slots):
            self.snapshot()
            assert self.changing(slots)
        self.states[slots] = 0.0 if value is None else value
        padded = np.zeros((len(slots), LAYERS, PADDED), np.float32)
        padded[:, :, :SIZE] = self.states[slots]
        self.tiers.load(slots, None if value is None else padded)

    def snapshot(self) -> None:
        changed = np.flatnonzero(~self.book.kept)
        self.book.states[changed] = self.tiers.read(changed)[:, :, :SIZE]
        self.book.kept[changed] = True

    def check(self) -> None:
        np.testing.assert_array_equal(self.tiers.read(self.everyone)[:, :, :SIZE], self.states[1:])
        hot, warm = self.tiers.hot_slots, self.store.slots
        assert not set(hot[hot > 0]) & set(warm[warm > 0]), "a state is in two places"


CHOSEN = st.lists(st.integers(1, STREAMS), unique=True, min_size=1, max_size=HOT)
EVENTS = st.sampled_from(["step", "step", "step", "snapshot", "zeros", "states", "fails"])


@given(st.lists(st.tuples(EVENTS, CHOSEN), max_size=40))
def test_no_state_is_mixed_up_or_lost(events: list[tuple[str, list[int]]]) -> None:
    moved = Moved()
    for turn, (event, chosen) in enumerate(events):
        slots = np.array(chosen)
        if event == "snapshot":
            moved.snapshot()
        elif event == "zeros":
            moved.load(slots, None)
        elif event == "states":
            moved.load(slots, -1.0 - turn)
        elif event == "fails":
            moved.book.fails = True
            with contextlib.suppress(OSError):
                moved.tiers.make_hot(slots)
            moved.book.fails = False
        else:
            moved.step(slots)
        moved.check()


def test_what_is_not_kept_never_leaves_memory_and_a_batch_without_room_fails_whole() -> None:
    moved = Moved()
    for slot in range(1, 1 + HOT + WARM):
        moved.book.kept[slot] = False
        moved.tiers.make_hot(np.array([slot]))
    moved.check()
    with pytest.raises(NoRoom, match="no room for 1 states"):
        moved.tiers.make_hot(np.array([11]))
    moved.check()
    assert moved.store.states_dropped_total == 0
    moved.book.kept[:] = True
    moved.tiers.make_hot(np.array([11]))
    moved.check()
    assert moved.store.states_dropped_total == 1


def test_zeros_take_no_room_and_are_not_read() -> None:
    moved = Moved()
    for first in range(1, 1 + STREAMS, HOT):
        moved.step(np.arange(first, first + HOT))
    moved.load(np.array([1, 2]), None)
    counted = moved.book.read_count
    np.testing.assert_array_equal(moved.tiers.read(np.array([1, 2])), np.zeros((2, LAYERS, PADDED)))
    moved.tiers.make_hot(np.array([1, 2]))
    assert moved.book.read_count == counted
    assert not {1, 2} & set(moved.store.slots.tolist())


def test_moves_are_counted_and_what_was_used_last_stays() -> None:
    moved = Moved()
    for slot in range(1, 1 + HOT + WARM):
        moved.step(np.array([slot]))
        moved.snapshot()
    assert sorted(moved.tiers.hot_slots.tolist()) == [5, 6, 7]
    assert sorted(moved.store.slots.tolist()) == [1, 2, 3, 4]
    assert (moved.store.states_fetched_total, moved.store.states_dropped_total) == (0, 0)
    moved.step(np.array([2, 8]))
    assert sorted(moved.tiers.hot_slots.tolist()) == [2, 7, 8]
    assert sorted(moved.store.slots.tolist()) == [0, 4, 5, 6], "room is made before a state leaves for the device"
    assert (moved.store.states_fetched_total, moved.store.states_dropped_total) == (0, 2)
    moved.step(np.array([1]))
    assert (moved.store.states_fetched_total, moved.store.states_dropped_total) == (1, 2)
    moved.check()
