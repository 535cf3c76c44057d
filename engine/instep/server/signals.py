"""Signals as calls in the event loop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_call(interrupted: Callable[[], None]) -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM call `interrupted` in the running event loop, of the main thread.

    asyncio's own handlers cannot be taken off without a moment in which Ctrl-C raises wherever it meets the program.
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
