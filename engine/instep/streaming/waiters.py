"""Waiting for something about streams to become true, without a callback for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Waiters:
    """Coroutines that wait until a predicate holds; `check` lets those proceed whose time has come.

    Each check evaluates every predicate that is waited for, so the number of waiting coroutines must be bounded.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Return as soon as the predicate holds, at once if it does already.

        Whatever it depends on may have changed again when the coroutine runs, unless the caller has arranged that it
        cannot.
        """
        if not holds():
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((holds, future))
            await future

    def check(self) -> None:
        """Something has changed."""
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
