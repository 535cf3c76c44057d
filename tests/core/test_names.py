from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.core.names import Names
from instep.core.slots import SCRATCH_SLOT


class SameHash(Names):
    """All names begin at one of two places of the table, so that every one stands in another's way."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._hash = lambda name: name[-1] % 2 * -3  # the last places, so that they go on at the first ones


@pytest.mark.parametrize("kind", [Names, SameHash])
@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 15)), max_size=60))
def test_the_rules_of_a_dictionary_hold(kind: type[Names], steps: list[tuple[bool, int]]) -> None:
    capacity = 10
    names, slot_of = kind(capacity), dict[str, int]()
    for adds, number in steps:
        name = f"näme {number}"
        if name in slot_of and not adds:
            names.remove(slot_of.pop(name))
        elif name not in slot_of and adds and len(slot_of) < capacity:
            slot_of[name] = next(slot for slot in range(1, capacity + 1) if slot not in slot_of.values())
            names.add(name, slot_of[name])
        assert len(names) == len(slot_of)
        for other in range(16):
            assert names.find(f"näme {other}") == slot_of.get(f"näme {other}", SCRATCH_SLOT)
        for known, slot in slot_of.items():
            assert names.name(slot) == known


def test_a_full_table_is_searched_to_an_end() -> None:
    for capacity in (1, 2, 3, 5, 8, 100):
        names = Names(capacity)
        for slot in range(1, capacity + 1):
            names.add(f"s{slot}", slot)
        assert names.find("another") == SCRATCH_SLOT
        assert [names.find(f"s{slot}") for slot in range(1, capacity + 1)] == list(range(1, capacity + 1))


def test_a_free_slot_has_no_name() -> None:
    with pytest.raises(AssertionError, match="slot 1 is free"):
        Names(1).name(1)
