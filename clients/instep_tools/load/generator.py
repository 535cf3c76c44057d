"""The load of one process: closed loop, or open loop measured from the scheduled send time."""

from __future__ import annotations

import asyncio
import ctypes
import math
import time
from array import array
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from instep_client.aio import AsyncClient
from instep_client.aio_streams import AsyncGroup
from instep_client.protocol.errors import ConnectionFailed, FramesRefused, InstepError, Refused
from instep_client.protocol.wire import F32
from instep_client.streams import ENDING
from instep_tools.load.plan import LoadPart, Mode, Schedule
from instep_tools.load.samples import SampleArray, as_samples, held_up_us
from instep_tools.pacing import Clock, Stop, wait_until
from instep_tools.pipeline import task_group

DRAIN_S: Final = 5.0
"""How long after the last send the answers may still take; what comes later counts as unanswered."""
PING_S: Final = 2.0
"""How long a server that has left frames unanswered may take to answer anything."""
LEAD_S: Final = 0.05
"""From everything being open to the first send."""
GRACE_S: Final = 0.25
"""How long after the end an open loop may still send what was due before; the rest counts as not sent."""
OPENINGS: Final = 16
"""Groups that are opened at once: the server refuses too many requests on streams."""
LEAST_GAP_S: Final = 0.001
"""Another connection takes longer than this, so that there is none to look for between answers that came faster."""
BEAT_S: Final = 0.005
"""How often a process finds out whether it stood still."""
STALL_S: Final = 0.002
"""Shorter ones are the grain of its timers."""
JUDGE_S: Final = 0.1
"""How often an open loop finds out whether its service level can still be met."""

Connect = Callable[[], AbstractAsyncContextManager[AsyncClient]]


@dataclass
class PartResult:
    """What one process measured after the warm-up."""

    samples: SampleArray
    refused: Counter[str] = field(default_factory=Counter)
    """Frames that were refused, by the code's name."""
    unanswered: int = 0
    """Frames that were due but not answered in time; in `samples` with the time they had waited by then."""
    unsent: int = 0
    """Frames that were due and that this side was too late to send; in `samples` as well."""
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """From the last answer before a connection was lost to the first one after, or to the end, in seconds after the
    warm-up."""
    gone: int = 0
    """How many of the gaps last to the end: the server did not come back."""
    stopped: bool = False
    gave_up: bool = False
    """Whether it ended because the service level could not be met any more."""
    lost: str = ""
    """Why it ended before its time: the server or its streams are gone."""


class _Line:
    """A connection, and the times in which it was lost.

    A stream gets another epoch with every connection, so one of its streams tells of it.
    """

    def __init__(self, group: AsyncGroup) -> None:
        self.gaps: list[tuple[float, float]] = []
        self.heard_at = -math.inf
        self._group = group
        self._epoch = int(group.epochs[0])

    def hear(self, now: float) -> None:
        """An answer came."""
        if now - self.heard_at > LEAST_GAP_S:
            epoch = int(self._group.epochs[0])
            if epoch != self._epoch:
                self._epoch = epoch
                self.lose(now)
        self.heard_at = now

    def lose(self, now: float) -> None:
        """There has been no connection since the last answer."""
        self.gaps.append((self.heard_at, now))

    def lost_s(self, since: float, until: float) -> float:
        """How much of a time there was no connection."""
        return sum(max(0.0, min(end, until) - max(start, since)) for start, end in self.gaps)


@dataclass(frozen=True, slots=True)
class _Sender:
    """A group of streams and the block that it sends again and again."""

    group: AsyncGroup
    line: _Line
    x: F32

    @property
    def frames(self) -> int:
        """Of one block."""
        steps, streams, _ = self.x.shape
        return int(steps * streams)


@dataclass(slots=True, eq=False)
class _Block:
    """A block on its way."""

    due: float
    frames: int
    line: _Line
    sent: float = math.nan
    """When the client library began to send."""
    answered: bool = False


@dataclass
class Load:
    """Runs one part."""

    part: LoadPart
    connect: Connect
    clock: Clock
    stop: Stop
    answered: ctypes.c_uint64 = field(default_factory=ctypes.c_uint64)
    """Counts frames while it runs, the warm-up included."""
    ping_s: float = PING_S
    _start: float = 0.0
    _counted_from: float = 0.0
    _end: float = 0.0
    _samples: array[float] = field(default_factory=lambda: array("d"))
    _refused: Counter[str] = field(default_factory=Counter)
    _clients: list[AsyncClient] = field(default_factory=list)
    _lines: list[_Line] = field(default_factory=list)
    _stalls: list[tuple[float, float]] = field(default_factory=list)
    _waiting: dict[asyncio.Task[None], _Block] = field(default_factory=dict)
    _left: list[_Block] = field(default_factory=list)
    """Blocks that were given up without an answer."""
    _slow: int = 0
    _unsent: int = 0
    _gave_up: bool = False

    async def run(self, ready: Callable[[], Awaitable[float]], drain_s: float = DRAIN_S) -> PartResult:
        """Connect, open, call `ready` for the moment of the start, send, drain, close.

        It ends when its time is over and the drain is, whatever the server does, and gives what it has measured when
        the connection is lost for good or a stream has ended at the server.

        Raises:
            InstepError: when nobody answers, or a stream cannot be opened.
        """
        lost, is_gone = "", False
        async with AsyncExitStack() as stack:
            senders = await self._open(stack)
            self._start = await ready()
            self._counted_from = self._start + self.part.plan.warmup_s
            self._end = self._counted_from + self.part.plan.duration_s
            if self.part.plan.slo_ms is not None:
                stack.callback(asyncio.create_task(self._note_stalls()).cancel)
            send = self._send_open_loop if self.part.plan.mode is Mode.OPEN else self._send_closed_loop
            try:
                async with task_group() as tasks:
                    await send(senders, tasks)
                    await self._drain(max(0.0, self._end - self.clock.now()) * self._is_closed + drain_s)
                drained = self.clock.now()
                if self._left:
                    lost = await self._find_loss()
                    is_gone = bool(lost)
            except InstepError as error:
                drained, lost, is_gone = self.clock.now(), str(error), isinstance(error, ConnectionFailed)
        if is_gone:
            for line in self._lines:
                line.lose(drained)
        unanswered = self._add_unanswered(drained, is_gone)
        samples = as_samples(self._samples)
        stalls = [(start - self._counted_from, end - self._counted_from) for start, end in self._stalls]
        samples["held_up_us"] = held_up_us(samples, stalls)
        gaps = [gap for line in self._lines for gap in line.gaps if self._counted_from < gap[1] and gap[0] < self._end]
        return PartResult(
            samples=samples,
            refused=+self._refused,
            unanswered=unanswered,
            unsent=self._unsent,
            gaps=[
                (max(0.0, start - self._counted_from), min(end, self._end) - self._counted_from) for start, end in gaps
            ],
            gone=sum(line.gaps[-1] in gaps for line in self._lines) if is_gone else 0,
            stopped=self.stop.requested,
            gave_up=self._gave_up,
            lost=lost,
        )

    async def _find_loss(self) -> str:
        """Why frames were not answered, if it is because the server is gone."""
        try:
            async with asyncio.timeout(self.ping_s):
                for client in self._clients:
                    await client.ping()
        except TimeoutError:
            if all(line.heard_at < self._counted_from for line in self._lines):
                return "the server went away during the warm-up"
            return "the server does not answer any more"
        return ""

    @property
    def _is_closed(self) -> bool:
        return self.part.plan.mode is Mode.CLOSED

    async def _open(self, stack: AsyncExitStack) -> list[_Sender]:
        """All groups, those of different connections in turn."""
        random = np.random.default_rng(0)
        by_connection: list[list[_Sender]] = []
        for connection, sizes in enumerate(self.part.connections):
            client = await stack.enter_async_context(self.connect())
            self._clients.append(client)
            names = [f"{self.part.name}-{connection}-{number}" for number in range(sum(sizes))]
            ends = np.cumsum(sizes).tolist()
            names_of = [names[end - size : end] for end, size in zip(ends, sizes, strict=True)]
            groups: list[AsyncGroup] = []
            for first in range(0, len(sizes), OPENINGS):
                groups += await asyncio.gather(*map(client.open_group, names_of[first : first + OPENINGS]))
            line = _Line(groups[0])
            shapes = [(self.part.plan.steps, size, client.info.features) for size in sizes]
            blocks = [random.standard_normal(shape, np.float32) for shape in shapes]
            senders = [_Sender(group, line, x) for group, x in zip(groups, blocks, strict=True)]
            self._lines.append(line)
            by_connection.append(senders)
        longest = max(len(senders) for senders in by_connection)
        return [senders[turn] for turn in range(longest) for senders in by_connection if turn < len(senders)]

    async def _send_open_loop(self, senders: list[_Sender], tasks: asyncio.TaskGroup) -> None:
        plan = self.part.plan
        schedule = Schedule(len(senders), plan.steps / plan.rate_hz, self.part.offset)
        sends = schedule.count(plan.warmup_s + plan.duration_s)
        judge_at = self._counted_from
        for number in range(sends):
            due = self._start + schedule.due_s(number)
            if due < self._counted_from <= self.clock.now():
                continue  # this side is late; what it did not send in the warm-up is not missed
            if not await wait_until(due, self.clock, self.stop):
                break
            now = self.clock.now()
            if now >= judge_at:
                judge_at = now + JUDGE_S
                self._gave_up = self._cannot_be_met(now, due)
            if self._gave_up or now > self._end + GRACE_S:
                self._leave_unsent(senders, schedule, range(number, sends), now)
                break
            sender = senders[schedule.sender(number)]
            block = _Block(due, sender.frames, sender.line)
            task = tasks.create_task(self._send(sender, block))
            self._waiting[task] = block
            task.add_done_callback(self._waiting.pop)

    def _leave_unsent(self, senders: list[_Sender], schedule: Schedule, numbers: range, now: float) -> None:
        """Take a sample of every block that is due by now and will not be sent, as late as it is."""
        for number in numbers:
            due = self._start + schedule.due_s(number)
            if due > now:
                break
            if due >= self._counted_from:
                late_us, frames = 1e6 * (now - due), senders[schedule.sender(number)].frames
                self._samples.extend((now - self._counted_from, late_us, late_us, *[math.nan] * 5, 0.0, frames))
                self._unsent += frames * (not self._gave_up)

    async def _send_closed_loop(self, senders: list[_Sender], tasks: asyncio.TaskGroup) -> None:
        await wait_until(self._start, self.clock, self.stop)

        async def send_again_and_again(sender: _Sender) -> None:
            task = asyncio.current_task()
            assert task is not None
            while not self.stop.requested and (now := self.clock.now()) < self._end:
                self._waiting[task] = block = _Block(now, sender.frames, sender.line)
                await self._send(sender, block)
            self._waiting.pop(task, None)

        for sender in senders:
            self._waiting[tasks.create_task(send_again_and_again(sender))] = _Block(self._start, 0, sender.line)

    async def _note_stalls(self) -> None:
        """Note when the event loop, and with it the client library, did not get its turn."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(BEAT_S)
            stall_s = time.monotonic() - began - BEAT_S
            if stall_s > STALL_S:
                now = self.clock.now()
                self._stalls.append((now - stall_s, now))

    async def _drain(self, timeout_s: float) -> None:
        """Wait for the last answers, and give up the blocks that got none in time."""
        if self._waiting:
            await asyncio.wait(list(self._waiting), timeout=timeout_s)
        for task in list(self._waiting):
            task.cancel()

    async def _send(self, sender: _Sender, block: _Block) -> None:
        counted = block.due >= self._counted_from
        block.sent = self.clock.now()
        if not self._is_closed:  # note when the client library sends: in the next turn
            asyncio.get_running_loop().call_soon(self._note_sent, block)
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
            self._refused[refused.code.name] += block.frames * counted
        except (ConnectionFailed, asyncio.CancelledError):
            self._left.append(block)
            raise
        else:
            now = self.clock.now()
            block.answered = True
            block.line.hear(now)
            self.answered.value += block.frames
            if counted:
                server = (answer.queue_us, answer.compute_us, answer.send_us)
                self._add(block, now, 1e6 * block.line.lost_s(block.sent, now), *server)

    def _note_sent(self, block: _Block) -> None:
        if not block.answered:
            block.sent = self.clock.now()

    def _add(self, block: _Block, now: float, away_us: float, *server_us: float) -> None:
        latency_us, late_us = 1e6 * (now - block.due), 1e6 * (block.sent - block.due)
        if latency_us > 1e6 * self.part.slo_s:
            self._slow += block.frames
        rest_us = latency_us - late_us - away_us - sum(server_us)
        at_s = now - self._counted_from
        self._samples.extend((at_s, latency_us, late_us, away_us, *server_us, rest_us, 0.0, block.frames))

    def _add_unanswered(self, now: float, is_gone: bool) -> int:
        """Take a sample of every block that counts and was given up; the number of their frames."""
        left = [block for block in self._left if block.due >= self._counted_from]
        for block in left:
            away_us = 1e6 * block.line.lost_s(block.sent, now) if is_gone else math.nan
            self._add(block, now, away_us, math.nan, math.nan, math.nan)
        return sum(block.frames for block in left)

    def _cannot_be_met(self, now: float, due: float) -> bool:
        """Whether too many frames are slow by now: answered too late, unanswered for too long, or due for too long."""
        slo_s = self.part.slo_s
        since = max(due, self._counted_from)
        share = sum(map(sum, self.part.connections)) * self.part.plan.rate_hz
        slow = self._slow + max(0.0, now - since - slo_s) * share
        for block in self._waiting.values():
            if not block.answered and block.due >= self._counted_from and now - block.due > slo_s:
                slow += block.frames
        return slow > self.part.most_slow
