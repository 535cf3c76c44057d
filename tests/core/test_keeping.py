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


def test_a_snapshot_takes_what_has_changed_since_the_last_one() -> None:
    keeping = Keeping(6)
    keeping.changed(slots(2, 3))
    assert keeping.take().tolist() == [2, 3]
    keeping.changed(slots(3))
    keeping.committed(slots(2, 3))
    assert keeping.take().tolist() == [3]


def test_what_a_failed_snapshot_had_taken_is_in_the_next_one() -> None:
    keeping = Keeping(6)
    keeping.changed(slots(2, 3, 5))
    taken = keeping.take()
    keeping.kept(slots(5))
    keeping.failed(taken)
    assert keeping.take().tolist() == [2, 3]


@given(st.lists(EVENTS, max_size=40))
def test_a_snapshot_takes_every_change_that_no_committed_one_holds(events: list[tuple[str, list[int]]]) -> None:
    keeping = Keeping(6)
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
            keeping.failed(under_way)
            changed, taken, under_way = changed | taken, set(), None
    if under_way is not None:
        keeping.failed(under_way)
    assert set(keeping.take().tolist()) == changed | taken
