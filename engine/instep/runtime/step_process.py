"""Steps in a process of their own, so that they and the event loop never wait for one interpreter's lock.

The process is forked, so it has the network, and with it certification, just as the server has them; states and rings
are shared memory (`shared_zeros`). What goes between the two are pipes with a few bytes a run: the number of a place in
shared memory where the batch stands and its size, and what became of it. Closing the pipe ends the process after the
run that is under way, so it ends when the server is killed; on Linux at once, also where a step never ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Final, NoReturn

import torch

from instep.core.typing import I64
from instep.runtime.errors import StateLost
from instep.runtime.runs import MOST_STEPS, Ended, run_steps
from instep.runtime.shared_memory import shared_zeros

PLACES: Final = 4
"""Runs that may be under way at once."""
_TEXT_BYTES: Final = 1024
_FAILED: Final = 1
_LOST: Final = 2
_COMMAND: Final = struct.Struct("=BBI")
"""Place, steps and streams of a run. Pipes take it, and `_OUTCOME`, in one piece, so no piece of one is ever read."""
_OUTCOME: Final = struct.Struct("=BqqBB")
"""Place of a run, when it began and ended, in ns of the monotonic clock, how many steps it made, what went wrong."""
_POLL_S: Final = 0.005
_ENOUGH_LONG_WAITS: Final = 8
_PR_SET_PDEATHSIG: Final = 1


class StepFailed(Exception):
    """A step raised something; the message is its name and words. No state has changed."""


class StepProcess:
    """A forked process that steps one batch after another.

    Args:
        step: steps the streams of slots, int64 [B], with the frames of rows, int64 [B]; everything it changes that the
            server reads is shared memory.
        most: the largest batch.
        spin_ns: for how long after a step it looks for the next one, rather than sleep and be woken; see `Vigil`.

    Raises:
        OSError: when there can be no other process.
    """

    def __init__(self, step: Callable[[I64, I64], None], most: int, spin_ns: int = 0) -> None:
        self._slots: I64 = shared_zeros((PLACES, most), "i8")
        self._rows: I64 = shared_zeros((PLACES, MOST_STEPS, most), "i8")
        self._text = shared_zeros((PLACES, _TEXT_BYTES), "u1")
        self._next = 0
        commands, self._commands = os.pipe()
        self.signal_fd, endings = os.pipe()
        """Becomes readable when a step has ended, and when the process has."""
        try:
            with warnings.catch_warnings():  # Python 3.12 warns of threads, as numpy's BLAS has; the child starts none
                warnings.simplefilter("ignore", DeprecationWarning)
                self._pid = os.fork()
        except OSError:
            for fd in (commands, self._commands, self.signal_fd, endings):
                os.close(fd)
            raise
        if self._pid == 0:
            self._live(step, commands, endings, spin_ns)
        os.close(commands)
        os.close(endings)
        os.set_blocking(self.signal_fd, False)

    def begin(self, slots: I64, rows: I64) -> None:
        """Step streams, int64 [B], with frames, int64 [steps, B], after what has begun; that is less than `PLACES`."""
        place, (steps, size) = self._next, rows.shape
        self._next = (place + 1) % PLACES
        self._slots[place, :size] = slots
        self._rows[place, :steps, :size] = rows
        with contextlib.suppress(BrokenPipeError):  # it has died, which `ended` tells
            os.write(self._commands, _COMMAND.pack(place, steps, size))

    def ended(self) -> Iterator[Ended]:
        """Runs that have ended since the last call, in order.

        Raises:
            EOFError: when the process has ended.
        """
        try:
            outcomes = os.read(self.signal_fd, PLACES * _OUTCOME.size)
        except BlockingIOError:
            return
        if not outcomes:
            raise EOFError("the process that steps is gone")
        for place, began_ns, ended_ns, steps, outcome in _OUTCOME.iter_unpack(outcomes):
            yield Ended(began_ns, ended_ns, steps, self._error(place, outcome) if outcome else None)

    def _error(self, place: int, outcome: int) -> Exception:
        text = self._text[place].tobytes().rstrip(b"\0").decode(errors="replace")
        if outcome == _LOST:
            return StateLost(text)
        return StepFailed(text)

    def stop(self, timeout_s: float | None = None) -> None:
        """Let it finish what has begun, then end; after `timeout_s` it is killed. May be called twice."""
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

    def _live(self, step: Callable[[I64, I64], None], commands: int, endings: int, spin_ns: int) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)  # the server says when it is over
            _die_with_the_server()
            _close_all_but(0, 1, 2, commands, endings)
            runs = _Commands(commands, spin_ns)
            with torch.inference_mode():  # once, not for each step, which would be longer by it
                while commands_read := runs.read():
                    for place, steps, size in _COMMAND.iter_unpack(commands_read):
                        os.write(endings, self._run(step, place, steps, size))
            status = 0
        except BrokenPipeError:
            pass  # the server is gone
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def _run(self, step: Callable[[I64, I64], None], place: int, steps: int, size: int) -> bytes:
        ended = run_steps(step, self._slots[place, :size], self._rows[place, :steps, :size])
        outcome = 0
        if (error := ended.error) is not None:
            is_lost = isinstance(error, StateLost)
            outcome = _LOST if is_lost else _FAILED
            told = (str(error) if is_lost else f"{type(error).__name__}: {error}").encode()[:_TEXT_BYTES]
            self._text[place] = 0
            self._text[place, : len(told)] = list(told)
        return _OUTCOME.pack(place, ended.began_ns, ended.ended_ns, ended.steps, outcome)


def _has_ended(pid: int, *, wait: bool) -> bool:
    try:
        return os.waitpid(pid, 0 if wait else os.WNOHANG)[0] != 0
    except ChildProcessError:  # where SIGCHLD is ignored, the system has taken it away
        return True


class _Commands:
    """Runs as they come. It looks for the next one for a while, unless the last ones all came much later than that."""

    def __init__(self, fd: int, spin_ns: int) -> None:
        self._fd = fd
        self._spin_ns = spin_ns
        self._long_waits = 0
        """How many of the last waits were more than twice as long as it looks."""
        self._signal = select.poll()  # `select.select` takes no number above 1023
        self._signal.register(fd, select.POLLIN)
        os.set_blocking(fd, False)

    def read(self) -> bytes:
        """Runs as `_COMMAND`, at least one; nothing when there will be none."""
        began_ns = time.monotonic_ns()
        until_ns = began_ns + (self._spin_ns if self._long_waits < _ENOUGH_LONG_WAITS else 0)
        while True:
            try:
                runs = os.read(self._fd, PLACES * _COMMAND.size)
                break
            except BlockingIOError:
                if time.monotonic_ns() < until_ns:
                    os.sched_yield()
                else:
                    self._signal.poll()
        is_long = time.monotonic_ns() - began_ns > 2 * self._spin_ns  # twice: being woken makes every wait longer
        self._long_waits = self._long_waits + 1 if is_long else 0
        return runs


def _die_with_the_server() -> None:
    """Strictly, with the thread that forked: the one of the server's loop, which ends after this process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _close_all_but(*kept: int) -> None:
    """So that sockets and files which the server closes are closed."""
    bounds = [-1, *sorted(kept), os.sysconf("SC_OPEN_MAX")]
    for last_kept, next_kept in pairwise(bounds):
        if last_kept + 1 < next_kept:  # of an empty range Python 3.11 makes all there are
            os.closerange(last_kept + 1, next_kept)
