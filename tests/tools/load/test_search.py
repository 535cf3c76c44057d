from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from instep_client.protocol.errors import ConnectionFailed
from instep_tools.load.generator import SAMPLE, PartResult
from instep_tools.load.plan import LoadPlan
from instep_tools.load.result import LoadResult, Verdict
from instep_tools.load.search import RESOLUTION, Search
from instep_tools.pacing import Stop

PLAN = LoadPlan(streams=1, connections=1, processes=1, rate_hz=50.0, duration_s=1.0, warmup_s=0.0)


@dataclass
class Trial:
    """A try whose verdict was made up."""

    plan: LoadPlan
    found: PartResult
    made_up: Verdict

    def verdict(self, slo_ms: float) -> Verdict:
        return self.made_up


@dataclass
class Searched:
    """A search of a server that behaves as `judge` says for a number of streams and of processes."""

    judge: Callable[[int, int], Verdict]
    stop: Stop = field(default_factory=Stop)
    asked: list[tuple[int, int]] = field(default_factory=list)
    lost_at: int = 0

    def __post_init__(self) -> None:
        self.search = Search(self.measure, 20.0, 1, self.stop)

    async def measure(self, streams: int, processes: int) -> LoadResult:
        self.asked.append((streams, processes))
        lost = "the server went away" if len(self.asked) == self.lost_at else ""
        plan = replace(PLAN, streams=streams, processes=processes)
        return cast(LoadResult, Trial(plan, PartResult(np.zeros(0, SAMPLE), lost=lost), self.judge(streams, processes)))

    async def run(self, start: int, limit: int = 4096) -> int:
        await self.search.run(start, limit)
        return self.search.best.plan.streams if self.search.best is not None else 0

    @property
    def sizes(self) -> list[int]:
        return [streams for streams, _ in self.asked]


def up_to(capacity: int) -> Callable[[int, int], Verdict]:
    return lambda streams, processes: "met" if streams <= capacity else "not met"


@example(81, 5, 81)
@given(st.integers(0, 5000), st.integers(1, 4096), st.integers(1, 4096))
async def test_the_answer_is_right_to_the_resolution(capacity: int, start: int, limit: int) -> None:
    searched = Searched(up_to(capacity))
    found = await searched.run(min(start, limit), limit)
    truth = min(capacity, limit)
    assert found <= truth
    assert truth - found <= max(0, found * RESOLUTION)
    assert searched.search.limited == (capacity >= limit)
    assert searched.search.ended == ""
    assert all(1 <= streams <= limit for streams in searched.sizes)
    assert len(searched.asked) <= 50


async def test_it_doubles_or_halves_then_bisects() -> None:
    for capacity, start, sizes in (
        (11, 1, [1, 2, 4, 8, 16, 16, 12, 12, 10, 11]),
        (5, 64, [64, 64, 32, 32, 16, 16, 8, 8, 4, 6, 6, 5]),
    ):
        searched = Searched(up_to(capacity))
        assert await searched.run(start) == capacity
        assert searched.sizes == sizes


async def test_a_try_in_which_this_side_was_late_is_repeated_with_more_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    searched = Searched(lambda streams, processes: "met" if streams <= 25 * processes else "invalid")
    assert await searched.run(16) == 148
    assert searched.asked[:5] == [(16, 1), (32, 1), (32, 2), (64, 2), (64, 4)]
    assert (256, 6) in searched.asked
    assert max(processes for _, processes in searched.asked) == 6
    assert searched.search.measured_itself
    assert "152 streams" in searched.search.ended


async def test_where_this_side_is_always_late_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    searched = Searched(lambda streams, processes: "invalid")
    assert await searched.run(4) == 0
    assert searched.asked == [(4, 1), (4, 2), (4, 2), (2, 2), (2, 2), (1, 1), (1, 1)]
    assert searched.search.measured_itself


async def test_what_was_found_before_the_end_is_kept() -> None:
    searched = Searched(up_to(4096), lost_at=3)
    assert await searched.run(4) == 16
    assert searched.search.ended.endswith("the server went away")

    def stop(streams: int, processes: int) -> Verdict:
        searched.stop.request()
        return "met"

    def fail(streams: int, processes: int) -> Verdict:
        raise ConnectionFailed("nobody answers")

    def second(judge: Callable[[int, int], Verdict]) -> Callable[[int, int], Verdict]:
        return lambda *size: judge(*size) if len(searched.asked) == 2 else "met"

    for judge in (stop, fail):
        searched = Searched(second(judge))
        assert await searched.run(4) == 4
        assert searched.search.ended
    searched = Searched(fail)
    with pytest.raises(ConnectionFailed):
        await searched.run(4)
