"""How the streams of a load test are spread over processes, connections and blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from instep_client.protocol.wire import MAX_BLOCK_STREAMS, ServerInfo
from instep_tools.load import LoadPart, Mode
from instep_tools.problems import CommandProblem
from instep_tools.words import counted

REAL_TIME_RATE_HZ: Final = 100.0
"""An open loop's rate where none is given: speech features come every 10 ms."""


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load test does, as one sees it from outside."""

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
    """The time within which 99 % of the frames are to be answered, where the test ends once they cannot be."""

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


def split(plan: LoadPlan, info: ServerInfo, name: str) -> list[LoadPart]:
    """One part a process; streams and connections are spread evenly.

    Args:
        plan: what to do.
        info: whose limits to keep.
        name: what the streams are called after, different in every test.

    Raises:
        CommandProblem: when the numbers do not fit together, or the server does not take as much.
    """
    if not 1 <= plan.processes <= plan.connections <= plan.streams:
        raise CommandProblem(
            f"{plan.streams} streams, {plan.connections} connections and {plan.processes} processes do not fit: every "
            "process needs a connection of its own, and every connection a stream"
        )
    if plan.streams > info.max_streams:
        raise CommandProblem(
            f"the server keeps {info.max_streams} streams at most; ask for fewer, or start it with "
            f"--max-streams {plan.streams}"
        )
    block = block_limit(plan.steps, info)
    if plan.block is not None:
        if plan.block > block:
            raise CommandProblem(f"the server takes at most {block} streams of {plan.steps} timesteps in one block")
        block = plan.block
    connections = [_blocks(size, block) for size in _evenly(plan.streams, plan.connections)]
    parts: list[LoadPart] = []
    for process, count in enumerate(_evenly(plan.connections, plan.processes)):
        parts.append(
            LoadPart(
                name=f"{name}-{process}",
                connections=tuple(connections[:count]),
                steps=plan.steps,
                mode=plan.mode,
                rate_hz=plan.rate_hz,
                warmup_s=plan.warmup_s,
                duration_s=plan.duration_s,
                offset=process / plan.processes,
                slo_us=math.inf if plan.slo_ms is None else 1000 * plan.slo_ms,
                most_slow=math.inf if plan.slo_ms is None else plan.offered_frames_s * plan.duration_s / 100,
            )
        )
        del connections[:count]
    return parts


def block_limit(steps: int, info: ServerInfo) -> int:
    """The most streams that a block of so many timesteps may hold.

    Raises:
        CommandProblem: when not even one stream's frames fit.
    """
    limit = min(
        info.max_block_frames // steps,
        info.credit_frames // steps,
        info.max_message_bytes // (4 * info.features * steps),
        MAX_BLOCK_STREAMS,
    )
    if limit < 1:
        raise CommandProblem(f"{steps} timesteps do not fit in one block of this server")
    return limit


def _blocks(streams: int, block: int) -> tuple[int, ...]:
    return tuple(_evenly(streams, -(-streams // block)))


def _evenly(number: int, parts: int) -> list[int]:
    """`number` as a sum of `parts` numbers that differ by 1 at most."""
    return [(number * (part + 1)) // parts - (number * part) // parts for part in range(parts)]
