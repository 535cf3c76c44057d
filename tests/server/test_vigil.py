from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest
from instep.server.vigil import Vigil

from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.turning import Turning


class Clock:
    """Monotonic time that passes by one look."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, look_ns: int) -> None:
        self.now_ns = 0
        self.look_ns = look_ns
        monkeypatch.setattr("instep.server.vigil.time.monotonic_ns", lambda: self.now_ns)

    def looking(self, looks: list[int], until: int = -1) -> Callable[[], bool]:
        def look() -> bool:
            looks.append(self.now_ns)
            self.now_ns += self.look_ns
            return len(looks) == until

        return look


def idle() -> int:
    """Nothing is under way."""
    return 0


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_it_looks_until_the_time_is_up_and_lets_others_have_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = Clock(monkeypatch, 20_000), list[int]()
    vigil = Vigil(asyncio.get_running_loop(), clock.looking(looks), idle, 100_000)
    vigil.stay()
    vigil.stay()
    assert looks == []
    await turns(1)
    assert looks == [0, 20_000, 40_000], "a slice, and then the others' turn"
    await turns(5)
    assert looks == [0, 20_000, 40_000, 60_000, 80_000]
    vigil.stay()
    await turns(5)
    assert len(looks) == 10, "it can be asked again"


async def test_what_happens_prolongs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks = Clock(monkeypatch, 20_000), list[int]()
    look = clock.looking(looks, until=2)

    def look_and_stay() -> bool:
        found = look()
        if found:
            vigil.stay()
        return found

    vigil = Vigil(asyncio.get_running_loop(), look_and_stay, idle, 100_000)
    vigil.stay()
    await turns(1)
    assert len(looks) == 2, "it goes on after what it found in a turn of its own"
    await turns(9)
    assert looks[-1] == 120_000


async def test_without_a_time_it_never_looks() -> None:
    def look() -> bool:
        raise AssertionError("it looked")

    vigil = Vigil(asyncio.get_running_loop(), look, idle, 0)
    vigil.stay()
    await turns(3)


async def test_it_sleeps_while_what_is_under_way_takes_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, looks, expected = Clock(monkeypatch, 20_000), list[int](), [100_000]
    vigil = Vigil(asyncio.get_running_loop(), clock.looking(looks), lambda: expected[0], 100_000)
    vigil.stay()
    await turns(3)
    assert not looks
    expected[0] -= 1
    vigil.stay()
    await turns(1)
    assert looks


async def test_a_server_that_stays_awake_gives_the_same_answers(rng: np.random.Generator) -> None:
    x = rng.standard_normal((30, 5)).astype(np.float32)
    engine = {"steps_in": "process", "busy_poll_us": 2000}
    async with running(SMALL, engine=engine) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        replies = [await client.step(handles, [seq], x[seq : seq + 1, None]) for seq in range(30)]
    y = np.concatenate([reply.floats() for reply in replies]).reshape(30, 8)
    np.testing.assert_array_equal(y, whole(SMALL, x)[0])


async def test_a_server_knows_of_a_step_that_takes_longer(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 1, 1, 5)).astype(np.float32)
    async with running(SMALL, engine={"steps_in": "process", "busy_poll_us": 1000}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            await client.step(handles, [0], x[0])
            server.engine._step_ns = dict.fromkeys(server.engine._stepper.buckets, 2_000_000)
            waits, ask = list[int](), server._vigil._expected_ns
            server._vigil._expected_ns = lambda: waits.append(ask()) or waits[-1]  # type: ignore[func-returns-value]
            await client.step(handles, [1], x[1])
    assert waits[:2] == [2_000_000, 0], "when it has begun, and when it has ended"


async def test_what_is_under_way_is_expected_to_take_as_long_as_all_its_steps() -> None:
    turning = Turning(SMALL)
    engine = turning.server.engine
    engine._step_ns = dict.fromkeys(engine._stepper.buckets, 100_000)
    engine.longest_run_ns = 1_000_000
    handles = turning.opens(0, 1)
    assert engine.expected_ns == 0
    turning.steps(0, handles, [0], np.ones((3, 1, 5), np.float32), [0])
    turning.take()
    engine.schedule()
    assert engine.expected_ns == 300_000
    turning.turn()
    assert engine.expected_ns == 0, "nothing is under way any more"
