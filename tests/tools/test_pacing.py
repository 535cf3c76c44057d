from __future__ import annotations

import asyncio
import sys
import time

import pytest

from instep_tools.pacing import LONGEST_NAP_S, OpenLoop, Stop, WallClock, loop_factory, wait_until
from tests.tools.helpers import JumpingClock


def test_senders_keep_their_period_and_spread_over_it() -> None:
    schedule = OpenLoop(senders=4, period_s=0.2)
    for sender in range(4):
        dues = [schedule.due_s(number) for number in range(40) if schedule.sender(number) == sender]
        assert dues == pytest.approx([sender * 0.05 + 0.2 * turn for turn in range(10)])


def test_processes_share_one_schedule() -> None:
    whole = OpenLoop(senders=6, period_s=0.6)
    parts = [OpenLoop(senders=2, period_s=0.6, offset=part / 3) for part in range(3)]
    merged = sorted(part.due_s(number) for part in parts for number in range(20))
    assert merged == pytest.approx([whole.due_s(number) for number in range(60)])


@pytest.mark.parametrize("senders", [1, 3, 256])
@pytest.mark.parametrize("period_s", [0.01, 0.3, 7.0])
@pytest.mark.parametrize("offset", [0.0, 0.5])
def test_the_count_is_of_what_is_due_before_the_end(senders: int, period_s: float, offset: float) -> None:
    schedule = OpenLoop(senders, period_s, offset)
    for duration_s in (0.0, 0.005, 0.3, 1.0, 2.1):
        count = schedule.count(duration_s)
        assert count == sum(1 for number in range(60_000) if schedule.due_s(number) < duration_s)


async def test_waiting_ends_at_the_moment() -> None:
    clock, stop = JumpingClock(), Stop()
    assert await wait_until(clock.now() + 0.35, clock, stop)
    assert clock.now() == pytest.approx(1000.35)
    assert clock.slept == pytest.approx([1000 + LONGEST_NAP_S, 1000.2, 1000.3, 1000.35])


async def test_waiting_for_the_past_lets_others_run() -> None:
    clock, stop = JumpingClock(), Stop()
    ran: list[bool] = []
    asyncio.get_running_loop().call_soon(ran.append, True)
    assert await wait_until(clock.now() - 1, clock, stop)
    assert ran == [True]
    assert clock.slept == []


async def test_a_stop_ends_a_wait() -> None:
    clock, stop = JumpingClock(), Stop()
    clock.on_sleep = lambda moment: stop.request() if len(clock.slept) == 2 else None
    assert not await wait_until(clock.now() + 100, clock, stop)
    assert len(clock.slept) == 3
    assert not await wait_until(clock.now() - 1, clock, stop)


async def test_a_stop_is_heard() -> None:
    stop = Stop()
    waiting = asyncio.create_task(stop.wait())
    await asyncio.sleep(0)
    assert not stop.requested
    stop.request()
    stop.request()
    await waiting
    assert stop.requested


async def test_the_wall_clock_never_wakes_too_early() -> None:
    with WallClock() as clock:
        for wait_s in (-1.0, 0.0, 0.0005, 0.004):
            moment = clock.now() + wait_s
            await clock.sleep_until(moment)
            assert time.monotonic() >= moment


def test_the_loop_is_uvloops_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert loop_factory() is None
    monkeypatch.undo()
    uvloop = pytest.importorskip("uvloop")
    factory = loop_factory()
    assert factory is not None
    loop = factory()
    assert isinstance(loop, uvloop.Loop)
    loop.close()
