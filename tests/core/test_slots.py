import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instep.core.slots import SCRATCH_SLOT, SlotAllocator


def test_slots_are_given_out_from_one_on_and_never_the_scratch_slot() -> None:
    slots = SlotAllocator(3)
    assert slots.allocate(2).tolist() == [1, 2]
    assert slots.allocate(5).tolist() == [3]
    assert slots.allocate(1).tolist() == []


def test_a_handle_names_slot_and_generation() -> None:
    slots = SlotAllocator(4, first_generation=7)
    assert slots.handles(slots.allocate(2)).tolist() == [(7 << 32) | 1, (7 << 32) | 2]


def test_a_released_slots_old_handle_is_void() -> None:
    slots = SlotAllocator(1)
    first = slots.allocate(1)
    old = slots.handles(first)
    slots.release(first)
    again = slots.allocate(1)
    assert again.tolist() == first.tolist()
    assert slots.resolve(old)[1].tolist() == [False]
    assert slots.resolve(slots.handles(again))[1].tolist() == [True]


def test_a_handle_of_another_start_is_void() -> None:
    before, after = SlotAllocator(1, first_generation=11), SlotAllocator(1, first_generation=12)
    old = before.handles(before.allocate(1))
    after.allocate(1)
    assert after.resolve(old)[1].tolist() == [False]


def test_a_generation_that_wraps_round_never_makes_handle_zero() -> None:
    slots = SlotAllocator(1, first_generation=2**32 - 1)
    taken = slots.allocate(1)
    slots.release(taken)
    assert (slots.handles(taken) >> np.uint64(32)).tolist() == [1]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30))
def test_any_handle_resolves_to_a_row_of_the_table(handles: list[int]) -> None:
    slots = SlotAllocator(5)
    rows, current = slots.resolve(np.array(handles, np.uint64))
    assert ((rows >= 0) & (rows <= 5)).all()
    assert not current[rows == SCRATCH_SLOT].any()


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_no_slot_is_ever_given_out_twice(steps: list[tuple[bool, int]]) -> None:
    slots = SlotAllocator(6)
    held: list[int] = []
    for take, count in steps:
        if take:
            got = slots.allocate(count).tolist()
            assert len(got) == min(count, 6 - len(held))
            assert not set(got) & set(held)
            held += got
        else:
            slots.release(np.array(held[:count], np.int64))
            held = held[count:]
        assert slots.free_count == 6 - len(held)
