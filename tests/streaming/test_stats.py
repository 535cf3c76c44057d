"""What the engine counts, against the numbers that were counted."""

from __future__ import annotations

import numpy as np
import pytest

from instep.streaming.stats import EngineStats


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
