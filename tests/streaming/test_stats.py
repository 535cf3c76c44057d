"""The log of events and the history of a server, against what happened to streams and the numbers fed in."""

from __future__ import annotations

import time

import numpy as np
import pytest

from instep.core.histogram import add_to, new_histogram
from instep.streaming.stats import COLUMNS, EventLog, History
from instep_client import AsyncClient
from instep_client.protocol.codes import Code
from tests.support.models import SMALL
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.streaming import random_frames


def test_events_are_numbered_and_found_by_number_and_stream() -> None:
    log, began_s = EventLog(), time.time()
    log.add("swapped", detail="why")
    log.add_all("opened", ["a", "b"], "connection 3", np.array([0, 7]))
    log.add_all("parked", [])
    log.add("closed", "a", seq=9)
    events = log.since(0)
    assert [event[:1] + event[2:] for event in events] == [
        (1, "swapped", "", "why", None),
        (2, "opened", "a", "connection 3", 0),
        (3, "opened", "b", "connection 3", 7),
        (4, "closed", "a", "", 9),
    ]
    assert all(began_s <= event.time_s <= time.time() for event in events)
    assert log.newest == 4
    assert log.since(2) == events[2:]
    assert log.since(1, "a") == [events[1], events[3]]
    assert log.since(4) == []


async def test_what_happens_to_streams_is_logged(rng: np.random.Generator) -> None:
    async with running(SMALL, limits={"park_s": 0.3}, transport={"heartbeat_s": 1.0}) as server:
        log = server.default.events
        async with RawClient(server.endpoint) as first, RawClient(server.endpoint) as second:
            await first.hello()
            await second.hello()
            handles = (await first.open("a", "b", "c")).handles()
            await first.step(handles, [0, 0, 0], random_frames(rng, 2, 3))
            await second.resume(["b"], [2], [0], take_over=True)
            await first.close(handles[2:], [2])
            for _ in range(3):
                await second.send(b"nonsense")
                assert (await second.receive()).code is Code.MALFORMED
        async with AsyncClient(server.endpoint) as client:
            while sum(event.kind == "evicted" for event in log.since(0)) < 2 or malformed(log) < 3:
                await client.stats()
    assert [event[2:] for event in log.since(0, "a")] == [
        ("opened", "a", "connection 0", 0),
        ("parked", "a", "", 2),
        ("evicted", "a", "expired", 2),
    ]
    assert [(event.kind, event.seq) for event in log.since(0, "b")] == [
        ("opened", 0),
        ("fenced", 2),
        ("resumed", 2),
        ("parked", 2),
        ("evicted", 2),
    ]
    assert [(event.kind, event.seq) for event in log.since(0, "c")] == [("opened", 0), ("closed", 2)]
    assert malformed(log) == 3


def malformed(log: EventLog) -> int:
    """How many refused messages events tell of; those of one second are one event."""
    details = [event.detail.split(" × ") for event in log.since(0) if event.kind == "refused"]
    assert all(code == "MALFORMED" for code, _ in details)
    return sum(int(count) for _, count in details)


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
