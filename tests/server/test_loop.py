"""Turns of the loop: one is due at most, however many things ask for it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from instep.server.loop import Loop
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
