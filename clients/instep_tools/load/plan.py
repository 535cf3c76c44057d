"""The load of a test, and its distribution over processes, connections and blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from instep_client.protocol.wire import MAX_BLOCK_STREAMS, ServerInfo
from instep_tools.problems import CommandProblem
from instep_tools.words import counted

REAL_TIME_RATE_HZ: Final = 100.0
"""The rate of a search without a given one: speech features come every 10 ms."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """A load, as the options describe it."""

    streams: int
    connections: int
    processes: int
    rate_hz: float | None
    """Frames per second of each stream in an open loop, which are due regardless of answers. None for a closed loop,
    which sends a block when the previous one is answered.
    """
    duration_s: float
    warmup_s: float
    block: int | None = None
    """The most streams in a block; None for all streams of the connection, as far as the server accepts them."""
    slo_ms: float | None = None
    """The time within which 99 % of the frames must be answered."""

    @property
    def due_frames_s(self) -> float:
        """The frames per second that are due in an open loop."""
        return self.streams * (self.rate_hz or 0.0)

    def sentence(self) -> str:
        """A description of the load."""
        loop = "closed loop" if self.rate_hz is None else f"open loop at {self.rate_hz:g} Hz a stream"
        block = "" if self.block is None else f", at most {counted(self.block, 'stream')} a block"
        return (
            f"{counted(self.streams, 'stream')} on {counted(self.connections, 'connection')} "
            f"from {counted(self.processes, 'process', 'processes')}, {loop}{block}, "
            f"{self.duration_s:g} s after {self.warmup_s:g} s of warm-up"
        )


@dataclass(frozen=True, slots=True)
class LoadPart:
    """The part of a plan that one process sends."""

    name: str
    """The prefix of the streams' names."""
    connections: tuple[tuple[int, ...], ...]
    """For each connection, the sizes of its groups; a block has the frames of one group."""
    plan: LoadPlan
    offset: float = 0.0
    """The position of this process's sends between those of the others, see `Schedule`."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """An open loop in which each of `senders` senders sends every `period_s` seconds, regardless of answers.

    Phases are spread evenly over the period, like those of independent producers, so consecutive sends are `period_s /
    senders` apart. `offset` (0 to 1) shifts all sends by that share of this gap, so that several processes can share
    one schedule.
    """

    senders: int
    period_s: float
    offset: float = 0.0

    def due_s(self, number: int) -> float:
        """The due time of send `number` (from 0, over all senders), in seconds after the start."""
        return (number + self.offset) * (self.period_s / self.senders)

    def count(self, duration_s: float) -> int:
        """The number of sends that are due before `duration_s`."""
        number = int(duration_s * self.senders / self.period_s) + 2
        while number > 0 and self.due_s(number - 1) >= duration_s:
            number -= 1
        return number


def split(plan: LoadPlan, info: ServerInfo, name: str) -> list[LoadPart]:
    """Split a plan into a part for each process, with streams and connections spread evenly.

    Names of streams begin with `name`, which is different in every test.

    Raises:
        CommandProblem: the numbers do not fit together, or the server accepts less.
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
    most_frames = min(info.max_block_frames, info.credit_frames, info.max_message_bytes // (4 * info.features))
    largest = min(most_frames, MAX_BLOCK_STREAMS)
    if plan.block is not None and plan.block > largest:
        raise CommandProblem(f"the server takes at most {counted(largest, 'stream')} in one block")
    block = plan.block or largest
    connections = [tuple(_evenly(size, -(-size // block))) for size in _evenly(plan.streams, plan.connections)]
    parts: list[LoadPart] = []
    for process, count in enumerate(_evenly(plan.connections, plan.processes)):
        parts.append(LoadPart(f"{name}-{process}", tuple(connections[:count]), plan, process / plan.processes))
        del connections[:count]
    return parts


def _evenly(number: int, parts: int) -> list[int]:
    """Split `number` into `parts` numbers that differ by at most 1."""
    return [(number * (part + 1)) // parts - (number * part) // parts for part in range(parts)]
