"""Blocks in flight: sent without waiting for earlier answers, which are delivered in the order of sending."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from instep_client.aio import AsyncGroup
from instep_client.protocol.errors import FrameFailure, FramesRefused, Refused, StreamEvicted
from instep_client.protocol.wire import F32
from instep_tools.plan import Rows

Key = TypeVar("Key")
Call = Callable[[], Coroutine[Any, Any, F32]]

DEPTH: Final = 64
"""The most blocks in flight; sending waits at this number."""


@asynccontextmanager
async def pipeline(
    take: Callable[[Key, F32 | Refused], object], depth: int = DEPTH
) -> AsyncIterator[Callable[[Key, Call], Awaitable[None]]]:
    """Start calls of the client in order, and pass the outputs or the refusal of each to `take`.

    The block receives `send(key, call)`, which starts the call and waits only while `depth` others are in flight. At
    the end of the block, all answers have been passed on.

    Raises:
        InstepError: as the calls do, except `Refused`.
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
    """A TaskGroup that raises its first failure instead of an exception group."""
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


class LivingGroup:
    """A group that continues with its other streams when the server ends some.

    Attributes:
        ended: bool [N], the streams that the server has ended.
    """

    def __init__(self, group: AsyncGroup, outputs: int) -> None:
        self._group = group
        self.ended: npt.NDArray[np.bool_] = np.zeros(len(group), np.bool_)
        self._outputs = outputs
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def step(self, x: F32, rows: Rows) -> F32:
        """Step the streams that are still open.

        Args:
            x: float32 [T, N, features].
            rows: [N], indices of the streams.

        Returns:
            float32 [T, N, outputs].

        Raises:
            FramesRefused: when some frames were not applied, or some streams have ended; its `outputs` contain the
                others'.
        """
        self._under_way += 1
        self._idle.clear()
        try:
            return await self._step(x, rows)
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def close(self) -> None:
        """Close the group after all pending steps. Streams that the server ended were reported with their frames."""
        await self._idle.wait()
        with suppress(Refused):
            await self._group.close()

    async def _step(self, x: F32, rows: Rows) -> F32:
        living: npt.NDArray[np.bool_] = np.ones(len(rows), np.bool_)
        y = np.full((*x.shape[:2], self._outputs), np.nan, np.float32)
        why: Refused | None = None
        failures: tuple[FrameFailure, ...] = ()
        while living.any():
            try:
                y[:, living] = await self._group.step(x[:, living], rows=rows[living])
            except StreamEvicted as ended:
                row = self._group.names.index(ended.stream)
                self.ended[row] = True
                why = why or ended
                if ended.outputs is not None:
                    y[:, living] = ended.outputs
                    failures += ended.failures
                    break
                living[np.flatnonzero(rows == row)] = False
                seq = int(self._group.next_seqs[row])
                failures += (FrameFailure(ended.stream, seq, ended.code, seq),)
                continue  # nothing was sent: the others go without it, before anything else is sent
            except FramesRefused as refused:
                y[:, living] = refused.outputs
                failures += refused.failures
                why = why or refused
            break
        if why is not None:
            raise FramesRefused(why.code, why.sentence, failures, y)
        return y
