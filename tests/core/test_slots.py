import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from instep.core.slots import SlotAllocator
from instep.core.tables import make_tables


def allocator(capacity: int, generation: int = 7) -> SlotAllocator:
    tables = make_tables(capacity, 1, 1, 1, 1, 1, 1, 1)
    return SlotAllocator(tables, np.full(capacity + 1, generation, np.uint32))


def test_slots_are_given_out_from_one_on_and_never_the_scratch_slot() -> None:
    slots = allocator(3)
    assert slots.allocate(2).tolist() == [1, 2]
    assert slots.allocate(5).tolist() == [3]
    assert slots.allocate(1).tolist() == []


def test_a_handle_names_slot_and_generation() -> None:
    slots = allocator(4)
    handles = slots.handles(slots.allocate(2))
    assert handles.tolist() == [(7 << 32) | 1, (7 << 32) | 2]
    assert slots.slots_named(handles).tolist() == [1, 2]


def test_every_slot_begins_with_a_generation_of_its_own() -> None:
    tables = make_tables(3, 1, 1, 1, 1, 1, 1, 1)
    slots = SlotAllocator(tables, np.array([0, 5, 2**32 - 1, 9], np.uint32))
    assert slots.handles(slots.allocate(3)).tolist() == [(5 << 32) | 1, ((2**32 - 1) << 32) | 2, (9 << 32) | 3]


def test_handles_change_with_each_release_and_each_renewal() -> None:
    slots = allocator(1)
    taken = slots.allocate(1)
    handles = [slots.handles(taken).item()]
    for void in (slots.renew, slots.release):
        void(taken)
        handles.append(slots.handles(taken).item())
    assert handles == [(7 << 32) | 1, (8 << 32) | 1, (9 << 32) | 1]
    assert slots.allocate(1).tolist() == taken.tolist()
    assert slots.handles(taken).tolist() == handles[2:]


def test_generations_wrap_round() -> None:
    slots = allocator(1, generation=2**32 - 1)
    slots.renew(slots.allocate(1))
    assert slots.handles(np.array([1])).tolist() == [1]


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=60))
def test_no_slot_is_ever_given_out_twice(steps: list[tuple[bool, int]]) -> None:
    slots = allocator(6)
    held: list[int] = []
    for take, count in steps:
        if take:
            got = slots.allocate(count).tolist()
            assert len(got) == min(count, 6 - len(held))
            assert not set(got) & set(held)
            assert all(1 <= slot <= 6 for slot in got)
            held += got
        else:
            slots.release(np.array(held[:count], np.int64))
            held = held[count:]
        assert slots.free_count == 6 - len(held)
