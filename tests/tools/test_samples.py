from __future__ import annotations

import numpy as np
import pytest

from instep_tools.samples import SAMPLE, Samples, distribution, percentiles


def test_percentiles_are_numpys_over_every_frame(rng: np.random.Generator) -> None:
    values = rng.exponential(size=500)
    weights = rng.integers(1, 50, 500)
    every_frame = np.repeat(values, weights)
    at = (0.1, 1.0, 25.0, 50.0, 90.0, 99.0, 99.9, 100.0)
    expected = np.percentile(every_frame, at, method="inverted_cdf")
    np.testing.assert_array_equal(percentiles(values, weights, at), expected)


def test_a_percentile_on_the_edge_is_not_lost_to_rounding() -> None:
    values = np.arange(1.0, 1001.0)
    assert percentiles(values, np.ones(1000, np.int64), (99.9, 99.0, 50.0)).tolist() == [999, 990, 500]


def test_no_values_have_no_percentiles() -> None:
    assert np.isnan(percentiles(np.empty(0), np.empty(0, np.int64))).all()


def test_a_distribution_leaves_unknown_values_out() -> None:
    known = distribution(np.array([np.nan, 1.0, 2.0]), np.array([1000, 3, 1]))
    assert (known.p50, known.p90, known.max) == (1.0, 2.0, 2.0)


@pytest.mark.parametrize("capacity", [0, 1, 3, 100])
def test_samples_find_room(capacity: int) -> None:
    samples = Samples(capacity)
    rows = [(number / 7, 1.0 * number, 2.0, 3.0, 4.0, 5.0, number) for number in range(50)]
    for row in rows:
        samples.add(*row)
    assert len(samples) == 50
    assert samples.array().tolist() == rows
    assert samples.array().dtype == SAMPLE
