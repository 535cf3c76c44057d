from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest
from instep.runtime.runs import MOST_STEPS, Ended
from instep.runtime.step_process import PLACES, StepFailed, StepProcess, _Commands

from instep.core.typing import F32, I64
from instep.runtime.errors import StateLost
from instep.runtime.shared_memory import shared_zeros
from instep.server.open_files import allow_open_files

DEADLINE_S = 60
MANY = 1024
"""The first number of a file that `select` does not take."""


def is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(DEADLINE_S * 1000))


class Stepped:
    """A step process over one shared array, in which it notes what it was given."""

    def __init__(self, also: Callable[[I64, I64], None] = lambda slots, rows: None) -> None:
        self.seen: F32 = shared_zeros((16, 2))

        def step(slots: I64, rows: I64) -> None:
            also(slots, rows)
            self.seen[slots, 0] = rows
            self.seen[slots, 1] += 1

        self.process = StepProcess(step, 8)

    def wait(self, count: int) -> list[Ended]:
        ended: list[Ended] = []
        while len(ended) < count:
            assert is_readable(self.process.signal_fd), "no step ended"
            ended += self.process.ended()
        return ended


@pytest.fixture
def stepped() -> Iterator[Callable[..., Stepped]]:
    made: list[Stepped] = []

    def make(also: Callable[[I64, I64], None] = lambda slots, rows: None) -> Stepped:
        made.append(Stepped(also))
        return made[-1]

    yield make
    for each in made:
        each.process.stop(timeout_s=DEADLINE_S)


def test_what_a_step_writes_is_seen_here(stepped: Callable[..., Stepped]) -> None:
    one = stepped()
    before = time.monotonic_ns()
    one.process.begin(np.array([3, 1, 7]), np.array([[30, 10, 70]]))
    (ended,) = one.wait(1)
    assert ended.error is None
    assert before <= ended.began_ns <= ended.ended_ns <= time.monotonic_ns()
    assert one.seen[[1, 3, 7]].tolist() == [[10, 1], [30, 1], [70, 1]]
    assert one.seen[:, 1].sum() == 3


def test_steps_run_in_order_and_places_are_used_again(stepped: Callable[..., Stepped]) -> None:
    one = stepped()
    for number in range(3 * PLACES):
        one.process.begin(np.array([2, 5])[: 1 + number % 2], np.array([[number, -number]])[:, : 1 + number % 2])
        if number % (PLACES - 1) == PLACES - 2:
            one.wait(PLACES - 1)
    assert one.seen[2].tolist() == [3 * PLACES - 1, 3 * PLACES]
    assert one.seen[5].tolist() == [-(3 * PLACES - 1), 3 * PLACES / 2]


def test_nothing_has_ended_before_it_has(stepped: Callable[..., Stepped]) -> None:
    assert list(stepped().process.ended()) == []


@pytest.mark.parametrize("spin_ns", [0, 10**12])
def test_steps_are_taken_awake_or_asleep(spin_ns: int) -> None:
    seen: F32 = shared_zeros((2,))

    def step(slots: I64, rows: I64) -> None:
        seen[slots] += rows

    process = StepProcess(step, 1, spin_ns)
    for _ in range(3):
        process.begin(np.array([1]), np.array([[5]]))
        assert is_readable(process.signal_fd)
        assert [ended.error for ended in process.ended()] == [None]
    process.stop()
    assert seen.tolist() == [0, 15]


def test_a_server_with_many_files_open_has_a_process_as_well(
    stepped: Callable[..., Stepped], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, soft = os.pipe, allow_open_files(MANY + 100)
    if soft < MANY + 100:
        pytest.skip(f"no more than {soft} files may be open here")

    def high_pipe() -> tuple[int, ...]:
        low = pipe()
        high = tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, MANY) for fd in low)
        for fd in low:
            os.close(fd)
        return high

    monkeypatch.setattr(os, "pipe", high_pipe)
    one = stepped()
    assert one.process.signal_fd >= MANY
    for _ in range(2):
        process = psutil.Process(one.process._pid)
        while process.status() not in (psutil.STATUS_SLEEPING, psutil.STATUS_ZOMBIE):
            time.sleep(0)
        one.process.begin(np.array([1]), np.array([[5]]))
        assert [ended.error for ended in one.wait(1)] == [None]


def test_what_a_step_raises_is_told_and_the_next_one_runs(stepped: Callable[..., Stepped]) -> None:
    def also(slots: I64, rows: I64) -> None:
        if rows[0] == 13:
            raise ValueError("thirteen: " + "µ" * 2000)
        if rows[0] == 14:
            raise StateLost("half written")

    one = stepped(also)
    one.process.begin(np.array([1]), np.array([[13]]))
    one.process.begin(np.array([4, 2]), np.array([[14, 14]]))
    one.process.begin(np.array([1]), np.array([[15]]))
    failed, lost, fine = [ended.error for ended in one.wait(3)]
    assert isinstance(failed, StepFailed)
    assert str(failed).startswith("ValueError: thirteen: µµµ")
    assert isinstance(lost, StateLost)
    assert str(lost) == "half written"
    assert fine is None
    assert one.seen[1].tolist() == [15, 1]


def test_a_run_of_steps_ends_with_the_first_that_fails(stepped: Callable[..., Stepped]) -> None:
    def also(slots: I64, rows: I64) -> None:
        if 13 in rows.tolist():
            raise ValueError

    one = stepped(also)
    one.process.begin(np.array([1, 2]), np.arange(2 * MOST_STEPS).reshape(MOST_STEPS, 2))
    one.process.begin(np.array([3]), np.arange(20, 23)[:, None])
    failed, fine = one.wait(2)
    assert (failed.steps, fine.steps) == (6, 3)
    assert isinstance(failed.error, StepFailed)
    assert fine.error is None
    assert one.seen[1:4].tolist() == [[10, 6], [11, 6], [22, 3]]


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_process_that_dies_is_noticed(stepped: Callable[..., Stepped], end: signal.Signals | None) -> None:
    def also(slots: I64, rows: I64) -> None:
        if end is None:
            raise KeyboardInterrupt  # nothing that a step may raise
        os.kill(os.getpid(), end)

    one = stepped(also)
    one.process.begin(np.array([1]), np.array([[1]]))
    with pytest.raises(EOFError, match="is gone"):
        one.wait(1)
    one.process.begin(np.array([1]), np.array([[1]]))  # nobody is there to take it, which is no error here


def test_interrupts_are_the_servers_business(stepped: Callable[..., Stepped]) -> None:
    def also(slots: I64, rows: I64) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)

    one = stepped(also)
    one.process.begin(np.array([1]), np.array([[1]]))
    assert one.wait(1)[0].error is None


def test_stopping_finishes_what_has_begun(stepped: Callable[..., Stepped]) -> None:
    one = stepped()
    for number in range(3):
        one.process.begin(np.array([1]), np.array([[number]]))
    one.process.stop()
    one.process.stop()
    assert one.seen[1].tolist() == [2, 3]


def test_a_step_that_never_ends_is_killed(stepped: Callable[..., Stepped]) -> None:
    one = stepped(lambda slots, rows: time.sleep(10 * DEADLINE_S))
    one.process.begin(np.array([1]), np.array([[1]]))
    one.process.stop(timeout_s=0.01)
    assert one.seen[1].tolist() == [0, 0]


@pytest.fixture
def _no_zombies() -> Iterator[None]:
    """The system takes ended processes away by itself, so nobody can wait for them."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("_no_zombies")
@pytest.mark.parametrize("timeout_s", [None, DEADLINE_S])
def test_it_is_stopped_where_ended_processes_leave_no_trace(
    stepped: Callable[..., Stepped], timeout_s: float | None
) -> None:
    one = stepped()
    pid = one.process._pid
    one.process.begin(np.array([1]), np.array([[7]]))
    one.process.stop(timeout_s)
    assert one.seen[1].tolist() == [7, 1]
    assert not psutil.pid_exists(pid)


@pytest.mark.usefixtures("_no_zombies")
def test_one_that_ends_just_before_it_is_killed_is_stopped_as_well(
    stepped: Callable[..., Stepped], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = os.kill

    def kill_too_late(pid: int, number: int) -> None:
        while True:
            kill(pid, number)  # until nobody is there

    one = stepped(lambda slots, rows: time.sleep(10 * DEADLINE_S))
    one.process.begin(np.array([1]), np.array([[1]]))
    monkeypatch.setattr(os, "kill", kill_too_late)
    one.process.stop(timeout_s=0.01)
    assert one.seen[1].tolist() == [0, 0]


def test_one_that_does_not_answer_is_killed(stepped: Callable[..., Stepped]) -> None:
    one = stepped()
    pid = one.process._pid
    os.kill(pid, signal.SIGSTOP)
    one.process.stop(timeout_s=0.01)
    assert not psutil.pid_exists(pid)


def test_an_interrupted_stop_is_not_repeated_on_what_others_have_opened_since(
    stepped: Callable[..., Stepped], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = stepped(lambda slots, rows: time.sleep(10 * DEADLINE_S))
    pid = one.process._pid

    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    one.process.begin(np.array([1]), np.array([[1]]))
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            one.process.stop(timeout_s=DEADLINE_S)
    others = [os.open(os.devnull, os.O_RDONLY) for _ in range(2)]
    one.process.stop()
    for fd in others:
        os.close(fd)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_where_there_can_be_no_process_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "fork", fork)
    before = psutil.Process().num_fds()
    with pytest.raises(BlockingIOError):
        StepProcess(lambda slots, rows: None, 4)
    assert psutil.Process().num_fds() == before


def test_nothing_that_the_server_has_open_is_held_open(stepped: Callable[..., Stepped]) -> None:
    reading, writing = os.pipe()
    one = stepped()
    os.close(writing)
    assert is_readable(reading)
    assert os.read(reading, 1) == b""  # the only end that was open is closed
    os.close(reading)
    one.process.begin(np.array([1]), np.array([[1]]))
    one.wait(1)
    assert psutil.Process(one.process._pid).num_fds() == 3 + 2  # and its ends of the two pipes


SERVER = """
import os, signal, sys, time, numpy as np
from instep.runtime.step_process import StepProcess

def step(slots, rows):
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)

process = StepProcess(step, 4)
print(process._pid, flush=True)
if sys.argv[1] == "in a step":
    process.begin(np.array([1]), np.array([[1]]))
    time.sleep(600)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["at rest", "in a step"])
def test_it_ends_when_the_server_is_killed(when: str) -> None:
    if when == "in a step" and sys.platform != "linux":
        pytest.skip("only Linux tells a process of the death of another")
    with subprocess.Popen([sys.executable, "-c", SERVER, when], stdout=subprocess.PIPE, text=True) as server:
        output, _ = server.communicate(timeout=DEADLINE_S)  # ends when nobody is left who could write, the process too
        assert int(output) > 0
    assert server.returncode == -signal.SIGKILL


def test_what_does_not_fit_is_a_memory_error() -> None:
    for shape in ((2**60, 2), (2**45,), (2**70,)):
        with pytest.raises(MemoryError, match="no memory for an array of shape"):
            shared_zeros(shape)
    assert shared_zeros((0, 3)).shape == (0, 3)
    zeros = shared_zeros((4, 3), "i8")
    assert zeros.dtype == np.int64
    assert zeros.sum() == 0
    zeros[1] = 5
    assert zeros.tolist()[1] == [5, 5, 5]


def test_it_looks_for_the_next_run_only_while_they_come_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    commands, to_it = os.pipe()
    runs, now, due, looks = _Commands(commands, spin_ns=10), 0, 0, 0

    def look() -> None:
        nonlocal now, looks
        now, looks = now + 1, looks + 1
        if now == due:
            os.write(to_it, b"\1")

    class Asleep:
        def poll(self) -> None:
            nonlocal now
            now = due
            os.write(to_it, b"\1")

    def looks_for(wait: int) -> int:
        """How often it looked for a run that comes so late."""
        nonlocal due, looks
        due, looks = now + wait, 0
        assert runs.read() == b"\1"
        return looks

    monkeypatch.setattr(runs, "_signal", Asleep())
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    monkeypatch.setattr(os, "sched_yield", look)
    try:
        assert [looks_for(5) for _ in range(3)] == [5, 5, 5]
        assert [looks_for(21) for _ in range(10)] == [10] * 8 + [0, 0]
        assert looks_for(20) == 0  # awake, it might have seen this one
        assert [looks_for(5), looks_for(20), *(looks_for(21) for _ in range(9))] == [5, *[10] * 9, 0]
    finally:
        os.close(commands)
        os.close(to_it)
