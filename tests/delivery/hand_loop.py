"""An event loop without a clock, sockets or threads: callbacks run one at a time, in order, when a test says so."""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVarTuple

Ts = TypeVarTuple("Ts")


class HandLoop(asyncio.AbstractEventLoop):
    """As much of an event loop as futures and tasks need; asyncio's class raises NotImplementedError for the rest."""

    def __init__(self) -> None:
        self._ready: deque[tuple[asyncio.Handle, Callable[[], object]]] = deque()
        self._former: list[asyncio.AbstractEventLoop | None] = []

    @property
    def is_idle(self) -> bool:
        """Whether no callback waits."""
        return not self._ready

    def run_one(self) -> bool:
        """Run the oldest callback, while this is the running loop; whether there was any."""
        if not self._ready:
            return False
        handle, call = self._ready.popleft()
        if not handle.cancelled():
            call()
        return True

    def __enter__(self) -> None:
        """This is the running loop from now on."""
        self._former.append(asyncio._get_running_loop())
        asyncio._set_running_loop(self)

    def __exit__(self, *error: object) -> None:
        """The one before is again."""
        asyncio._set_running_loop(self._former.pop())

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        context = context or contextvars.copy_context()
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append((handle, partial(context.run, callback, *args)))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        return asyncio.Task(coro, loop=self, **options)

    def add_reader(self, fd: Any, callback: Callable[[*Ts], object], *args: *Ts) -> None:
        """Nothing ever becomes readable."""

    def remove_reader(self, fd: Any) -> bool:
        return False

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Tasks that never end tell it, as they do when a violation ends an example; errors come out of `run_one`."""
