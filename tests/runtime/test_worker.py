from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Any

import pytest

from instep.runtime.worker import Job, Worker


class Caller:
    """A caller whose thread is the test: takes what the worker hands back."""

    def __init__(self) -> None:
        self.handed_back: queue.Queue[Callable[[], None]] = queue.Queue()
        self.results: list[tuple[Any, Exception | None]] = []
        self.deaths: list[BaseException] = []
        self.worker = Worker(self.handed_back.put, self.deaths.append)
        self.worker.start()

    def submit(self, call: Callable[[], Any]) -> None:
        self.worker.submit(Job(call, lambda result, error: self.results.append((result, error))))

    def take(self, count: int) -> None:
        for _ in range(count):
            self.handed_back.get(timeout=10)()


def test_jobs_run_in_order_and_results_come_back() -> None:
    caller = Caller()
    for number in range(5):
        caller.submit(lambda number=number: number)  # type: ignore[misc]
    caller.take(5)
    assert caller.results == [(number, None) for number in range(5)]
    caller.worker.stop()


def test_a_job_that_raises_is_reported_and_the_next_one_runs() -> None:
    caller = Caller()

    def fails() -> None:
        raise ValueError("no")

    caller.submit(fails)
    caller.submit(lambda: "fine")
    caller.take(2)
    (nothing, error), fine = caller.results
    assert nothing is None
    assert isinstance(error, ValueError)
    assert fine == ("fine", None)
    caller.worker.stop()


@pytest.mark.parametrize("death", [SystemExit, KeyboardInterrupt])
def test_a_worker_that_dies_says_so(death: type[BaseException]) -> None:
    caller = Caller()

    def dies() -> None:
        raise death

    caller.submit(dies)
    caller.take(1)
    assert isinstance(caller.deaths[0], death)
    caller.worker.stop()


def test_stopping_runs_what_is_queued() -> None:
    caller = Caller()
    caller.submit(lambda: 1)
    caller.worker.stop()
    caller.take(1)
    assert caller.results == [(1, None)]
