from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from instep.core.dirty import DirtyTracker
from instep.core.typing import I64
from tests.support.core_streams import ints

SLOTS = st.lists(st.integers(1, 6), unique=True, max_size=4)
EVENTS: st.SearchStrategy[tuple[str, list[int]]] = st.one_of(
    st.tuples(st.sampled_from(["dirty", "clean"]), SLOTS),
    st.tuples(st.sampled_from(["begin", "flushed", "failed"]), st.just([])),
)


def test_a_flush_takes_what_has_changed_since_the_last_one() -> None:
    dirty = DirtyTracker(6)
    assert dirty.begin_flush().tolist() == []
    dirty.mark_dirty(ints(2, 3))
    assert dirty.begin_flush().tolist() == [2, 3]
    dirty.mark_dirty(ints(3))
    dirty.flushed(ints(2, 3))
    assert dirty.begin_flush().tolist() == [3]


def test_what_a_failed_flush_had_taken_is_in_the_next_one() -> None:
    dirty = DirtyTracker(6)
    dirty.mark_dirty(ints(2, 3, 5))
    taken = dirty.begin_flush()
    dirty.mark_clean(ints(5))
    dirty.flush_failed(taken)
    assert dirty.begin_flush().tolist() == [2, 3]


@given(st.lists(EVENTS, max_size=40))
def test_a_flush_takes_every_change_that_the_recording_lacks(events: list[tuple[str, list[int]]]) -> None:
    dirty = DirtyTracker(6)
    changed: set[int] = set()
    flushing: set[int] = set()
    under_way: I64 | None = None
    for event, chosen in events:
        if event == "dirty":
            dirty.mark_dirty(ints(*chosen))
            changed |= set(chosen)
            flushing -= set(chosen)
        elif event == "clean":
            dirty.mark_clean(ints(*chosen))
            changed -= set(chosen)
            flushing -= set(chosen)
        elif event == "begin" and under_way is None:
            under_way = dirty.begin_flush()
            assert set(under_way.tolist()) == changed
            changed, flushing = set(), changed
        elif event == "flushed" and under_way is not None:
            dirty.flushed(under_way)
            flushing, under_way = set(), None
        elif event == "failed" and under_way is not None:
            dirty.flush_failed(under_way)
            changed, flushing, under_way = changed | flushing, set(), None
    if under_way is not None:
        dirty.flush_failed(under_way)
    assert set(dirty.begin_flush().tolist()) == changed | flushing
