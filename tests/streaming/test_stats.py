"""What the engine counts, against the numbers that were counted."""

from __future__ import annotations

import numpy as np
import pytest

from instep.core.histogram import add_to, new_histogram, quantile
from instep.streaming.stats import EngineStats


@pytest.mark.parametrize("scale", [1, 7, 1000, 10**6])
def test_quantiles_are_exact_to_an_eighth(rng: np.random.Generator, scale: int) -> None:
    values = (rng.exponential(50, 2000) * scale).astype(np.int64)
    histogram = new_histogram()
    for value in values.tolist():
        add_to(histogram, value, 1)
    for share in (0.5, 0.9, 0.99):
        truth = float(np.quantile(values, share, method="inverted_cdf"))
        assert quantile(histogram, share) == pytest.approx(truth, rel=0.125, abs=1)


def test_an_empty_histogram_has_no_quantile_but_zero() -> None:
    assert quantile(new_histogram(), 0.99) == 0


def test_steps_and_replies_are_counted_one_by_one() -> None:
    stats, numbers = EngineStats(), np.array([3, 1, 4, 5], np.int32)
    arrived_ns = np.array([0, 1, 0, 2, 3, 5], np.int64) * 1_000_000
    stats.stepped(streams=10, steps=3, step_ns=2_000_000)
    stats.replied(arrived_ns, numbers, now_ns=6_000_000, send_ns=3000)
    stats.evicted("idle", 2)
    stats.evicted("idle", 1)
    values = stats.values()
    assert (values["frames_total"], values["batches_total"], values["batch_size_mean"]) == (30, 3, 10)
    assert (values["messages_total"], values["evicted_streams_total"], values["evicted_idle_total"]) == (4, 3, 3)
    assert values["compute_us_p50"] == pytest.approx(2000, rel=0.125)
    assert values["send_us_p99"] == pytest.approx(3, abs=1)
    assert values["queue_us_p50"] == 0
    assert values["latency_us_p50"] == pytest.approx(3000, rel=0.125), "of 1, 3, 4 and 5 ms"
    assert stats.latency_us[-1] == 13_000, "the sum is exact"
