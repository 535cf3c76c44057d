"""Turns of the loop: one is due at most, however many things ask for it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from instep.server.loop import HeldUp, Loop
from instep.streaming.tasks import Tasks


class BusyFrontend:
    """A front end at which something has always arrived."""

    signal_fd = None
    is_readable = True
    received = 0

    def receive(self, budget_ns: int) -> bool:
        self.received += 1
        return True


def idle_engine() -> Any:
    return SimpleNamespace(
        collect=lambda: False,
        flush=lambda: None,
        admit=lambda: None,
        schedule=lambda: None,
        lost=[],
        wanted=set(),
        is_running=False,
        expected_ns=0,
        executor=SimpleNamespace(has_ended=False, signal_fd=None),
    )


def fail(error: BaseException) -> None:
    pytest.fail(repr(error))


class QuietFrontend:
    """A front end at which one thing has arrived; counts how often the loop looks for more."""

    signal_fd = None
    looks = 0

    def receive(self, budget_ns: int) -> bool:
        return self.looks == 0

    @property
    def is_readable(self) -> bool:
        self.looks += 1
        return False


@pytest.mark.parametrize("apart", [(True,), (True, True), (True, False)])
async def test_the_loop_polls_only_while_every_model_steps_in_a_process_of_its_own(apart: tuple[bool, ...]) -> None:
    loop, frontend = Loop(20_000_000, fail), QuietFrontend()
    loop.frontends = [cast(Any, frontend)]
    for each in apart:
        loop.add(cast(Any, SimpleNamespace(engine=idle_engine(), tasks=Tasks(fail), steps_apart=each)))
    loop.start()
    await asyncio.sleep(0.05)
    loop.stop()
    assert frontend.looks > 1 if all(apart) else frontend.looks == 1


async def test_turns_that_others_take_do_not_multiply_those_that_are_due() -> None:
    loop, frontend = Loop(0, fail), BusyFrontend()
    loop.frontends = [cast(Any, frontend)]
    loop.add(cast(Any, SimpleNamespace(engine=idle_engine(), tasks=Tasks(fail), steps_apart=True)))
    for _ in range(50):
        loop.turn()  # as when a signal arrives
        loop.wake()
    frontend.received, iterations = 0, 20
    for _ in range(iterations):
        await asyncio.sleep(0)
    loop.stop()
    assert 0 < frontend.received <= iterations


def test_a_loop_that_was_held_up_has_time_to_read_and_one_that_always_is_has_it_now_and_then() -> None:
    held_up, began_ns = HeldUp(), time.monotonic_ns()

    def look(after_s: float) -> bool:
        return held_up.look(began_ns + round(after_s * 1e9))

    assert [look(after_s) for after_s in (0.05, 0.9, 1.8)] == [False] * 3
    assert [look(after_s) for after_s in (9.8, 9.9, 10.7, 10.9)] == [True, True, True, False]
    assert [look(after_s) for after_s in range(20, 40, 2)] == [True, False] * 5
