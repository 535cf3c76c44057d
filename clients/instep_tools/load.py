"""Load on a server from one process: closed loop, or open loop measured from the scheduled send time."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Protocol

import numpy as np

from instep_client.protocol.errors import FramesRefused, InstepError, Refused
from instep_client.protocol.wire import F32, ServerInfo
from instep_client.streams import ENDING
from instep_tools.pacing import Clock, OpenLoop, Stop, wait_until
from instep_tools.pipeline import task_group
from instep_tools.samples import SampleArray, Samples

DRAIN_S: Final = 5.0
"""How long after the last send the answers may still take; what comes later counts as unanswered."""

LEAD_S: Final = 0.05
"""From everything being open to the first send."""

GRACE_S: Final = 0.25
"""How long after the end an open loop may still send what was due before; the rest counts as not sent."""


class Mode(StrEnum):
    """How a load is made."""

    CLOSED = "closed"
    """The next block of a group goes out when the one before it is answered."""
    OPEN = "open"
    """Blocks go out when they are due, whatever the answers do."""


class TimedAnswer(Protocol):
    """An answered block and the server's split of its time."""

    @property
    def queue_us(self) -> int:
        """Until its last step began."""
        ...

    @property
    def compute_us(self) -> int:
        """That step."""
        ...

    @property
    def send_us(self) -> int:
        """Until the reply was handed to the socket."""
        ...


class LoadGroup(Protocol):
    """What the load needs of a group of streams."""

    async def step_timed(self, x: F32, /) -> TimedAnswer:
        """Send float32 [T, N, features] and wait for the answer."""
        ...

    async def close(self) -> object:
        """Close its streams."""
        ...


class LoadClient(Protocol):
    """What the load needs of a connection."""

    @property
    def info(self) -> ServerInfo:
        """What the server said of itself."""
        ...

    async def open_group(self, names: Sequence[str], /) -> LoadGroup:
        """Open streams."""
        ...


Connect = Callable[[], AbstractAsyncContextManager[LoadClient]]


@dataclass(frozen=True, slots=True)
class LoadPart:
    """What one process does of a load test."""

    name: str
    """The streams are called after it."""
    connections: tuple[tuple[int, ...], ...]
    """For each connection the numbers of streams of its groups; each group sends one block at a time."""
    steps: int
    """Timesteps a block."""
    mode: Mode
    rate_hz: float
    """Frames a second for each stream in an open loop."""
    warmup_s: float
    duration_s: float
    offset: float = 0.0
    """Where this process's sends lie between those of the others, see `OpenLoop`."""
    slo_us: float = math.inf
    """The time within which 99 % of the frames are to be answered."""
    most_slow: float = math.inf
    """How many frames may take longer; with more the level is missed, and the test ends."""
    drain_s: float = DRAIN_S


@dataclass
class PartResult:
    """What one process measured."""

    samples: SampleArray
    """Of the blocks due after the warm-up."""
    refused: Counter[str] = field(default_factory=Counter)
    """Frames that were refused after the warm-up, by the code's name."""
    unanswered: int = 0
    """Frames that were due but not answered in time; in `samples` with the time they had waited by then."""
    unsent: int = 0
    """Frames that were due and that this side was too late to send."""
    stopped: bool = False
    gave_up: bool = False
    """Whether it ended because the service level could not be met any more."""
    lost: str = ""
    """Why it ended before its time: the server or its streams are gone."""


class Load:
    """Runs one part. `answered` counts frames while it runs, the warm-up included."""

    def __init__(self, part: LoadPart, connect: Connect, clock: Clock, stop: Stop) -> None:
        self.answered = 0
        self._part = part
        self._connect = connect
        self._clock = clock
        self._stop = stop
        self._start = 0.0
        self._counted_from = 0.0
        self._refused: Counter[str] = Counter()
        self._samples = Samples(self._expected_samples())
        self._slow = self._unsent = 0

    async def run(self, ready: Callable[[], Awaitable[float]]) -> PartResult:
        """Connect, open, call `ready` for the moment of the start, send, drain, close.

        It ends when its time is over and the drain is, whatever the server does, and gives what it has measured when
        the connection is lost or a stream has ended at the server, as all have when it was started anew.

        Raises:
            InstepError: when nobody answers, or a stream cannot be opened.
        """
        unanswered, lost = 0, ""
        async with AsyncExitStack() as stack:
            groups = await self._open(stack)
            self._start = await ready()
            self._counted_from = self._start + self._part.warmup_s
            send = self._send_open_loop if self._part.mode is Mode.OPEN else self._send_closed_loop
            try:
                async with task_group() as tasks:
                    unanswered = await send(groups, tasks)
                if not unanswered:
                    for group, _ in groups:
                        await group.close()
            except InstepError as error:
                lost = str(error)
        return PartResult(
            samples=self._samples.array(),
            refused=+self._refused,
            unanswered=unanswered,
            unsent=self._unsent,
            stopped=self._stop.requested,
            gave_up=self._has_given_up,
            lost=lost,
        )

    @property
    def _end(self) -> float:
        return self._counted_from + self._part.duration_s

    @property
    def _has_given_up(self) -> bool:
        return self._slow > self._part.most_slow

    def _expected_samples(self) -> int:
        groups = sum(len(sizes) for sizes in self._part.connections)
        if self._part.mode is Mode.OPEN:
            return int(groups * self._part.duration_s * self._part.rate_hz / self._part.steps) + groups
        return 65_536

    async def _open(self, stack: AsyncExitStack) -> list[tuple[LoadGroup, F32]]:
        """All groups, those of different connections in turn, each with the block it sends."""
        part = self._part
        random = np.random.default_rng(0)
        by_connection: list[list[tuple[LoadGroup, F32]]] = []
        for connection, sizes in enumerate(part.connections):
            client = await stack.enter_async_context(self._connect())
            groups: list[tuple[LoadGroup, F32]] = []
            first = 0
            for size in sizes:
                names = [f"{part.name}-{connection}-{number}" for number in range(first, first + size)]
                first += size
                shape = (part.steps, size, client.info.features)
                groups.append((await client.open_group(names), random.standard_normal(shape, np.float32)))
            by_connection.append(groups)
        longest = max(len(groups) for groups in by_connection)
        return [groups[turn] for turn in range(longest) for groups in by_connection if turn < len(groups)]

    async def _send_open_loop(self, groups: list[tuple[LoadGroup, F32]], tasks: asyncio.TaskGroup) -> int:
        part = self._part
        schedule = OpenLoop(len(groups), part.steps / part.rate_hz, part.offset)
        waiting: dict[asyncio.Task[None], tuple[float, int]] = {}
        sends = schedule.count(part.warmup_s + part.duration_s)
        for number in range(sends):
            due = self._start + schedule.due_s(number)
            if due < self._counted_from <= self._clock.now():
                continue  # this side is late; what it did not send in the warm-up is not missed
            if not await wait_until(due, self._clock, self._stop) or self._has_given_up:
                break
            if self._clock.now() > self._end + GRACE_S:
                late = [schedule.sender(each) for each in range(number, sends) if schedule.due_s(each) >= part.warmup_s]
                self._unsent = sum(_frames(groups[sender][1]) for sender in late)
                break
            group, x = groups[schedule.sender(number)]
            task = tasks.create_task(self._send(group, x, due))
            waiting[task] = due, _frames(x)
            task.add_done_callback(waiting.pop)
        return await self._drain(waiting, part.drain_s)

    async def _drain(self, waiting: dict[asyncio.Task[None], tuple[float, int]], timeout_s: float) -> int:
        """Wait for the last answers; the number of frames that got none in time."""
        if waiting:
            await asyncio.wait(list(waiting), timeout=timeout_s)
        unanswered = 0
        for task, (due, frames) in list(waiting.items()):
            task.cancel()
            if due >= self._counted_from:
                unanswered += frames
                self._sample(due, math.nan, math.nan, math.nan, math.nan, frames)
        return unanswered

    async def _send_closed_loop(self, groups: list[tuple[LoadGroup, F32]], tasks: asyncio.TaskGroup) -> int:
        await wait_until(self._start, self._clock, self._stop)
        waiting: dict[asyncio.Task[None], tuple[float, int]] = {}

        async def send_again_and_again(group: LoadGroup, x: F32) -> None:
            task = asyncio.current_task()
            assert task is not None
            while not self._stop.requested and (now := self._clock.now()) < self._end:
                waiting[task] = now, _frames(x)
                await self._send(group, x, now)
            waiting.pop(task, None)

        for group, x in groups:
            waiting[tasks.create_task(send_again_and_again(group, x))] = self._start, 0
        return await self._drain(waiting, max(0.0, self._end - self._clock.now()) + self._part.drain_s)

    async def _send(self, group: LoadGroup, x: F32, due: float) -> None:
        counted = due >= self._counted_from
        late_us = (self._clock.now() - due) * 1e6
        try:
            answer = await group.step_timed(x)
        except FramesRefused as refused:
            if any(failure.code in ENDING for failure in refused.failures):
                raise
            frames = int(np.isnan(refused.outputs).any(axis=-1).sum())
            self._refused[refused.code.name] += frames * counted
        except Refused as refused:
            if refused.code in ENDING:
                raise
            self._refused[refused.code.name] += _frames(x) * counted
        else:
            self.answered += _frames(x)
            if counted:
                self._sample(due, late_us, answer.queue_us, answer.compute_us, answer.send_us, _frames(x))

    def _sample(
        self, due: float, late_us: float, queue_us: float, compute_us: float, send_us: float, frames: int
    ) -> None:
        now = self._clock.now()
        latency_us = (now - due) * 1e6
        if latency_us > self._part.slo_us:
            self._slow += frames
        self._samples.add(now - self._counted_from, late_us, latency_us, queue_us, compute_us, send_us, frames)


def _frames(x: F32) -> int:
    steps, streams, _ = x.shape
    return int(steps * streams)
