"""What every executor does, whether it steps in the caller's thread, in a thread of its own, or in a process."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from instep.core.tables import MOST_STEPS
from instep.core.typing import F32, I64
from instep.runtime import executor
from instep.runtime.executor import (
    RunResult,
    StateLost,
    Step,
    StepExecutor,
    ThreadExecutor,
)
from instep.runtime.process_executor import ProcessExecutor, shared_zeros

DEADLINE_S = 60
KINDS: dict[str, Callable[[Step], StepExecutor]] = {
    "thread": ThreadExecutor,
    "process": lambda step: ProcessExecutor(step, 8),
    "polling process": lambda step: ProcessExecutor(step, 8, 10**12),
}


def ended(executor: StepExecutor, count: int) -> list[RunResult]:
    """The next results, waited for as the loop does."""
    results: list[RunResult] = []
    poll = select.poll()
    if executor.signal_fd is not None:
        poll.register(executor.signal_fd, select.POLLIN)
    while True:
        results += executor.ended()
        if len(results) >= count:
            return results
        assert poll.poll(DEADLINE_S * 1000), "no run ended"
        executor.take_signal()


@pytest.fixture(params=KINDS)
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[Step], StepExecutor]]:
    """Makes an executor, which is stopped with the test."""
    made: list[StepExecutor] = []

    def make_one(step: Step) -> StepExecutor:
        made.append(KINDS[request.param](step))
        return made[-1]

    yield make_one
    for each in made:
        each.stop(DEADLINE_S)


@pytest.fixture
def seen() -> F32:
    """float32 [slots, 2]: the row that each slot was last stepped with, and how often it was."""
    return shared_zeros((16, 2))


@pytest.fixture
def note(seen: F32) -> Step:
    def step(slots: I64, rows: I64) -> None:
        seen[slots, 0] = rows
        seen[slots, 1] += 1

    return step


def test_every_step_of_a_run_has_its_rows(make: Callable[[Step], StepExecutor], seen: F32, note: Step) -> None:
    runs = make(note)
    assert runs.ended() == []
    before = time.monotonic_ns()
    runs.begin(np.array([4, 2]), np.array([[1, 2], [3, 4], [5, 6]]), 0)
    (result,) = ended(runs, 1)
    assert (result.steps, result.error) == (3, None)
    assert before <= result.began_ns <= result.ended_ns <= time.monotonic_ns()
    assert seen[[4, 2]].tolist() == [[5, 3], [6, 3]]
    assert seen[:, 1].sum() == 6
    assert runs.ended() == []
    assert not runs.has_ended


def test_runs_are_stepped_in_order_up_to_the_capacity(
    make: Callable[[Step], StepExecutor], seen: F32, note: Step
) -> None:
    runs = make(note)
    for number in range(0, 12, runs.capacity):
        for at in range(number, number + runs.capacity):
            runs.begin(np.array([2, 5])[: 1 + at % 2], np.array([[at, -at]])[:, : 1 + at % 2], 0)
        ended(runs, runs.capacity)
    assert seen[[2, 5]].tolist() == [[11, 12], [-11, 6]]


def test_a_run_ends_with_the_first_step_that_fails_and_the_next_run_is_stepped(
    make: Callable[[Step], StepExecutor], seen: F32, note: Step
) -> None:
    def step(slots: I64, rows: I64) -> None:
        if 13 in rows.tolist():
            raise ValueError("thirteen: " + "µ" * 2000)
        note(slots, rows)

    runs = make(step)
    runs.begin(np.array([1, 2]), np.arange(2 * MOST_STEPS).reshape(MOST_STEPS, 2), 0)
    (failed,) = ended(runs, 1)
    assert (failed.steps, "thirteen: µµµ" in str(failed.error)) == (6, True)
    runs.begin(np.array([3]), np.arange(20, 23)[:, None], 0)
    (fine,) = ended(runs, 1)
    assert (fine.steps, fine.error) == (3, None)
    assert seen[1:4].tolist() == [[10, 6], [11, 6], [22, 3]]


def test_a_lost_state_is_told_as_such(make: Callable[[Step], StepExecutor]) -> None:
    def step(slots: I64, rows: I64) -> None:
        raise StateLost("half written")

    runs = make(step)
    runs.begin(np.array([4, 2]), np.array([[1, 1]]), 0)
    (lost,) = ended(runs, 1)
    assert isinstance(lost.error, StateLost)
    assert str(lost.error) == "half written"


def test_stopping_finishes_what_has_begun_and_may_come_twice(
    make: Callable[[Step], StepExecutor], seen: F32, note: Step
) -> None:
    runs = make(note)
    for number in range(runs.capacity):
        runs.begin(np.array([1]), np.array([[number]]), 0)
    runs.stop()
    runs.stop()
    assert seen[1].tolist() == [runs.capacity - 1, runs.capacity]


# ── The thread ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("death", [SystemExit, KeyboardInterrupt])
def test_a_thread_that_dies_says_so(death: type[BaseException]) -> None:
    def step(slots: I64, rows: I64) -> None:
        raise death("injected")

    runs = ThreadExecutor(step)
    runs.begin(np.array([1]), np.array([[1]]), 0)
    with pytest.raises(executor.ExecutorDied, match="injected"):
        ended(runs, 1)
    runs.stop()


def test_a_thread_that_never_ends_its_step_is_abandoned() -> None:
    may_end = threading.Event()
    runs = ThreadExecutor(lambda slots, rows: (may_end.wait(), None)[1])
    runs.begin(np.array([1]), np.array([[1]]), 0)
    runs.stop(0.01)
    may_end.set()
