from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.state_spec import (
    DTYPES,
    InvalidStateSpec,
    Leaf,
    StateSpec,
)

MIXED = StateSpec(
    (
        Leaf("open", (3,), DTYPES["bool"], 1),
        Leaf("count", (), DTYPES["int64"], 7),
        Leaf("h", (2, 3), DTYPES["float32"], -0.5),
        Leaf("sum", (1,), DTYPES["float64"]),
        Leaf("last", (), DTYPES["bool"]),
    )
)
LAYOUT = "<3?5xq6fd?7x"
"""The same row for the struct module, written by hand."""


def values(count: int) -> dict[str, Any]:
    rng = np.random.default_rng(count)
    return {
        "open": rng.random((count, 3)) < 0.5,
        "count": rng.integers(-(2**62), 2**62, count),
        "h": rng.standard_normal((count, 2, 3)).astype(np.float32),
        "sum": rng.standard_normal((count, 1)),
        "last": rng.random(count) < 0.5,
    }


def test_a_row_is_a_c_struct() -> None:
    arrays = values(4)
    rows = MIXED.pack(arrays)
    assert MIXED.row_bytes == struct.calcsize(LAYOUT) == rows.shape[1]
    for index in range(4):
        fields = (*arrays["open"][index], arrays["count"][index], *arrays["h"][index].reshape(-1))
        expected = struct.pack(LAYOUT, *fields, arrays["sum"][index, 0], arrays["last"][index])
        assert rows[index].tobytes() == expected


def test_unpacked_leaves_are_views_with_the_values_that_were_packed() -> None:
    arrays = values(5)
    rows = MIXED.pack(arrays)
    found = MIXED.unpack(rows)
    assert list(found) == ["open", "count", "h", "sum", "last"]
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    found["count"][3] = 99
    assert struct.unpack(LAYOUT, rows[3].tobytes())[3] == 99


def test_initial_and_missing_rows() -> None:
    initial, missing = MIXED.initial(2), MIXED.missing(2)
    row = struct.unpack(LAYOUT, initial[1].tobytes())
    assert row == (True, True, True, 7, *[-0.5] * 6, 0.0, False)
    leaves = MIXED.unpack(missing)
    assert np.isnan(leaves["h"]).all()
    assert np.isnan(leaves["sum"]).all()
    assert not leaves["open"].any()
    assert not leaves["count"].any()
    assert MIXED.initial(0).shape == (0, MIXED.row_bytes)
    assert MIXED.valid(initial).all()
    assert not MIXED.valid(missing).any()


def test_rows_that_no_stream_can_have() -> None:
    rows = MIXED.initial(5)
    leaves = MIXED.unpack(rows)
    leaves["h"][1, 0, 0] = np.inf
    leaves["sum"][2] = np.nan
    rows[3, 0] = 2  # a bool
    rows[4, -1] = 1  # padding
    assert MIXED.valid(rows).tolist() == [True, False, False, False, False]


def test_encoding() -> None:
    encoded = MIXED.encode()
    assert encoded[2] == ["h", [2, 3], "float32", -0.5]
    assert StateSpec.decode(encoded) == MIXED
    assert StateSpec.decode(tuple(map(tuple, encoded))) == MIXED
    other = StateSpec((Leaf("h", (2, 3), DTYPES["float32"]),))
    renamed = StateSpec((Leaf("g", (2, 3), DTYPES["float32"]),))
    filled = StateSpec((Leaf("h", (2, 3), DTYPES["float32"], 1.0),))
    assert len({other, renamed, filled, MIXED}) == 4


@pytest.mark.parametrize(
    "value",
    [
        "h",
        [["h", [2], "float32"]],
        [["h", 2, "float32", 0.0]],
        [["h", [2], "float32", "0"]],
        [["", [2], "float32", 0.0]],
        [["h", [2**40], "float32", 0.0]],
        [["h", [2], "int64", 0.5]],
        [["h", [2], "float32", 0.0], ["h", [2], "bool", 0.0]],
    ],
)
def test_specifications_of_strangers_are_checked(value: Any) -> None:
    with pytest.raises(InvalidStateSpec):
        StateSpec.decode(value)


@pytest.mark.parametrize(
    "changed",
    [
        {"h": None},
        {"h": np.zeros((2, 3, 2), np.float32)},
        {"h": np.zeros((2, 2, 3))},
    ],
)
def test_arrays_that_do_not_fit_are_not_packed(changed: dict[str, Any]) -> None:
    arrays = {name: array for name, array in (values(2) | changed).items() if array is not None}
    with pytest.raises(ValueError):
        MIXED.pack(arrays)


def test_what_a_leaf_begins_with_may_be_known_to_the_server_only() -> None:
    h0 = np.linspace(-1, 1, 3, dtype=np.float32)
    told = StateSpec((Leaf("h", (3,), DTYPES["float32"], None), Leaf("count", (), DTYPES["int64"], 7)))
    known = told.with_learned({"h": h0})
    assert told.encode() == known.encode() == [["h", [3], "float32", None], ["count", [], "int64", 7.0]]
    assert StateSpec.decode(told.encode()) == told == known, "the layout is the same"
    rows = known.unpack(known.initial(2))
    assert rows["h"].tobytes() == h0.tobytes() * 2
    assert rows["count"].tolist() == [7, 7]
    with pytest.raises(ValueError):
        told.initial(1)
