from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from instep_client.protocol.errors import ConnectionFailed
from instep_tools.load.generator import PartResult
from instep_tools.load.plan import LoadPlan, Mode
from instep_tools.load.result import Measured, Verdict
from instep_tools.load.samples import SAMPLE
from instep_tools.load.search import FAILURES_TO_BELIEVE, RESOLUTION, Search, next_size, tries
from instep_tools.pacing import Stop

PLAN = LoadPlan(
    streams=1,
    connections=1,
    processes=1,
    mode=Mode.OPEN,
    rate_hz=50.0,
    duration_s=1.0,
    warmup_s=0.0,
    block=None,
    steps=1,
    slo_ms=20.0,
)


@dataclass
class Trial:
    """A try whose verdict was made up."""

    plan: LoadPlan
    found: PartResult
    made_up: Verdict
    sent_share: float
    own_p99_us: float

    def verdict(self, slo_ms: float) -> Verdict:
        return self.made_up


@dataclass
class Searched:
    """A search of a server that behaves as `judge` says for a number of streams and of processes."""

    judge: Callable[[int, int], Verdict]
    stop: Stop = field(default_factory=Stop)
    asked: list[tuple[int, int]] = field(default_factory=list)
    lost_at: int = 0
    sends: float = math.inf
    """How many streams this side can send for."""
    late_us: Callable[[int], float] = lambda streams: 1000.0 * streams
    """How late it is with a number of streams, if it can send for them."""

    def __post_init__(self) -> None:
        self.search = Search(self.measure, 20.0, 1, self.stop)

    async def measure(self, streams: int, processes: int) -> Measured:
        self.asked.append((streams, processes))
        lost = "the server went away" if len(self.asked) == self.lost_at else ""
        plan = replace(PLAN, streams=streams, processes=processes)
        found, share = PartResult(np.zeros(0, SAMPLE), lost=lost), min(1.0, self.sends / streams)
        return cast(Measured, Trial(plan, found, self.judge(streams, processes), share, self.late_us(streams)))

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
    fewest, most = tries(min(start, limit), limit)
    assert fewest <= len(searched.asked) <= most <= FAILURES_TO_BELIEVE * 25


@pytest.mark.parametrize(
    ("capacity", "start", "asked"),
    [
        (100, 16, [16, 32, 64, 128, 128, 96, 112, 112, 104, 104, 100, 102, 102]),
        (5, 64, [64, 64, 32, 32, 16, 16, 8, 8, 4, 6, 6, 5]),
        (0, 4, [4, 4, 2, 2, 1, 1]),
    ],
)
async def test_it_doubles_or_halves_then_bisects(capacity: int, start: int, asked: list[int]) -> None:
    searched = Searched(up_to(capacity))
    assert await searched.run(start) == capacity
    assert searched.sizes == asked


async def test_one_hiccup_decides_nothing() -> None:
    searched = Searched(lambda streams, processes: "met" if searched.sizes.count(streams) > 1 else "not met")
    assert await searched.run(64, 512) == 512
    assert tries(64, 512)[1] >= len(searched.asked)
    assert searched.sizes == [64, 64, 128, 128, 256, 256, 512, 512]


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
    assert searched.search.ended.startswith("with 152 streams the load generator could not keep up; use more")


async def test_where_this_side_is_always_late_nothing_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    searched = Searched(lambda streams, processes: "invalid")
    assert await searched.run(4) == 0
    assert searched.asked == [(4, 1), (4, 2), (2, 2), (2, 2), (1, 1), (1, 1)]
    assert searched.search.ended.startswith("with 1 stream the load generator could not keep up")
    assert searched.search.is_all_invalid
    searched = Searched(lambda streams, processes: "invalid" if len(searched.asked) == 1 else up_to(8)(streams, 1))
    assert await searched.run(4) == 8
    assert (searched.search.measured_itself, searched.search.ended) == (False, "")


async def test_it_ends_where_fewer_streams_do_not_make_this_side_less_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    searched = Searched(lambda streams, processes: "invalid", late_us=lambda streams: 12_000 + streams)
    assert await searched.run(1024) == 0
    assert searched.asked == [(1024, 1), (1024, 2), (512, 2), (512, 2)]
    assert searched.search.measured_itself
    assert searched.search.ended == (
        "with 512 streams the load generator was as late as with more; this machine is busy: run it while the machine "
        "is idle, with a lower --rate, or on another machine"
    )


async def test_after_a_try_that_could_not_be_sent_it_tries_what_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)

    def judge(streams: int, processes: int) -> Verdict:
        return "met" if streams <= 100 else "invalid"

    searched = Searched(judge, sends=130.5, late_us=lambda streams: 12_000)
    assert await searched.run(2000) == 99
    assert searched.sizes == [2000, 2000, 130, 130, 65, 97, 113, 113, 105, 105, 101, 101, 99]
    searched = Searched(judge, sends=40.5)
    assert await searched.run(2000) == 99
    assert searched.sizes == [2000, 2000, 40, 282, 282, 106, 106, 73, 89, 97, 101, 101, 99]
    assert searched.search.measured_itself


@pytest.mark.parametrize(("first", "second"), [(20.0, 800.0), (800.0, 20.0)])
async def test_a_stall_in_one_of_two_tries_lowers_no_estimate(
    first: float, second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)

    def judge(streams: int, processes: int) -> Verdict:
        searched.sends = second
        return "invalid"

    searched = Searched(judge, sends=first, late_us=lambda streams: 12_000)
    await searched.run(2000)
    assert searched.sizes[:3] == [2000, 2000, 800]


async def test_after_two_tries_that_stalled_it_does_not_double_from_what_they_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 1)

    def judge(streams: int, processes: int) -> Verdict:
        return "invalid" if len(searched.asked) <= 2 else up_to(1500)(streams, processes)

    searched = Searched(judge, sends=20)
    assert await searched.run(2000) == 1494
    assert searched.search.ended == ""
    assert searched.sizes == [2000, 2000, 20, 200, 632, 1264, 1632, 1632, 1448, 1540, 1540, 1494]


@given(st.integers(1, 4095), st.integers(1, 4095), st.integers(2, 4096))
def test_a_low_estimate_costs_few_tries(capacity: int, estimate: int, bad: int) -> None:
    """From a size that held up to one that did not, whichever holds: the answer is right, and found soon."""
    bad, capacity = max(bad, estimate + 1), max(capacity, estimate)
    good, tried, smallest_bad = estimate, 0, bad
    while (size := next_size(good, smallest_bad, 4096, 4096)) is not None:
        assert good < size < smallest_bad
        tried += 1
        if size <= capacity:
            good = size
        else:
            smallest_bad = size
    truth = min(capacity, bad - 1)
    assert truth - good <= max(0, good * RESOLUTION)
    assert tried <= 10, "doubling takes up to 16"


async def test_what_was_found_before_the_end_is_kept() -> None:
    searched = Searched(up_to(4096), lost_at=3)
    assert await searched.run(4) == 16
    assert searched.search.ended == "the search ended there: the server went away"

    def stop_at_two(streams: int, processes: int) -> Verdict:
        if len(searched.asked) == 2:
            searched.stop.request()
        return "met"

    searched = Searched(stop_at_two)
    assert await searched.run(4) == 4
    assert searched.search.ended == "the search was stopped before its end"

    def fail_at(number: int) -> Callable[[int, int], Verdict]:
        def judge(streams: int, processes: int) -> Verdict:
            if len(searched.asked) == number:
                raise ConnectionFailed("nobody answers")
            return "met"

        return judge

    searched = Searched(fail_at(2))
    assert await searched.run(4) == 4
    assert searched.search.ended == "the search ended there: nobody answers"
    searched = Searched(fail_at(1))
    with pytest.raises(ConnectionFailed):
        await searched.run(4)
