from __future__ import annotations

import asyncio
import multiprocessing
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind
from instep_tools.connect import Target
from instep_tools.load import processes
from instep_tools.load.generator import PartResult
from instep_tools.load.plan import LoadPart, LoadPlan, Mode
from instep_tools.load.processes import END, READY, counters, merge, run_parts, work
from instep_tools.load.samples import SAMPLE
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem
from tests.support.fake_server import FakeServer, Message, error
from tests.tools.load_workers import die, never_end, signalled

PLAN = LoadPlan(
    streams=4,
    connections=2,
    processes=2,
    mode=Mode.OPEN,
    rate_hz=64.0,
    duration_s=0.25,
    warmup_s=0.125,
    block=None,
    steps=1,
)
PART = LoadPart("load-0", ((2,),), PLAN)
PARTS = [PART, replace(PART, name="load-1", offset=0.5)]


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    """`work` ignores Ctrl-C and SIGTERM for its whole process, which here is the test's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_results_are_merged() -> None:
    one = PartResult(np.zeros(2, SAMPLE), Counter(BUSY=1), unanswered=3, gaps=[(0.1, 0.2)])
    other = PartResult(np.ones(1, SAMPLE), Counter(BUSY=2, IDLE=1), unanswered=4, gaps=[(0, 1)], stopped=True)
    merged = merge([one, other])
    assert merged.samples["at_s"].tolist() == [0, 0, 1]
    assert merged.refused == {"BUSY": 3, "IDLE": 1}
    assert (merged.unanswered, merged.gaps, merged.stopped) == (7, [(0.1, 0.2), (0, 1)], True)


async def test_one_part_runs_here() -> None:
    with FakeServer() as server:
        result = await run_parts([PART], Target(server.endpoint), Stop())
        assert server.rules.names == {}
    assert len(result.samples) == 16
    assert result.samples["frames"].tolist() == [2] * 16


async def test_several_parts_run_in_processes_of_their_own() -> None:
    with FakeServer() as server:
        answered = counters(2)
        result = await run_parts(PARTS, Target(server.endpoint), Stop(), answered=answered)
        assert [counter.value for counter in answered] == [48, 48]
        assert server.rules.kinds.count(Kind.HELLO) == 2
        assert server.rules.names == {}
    assert len(result.samples) == 32
    assert (result.refused, result.unanswered, result.stopped) == ({}, 0, False)


async def test_a_stop_reaches_the_processes() -> None:
    stop = Stop()
    with FakeServer() as server:
        rules = server.rules
        loop = asyncio.get_running_loop()

        def stop_at_ten(header: list[Any], frames: list[bytes]) -> list[Message] | None:
            if len(rules.blocks) == 10:
                loop.call_soon_threadsafe(stop.request)
            return None

        rules.fault = stop_at_ten
        long = [replace(part, plan=replace(PLAN, duration_s=1000.0)) for part in PARTS]
        result = await run_parts(long, Target(server.endpoint), stop)
        assert rules.names == {}
    assert result.stopped


async def test_a_process_that_gives_up_ends_all() -> None:
    def answer_slowly(header: list[Any], frames: list[bytes]) -> None:
        if header[0] == Kind.STEP:
            time.sleep(0.03)

    hopeless = [replace(part, plan=replace(PLAN, duration_s=10.0, slo_ms=20.0)) for part in PARTS]
    with FakeServer() as server:
        server.rules.fault = answer_slowly
        result = await run_parts(hopeless, Target(server.endpoint), Stop())
    assert result.gave_up
    assert result.samples["at_s"].max() < 9


async def test_a_process_that_cannot_open_ends_all() -> None:
    with FakeServer() as server:
        server.rules.names["load-1-0-0"] = 999
        with pytest.raises(CommandProblem, match="NAME_IN_USE"):
            await run_parts(PARTS, Target(server.endpoint), Stop())
        assert list(server.rules.names) == ["load-1-0-0"]


async def test_a_process_that_dies_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "work", die)
    with pytest.raises(CommandProblem, match="was killed"):
        await run_parts(PARTS, Target("tcp://127.0.0.1:1"), Stop())


async def test_a_cancellation_waits_for_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "work", never_end)
    answered = counters(len(PARTS))
    running = asyncio.create_task(run_parts(PARTS, Target("tcp://127.0.0.1:1"), Stop(), answered=answered))
    while not all(counter.value for counter in answered):
        await asyncio.sleep(0.01)
    begun = multiprocessing.active_children()
    running.cancel()
    try:
        ended, _ = await asyncio.wait([running], timeout=10)
        assert ended == {running}
        assert running.cancelled()
        assert multiprocessing.active_children() == []
    finally:
        for process in begun:
            process.kill()


async def test_a_signal_to_the_process_group_while_a_process_begins_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "work", signalled)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with FakeServer() as server:
        result = await run_parts(PARTS, Target(server.endpoint), Stop())
    assert not result.stopped
    assert len(result.samples)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


class Parent:
    """The parent's side of `work`, which runs in this thread; the parent's words wait in the pipe."""

    def __init__(self) -> None:
        self.pipe, self.theirs = multiprocessing.Pipe()

    def work(self, endpoint: str, part: LoadPart = PART) -> list[Any]:
        work(part, Target(endpoint), self.theirs, *counters(1))
        self.theirs.close()
        messages: list[Any] = []
        while self.pipe.poll():
            try:
                messages.append(self.pipe.recv())
            except EOFError:
                break
        self.pipe.close()
        return messages


def test_a_worker_ends_with_its_result() -> None:
    parent = Parent()
    parent.pipe.send(0.0)

    def end_after_the_first_word() -> None:
        parent.pipe.poll(None)
        parent.pipe.send(END)

    ending = threading.Thread(target=end_after_the_first_word)
    with FakeServer() as server:
        ending.start()
        ready, result = parent.work(server.endpoint)
        ending.join()
    assert ready == READY
    assert isinstance(result, PartResult)
    assert signal.getsignal(signal.SIGINT) is signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_worker_that_is_ended_before_the_start_sends_nothing() -> None:
    parent = Parent()
    parent.pipe.send(END)
    with FakeServer() as server:
        _, result = parent.work(server.endpoint)
        assert Kind.STEP not in server.rules.kinds
    assert result.stopped
    assert len(result.samples) == 0


def test_a_worker_whose_parent_is_gone_ends() -> None:
    parent = Parent()
    parent.pipe.close()
    with FakeServer() as server:
        work(PART, Target(server.endpoint), parent.theirs, *counters(1))
        assert Kind.STEP not in server.rules.kinds
    parent.theirs.close()


def test_a_worker_tells_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    parent = Parent()
    parent.pipe.send(END)

    def refuse(header: list[Any], frames: list[bytes]) -> list[Message] | None:
        return [error(header[1], Code.SHUTTING_DOWN)] if header[0] == Kind.OPEN else None

    with FakeServer() as server:
        server.rules.fault = refuse
        (problem,) = parent.work(server.endpoint)
    assert isinstance(problem, CommandProblem)
    assert "SHUTTING_DOWN" in str(problem)

    def broken(endpoint: str) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(processes, "connector", broken)
    parent = Parent()
    parent.pipe.send(END)
    (problem,) = parent.work("tcp://127.0.0.1:1")
    assert str(problem) == "a process of the load test failed: ZeroDivisionError: oh"
