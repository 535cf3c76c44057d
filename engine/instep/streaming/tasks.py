"""Starts and counts coroutines that run next to the loop, and lets them wait until a condition holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from instep_client.daemon_thread import begin_in_thread

R = TypeVar("R")


async def in_daemon_thread(work: Callable[[], R], name: str) -> R:
    """Return the result of `work`, or raise its exception; its thread does not keep the process from ending.

    A forced end of the process waits for the threads of `asyncio.to_thread`, but not for these.
    """
    return await asyncio.wrap_future(begin_in_thread(work, name))


class Tasks:
    """Starts coroutines in order; each runs up to its first wait before the loop continues.

    `on_bug` is called with an exception that a coroutine raised, because clients may be waiting for its result.
    """

    def __init__(self, on_bug: Callable[[BaseException], None]) -> None:
        self._on_bug = on_bug
        self._tasks: set[asyncio.Task[None]] = set()
        self._unbegun = 0

    def __len__(self) -> int:
        return len(self._tasks)

    @property
    def are_beginning(self) -> bool:
        """Whether a started coroutine has not yet run up to its first wait."""
        return self._unbegun > 0

    def start(self, coroutine: Coroutine[Any, Any, None], on_end: Callable[[], None] = lambda: None) -> None:
        """Run a coroutine from the loop's next iteration on; then call `on_end`, even if it never began."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(coroutine)
        self._unbegun += 1
        loop.call_soon(self._begun)  # right behind the task's first part
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: on_end())

    def _begun(self) -> None:
        self._unbegun -= 1

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_bug(error)

    def cancel(self) -> None:
        """Cancel all coroutines, because the server ends."""
        for task in list(self._tasks):
            task.cancel()


class Waiters:
    """Coroutines that wait until a predicate holds; `check` lets those proceed whose predicate holds.

    Each check evaluates every predicate that is waited for, so the number of waiting coroutines must be bounded.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._count = 0

    def __len__(self) -> int:
        """The number of coroutines that wait, or may proceed and have not run yet."""
        return self._count

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return as soon as the predicate holds, at once if it does already.

        It may not hold any more when the coroutine runs, unless the caller prevents that.
        """
        if not holds():
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((holds, future))
            self._count += 1
            try:
                await future
            finally:
                self._count -= 1

    def check(self) -> None:
        """Check the predicates after a change."""
        if not self._waiting:
            return
        still_waiting = []
        for holds, future in self._waiting:
            if future.done():  # its coroutine was cancelled
                continue
            if holds():
                future.set_result(None)
            else:
                still_waiting.append((holds, future))
        self._waiting = still_waiting
