# ruff: noqa: D102 - see `StepExecutor`
"""Steps in another process, so that steps and the event loop never wait for one interpreter's lock.

The process is forked, so it has the server's network; states and frame buffer are in shared memory. Only a few bytes
per run cross the pipes: the index of a batch in shared memory, and the outcome. Closing the pipe ends the process after
the present run; on Linux the kernel kills it as soon as the server is gone, even in the middle of a step.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import select
import signal
import struct
import sys
import time
import traceback
import warnings
from itertools import pairwise
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from instep.core.tables import MOST_STEPS
from instep.core.typing import I64
from instep.interrupts import end_with_parent, signal_name
from instep.runtime.executor import ExecutorDied, RunResult, StateLost, Step, run_steps

_PLACES: Final = 2
_TEXT_BYTES: Final = 1024
_FAILED: Final = 1
_LOST: Final = 2
_COMMAND: Final = struct.Struct("=BBI")
"""Index in shared memory, steps and streams of a run. A pipe transfers this, like `_OUTCOME`, in one piece."""
_OUTCOME: Final = struct.Struct("=BqqBB")
"""Index of a run, its beginning and end (ns, monotonic clock), the number of applied steps, and the error."""
_POLL_S: Final = 0.005
_ENOUGH_LONG_WAITS: Final = 8
_SHORT_NS: Final = 300_000
"""Runs shorter than this execute inline in the event loop when the process is idle, and so do runs that take less time
than the loop needs for their messages. This leaves a core to the clients, and saves a round trip to the process.
"""


class StepFailed(Exception):
    """A step raised an exception, whose name and text are the message. No state has changed."""


class ProcessExecutor:
    """A forked process that executes one run after another.

    Args:
        step: steps a batch. Everything that it changes for the server must be in shared memory.
        max_batch_size: the largest batch.
        busy_poll_ns: the time after a run for which the process polls for the next one before it sleeps.

    Raises:
        OSError: the process cannot be forked.
    """

    capacity = _PLACES

    def __init__(self, step: Step, max_batch_size: int, busy_poll_ns: int = 0) -> None:
        self._step = step
        self._slots: I64 = shared_zeros((_PLACES, max_batch_size), "i8")
        self._rows: I64 = shared_zeros((_PLACES, MOST_STEPS, max_batch_size), "i8")
        self._text = shared_zeros((_PLACES, _TEXT_BYTES), "u1")
        self._next = 0
        self._under_way = 0
        """Runs that the process has not finished."""
        self._results: list[RunResult] = []
        self._status: int | None = None
        """The exit status of the process, once its end was noticed."""
        commands, self._commands = os.pipe()
        self.signal_fd, outcomes = os.pipe()
        server = os.getpid()
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of threads, as numpy's BLAS has; the child starts none
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pid = os.fork()
        except OSError:
            for fd in (commands, self._commands, self.signal_fd, outcomes):
                os.close(fd)
            raise
        if self._pid == 0:
            self._live(server, commands, outcomes, busy_poll_ns)
        os.close(commands)
        os.close(outcomes)
        os.set_blocking(self.signal_fd, False)

    @property
    def has_ended(self) -> bool:
        return bool(self._results)

    def begin(self, slots: I64, rows: I64, expected_ns: int, loop_ns: int = 0) -> None:
        is_idle = self._under_way == 0 and not self._results
        if is_idle and 0 < expected_ns < max(_SHORT_NS, loop_ns):
            self._results.append(run_steps(self._step, slots, rows))
            return
        place, (steps, size) = self._next, rows.shape
        self._next = (place + 1) % _PLACES
        self._slots[place, :size] = slots
        self._rows[place, :steps, :size] = rows
        self._under_way += 1
        with contextlib.suppress(BrokenPipeError):  # it has died, which `ended` tells
            os.write(self._commands, _COMMAND.pack(place, steps, size))

    def ended(self) -> list[RunResult]:
        if self._under_way:
            self.take_signal()
        results, self._results = self._results, []
        return results

    def take_signal(self) -> None:
        """See `StepExecutor`; the end of an idle process also makes the pipe readable."""
        try:
            outcomes = os.read(self.signal_fd, _PLACES * _OUTCOME.size)
        except BlockingIOError:
            return
        if not outcomes:
            raise self._death()
        for place, began_ns, ended_ns, steps, failure in _OUTCOME.iter_unpack(outcomes):
            self._under_way -= 1
            error = self._error(place, failure) if failure else None
            self._results.append(RunResult(began_ns, ended_ns, steps, error))

    def _death(self) -> ExecutorDied:
        if self._status is None:
            try:
                self._status = os.waitpid(self._pid, 0)[1]
            except ChildProcessError:  # where SIGCHLD is ignored, nobody knows
                self._status = 0
        if os.WIFSIGNALED(self._status):
            number = os.WTERMSIG(self._status)
            return ExecutorDied(f"the process that steps was killed by {signal_name(number)}", number)
        return ExecutorDied("the process that steps has died")

    def _error(self, place: int, failure: int) -> Exception:
        text = self._text[place].tobytes().rstrip(b"\0").decode(errors="replace")
        if failure == _LOST:
            return StateLost(text)
        return StepFailed(text)

    def stop(self, timeout_s: float | None = None) -> None:
        """See `StepExecutor`; after the timeout the process is killed."""
        if self._pid == 0:
            return
        pid, self._pid = self._pid, 0
        os.close(self._commands)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            while not _has_ended(pid, wait=deadline is None):
                if deadline is not None and time.monotonic() > deadline:
                    with contextlib.suppress(ProcessLookupError):  # where SIGCHLD is ignored, it may be gone by now
                        os.kill(pid, signal.SIGKILL)
                    deadline = None
                else:
                    time.sleep(_POLL_S)
        finally:
            os.close(self.signal_fd)

    # ── In the other process ───────────────────────────────────────────────────────────────────────────────────────

    def _live(self, server: int, commands: int, outcomes: int, busy_poll_ns: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # the server says when it is over
            end_with_parent(server, signal.SIGKILL, "instep step")
            _close_all_but(0, 1, 2, commands, outcomes)
            runs = _Commands(commands, busy_poll_ns)
            while commands_read := runs.read():
                for place, steps, size in _COMMAND.iter_unpack(commands_read):
                    os.write(outcomes, self._run(place, steps, size))
            status = 0
        except BrokenPipeError:
            pass  # the server is gone
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _run(self, place: int, steps: int, size: int) -> bytes:
        result = run_steps(self._step, self._slots[place, :size], self._rows[place, :steps, :size])
        failure = 0
        if (error := result.error) is not None:
            is_lost = isinstance(error, StateLost)
            failure = _LOST if is_lost else _FAILED
            told = (str(error) if is_lost else f"{type(error).__name__}: {error}").encode()[:_TEXT_BYTES]
            self._text[place] = 0
            self._text[place, : len(told)] = list(told)
        return _OUTCOME.pack(place, result.began_ns, result.ended_ns, result.steps, failure)


def _has_ended(pid: int, *, wait: bool) -> bool:
    try:
        return os.waitpid(pid, 0 if wait else os.WNOHANG)[0] != 0
    except ChildProcessError:  # where SIGCHLD is ignored, the system has taken it away
        return True


class _Commands:
    """Reads runs from the pipe, polling for a while unless the last ones all came much later."""

    def __init__(self, fd: int, busy_poll_ns: int) -> None:
        self._fd = fd
        self._busy_poll_ns = busy_poll_ns
        self._long_waits = 0
        """The number of last waits in a row that took more than twice the polling time."""
        self._signal = select.poll()  # `select.select` takes no number above 1023
        self._signal.register(fd, select.POLLIN)
        os.set_blocking(fd, False)

    def read(self) -> bytes:
        """Return at least one run as `_COMMAND`, or nothing after the pipe was closed."""
        began_ns = time.monotonic_ns()
        until_ns = began_ns + (self._busy_poll_ns if self._long_waits < _ENOUGH_LONG_WAITS else 0)
        while True:
            try:
                runs = os.read(self._fd, _PLACES * _COMMAND.size)
                break
            except BlockingIOError:
                if time.monotonic_ns() < until_ns:
                    os.sched_yield()
                else:
                    self._signal.poll()
        is_long = time.monotonic_ns() - began_ns > 2 * self._busy_poll_ns  # twice: waking up makes every wait longer
        self._long_waits = self._long_waits + 1 if is_long else 0
        return runs


def _close_all_but(*kept: int) -> None:
    """Close every other file, because this process would keep sockets and files open that the server closes."""
    bounds = [-1, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for last_kept, next_kept in pairwise(bounds):
        if last_kept + 1 < next_kept:  # Python 3.11 takes an empty range to mean all files
            os.closerange(last_kept + 1, next_kept)


def shared_zeros(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """Zeros in memory that later forked processes share. Untouched pages use no memory.

    Raises:
        MemoryError: when memory does not suffice.
    """
    count = math.prod(shape)
    try:
        memory = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1))
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"no memory for an array of shape {list(shape)}: {error}") from None
    return np.frombuffer(memory, dtype, count).reshape(shape)
