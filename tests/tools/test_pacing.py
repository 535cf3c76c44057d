from __future__ import annotations

import time

import pytest

from instep_tools.pacing import LONGEST_NAP_S, Stop, WallClock, wait_until
from tests.tools.helpers import JumpingClock


async def test_waiting_ends_at_the_moment() -> None:
    clock, stop = JumpingClock(), Stop()
    assert await wait_until(clock.now() + 0.35, clock, stop)
    assert clock.now() == pytest.approx(1000.35)
    assert clock.slept == pytest.approx([1000 + LONGEST_NAP_S, 1000.2, 1000.3, 1000.35])


async def test_a_stop_ends_a_wait() -> None:
    clock, stop = JumpingClock(), Stop()
    clock.on_sleep = lambda moment: stop.request() if len(clock.slept) == 2 else None
    assert not await wait_until(clock.now() + 100, clock, stop)
    assert len(clock.slept) == 3
    assert not await wait_until(clock.now() - 1, clock, stop)


async def test_the_wall_clock_never_wakes_too_early() -> None:
    with WallClock() as clock:
        for wait_s in (-1.0, 0.0, 0.0005, 0.004):
            moment = clock.now() + wait_s
            await clock.sleep_until(moment)
            assert time.monotonic() >= moment
