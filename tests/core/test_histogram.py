from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep.core.histogram import ENTRIES, add_to, entry_of, largest_of, new_histogram, quantile

LARGEST = 2**63 - 1


@pytest.mark.parametrize("value", range(16))
def test_small_values_have_an_entry_each(value: int) -> None:
    assert entry_of(value) == value == largest_of(value)


@given(st.one_of(st.integers(0, LARGEST), st.integers(0, 62).map(lambda bit: 2**bit)))
def test_an_entry_holds_values_within_an_eighth(value: int) -> None:
    entry = entry_of(value)
    assert value <= largest_of(entry) <= value + value // 8
    assert entry == 0 or largest_of(entry - 1) < value


def test_the_largest_value_has_the_last_entry() -> None:
    assert entry_of(LARGEST) == ENTRIES - 1
    assert largest_of(ENTRIES - 1) == LARGEST


def test_quantiles_are_those_of_the_values_within_an_eighth() -> None:
    histogram = new_histogram()
    values = np.arange(1, 1001)
    for value in values.tolist():
        add_to(histogram, value, 3)
    assert histogram[:ENTRIES].sum() == 3000
    assert histogram[ENTRIES] == 3 * values.sum(), "the sum is exact"
    for share in (0.01, 0.5, 0.9, 0.99, 1.0):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert exact <= quantile(histogram, share) <= exact * 9 / 8


def test_nothing_counted_has_no_quantile_and_negative_values_count_as_zero() -> None:
    histogram = new_histogram()
    assert quantile(histogram, 0.5) == 0
    add_to(histogram, -5, 1)
    assert histogram[0] == 1
    assert quantile(histogram, 0.5) == 0
