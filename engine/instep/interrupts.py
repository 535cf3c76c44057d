"""What Ctrl-C does: nothing but end the process at once, until a command handles it in order.

Python's own way, an exception anywhere, is swallowed or printed at length when it comes while large packages are
imported, or while the process ends.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130
"""The exit status, as shells have it."""


def end_at_once() -> None:
    """From here on Ctrl-C ends the process without a word."""
    signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """From here on Ctrl-C raises where it was `end_at_once`: the command that runs now cleans up behind itself."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def change_nothing() -> None:
    """From here on Ctrl-C does nothing: the work is done, the exit status decided, and the process ends by itself."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def interrupts_call(interrupted: Callable[[], None]) -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM call `interrupted` in the running event loop.

    asyncio's own handlers cannot be taken off without a moment in which Ctrl-C raises.
    """
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(interrupted)

    waker, wakes = socket.socketpair()  # a signal that comes just before the loop sleeps must wake it
    with waker, wakes:
        waker.setblocking(False)
        wakes.setblocking(False)
        loop.add_reader(waker, waker.recv, 4096)
        before_fd = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            loop.remove_reader(waker)


def _end(number: int, frame: FrameType | None) -> None:
    if sys.stderr is not None and sys.stderr.isatty():
        os.write(2, b"\n")  # behind the terminal's ^C
    os._exit(INTERRUPTED)
