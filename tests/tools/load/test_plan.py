from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from instep_tools.load.plan import LoadPlan, Mode, Schedule, block_limit, split
from instep_tools.problems import CommandProblem
from tests.tools.helpers import info_with

PLAN = LoadPlan(
    streams=10,
    connections=3,
    processes=2,
    mode=Mode.OPEN,
    rate_hz=50.0,
    duration_s=5.0,
    warmup_s=1.0,
    block=None,
    steps=1,
)


def test_streams_and_connections_are_spread_evenly() -> None:
    parts = split(PLAN, info_with(), "load")
    assert [part.connections for part in parts] == [((3,),), ((3,), (4,))]
    assert [part.name for part in parts] == ["load-0", "load-1"]
    assert [part.offset for part in parts] == [0, 0.5]
    assert [(part.slo_s, part.most_slow) for part in parts] == [(math.inf, math.inf)] * 2
    assert split(replace(PLAN, slo_ms=20.0), info_with(), "load")[0].slo_s == 0.02
    assert split(replace(PLAN, slo_ms=20.0), info_with(), "load")[0].most_slow == 25


@pytest.mark.parametrize(
    ("streams", "connections", "processes", "block"), [(1, 1, 1, None), (97, 13, 5, 3), (9, 9, 9, 1)]
)
def test_nothing_is_lost_in_splitting(streams: int, connections: int, processes: int, block: int | None) -> None:
    plan = replace(PLAN, streams=streams, connections=connections, processes=processes, block=block)
    parts = split(plan, info_with(), "load")
    assert len(parts) == processes
    assert sum(len(part.connections) for part in parts) == connections
    sizes = [size for part in parts for blocks in part.connections for size in blocks]
    assert sum(sizes) == streams
    assert block is None or max(sizes) <= block
    assert min(sizes) >= 1


def test_blocks_stay_within_what_the_server_takes() -> None:
    info = info_with(max_block_frames=100, credit_frames=64, features=3, max_message_bytes=3 * 4 * 50)
    assert block_limit(1, info) == 50
    assert block_limit(2, info_with(max_block_frames=9)) == 4
    assert block_limit(3, info_with(credit_frames=9)) == 3
    assert block_limit(1, info_with(max_block_frames=10**9, credit_frames=10**9, max_message_bytes=10**12)) == 65_535
    parts = split(replace(PLAN, streams=200, connections=1, processes=1), info, "load")
    assert parts[0].connections == ((50, 50, 50, 50),)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"connections": 11}, "10 streams, 11 connections and 2 processes do not fit"),
        ({"processes": 4}, "every process needs a connection"),
        ({"streams": 200_000}, "keeps 100000 streams at most"),
        ({"block": 20_000}, "takes at most 16384 streams of 1 timesteps in one block"),
        ({"steps": 20_000}, "20,000 timesteps do not fit in one block of this server, which takes 16,384 at most"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(CommandProblem, match=why):
        split(replace(PLAN, **changes), info_with(), "load")


def test_a_plan_in_words() -> None:
    assert PLAN.sentence() == (
        "10 streams on 3 connections from 2 processes, open loop at 50 Hz a stream, 1 timestep a block, "
        "5 s after 1 s of warm-up"
    )
    closed = replace(PLAN, mode=Mode.CLOSED, streams=1, connections=1, processes=1, block=1, steps=4)
    assert closed.sentence() == (
        "1 stream on 1 connection from 1 process, closed loop, 4 timesteps a block of at most 1 stream, "
        "5 s after 1 s of warm-up"
    )
    assert PLAN.offered_frames_s == 500


def test_senders_keep_their_period_and_spread_over_it() -> None:
    schedule = Schedule(senders=4, period_s=0.2)
    for sender in range(4):
        dues = [schedule.due_s(number) for number in range(40) if schedule.sender(number) == sender]
        assert dues == pytest.approx([sender * 0.05 + 0.2 * turn for turn in range(10)])


def test_processes_share_one_schedule() -> None:
    whole = Schedule(senders=6, period_s=0.6)
    parts = [Schedule(senders=2, period_s=0.6, offset=part / 3) for part in range(3)]
    merged = sorted(part.due_s(number) for part in parts for number in range(20))
    assert merged == pytest.approx([whole.due_s(number) for number in range(60)])


@pytest.mark.parametrize("senders", [1, 3, 256])
@pytest.mark.parametrize("period_s", [0.01, 0.3, 7.0])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_count_is_of_what_is_due_before_the_end(senders: int, period_s: float, offset: float) -> None:
    schedule = Schedule(senders, period_s, offset)
    for duration_s in (0.0, 0.005, 0.3, 1.0, 2.1):
        count = schedule.count(duration_s)
        assert count == sum(1 for number in range(60_000) if schedule.due_s(number) < duration_s)
