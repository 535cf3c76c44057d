"""States as users give and get them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.state_spec import DTYPES, Leaf, StateSpec
from instep_client.states import as_state, state_rows

GRU = StateSpec((Leaf("h", (2, 4), DTYPES["float32"]),))
TWO = StateSpec((Leaf("level", (3,), DTYPES["float32"]), Leaf("count", (), DTYPES["int64"])))


def test_the_array_of_the_only_leaf_will_do() -> None:
    state = np.arange(8).reshape(2, 4)
    rows = state_rows(state, GRU, None)
    assert rows.tobytes() == state.astype("<f4").tobytes()
    assert as_state(rows, GRU, single=True)["h"].tolist() == state.tolist()
    group = np.arange(24.0).reshape(3, 2, 4)
    assert as_state(state_rows(group, GRU, 3), GRU, single=False)["h"].tolist() == group.tolist()


def test_states_are_dicts_of_arrays() -> None:
    state: dict[str, Any] = {"count": np.int64(5), "level": [1.0, 2.0, 3.0]}
    found = as_state(state_rows(state, TWO, None), TWO, single=True)
    assert {name: leaf.tolist() for name, leaf in found.items()} == {"level": [1, 2, 3], "count": 5}
    assert [found["level"].dtype, found["count"].dtype] == [np.float32, np.int64]
    group = {"count": np.array([2**60, -1]), "level": np.ones((2, 3))}
    found = as_state(state_rows(group, TWO, 2), TWO, single=False)
    assert found["count"].tolist() == [2**60, -1]
    assert found["level"].shape == (2, 3)


def test_what_a_user_gets_is_a_copy() -> None:
    rows = GRU.initial(1)
    as_state(rows, GRU, single=True)["h"][:] = 1
    assert not rows.any()
    count = as_state(TWO.initial(1), TWO, single=True)["count"]
    count[...] = 7  # an array, although it holds one value
    assert count.tolist() == 7


@pytest.mark.parametrize(
    ("state", "spec"),
    [
        (np.ones((4, 2)), GRU),
        (np.ones(3), TWO),
        ({"level": np.ones(3), "count": 1.5}, TWO),
    ],
)
def test_what_does_not_fit_is_refused(state: Any, spec: StateSpec) -> None:
    with pytest.raises(InvalidInput):
        state_rows(state, spec, None)
