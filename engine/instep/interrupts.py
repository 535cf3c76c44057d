"""SIGINT (Ctrl-C), SIGTERM and SIGHUP end a command after it has cleaned up; a second signal ends it at once.

This is imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to end."""


class Stopped(SystemExit):
    """Raised by a signal that stops the command; it has the exit status of shells, and names the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal_name(self.number)}"


def end_at_once() -> None:
    """Let these signals end the process silently, with their exit statuses.

    Python's own handler raises at any point of the program, which packages in C report at length; the system's handler
    does nothing in the first process of a container.
    """
    for number in ENDINGS:
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            signal.signal(number, _end)


def raise_stopped() -> None:
    """Let the first signal raise `Stopped` instead of ending the process, so the command can clean up."""
    for number in _ours():
        signal.signal(number, _stop)


def stop_no_more() -> None:
    """Ignore these signals, because the work is done and the exit status decided."""
    for number in _ours():
        signal.signal(number, signal.SIG_IGN)


def signal_name(number: int) -> str:
    """A signal's name, such as `SIGSEGV`, or `signal 35` if Python has no name for it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def how_ended(code: int) -> str:
    """How a process ended that has this exit status, or -N if signal N killed it."""
    return f"was killed by {signal_name(-code)}" if code < 0 else f"ended with status {code}"


def end_with_parent(parent: int, by: signal.Signals = signal.SIGTERM, name: str = "") -> None:
    """Have the kernel signal this process when the thread of `parent` that forked it ends; on Linux only.

    There `ps -o pid,comm`, `top` and `pstree` also show the process under its name, of which 15 bytes are kept.
    """
    if sys.platform == "linux":
        import ctypes

        prctl = ctypes.CDLL(None).prctl
        prctl(1, by)  # PR_SET_PDEATHSIG
        if name:
            prctl(15, name.encode())  # PR_SET_NAME
        if os.getppid() != parent:  # it died before the kernel knew
            os._exit(1)


def _ours() -> list[signal.Signals]:
    return [number for number in ENDINGS if signal.getsignal(number) in (_end, _stop)]


def _stop(number: int, frame: FrameType | None) -> None:
    end_at_once()
    raise Stopped(number)


def _end(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT and sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\n")  # behind the terminal's ^C
    os._exit(128 + number)
