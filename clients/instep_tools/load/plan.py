"""What a load test does, and how its streams are spread over processes, connections and blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from instep_client.protocol.wire import MAX_BLOCK_STREAMS, ServerInfo
from instep_tools.problems import CommandProblem
from instep_tools.words import counted

REAL_TIME_RATE_HZ: Final = 100.0
"""An open loop's rate where none is given: speech features come every 10 ms."""


class Mode(StrEnum):
    """How a load is made."""

    CLOSED = "closed"
    """The next block of a group is sent when the one before it is answered."""
    OPEN = "open"
    """Blocks are sent when they are due, whatever the answers do."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A load, as one sees it from outside."""

    streams: int
    connections: int
    processes: int
    mode: Mode
    rate_hz: float
    """Frames a second for each stream; of an open loop."""
    duration_s: float
    warmup_s: float
    block: int | None
    """Streams a block at most; None for as many as the connection has and the server takes."""
    steps: int
    """Timesteps a block."""
    slo_ms: float | None = None
    """99 % of the frames are to be answered within this time; the test ends once they cannot be."""

    @property
    def offered_frames_s(self) -> float:
        """Frames a second that are due in an open loop."""
        return self.streams * self.rate_hz

    def sentence(self) -> str:
        """The load in words."""
        loop = f"open loop at {self.rate_hz:g} Hz a stream" if self.mode is Mode.OPEN else "closed loop"
        block = "" if self.block is None else f" of at most {counted(self.block, 'stream')}"
        return (
            f"{counted(self.streams, 'stream')} on {counted(self.connections, 'connection')} "
            f"from {counted(self.processes, 'process', 'processes')}, {loop}, "
            f"{counted(self.steps, 'timestep')} a block{block}, "
            f"{self.duration_s:g} s after {self.warmup_s:g} s of warm-up"
        )


@dataclass(frozen=True, slots=True)
class LoadPart:
    """What one process does of a plan."""

    name: str
    """The streams are called after it."""
    connections: tuple[tuple[int, ...], ...]
    """For each connection the numbers of streams of its groups; a block holds the frames of one group."""
    plan: LoadPlan
    offset: float = 0.0
    """Where this process's sends lie between those of the others, see `Schedule`."""

    @property
    def slo_s(self) -> float:
        """The time within which a frame is to be answered; infinite without a service level."""
        return math.inf if self.plan.slo_ms is None else self.plan.slo_ms / 1000

    @property
    def most_slow(self) -> float:
        """With more frames than these, of all processes, that take longer, the level is missed."""
        return math.inf if self.plan.slo_ms is None else self.plan.offered_frames_s * self.plan.duration_s / 100


@dataclass(frozen=True, slots=True)
class Schedule:
    """An open loop: each of `senders` senders sends every `period_s` seconds, whatever the answers do.

    The senders' phases are spread evenly over the period, as independent producers' are, so that all sends together are
    `period_s / senders` apart. `offset` (0 to 1) shifts all of them by that part of this gap: several processes share
    one schedule that way.
    """

    senders: int
    period_s: float
    offset: float = 0.0

    def due_s(self, number: int) -> float:
        """When send `number` (from 0, over all senders) is due, in seconds after the start."""
        return (number + self.offset) * (self.period_s / self.senders)

    def sender(self, number: int) -> int:
        """Whose send it is."""
        return number % self.senders

    def count(self, duration_s: float) -> int:
        """How many sends are due before `duration_s`."""
        numbers = int(duration_s * self.senders / self.period_s) + 2
        while numbers > 0 and self.due_s(numbers - 1) >= duration_s:
            numbers -= 1
        return numbers


def split(plan: LoadPlan, info: ServerInfo, name: str) -> list[LoadPart]:
    """One part a process; streams and connections are spread evenly.

    The streams are called after `name`, which is different in every test.

    Raises:
        CommandProblem: when the numbers do not fit together, or the server does not take as much.
    """
    if not 1 <= plan.processes <= plan.connections <= plan.streams:
        raise CommandProblem(
            f"{counted(plan.streams, 'stream')}, {counted(plan.connections, 'connection')} and "
            f"{counted(plan.processes, 'process', 'processes')} do not fit: every process needs a connection of its "
            "own, and every connection a stream"
        )
    if plan.streams > info.max_streams:
        raise CommandProblem(
            f"the server keeps {info.max_streams} streams at most; ask for fewer, or start it with "
            f"--set engine.max_streams={plan.streams}"
        )
    block = block_limit(plan.steps, info)
    if plan.block is not None:
        if plan.block > block:
            raise CommandProblem(f"the server takes at most {block} streams of {plan.steps} timesteps in one block")
        block = plan.block
    connections = [tuple(_evenly(size, -(-size // block))) for size in _evenly(plan.streams, plan.connections)]
    parts: list[LoadPart] = []
    for process, count in enumerate(_evenly(plan.connections, plan.processes)):
        parts.append(LoadPart(f"{name}-{process}", tuple(connections[:count]), plan, process / plan.processes))
        del connections[:count]
    return parts


def block_limit(steps: int, info: ServerInfo) -> int:
    """The most streams that a block of this number of timesteps may hold.

    Raises:
        CommandProblem: when not even one stream's frames fit.
    """
    most_frames = min(info.max_block_frames, info.credit_frames, info.max_message_bytes // (4 * info.features))
    if steps > most_frames:
        raise CommandProblem(
            f"{counted(steps, 'timestep')} do not fit in one block of this server, which takes {most_frames:,} at most"
        )
    return min(most_frames // steps, MAX_BLOCK_STREAMS)


def _evenly(number: int, parts: int) -> list[int]:
    """`number` as a sum of `parts` numbers that differ by 1 at most."""
    return [(number * (part + 1)) // parts - (number * part) // parts for part in range(parts)]
