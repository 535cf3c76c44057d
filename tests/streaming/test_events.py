"""The log of events: a ring that keeps the newest, and what a server's streams put there."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instep.models.folder import write_model
from instep.streaming.stats import EventLog
from instep_client import AsyncClient
from instep_client.protocol.codes import Code
from tests.support.models import SMALL, plain
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.streaming import random_frames
from tests.support.swapping import reload_models


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


@pytest.mark.parametrize("sizes", [[1] * 30, [3, 1, 7, 2, 5, 4, 1], [2, 25, 1], [40], [10], [4, 6, 10]], ids=str)
def test_the_newest_are_kept(sizes: list[int]) -> None:
    log, truth = EventLog(most=10), list[tuple[int, str]]()
    for size in sizes:
        names = [f"s{len(truth) + at}" for at in range(size)]
        log.add_all("opened", names)
        truth += [(len(truth) + 1 + at, name) for at, name in enumerate(names)]
        assert [(event.number, event.stream) for event in log.since(0)] == truth[-10:]
        assert [event.number for event in log.since(log.newest - 3)] == [number for number, _ in truth[-3:]]


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


async def test_a_swap_keeps_the_log_and_the_history(tmp_path: Path) -> None:
    former, latter = plain(5, 8), replace(plain(5, 8, seed=9), name=plain(5, 8).name)
    write_model(tmp_path / "new", latter)
    async with running(former) as server, AsyncClient(server.endpoint) as client:
        await client.open("s", first_seq=3)
        while not len(server.default.history):
            await asyncio.sleep(0.05)
        before = server.default.history.columns()["time_s"][0]
        assert not await reload_models(server, {former.name: tmp_path / "new"}, "move")
        assert server.default.history.columns()["time_s"][0] == before, "the history continues"
        log = server.default.events
        assert [event[2:] for event in log.since(0, "s")] == [
            ("opened", "s", "connection 0", 3),
            ("moved", "s", latter.fingerprint, 3),
        ]
        assert [event[2:] for event in log.since(0, "")] == [("swapped", "", latter.fingerprint, None)]


def malformed(log: EventLog) -> int:
    """How many refused messages events tell of; those of one second are one event."""
    details = [event.detail.split(" × ") for event in log.since(0) if event.kind == "refused"]
    assert all(code == "MALFORMED" for code, _ in details)
    return sum(int(count) for _, count in details)
