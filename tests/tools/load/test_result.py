"""Numbers and verdicts of made-up samples; the truth is numpy's, over every frame."""

from __future__ import annotations

import itertools
import json
import math
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from instep_tools.load.generator import SAMPLE, PartResult, as_samples
from instep_tools.load.plan import LoadPlan
from instep_tools.load.result import LoadResult, percentiles
from instep_tools.words import three_digits

PLAN = LoadPlan(streams=4, connections=1, processes=1, rate_hz=50.0, duration_s=10.0, warmup_s=1.0)
#        at    latency late  queue compute send rest frames own
GOOD: list[tuple[float, ...]] = [
    (0.5, 1000.0, 100.0, 300.0, 200.0, 50.0, 350.0, 4, 100.0),
    (9.5, 3000.0, 0.0, 500.0, 250.0, 70.0, 2180.0, 12, 0.0),
]
UNANSWERED = (8.0, 5.5e6, 10.0, *[math.nan] * 4, 4, 10.0)


def result(rows: Sequence[tuple[float, ...]], **found: Any) -> LoadResult:
    return LoadResult(PLAN, PartResult(np.array(rows, SAMPLE), **found))


def one(latency_us: float, own_us: float = 0.0, **found: Any) -> LoadResult:
    return result([(0.5, latency_us, own_us, 0.0, 0.0, 0.0, latency_us - own_us, 4, own_us)], **found)


def test_percentiles_are_numpys_over_every_frame(rng: np.random.Generator) -> None:
    values, frames = rng.exponential(size=2000), rng.integers(1, 50, 2000)
    every = np.repeat(values, frames)
    found = percentiles(np.append(values, math.nan), np.append(frames, 9).astype(float))
    expected = np.percentile(every, (50, 90, 99, 99.9, 100), method="inverted_cdf")
    np.testing.assert_array_equal(list(found.values()), expected)
    assert math.isnan(percentiles(values[:999], frames[:999].astype(float))["p99.9"]), "of too few answers"
    assert all(map(math.isnan, percentiles(np.empty(0), np.empty(0)).values()))


def test_a_stall_while_a_block_was_on_its_way_is_the_load_generators_own_share() -> None:
    """Blocks from 0 to 1 s after they were sent, which is 0.1 s late, and stalls at 0.2 to 0.3 s and 0.6 to 1.6 s."""
    rows = [(at, 1.1e6, 0.1e6, 0, 0, 0, 0, 1, 0.1e6) for at in (0.1, 0.25, 1.0, 1.25, 3.0)]
    found = as_samples(array("d", itertools.chain(*rows)), [(0.2, 0.3), (0.6, 1.6)])
    np.testing.assert_allclose(found["own_us"] / 1e6, [0.1, 0.15, 0.6, 0.8, 0.1], atol=1e-9)


def test_numbers() -> None:
    found = result(GOOD)
    assert (found.seconds, found.frames_s, found.whole) == (10, 1.6, True)
    assert (found.p99_ms, found.latencies["queue_us"]["p50"], found.latencies["rest_us"]["max"]) == (3, 500, 2180)
    late = (10.5, 9000.0, *[0.0] * 5, 4, 0.0)
    assert result([*GOOD, late]).frames_s == 1.6, "what came after the end is no throughput"
    assert result([*GOOD, late]).p99_ms == 9
    stopped, nothing = result(GOOD[:1], stopped=True), result([], stopped=True)
    assert (stopped.seconds, stopped.frames_s) == (0.5, 8)
    assert (nothing.seconds, nothing.frames_s, nothing.whole) == (0, 0, False)


def test_frames_without_an_answer_count_with_the_time_they_waited() -> None:
    found = result([GOOD[0], UNANSWERED, UNANSWERED], unanswered=8, lost="it is gone")
    assert (found.whole, found.seconds, found.p99_ms, found.frames_s) == (False, 0.5, 5500, 8)
    assert found.latencies["queue_us"]["max"] == 300
    values = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert (values["unanswered_frames"], values["error"]) == (8, "it is gone")


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (one(20_001), "not met"),
        (one(20_000, unanswered=1), "not met"),
        (one(30_000, unsent=1), "invalid"),
        (one(22_000, own_us=1900), "not met"),  # less than a tenth of the level
        (one(24_000, own_us=2100), "invalid"),  # without twice as much, it would have been met
        (one(24_000, own_us=2100, lost="it is gone"), "not met"),
    ],
)
def test_a_level_is_not_missed_by_the_server_where_this_side_was_late(found: LoadResult, verdict: str) -> None:
    assert found.verdict(20.0) == verdict


def test_a_load_generator_that_is_too_slow_says_so() -> None:
    assert one(3000, own_us=2000).measured_itself
    assert not one(1000, own_us=900).measured_itself, "less than a millisecond is no finding"
    assert not one(9000, own_us=2000).measured_itself, "nor is less than half of the latency"
    assert one(9000, unsent=1).measured_itself


def test_three_digits() -> None:
    shown = {0.0004: "0", 0.01234: "0.0123", 1.234: "1.23", 22607.2: "22,607", math.nan: "–"}
    assert list(map(three_digits, shown)) == list(shown.values())
