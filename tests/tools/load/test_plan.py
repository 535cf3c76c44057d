from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instep_tools.load.plan import LoadPlan, Schedule, split
from instep_tools.problems import CommandProblem
from tests.tools.helpers import info_with

PLAN = LoadPlan(streams=10, connections=3, processes=2, rate_hz=50.0, duration_s=5.0, warmup_s=1.0)


@given(st.integers(1, 300), st.data())
def test_nothing_is_lost_in_splitting_and_blocks_fit(streams: int, data: st.DataObject) -> None:
    connections = data.draw(st.integers(1, streams))
    processes = data.draw(st.integers(1, connections))
    block = data.draw(st.none() | st.integers(1, 50))
    plan = replace(PLAN, streams=streams, connections=connections, processes=processes, block=block)
    parts = split(plan, info_with(max_block_frames=100, features=3, max_message_bytes=3 * 4 * 50), "load")
    assert len(parts) == processes
    assert sum(len(part.connections) for part in parts) == connections
    sizes = [size for part in parts for blocks in part.connections for size in blocks]
    assert (sum(sizes), min(sizes) >= 1, max(sizes) <= (block or 50)) == (streams, True, True)


@pytest.mark.parametrize("changes", [{"connections": 11}, {"block": 20_000}])
def test_what_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CommandProblem):
        split(replace(PLAN, **changes), info_with(), "load")


def test_processes_share_one_schedule() -> None:
    whole = Schedule(senders=6, period_s=0.6)
    parts = [Schedule(senders=2, period_s=0.6, offset=part / 3) for part in range(3)]
    merged = sorted(part.due_s(number) for part in parts for number in range(20))
    assert merged == pytest.approx([whole.due_s(number) for number in range(60)])


@given(st.integers(1, 256), st.floats(0.01, 7.0), st.floats(0.0, 0.99), st.floats(0.0, 2.1))
def test_the_count_is_of_what_is_due_before_the_end(
    senders: int, period_s: float, offset: float, duration_s: float
) -> None:
    schedule = Schedule(senders, period_s, offset)
    count = schedule.count(duration_s)
    assert count == 0 or schedule.due_s(count - 1) < duration_s
    assert schedule.due_s(count) >= duration_s
