"""Ctrl-C, SIGTERM and SIGHUP end the process at once, until a command handles them in order.

Python's own way, an exception anywhere, is swallowed or printed at length when it comes while large packages are
imported, or while the process ends. This is imported before anything else, so it imports next to nothing.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from instep_tools import SAME_SIGNAL_S, EndingSignals, end_quietly

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a command to end."""
_IMPORTER = "<frozen importlib._bootstrap>"
"""The file of Python's functions that import a module, as the stack names it."""
_IMPORTING_S = 0.05
"""A signal that comes while something is imported comes again after this time."""

_had_terminal = False
_was_hung_up = False
_stops = EndingSignals()


class Stopped(SystemExit):
    """A signal stops the command, with the exit status that shells have for it; the text says which signal.

    Attributes:
        is_told: the command has said that it was stopped.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        self.is_told = False

    def __str__(self) -> str:
        return f"stopped by {signal_name(self.number)}"


def end_at_once(*, hangups_wait: bool = False) -> None:
    """From here on Ctrl-C ends the process without a word; SIGTERM and SIGHUP, which nobody typed, with a sentence.

    Args:
        hangups_wait: SIGHUP is only remembered, for a command that asks `was_hung_up` once it can handle it.
    """
    global _had_terminal
    _had_terminal = _has_terminal()
    signal.signal(signal.SIGINT, end_quietly)
    on_hangup = _remember if hangups_wait else _end_with_a_sentence
    for number, handler in ((signal.SIGTERM, _end_with_a_sentence), (signal.SIGHUP, on_hangup)):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has SIGHUP
            signal.signal(number, handler)


def was_hung_up() -> bool:
    """Whether a SIGHUP has come that waits."""
    return _was_hung_up


def has_lost_its_terminal() -> bool:
    """Whether the process was started from a terminal that exists no more: the window or the ssh session has closed."""
    return _had_terminal and not _has_terminal()


def raise_stopped(same_signal_s: float = SAME_SIGNAL_S) -> None:
    """From here on Ctrl-C, SIGTERM and SIGHUP raise `Stopped` where they were `end_at_once`: the command cleans up.

    In another thread than the main one, which no signal reaches, it does nothing. A signal that comes while something
    is imported waits until that has ended.

    Args:
        same_signal_s: a signal that comes this soon after another is the same one, and raises nothing.
    """
    global _stops
    if threading.current_thread() is not threading.main_thread():
        return
    _stops = EndingSignals(same_signal_s)
    for number in ENDINGS:
        if signal.getsignal(number) in (end_quietly, _end_with_a_sentence):
            signal.signal(number, _stop)


@contextlib.contextmanager
def first_signal_calls(call: Callable[[Stopped | KeyboardInterrupt], object]) -> Iterator[None]:
    """While the block runs, the first signal that ends the command makes this call; a second one raises as usual.

    The handlers that there are decide what such a signal is: those of `raise_stopped` pass over copies, and they still
    do so after the block.

    Args:
        call: told what the signal would have raised.
    """
    usual = {number: handler for number in ENDINGS if callable(handler := signal.getsignal(number))}
    has_called = False

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal has_called
        try:
            usual[signal.Signals(number)](number, frame)
        except (Stopped, KeyboardInterrupt) as raised:
            if has_called:
                raise
            has_called = True
            call(raised)

    for number in usual:
        signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def tell(stop: Stopped) -> None:
    """Say that a signal has stopped the command, unless it has said so, or somebody typed Ctrl-C."""
    if not stop.is_told and stop.number != signal.SIGINT:
        with contextlib.suppress(OSError):  # nobody is left to read it
            _write_sentence(stop.number)


def stop_no_more() -> None:
    """From here on the signals that raised `Stopped` do nothing: the command is about to complete its work."""
    global _stops
    passes_over = EndingSignals(math.inf)  # every later signal is the same one as this
    passes_over.take(time.monotonic())
    _stops = passes_over


def drop_unread() -> bool:
    """Send what goes to a terminal that has closed to nowhere, because writing to it fails; whether there was one."""
    unread = [file for file in (1, 2) if _has_closed(file)]
    for file in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, file)
        os.close(nowhere)
    return bool(unread)


def change_nothing() -> None:
    """From here on Ctrl-C does nothing: the work is done, the exit status decided, and the process ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)


def end_by_itself() -> None:
    """From here on Ctrl-C and SIGTERM do nothing where they were `end_at_once`: what was asked for has happened."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) in (end_quietly, _end_with_a_sentence):
            signal.signal(number, signal.SIG_IGN)


def signal_name(number: int) -> str:
    """`SIGSEGV`, or `signal 35` for a signal that Python has no name for, such as most real-time signals."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _has_terminal() -> bool:
    """Whether there is a controlling terminal; the system takes it from a process when the terminal closes."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _has_closed(file: int) -> bool:
    """Whether this is a terminal that has closed; others, and files, give no error or another one."""
    try:
        os.get_terminal_size(file)
    except OSError as error:
        return error.errno == errno.EIO
    return False


def _stop(number: int, frame: FrameType | None) -> None:
    if _is_importing(frame):  # packages in C turn what is raised there into an ImportError of their own
        threading.Timer(_IMPORTING_S, os.kill, (os.getpid(), number)).start()
    elif _stops.take(time.monotonic()):
        drop_unread()  # or the report fails that a command ends with
        raise Stopped(number)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_filename != _IMPORTER:
        frame = frame.f_back
    return frame is not None


def _remember(number: int, frame: FrameType | None) -> None:
    global _was_hung_up
    _was_hung_up = True


def _write_sentence(number: int) -> None:
    os.write(2, f"instep was ended by {signal_name(number)}\n".encode())


def _end_with_a_sentence(number: int, frame: FrameType | None) -> None:
    try:
        _write_sentence(number)
    finally:  # whether or not there is anybody left to read it
        os._exit(128 + number)
