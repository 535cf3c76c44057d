from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.core.residency import NO_ROW, Residency
from instep.core.slots import SCRATCH_SLOT
from instep.core.typing import I64, Bool

ROWS, STREAMS = 5, 16
SLOTS = st.lists(st.integers(1, STREAMS), unique=True, max_size=ROWS)
USES = st.tuples(st.just("use"), SLOTS)
FORGETTINGS = st.tuples(st.just("forget"), SLOTS)


def bring(residency: Residency, slots: I64) -> I64:
    """What whoever moves states does; returns the batch's rows."""
    rows = residency.use(slots)
    missing = slots[rows == NO_ROW]
    lacking = len(missing) - residency.free_count
    if lacking > 0:
        residency.vacate(residency.least_recently_used(lacking))
    residency.occupy(residency.free_rows(len(missing)), missing)
    return residency.rows(slots)


class Dictionary:
    """The same rules over a dict: when each slot with a row was used last."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.used: dict[int, int] = {}
        self.uses = 0

    def check_use(self, residency: Residency, slots: Sequence[int]) -> None:
        before = residency.row.copy()
        rows = bring(residency, np.array(slots, np.int64))
        self.uses += 1
        assert rows.tolist() == residency.row[list(slots)].tolist()
        assert NO_ROW not in rows, "a slot of the batch has no row"
        held = np.flatnonzero(residency.row).tolist()
        evicted = self.used.keys() - held
        assert not evicted.intersection(slots)
        assert len(evicted) == max(0, len(self.used.keys() | set(slots)) - self.rows), "no more than must be"
        stay = [use for slot, use in self.used.items() if slot not in evicted and slot not in slots]
        if stay:
            assert max((self.used[slot] for slot in evicted), default=0) <= min(stay)
        for slot in evicted:
            del self.used[slot]
        for slot in self.used:
            assert residency.row[slot] == before[slot], "a state was moved for nothing"
        self.used |= dict.fromkeys(slots, self.uses)
        self.check(residency)

    def check_forget(self, residency: Residency, slots: Sequence[int]) -> None:
        residency.forget(np.array(slots, np.int64))
        for slot in slots:
            self.used.pop(slot, None)
        self.check(residency)

    def check(self, residency: Residency) -> None:
        held = np.flatnonzero(residency.row)
        rows = residency.row[held]
        assert set(held.tolist()) == self.used.keys()
        assert len(np.unique(rows)) == len(rows), "two slots in one row"
        assert SCRATCH_SLOT not in held
        expected = np.full(self.rows + 1, SCRATCH_SLOT)
        expected[rows] = held
        np.testing.assert_array_equal(residency.slot, expected)
        assert residency.free_count == self.rows - len(held)
        free = residency.free_rows(residency.free_count)
        assert sorted([*free.tolist(), *rows.tolist()]) == list(range(1, self.rows + 1))


@given(st.lists(st.one_of(USES, USES, FORGETTINGS), max_size=40))
def test_the_rules_of_a_dictionary_hold(events: list[tuple[str, list[int]]]) -> None:
    residency, model = Residency(STREAMS, ROWS), Dictionary(ROWS)
    for event, slots in events:
        if event == "use":
            model.check_use(residency, slots)
        else:
            model.check_forget(residency, slots)


def test_they_hold_for_thousands_of_rows_with_favourites(rng: np.random.Generator) -> None:
    residency, model = Residency(9000, 3000), Dictionary(3000)
    for turn in range(60):
        often, rarely = rng.permutation(700)[: rng.integers(700)], 700 + rng.permutation(8300)[: rng.integers(900)]
        model.check_use(residency, (np.concatenate([often, rarely]) + 1).tolist())
        if turn % 7 == 0:
            model.check_forget(residency, (rng.permutation(9000)[:50] + 1).tolist())


def test_a_batch_that_stays_drops_nothing_however_often_it_is_used() -> None:
    residency = Residency(10, 4)
    bring(residency, np.array([9, 8]))
    for _ in range(1000):
        assert bring(residency, np.array([2, 3])).tolist() == [3, 4]
    assert residency.least_recently_used(2).tolist() == residency.row[[9, 8]].tolist()


def test_looking_for_rows_changes_nothing() -> None:
    residency = Residency(10, 4)
    bring(residency, np.arange(1, 5))
    bring(residency, np.array([1, 2]))
    first = residency.least_recently_used(3)
    assert residency.slot[first].tolist() == [3, 4, 1]
    assert residency.least_recently_used(3).tolist() == first.tolist()
    assert residency.row[:6].tolist() == [NO_ROW, 1, 2, 3, 4, NO_ROW]


def test_rows_are_looked_for_among_some_slots_only() -> None:
    residency = Residency(5000, 3000)
    bring(residency, np.arange(1, 3001))
    bring(residency, np.arange(1, 3))

    def late(slots: I64) -> Bool:
        are_late: Bool = (slots > 2500) | (slots == 1)
        return are_late

    assert residency.slot[residency.least_recently_used(3, late)].tolist() == [2501, 2502, 2503]
    assert residency.slot[residency.least_recently_used(600, late)].tolist() == [*range(2501, 3001), 1]
    assert residency.slot[residency.least_recently_used(2)].tolist() == [3, 4], "those that may not are still there"


def test_a_batch_with_more_streams_than_rows_is_a_bug_of_the_caller() -> None:
    residency = Residency(10, 4)
    with pytest.raises(AssertionError, match="more streams than"):
        bring(residency, np.arange(1, 6))
    with pytest.raises(AssertionError, match="vacated first"):
        residency.free_rows(5)
