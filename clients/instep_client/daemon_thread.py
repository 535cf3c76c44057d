"""Work in a thread that does not keep the process from ending, unlike the threads of `concurrent.futures`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

R = TypeVar("R")


def begin_in_thread(work: Callable[[], R], name: str) -> Future[R]:
    """Begin to call `work` in a daemon thread, and return the future of its result; it cannot be cancelled."""
    result: Future[R] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return result
