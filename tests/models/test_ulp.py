from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.models.ulp import NOT_COMPARABLE, ulp_distance

BITS = st.integers(0, 2**32 - 1)


def f4(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.array(values, np.float32)


def from_bits(bits: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.frombuffer(struct.pack("<I", bits), np.float32)


def test_known_distances() -> None:
    a = f4(1.0, 1.0, 0.0, -1.0, 2.0, 0.0, np.inf)
    b = f4(1.0, 1.0 + 2**-23, 2.0**-149, -1.0 - 2**-23, 1.0, -0.0, float(np.finfo(np.float32).max))
    assert ulp_distance(a, b).tolist() == [0, 1, 1, 1, 2**23, 1, 1]
    assert ulp_distance(f4(-np.inf), f4(np.inf)).tolist() == [2 * 0x7F800000 + 1]


def test_nan_equals_itself_and_is_far_from_the_rest() -> None:
    quiet, payload = from_bits(0x7FC00000), from_bits(0xFFC00001)
    assert ulp_distance(quiet, quiet).tolist() == [0]
    for other in (payload, f4(0.0), f4(np.inf)):
        assert ulp_distance(quiet, other).tolist() == [NOT_COMPARABLE]
        assert ulp_distance(other, quiet).tolist() == [NOT_COMPARABLE]


@given(st.floats(-(2.0**100), 2.0**100, width=32), st.integers(1, 20))
def test_every_step_to_the_next_value_counts_one(start: float, steps: int) -> None:
    value = f4(start) + f4(0.0)  # -0.0 + 0.0 is 0.0
    end = value
    crossed_zero = 0  # nextafter goes from 0.0 past -0.0
    for _ in range(steps):
        before, end = end, np.nextafter(end, f4(-np.inf))
        crossed_zero += int(before[0] == 0)
    assert ulp_distance(value, end).tolist() == [steps + crossed_zero]


@given(BITS, BITS)
def test_zero_exactly_where_bits_are_equal_and_the_same_both_ways(one: int, other: int) -> None:
    a, b = from_bits(one), from_bits(other)
    assert (ulp_distance(a, b)[0] == 0) == (one == other)
    assert ulp_distance(a, b)[0] == ulp_distance(b, a)[0]


def test_shapes_and_strides_are_kept() -> None:
    a = np.zeros((3, 4), np.float32)
    b = np.zeros((4, 3), np.float32).T
    b[1, 2] = 2.0**-149
    expected = np.zeros((3, 4), np.int64)
    expected[1, 2] = 1
    distance = ulp_distance(a, b)
    assert distance.dtype == np.int64
    assert np.array_equal(distance, expected)
    assert ulp_distance(np.array(1, np.float32), np.array(1, np.float32)).shape == ()


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        ulp_distance(np.zeros(2, np.float32), np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="float64"):
        ulp_distance(np.zeros(2, np.float32), np.zeros(2))  # type: ignore[arg-type]
