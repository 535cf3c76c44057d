from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import pytest
from instep.runtime.runs import Ended
from instep.runtime.worker import Job, Worker

from instep.core.typing import I64
from instep.runtime import worker


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


def test_torch_is_set_up_in_its_thread_before_the_first_job(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(worker, "threads_as_here", lambda: lambda: events.append(threading.current_thread().name))
    caller = Caller()
    caller.submit(lambda: events.append("job"))
    caller.take(1)
    caller.worker.stop()
    assert events == ["instep-step-worker", "job"]


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


class HandProcess:
    """A step process whose steps the test ends."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.over: list[Ended] = []
        self.is_gone = False
        self.stopped_after: list[float | None] = []

    def begin(self, slots: I64, rows: I64) -> None:
        self.begun.append(int(slots[0]))

    def ended(self) -> Iterator[Ended]:
        if self.is_gone:
            raise EOFError("gone")
        over, self.over = self.over, []
        return iter(over)

    def stop(self, timeout_s: float | None = None) -> None:
        self.stopped_after.append(timeout_s)


class StepCaller(Caller):
    """A caller whose steps go to a process."""

    def __init__(self) -> None:
        super().__init__()
        self.worker.stop()
        process: Any = HandProcess()
        self.process = process
        self.worker = Worker(self.handed_back.put, self.deaths.append, process)
        self.worker.start()
        self.log: list[Any] = []

    def step(self, number: int) -> None:
        slots = np.array([number])
        self.worker.submit(Job(self.never, lambda *result: self.log.append((number, *result)), (slots, slots[None])))

    def short(self, number: int) -> None:
        """A short step, which ends at that time where it is done here."""
        slots, ended = np.array([number]), Ended(0, number, 1, None)
        done = lambda *result: self.log.append((number, *result))  # noqa: E731
        self.worker.submit(Job(lambda: ended, done, (slots, slots[None]), is_short=True))

    def job(self, name: str) -> None:
        self.worker.submit(Job(lambda: name, lambda *result: self.log.append(result)))

    def end(self, *endings: Ended) -> None:
        self.process.over += endings
        self.worker.collect()

    @staticmethod
    def never() -> None:
        raise AssertionError("a step ran in the thread")


def test_steps_go_to_the_process_and_their_times_come_back() -> None:
    caller = StepCaller()
    caller.step(1)
    caller.step(2)
    assert caller.process.begun == [1, 2]
    ended = [Ended(10, 20, 1, None), Ended(20, 25, 0, ValueError("no"))]
    caller.end(*ended)
    assert caller.log == [(1, ended[0], None), (2, ended[1], None)]
    caller.worker.stop(3.0)
    assert caller.process.stopped_after == [3.0]


def test_a_job_waits_for_the_steps_before_it_and_a_step_for_the_jobs_before_it() -> None:
    caller = StepCaller()
    caller.step(1)
    caller.job("first")
    caller.job("second")
    caller.step(2)
    caller.step(3)
    caller.job("third")
    assert caller.process.begun == [1]
    assert caller.worker._threaded == 0, "a job began before the step in front of it had ended"
    caller.end(Ended(0, 1, 1, None))
    caller.take(1)
    assert caller.process.begun == [1], "a step began before the jobs in front of it had ended"
    caller.take(1)
    assert caller.process.begun == [1, 2, 3]
    caller.end(Ended(1, 2, 1, None))
    assert caller.worker._threaded == 0
    caller.end(Ended(2, 3, 1, None))
    caller.take(1)
    jobs = [("first", None), ("second", None)]
    steps = [(number, Ended(number - 1, number, 1, None), None) for number in (1, 2, 3)]
    assert caller.log == [steps[0], *jobs, *steps[1:], ("third", None)]
    caller.worker.stop()


def test_a_short_step_is_done_here_and_told_of_when_it_is_collected() -> None:
    caller = StepCaller()
    assert not caller.worker.has_ended
    caller.short(1)
    assert (caller.process.begun, caller.log, caller.worker.has_ended) == ([], [], True)
    assert caller.worker.collect()
    assert (caller.log, caller.worker.has_ended) == ([(1, Ended(0, 1, 1, None), None)], False)
    assert not caller.worker.collect()
    caller.worker.stop()


def test_a_short_step_keeps_its_place_among_steps_and_jobs() -> None:
    caller = StepCaller()
    caller.step(1)
    caller.short(2)
    assert caller.process.begun == [1, 2], "it would have been done before the step in front of it"
    ends = [Ended(0, 9, 1, None), Ended(9, 10, 1, None)]
    caller.end(*ends)
    caller.short(3)
    caller.step(4)
    caller.job("between")
    caller.short(5)
    assert caller.process.begun == [1, 2, 4]
    caller.worker.collect()
    assert caller.worker._threaded == 0, "a job began before the step in front of it had ended"
    caller.end(ends[0])
    assert not caller.worker.has_ended, "a step was done before the job in front of it"
    caller.take(1)
    assert caller.worker.has_ended
    caller.worker.collect()
    steps = [(1, ends[0], None), (2, ends[1], None), (3, Ended(0, 3, 1, None), None), (4, ends[0], None)]
    assert caller.log == [*steps, ("between", None), (5, Ended(0, 5, 1, None), None)]
    caller.worker.stop()


def test_the_death_of_the_process_is_told_behind_a_short_step() -> None:
    caller = StepCaller()
    caller.process.is_gone = True
    caller.short(1)
    assert caller.worker.collect_short()
    assert not caller.worker.collect_short()
    assert (caller.log, caller.deaths) == ([(1, Ended(0, 1, 1, None), None)], []), "it was not asked"
    caller.short(2)
    caller.worker.collect()
    assert caller.log == [(number, Ended(0, number, 1, None), None) for number in (1, 2)]
    assert [str(death) for death in caller.deaths] == ["gone"]
    caller.worker.stop()


def test_the_process_is_stopped_whatever_becomes_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    never_started = HandProcess()
    Worker(lambda _: None, lambda _: None, cast(Any, never_started)).stop(3.0)
    assert never_started.stopped_after == [3.0]
    caller = StepCaller()

    def interrupted(_: float | None) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(caller.worker._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            caller.worker.stop(3.0)
    assert caller.process.stopped_after == [3.0]
    caller.worker.stop()


def test_the_death_of_the_process_is_told() -> None:
    caller = StepCaller()
    caller.step(1)
    caller.process.is_gone = True
    caller.worker.collect()
    assert [str(death) for death in caller.deaths] == ["gone"]
    assert caller.log == []
    caller.worker.stop()
