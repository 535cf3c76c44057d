"""Coroutines that run beside the loop, counted and never forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Tasks:
    """Starts coroutines in order; each runs up to its first wait before whatever the loop does next.

    Args:
        on_bug: told of an exception that a coroutine raised: clients may wait for what it did not do.
    """

    def __init__(self, on_bug: Callable[[BaseException], None]) -> None:
        self._on_bug = on_bug
        self._tasks: set[asyncio.Task[None]] = set()
        self._unbegun = 0

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def are_beginning(self) -> bool:
        """Whether a coroutine was started that has not run up to its first wait yet."""
        return self._unbegun > 0

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine from the loop's next iteration on."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(coroutine)
        self._unbegun += 1
        loop.call_soon(self._begun)  # right behind the task's first part
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _begun(self) -> None:
        self._unbegun -= 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_bug(error)

    def cancel(self) -> None:
        """Cancel everything that runs: the server ends."""
        for task in list(self._tasks):
            task.cancel()
