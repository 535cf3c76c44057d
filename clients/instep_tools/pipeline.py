"""Blocks on their way: sent without waiting for each other's answers, and handed over in the order of sending."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from instep_client.protocol.errors import Refused
from instep_client.protocol.wire import F32

Key = TypeVar("Key")
Call = Callable[[], Coroutine[Any, Any, F32]]

DEPTH: Final = 64
"""Blocks that may be on their way at once; sending waits when there are more."""


@asynccontextmanager
async def pipeline(
    take: Callable[[Key, F32 | Refused], None], depth: int = DEPTH
) -> AsyncIterator[Callable[[Key, Call], Awaitable[None]]]:
    """Start calls of the client in order, and hand each one's outputs, or why they were refused, to `take`.

    The block gets `send(key, call)`, which starts the call and waits only while `depth` others are on their way. When
    the block ends, all answers have been taken.

    Raises:
        InstepError: as the calls do, but for `Refused`.
    """
    answers: asyncio.Queue[tuple[Key, asyncio.Task[F32 | Refused]] | None] = asyncio.Queue(depth)

    async def take_in_order() -> None:
        while (entry := await answers.get()) is not None:
            key, answer = entry
            take(key, await answer)

    async with task_group() as tasks:
        tasks.create_task(take_in_order())

        async def send(key: Key, call: Call) -> None:
            await answers.put((key, tasks.create_task(_outcome(call))))

        yield send
        await answers.put(None)


@asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A TaskGroup that raises the first failure itself, not a group of them."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _outcome(call: Call) -> F32 | Refused:
    try:
        return await call()
    except Refused as refused:
        return refused
