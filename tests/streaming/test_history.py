"""The history of a server: rates, quantiles and gauges against the numbers that were fed in."""

from __future__ import annotations

import time

import numpy as np
import pytest

from instep.core.histogram import add_to, new_histogram
from instep.streaming.stats import COLUMNS, HISTORY_ROWS, History

SECOND = 10**9


def test_rows_are_rates_means_and_gauges_of_their_second() -> None:
    now: dict[str, float] = {"frames_total": 100, "batches_total": 10}
    history, began_s = History(lambda: dict(now), {}), time.time()
    assert history.newest() == {}
    assert history.sample(5 * SECOND)
    assert len(history) == 0
    now |= {"frames_total": 400, "batches_total": 30, "loop_busy_s_total": 0.25}
    assert not history.sample(5 * SECOND + SECOND // 2)
    assert history.sample(6 * SECOND)
    now |= {"frames_total": 480, "batches_total": 40, "streams_open": 7}
    assert history.sample(8 * SECOND), "two seconds later, the loop was busy"
    assert history.sample(9 * SECOND)
    columns = history.columns()
    assert tuple(columns) == COLUMNS
    assert columns["frames_per_s"] == [300, 40, 0]
    assert columns["batches_per_s"] == [20, 5, 0]
    assert columns["batch_size_mean"] == [15, 8, 0]
    assert columns["loop_busy"] == [0.25, 0, 0]
    assert columns["streams_open"] == [0, 7, 7]
    assert all(began_s <= time_s <= time.time() for time_s in columns["time_s"])
    assert history.newest() == {name: values[-1] for name, values in columns.items()}


def test_quantiles_are_those_of_the_last_ten_seconds(rng: np.random.Generator) -> None:
    histogram = new_histogram()
    history, seconds = History(dict, {"queue_us": histogram}), list[list[int]]()
    history.sample(SECOND)
    for number in range(25):
        seconds.append((rng.exponential(20, 200) * (1 + number)).astype(np.int64).tolist())
        for value in seconds[-1]:
            add_to(histogram, value, 1)
        history.sample((2 + number) * SECOND)
        row, lately = history.newest(), np.concatenate(seconds[-10:])
        for name, share in (("queue_us_p50", 0.50), ("queue_us_p99", 0.99)):
            truth = float(np.quantile(lately, share, method="inverted_cdf"))
            assert row[name] == pytest.approx(truth, rel=0.125, abs=1), number
        assert row["send_us_p99"] == 0


def test_the_parts_of_the_mean_latency_add_up(rng: np.random.Generator) -> None:
    histograms = {f"{name}_us": new_histogram() for name in ("latency", "queue", "compute", "send")}
    history = History(dict, histograms)
    history.sample(SECOND)
    parts = rng.exponential(500, (3, 200)).astype(np.int64)
    for queue, compute, send in parts.T.tolist():
        for name, value in (("latency", queue + compute + send), ("queue", queue), ("send", send)):
            add_to(histograms[f"{name}_us"], value, 1)
    add_to(histograms["compute_us"], 10_000, 1)  # one step of a batch counts once, not once for each message
    history.sample(2 * SECOND)
    row = history.newest()
    means = [row[f"{name}_us_mean"] for name in ("queue", "compute", "send")]
    assert means == pytest.approx(parts.mean(axis=1))
    assert row["latency_us_mean"] == pytest.approx(sum(means))


def test_ten_minutes_are_kept() -> None:
    total = 0
    history = History(lambda: {"frames_pending": float(total)}, {})
    for total in range(HISTORY_ROWS + 41):
        history.sample((1 + total) * SECOND)
        assert len(history) == min(total, HISTORY_ROWS)
        if total in (1, 7, HISTORY_ROWS - 1, HISTORY_ROWS, HISTORY_ROWS + 1, HISTORY_ROWS + 40):
            assert history.columns()["frames_pending"] == list(range(max(1, total - HISTORY_ROWS + 1), total + 1))
