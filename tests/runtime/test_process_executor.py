"""The process that steps: its death, its end, and the runs that the caller steps instead."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from instep.core.typing import F32, I64
from instep.runtime.executor import ExecutorDied, RunResult
from instep.runtime.process_executor import ProcessExecutor, shared_zeros
from tests.support.warm import WarmProcess

DEADLINE_S = 60


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(DEADLINE_S * 1000))


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


class Stepped:
    """A process that steps over one shared array, in which it notes what it was given."""

    def __init__(self, also: Callable[[I64, I64], None] = lambda slots, rows: None) -> None:
        self.seen: F32 = shared_zeros((16, 2))

        def step(slots: I64, rows: I64) -> None:
            also(slots, rows)
            self.seen[slots, 0] = rows
            self.seen[slots, 1] += 1

        before = children()
        self.process = ProcessExecutor(step, 8)
        (self.pid,) = children() - before

    def begin(self, slot: int = 1, row: int = 1, expected_ns: int = 0) -> None:
        self.process.begin(np.array([slot]), np.array([[row]]), expected_ns)

    def wait(self) -> RunResult:
        while not (ended := self.process.ended()):
            assert is_readable(self.process.signal_fd), "no run ended"
        return ended[0]


@pytest.fixture
def stepped() -> Iterator[Callable[..., Stepped]]:
    made: list[Stepped] = []

    def make(also: Callable[[I64, I64], None] = lambda slots, rows: None) -> Stepped:
        made.append(Stepped(also))
        return made[-1]

    yield make
    for each in made:
        each.process.stop(timeout_s=DEADLINE_S)


@pytest.mark.parametrize(
    ("end", "words"), [(signal.SIGKILL, "was killed by SIGKILL"), (36, "was killed by signal 36"), (None, "has died")]
)
def test_a_process_that_dies_is_noticed(stepped: Callable[..., Stepped], end: int | None, words: str) -> None:
    def also(slots: I64, rows: I64) -> None:
        if end is None:
            raise KeyboardInterrupt  # nothing that a step may raise
        os.kill(os.getpid(), end)

    one = stepped(also)
    one.begin()
    with pytest.raises(ExecutorDied, match=words) as caught:
        one.wait()
    assert caught.value.killed_by == end
    one.begin()  # nobody is there to take it, which is no error here


def test_a_step_that_never_ends_is_killed(stepped: Callable[..., Stepped]) -> None:
    one = stepped(lambda slots, rows: time.sleep(10 * DEADLINE_S))
    one.begin()
    one.process.stop(timeout_s=0.01)
    assert one.seen[1].tolist() == [0, 0]


def test_one_that_does_not_answer_is_killed(stepped: Callable[..., Stepped]) -> None:
    one = stepped()
    pid = one.pid
    os.kill(pid, signal.SIGSTOP)
    one.process.stop(timeout_s=0.01)
    assert not psutil.pid_exists(pid)


def test_nothing_that_the_server_has_open_is_held_open(stepped: Callable[..., Stepped]) -> None:
    reading, writing = os.pipe()
    one = stepped()
    os.close(writing)
    assert is_readable(reading)
    assert os.read(reading, 1) == b""  # the only end that was open is closed
    os.close(reading)
    one.begin()
    one.wait()
    assert psutil.Process(one.pid).num_fds() == 3 + 2  # and its ends of the two pipes


SERVER = """
import os, signal, sys, time, numpy as np
from instep.runtime.process_executor import ProcessExecutor

def step(slots, rows):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)

executor = ProcessExecutor(step, 4)
print("under way", flush=True)
if sys.argv[1] == "in a step":
    executor.begin(np.array([1]), np.array([[1]]), 0)
    time.sleep(600)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["at rest", "in a step"])
def test_it_ends_when_the_server_is_killed(when: str, tmp_path: Path) -> None:
    if when == "in a step" and sys.platform != "linux":
        pytest.skip("only Linux tells a process of the death of another")
    (tmp_path / "server.py").write_text(SERVER)
    server = WarmProcess([when], program=str(tmp_path / "server.py"))
    output, _ = server.communicate(timeout=DEADLINE_S)  # ends when nobody is left who could write, the process too
    assert output == "under way\n"
    assert server.returncode == -signal.SIGKILL


def test_what_does_not_fit_is_a_memory_error() -> None:
    for shape in ((2**60, 2), (2**45,), (2**70,)):
        with pytest.raises(MemoryError):
            shared_zeros(shape)
    assert shared_zeros((0, 3)).shape == (0, 3)
    zeros = shared_zeros((4, 3), "i8")
    assert zeros.dtype == np.int64
    assert zeros.sum() == 0
    zeros[1] = 5
    assert zeros.tolist()[1] == [5, 5, 5]


@pytest.mark.parametrize(
    ("expected_ns", "loop_ns", "is_inline"),
    [
        (1, 0, True),
        (299_999, 0, True),
        (300_000, 0, False),
        (500_000, 500_001, True),
        (500_000, 500_000, False),
        (0, 10**9, False),
    ],
)
def test_short_runs_and_those_with_many_messages_are_stepped_by_the_caller_while_the_process_is_idle(
    expected_ns: int, loop_ns: int, is_inline: bool
) -> None:
    pids = shared_zeros((2,), "i8")

    def step(slots: I64, rows: I64) -> None:
        pids[slots] = os.getpid()

    executor = ProcessExecutor(step, 1)
    executor.begin(np.array([1]), np.array([[0]]), expected_ns, loop_ns)
    assert executor.has_ended == is_inline
    while not executor.ended():
        assert is_readable(executor.signal_fd)
    assert (pids[1] == os.getpid()) == is_inline
    executor.stop()


def test_a_short_run_keeps_its_place_behind_a_long_one(stepped: Callable[..., Stepped]) -> None:
    one = stepped()
    one.begin(row=1)
    one.begin(row=2, expected_ns=1)
    one.wait()
    while one.seen[1, 1] < 2:
        is_readable(one.process.signal_fd)
        one.process.ended()
    assert one.seen[1].tolist() == [2, 2]
