"""The front end without a transport: producers in the server's own process and event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from instep.core.admission import SENT_COLUMN
from instep.core.typing import F32, I64, U8, U64
from instep.frontends.models import Served
from instep.streaming.api import Frames, Grants, Names, Refusal, Reply, StatesRead, StreamEvent
from instep.streaming.service import ModelService
from instep_client.protocol.codes import HAVE_ALL

T = TypeVar("T")


class InProcessOrigin:
    """A producer in this process: the engine's operations, with this origin as the owner."""

    def __init__(self, frontend: InProcessFrontend) -> None:
        self.number = -1
        self.arrival = 0
        self.events: list[StreamEvent] = []
        """Events of its streams, oldest first."""
        self._frontend = frontend
        self._operations = frontend.service.operations
        self._replies: dict[int, asyncio.Future[Reply]] = {}
        self._next_tag = 0

    async def step(self, handles: U64, seqs: I64, acked: I64, x: F32) -> Reply:
        """Step T frames of N streams.

        Args:
            handles: uint64 [N].
            seqs: int64 [N], of the first timestep.
            acked: int64 [N], the outputs of all seqs below are not needed again.
            x: float32 [T, N, features].

        Raises:
            ValueError: the shape of `x` is not that of frames of this model.
            Refusal: the message was refused as a whole.
        """
        timesteps, width, features = x.shape
        wanted = self._frontend.service.engine.tables.x.shape[1]
        if not x.size or features != wanted:
            raise ValueError(f"x must be [T, N, {wanted}] with T and N of at least 1, not {x.shape}")
        columns = np.zeros(width, SENT_COLUMN)
        columns["handle"], columns["seq"], columns["acked"] = handles, seqs, acked
        self._next_tag += 1
        future = self._replies[self._next_tag] = asyncio.get_running_loop().create_future()
        memory = columns.data.cast("B"), np.ascontiguousarray(x, np.float32).data.cast("B")
        self._frontend.put(Frames.of(self, self._next_tag, timesteps, width, *memory, time.monotonic_ns()))
        reply: Reply = await future
        return reply

    async def open(self, names: Names, states: U8 | None = None, first_seqs: I64 | None = None) -> Grants:
        return await self._frontend.ask(lambda: self._operations.open(self, names, states, first_seqs))

    async def resume(self, names: Names, have: U64, epochs: U64, *, take_over: bool = False) -> Grants:
        return await self._frontend.ask(lambda: self._operations.resume(self, names, have, epochs, take_over))

    async def read_states(self, handles: U64) -> StatesRead:
        return await self._frontend.ask(lambda: self._operations.read_own_states(self, handles))

    async def close(self, handles: U64, have: U64 | None = None) -> StatesRead:
        """Close streams; their final states, with no seqs. See `StreamOperations.close`; None for all outputs."""
        have = np.full(len(handles), HAVE_ALL, np.uint64) if have is None else have
        states, codes = await self._frontend.ask(lambda: self._operations.close(self, handles, have))
        return StatesRead(np.zeros(len(codes), np.int64), states, codes)

    def deliver(self, reply: Reply) -> None:
        first = 0
        for index, (tag, width) in enumerate(reply.messages.T.tolist()):
            part = slice(first, first + width)
            first += width
            failures = None if reply.failures is None else reply.failures[:, part].copy()
            message = reply.messages[:, index : index + 1].copy()
            own = replace(reply, messages=message, y=reply.y[:, part].copy(), failures=failures)
            if not (future := self._replies.pop(tag)).done():  # the caller may have been cancelled
                future.set_result(own)

    def refuse(self, tag: int, refusal: Refusal) -> None:
        if not (future := self._replies.pop(tag)).done():
            future.set_exception(refusal)

    def notify(self, event: StreamEvent) -> None:
        self.events.append(event)

    def check_quota(self, streams: int) -> None:
        """See `Origin`."""


class InProcessFrontend:
    """Takes what origins in this process send to one model, in order; `wake` lets the loop take a turn."""

    signal_fd = None
    is_paused = False
    endpoint = "in this process"

    def __init__(self, service: ModelService, wake: Callable[[], None]) -> None:
        self.service = service
        self._wake = wake
        self._arrived: deque[Frames | Callable[[], Coroutine[Any, Any, None]]] = deque()

    def admit(self, principals: object) -> int:
        return 0

    def connect(self) -> InProcessOrigin:
        """A new origin.

        Raises:
            RuntimeError: too many origins are connected.
        """
        origin = InProcessOrigin(self)
        if not self.service.engine.origins.connect(origin):
            raise RuntimeError("limits.max_connections origins are connected")
        return origin

    def disconnect(self, origin: InProcessOrigin) -> None:
        """An origin leaves; its streams are parked or closed."""
        self.service.reaper.detach(origin)

    def put(self, frames: Frames) -> None:
        """A message of frames has arrived."""
        self._arrived.append(frames)
        self._wake()

    async def ask(self, request: Callable[[], Awaitable[T]]) -> T:
        """Begin a request behind everything that has arrived; its result."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                result = await request()
            except Refusal as refusal:
                if not future.done():  # the caller may have been cancelled
                    future.set_exception(refusal)
            else:
                if not future.done():
                    future.set_result(result)

        self._arrived.append(run)
        self._wake()
        return await future

    @property
    def is_readable(self) -> bool:
        return bool(self._arrived)

    def receive(self, budget_ns: int) -> bool:
        has_arrived = bool(self._arrived)
        while self._arrived:
            arrived = self._arrived.popleft()
            if not isinstance(arrived, Frames):
                self.service.tasks.start(arrived())
                break
            self.service.engine.submit(arrived)
        return has_arrived

    def tick(self, now_ns: int) -> None:
        pass

    def added(self, served: Served) -> None:
        pass

    def removed(self, served: Served, reason: str) -> None:
        pass

    def moved(self, former: Served, served: Served) -> None:
        pass

    def used(self) -> dict[str, dict[str, float]]:
        return {}

    def drain(self, *, asks: bool) -> bool:
        return not self._arrived

    def say_goodbye(self, reason: str) -> None:
        pass

    def close(self) -> None:
        pass
