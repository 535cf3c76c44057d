from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instep.core.keeping import Keeping
from instep.core.typing import I64

SLOTS = st.lists(st.integers(1, 6), unique=True, max_size=4)
EVENTS: st.SearchStrategy[tuple[str, list[int]]] = st.one_of(
    st.tuples(st.sampled_from(["changed", "kept"]), SLOTS),
    st.tuples(st.sampled_from(["take", "committed", "failed"]), st.just([])),
)


def slots(*numbers: int) -> I64:
    return np.array(numbers, np.int64)


def kept(keeping: Keeping) -> list[int]:
    everyone = np.arange(1, 7)
    found: list[int] = everyone[keeping.is_kept(everyone)].tolist()
    return found


def test_a_state_is_kept_when_the_snapshot_that_holds_it_is_committed_and_not_before() -> None:
    keeping = Keeping(6)
    keeping.changed(slots(2, 3))
    assert kept(keeping) == [1, 4, 5, 6]
    assert keeping.take().tolist() == [2, 3]
    assert kept(keeping) == [1, 4, 5, 6]
    keeping.changed(slots(3))
    keeping.committed(slots(2, 3))
    assert kept(keeping) == [1, 2, 4, 5, 6]
    assert keeping.take().tolist() == [3]


def test_what_a_failed_snapshot_had_taken_is_in_the_next_one() -> None:
    keeping = Keeping(6)
    keeping.changed(slots(2, 3, 5))
    taken = keeping.take()
    keeping.kept(slots(5))
    keeping.failed(taken, is_awaited=False)
    assert keeping.take().tolist() == [2, 3]


def test_room_is_what_is_left_of_the_bound() -> None:
    keeping = Keeping(6, max_changed=4)
    keeping.changed(slots(1, 2))
    assert keeping.has_room(2)
    assert not keeping.has_room(3)
    assert not keeping.is_pressed
    keeping.changed(slots(2, 3))
    assert keeping.is_pressed
    taken = keeping.take()
    assert not keeping.has_room(2), "they are not in the recording yet"
    keeping.committed(taken)
    assert keeping.has_room(4)
    assert not keeping.is_pressed


def test_who_waited_in_vain_for_a_snapshot_may_go_once() -> None:
    keeping = Keeping(6, max_changed=2)
    keeping.changed(slots(1, 2))
    keeping.failed(keeping.take(), is_awaited=False)
    assert not keeping.has_room(1)
    keeping.failed(keeping.take(), is_awaited=True)
    assert keeping.has_room(2)
    keeping.changed(slots(3, 4))
    assert not keeping.has_room(1)


def test_who_found_no_room_first_has_the_next_turn() -> None:
    keeping = Keeping(6, max_changed=3)
    assert keeping.may_begin("step", 2)
    keeping.changed(slots(1, 2))
    assert not keeping.may_begin("request", 3)
    assert not keeping.may_begin("step", 1), "or it would never end"
    keeping.committed(keeping.take())
    assert not keeping.may_begin("step", 1)
    assert keeping.may_begin("request", 3)
    keeping.changed(slots(3, 4, 5))
    assert not keeping.may_begin("request", 1)
    keeping.committed(keeping.take())
    assert not keeping.may_begin("request", 1), "the step was there before it"
    assert keeping.may_begin("step", 1)
    keeping.changed(slots(1))
    assert keeping.may_begin("request", 2)
    assert keeping.may_begin("step", 2)


def test_without_a_bound_there_is_always_room() -> None:
    keeping = Keeping(6)
    keeping.changed(np.arange(1, 7))
    assert keeping.has_room(1000)
    assert not keeping.is_pressed


@given(st.lists(EVENTS, max_size=40))
def test_the_rules_of_three_sets_hold(events: list[tuple[str, list[int]]]) -> None:
    keeping = Keeping(6, max_changed=3)
    changed: set[int] = set()
    taken: set[int] = set()
    under_way: I64 | None = None
    for event, chosen in events:
        if event == "changed":
            keeping.changed(slots(*chosen))
            changed |= set(chosen)
            taken -= set(chosen)
        elif event == "kept":
            keeping.kept(slots(*chosen))
            changed -= set(chosen)
            taken -= set(chosen)
        elif event == "take" and under_way is None:
            under_way = keeping.take()
            assert set(under_way.tolist()) == changed
            changed, taken = set(), changed
        elif event == "committed" and under_way is not None:
            keeping.committed(under_way)
            taken, under_way = set(), None
        elif event == "failed" and under_way is not None:
            keeping.failed(under_way, is_awaited=False)
            changed, taken, under_way = changed | taken, set(), None
        assert keeping.changed_count == len(changed | taken)
        assert set(kept(keeping)) == set(range(1, 7)) - changed - taken
