"""The load of one process: a closed loop, or an open loop measured from the scheduled send times."""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from instep_client.aio import AsyncClient, AsyncGroup
from instep_client.protocol.errors import ConnectionFailed, FramesRefused, InstepError, Refused
from instep_client.protocol.wire import F32
from instep_client.streams import ENDING
from instep_tools.load.plan import LoadPart, Schedule
from instep_tools.pacing import Clock, Stop, wait_until
from instep_tools.pipeline import task_group

F64 = npt.NDArray[np.float64]
SampleArray = npt.NDArray[np.void]
SAMPLE: Final = np.dtype(
    [
        ("at_s", "<f8"),  # when the answer came, in seconds after the warm-up
        ("latency_us", "<f8"),  # from when the block was due until the answer came; the sum of the five that follow:
        ("late_us", "<f8"),  # until this side began to send
        ("queue_us", "<f8"),  # the server's own split
        ("compute_us", "<f8"),
        ("send_us", "<f8"),
        ("rest_us", "<f8"),  # the wire, the client library, and a lost connection
        ("frames", "<f8"),
        ("own_us", "<f8"),  # this side's own share: until it began to send, and while it stood still afterwards
    ]
)
"""One block. The latency of an unanswered block is the time it had waited at the end, and its split is NaN."""

DRAIN_S: Final = 5.0
"""Answers that arrive later than this after the last send do not count."""
LEAD_S: Final = 0.05
"""The time from the last opening to the first send."""
GRACE_S: Final = 0.25
"""The time after the end in which an open loop may still send overdue blocks; the rest counts as not sent."""
OPENINGS: Final = 16
"""The number of groups opened at once, because the server refuses too many requests on streams."""
BEAT_S: Final = 0.005
"""The interval at which a process checks whether it stood still."""
STALL_S: Final = 0.002
"""Shorter stalls are within the precision of timers."""

Connect = Callable[[], AbstractAsyncContextManager[AsyncClient]]


@dataclass
class PartResult:
    """The measurements of one process after the warm-up."""

    samples: SampleArray
    refused: Counter[str] = field(default_factory=Counter)
    """The number of refused frames by the name of the code."""
    unanswered: int = 0
    """The number of frames sent but not answered in time; they are in `samples`."""
    unsent: int = 0
    """The number of due frames that this side was too late to send; they are not in `samples`."""
    stopped: bool = False
    lost: str = ""
    """The reason that it ended early: the server or its streams are gone."""


@dataclass(frozen=True, slots=True)
class _Sender:
    """A group of streams, and the block that it sends repeatedly."""

    group: AsyncGroup
    x: F32

    @property
    def frames(self) -> int:
        return len(self.x[0])


@dataclass
class Load:
    """Runs one part."""

    part: LoadPart
    connect: Connect
    clock: Clock
    stop: Stop
    _start: float = 0.0
    _counted_from: float = 0.0
    _end: float = 0.0
    _samples: array[float] = field(default_factory=lambda: array("d"))
    _refused: Counter[str] = field(default_factory=Counter)
    _clients: list[AsyncClient] = field(default_factory=list)
    _stalls: list[tuple[float, float]] = field(default_factory=list)
    _waiting: set[asyncio.Task[None]] = field(default_factory=set)
    _left: list[tuple[float, float, int]] = field(default_factory=list)
    """Due time, send time and frames of each block given up without an answer."""
    _unsent: int = 0

    async def run(self, ready: Callable[[], Awaitable[float]], drain_s: float = DRAIN_S) -> PartResult:
        """Connect, open, call `ready` for the start time, send, drain, close.

        It ends after its time and the drain, whatever the server does. It returns its measurements even if the
        connection is lost for good or the server has ended a stream.

        Raises:
            InstepError: nobody answers, or a stream cannot be opened.
        """
        plan, lost = self.part.plan, ""
        async with AsyncExitStack() as stack:
            senders = await self._open(stack)
            self._start = await ready()
            self._counted_from = self._start + plan.warmup_s
            self._end = self._counted_from + plan.duration_s
            stack.callback(asyncio.create_task(self._note_stalls()).cancel)
            try:
                async with task_group() as tasks:
                    if plan.rate_hz is None:
                        for sender in senders:
                            self._begin(tasks, self._send_again_and_again(sender))
                        drain_s += max(0.0, self._end - self.clock.now())
                    else:
                        schedule = Schedule(len(senders), 1 / plan.rate_hz, self.part.offset)
                        await self._send_when_due(senders, schedule, tasks)
                    if self._waiting:
                        await asyncio.wait(list(self._waiting), timeout=drain_s)
                    for task in list(self._waiting):
                        task.cancel()
            except InstepError as error:
                lost = str(error)
            drained = self.clock.now()
            if self._left and not lost and not all(client.is_connected for client in self._clients):
                lost = "the connection to the server was lost and did not come back"
        left = [block for block in self._left if block[0] >= self._counted_from]
        for due, sent, frames in left:
            self._add(due, sent, drained, frames, math.nan, math.nan, math.nan)
        return PartResult(
            samples=as_samples(self._samples, self._stalls),
            refused=+self._refused,
            unanswered=sum(frames for *_, frames in left),
            unsent=self._unsent,
            stopped=self.stop.requested,
            lost=lost,
        )

    async def _open(self, stack: AsyncExitStack) -> list[_Sender]:
        random = np.random.default_rng(0)
        by_connection: list[list[_Sender]] = []
        for connection, sizes in enumerate(self.part.connections):
            client = await stack.enter_async_context(self.connect())
            self._clients.append(client)
            names = iter(f"{self.part.name}-{connection}-{number}" for number in range(sum(sizes)))
            names_of = [[next(names) for _ in range(size)] for size in sizes]
            groups: list[AsyncGroup] = []
            for first in range(0, len(sizes), OPENINGS):
                groups += await asyncio.gather(*map(client.open_group, names_of[first : first + OPENINGS]))
            blocks = [random.standard_normal((1, size, client.info.features), np.float32) for size in sizes]
            by_connection.append([_Sender(group, x) for group, x in zip(groups, blocks, strict=True)])
        longest = max(map(len, by_connection))
        return [senders[turn] for turn in range(longest) for senders in by_connection if turn < len(senders)]

    def _begin(self, tasks: asyncio.TaskGroup, sending: Coroutine[None, None, None]) -> None:
        task = tasks.create_task(sending)
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _send_when_due(self, senders: list[_Sender], schedule: Schedule, tasks: asyncio.TaskGroup) -> None:
        sends = schedule.count(self._end - self._start)
        for number in range(sends):
            due = self._start + schedule.due_s(number)
            if due < self._counted_from <= self.clock.now():
                continue  # this side is late; what it did not send in the warm-up is not missed
            if not await wait_until(due, self.clock, self.stop):
                break
            if self.clock.now() > self._end + GRACE_S:
                self._unsent = sum(senders[left % len(senders)].frames for left in range(number, sends))
                break
            self._begin(tasks, self._send(senders[number % len(senders)], due))

    async def _send_again_and_again(self, sender: _Sender) -> None:
        await wait_until(self._start, self.clock, self.stop)
        while not self.stop.requested and (now := self.clock.now()) < self._end:
            await self._send(sender, now)

    async def _send(self, sender: _Sender, due: float) -> None:
        sent, counted = self.clock.now(), due >= self._counted_from
        try:
            answer = await sender.group.step_timed(sender.x)
        except FramesRefused as refused:
            if any(failure.code in ENDING for failure in refused.failures):
                raise
            frames = int(np.isnan(refused.outputs).any(axis=-1).sum())
            self._refused[refused.code.name] += frames * counted
        except Refused as refused:
            if refused.code in ENDING:
                raise
            self._refused[refused.code.name] += sender.frames * counted
        except (ConnectionFailed, asyncio.CancelledError):
            self._left.append((due, sent, sender.frames))
            raise
        else:
            if counted:
                split = (answer.queue_us, answer.compute_us, answer.send_us)
                self._add(due, sent, self.clock.now(), sender.frames, *split)

    def _add(self, due: float, sent: float, now: float, frames: int, *server_us: float) -> None:
        latency_us, late_us = 1e6 * (now - due), 1e6 * (sent - due)
        rest_us = latency_us - late_us - sum(server_us)
        at_s = now - self._counted_from
        self._samples.extend((at_s, latency_us, late_us, *server_us, rest_us, frames, late_us))

    async def _note_stalls(self) -> None:
        """Note when the event loop, and therefore the client library, did not get its turn."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(BEAT_S)
            stall_s = time.monotonic() - began - BEAT_S
            if stall_s > STALL_S:
                now = self.clock.now() - self._counted_from
                self._stalls.append((now - stall_s, now))


def as_samples(numbers: array[float], stalls: Sequence[tuple[float, float]] = ()) -> SampleArray:
    """The fields of samples, one sample after another, as an array of `SAMPLE`.

    `stalls` are the periods in which the process was stalled, in seconds after the warm-up, in order and without
    overlap. Stalls between the sending of a block and its answer are added to its `own_us`.
    """
    samples: SampleArray = np.frombuffer(numbers, SAMPLE).copy()
    if stalls:
        moments = np.array(stalls).ravel()
        passed = np.cumsum(np.diff(moments, prepend=moments[0]) * (np.arange(len(moments)) % 2))
        sent_s = samples["at_s"] - (samples["latency_us"] - samples["late_us"]) / 1e6
        samples["own_us"] += 1e6 * (np.interp(samples["at_s"], moments, passed) - np.interp(sent_s, moments, passed))
    return samples
