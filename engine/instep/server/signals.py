"""Signals as calls in the event loop, or as a cancellation."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from instep.interrupts import Stopped, first_signal_calls

R = TypeVar("R")


def run_cancellable(work: Coroutine[Any, Any, R]) -> R:
    """`asyncio.run`, in the main thread: the first signal that ends the command cancels the work, which may clean up.

    Raises:
        Stopped: once the work has ended that was cancelled; or KeyboardInterrupt, from Python's own handler of SIGINT.
    """
    stop: Stopped | KeyboardInterrupt | None = None

    async def cancellable() -> R:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel(raised: Stopped | KeyboardInterrupt) -> None:
            nonlocal stop
            stop = raised
            loop.call_soon_threadsafe(task.cancel)

        with first_signal_calls(cancel):
            return await work

    try:
        return asyncio.run(cancellable())
    finally:
        if stop is not None:  # whatever else came of it
            raise stop


@contextmanager
def signals_call(calls: Mapping[signal.Signals, Callable[[float], None]]) -> Iterator[None]:
    """While the block runs, each of these signals makes its call in the running loop, of the main thread.

    A call is told when its signal came, by `time.monotonic`: the loop may be held up.

    One that is ignored stays ignored, as SIGHUP under nohup.

    asyncio's own handlers cannot be taken off without a moment in which Ctrl-C raises wherever it meets the program.
    """
    loop = asyncio.get_running_loop()

    def on_signal(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(calls[signal.Signals(number)], time.monotonic())

    waker, wakes = socket.socketpair()  # a signal that comes just before the loop sleeps must wake it
    with waker, wakes:
        waker.setblocking(False)
        wakes.setblocking(False)
        loop.add_reader(waker, waker.recv, 4096)
        before_fd = signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        heard = [number for number in calls if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            loop.remove_reader(waker)
