"""Sending live: arrays and signals as one group, lines each when it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import Final

import numpy as np

from instep_client.aio import AsyncClient
from instep_client.aio_streams import AsyncStream
from instep_client.protocol.errors import Refused, StreamRefused
from instep_client.protocol.wire import F32
from instep_tools.answers import Answers, SentFrames
from instep_tools.lines import BadLine, LineReader
from instep_tools.living import step_living
from instep_tools.pacing import Clock, Stop, wait_until
from instep_tools.pipeline import pipeline
from instep_tools.plan import Rows, cuts
from instep_tools.sequences import I64, RecordedSequences
from instep_tools.terminal import Terminal

ENDLESS: Final = int(np.iinfo(np.int64).max)
CHUNK_STEPS: Final = 32
"""Timesteps a block where no rate is kept."""

LINES_ON_THE_WAY: Final = 1024

BAD_LINES_NAMED: Final = 5
"""How many bad lines one behind the other are named; then it is the file that is wrong, not a line."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast and how long to send."""

    rate_hz: float | None
    """Frames a second for each stream; None for as fast as they are taken."""
    frames: int | None
    """The most frames of each stream."""
    seconds: float | None
    """The longest time."""

    def due_s(self, frame: int) -> float:
        """When a frame is due, in seconds after the start."""
        return 0.0 if self.rate_hz is None else frame / self.rate_hz


@dataclass(frozen=True, slots=True)
class Source:
    """Frames that are there, or made, when they are asked for."""

    lengths: I64
    """[N] frames of each stream."""
    part: Callable[[int, int, Rows], F32]
    """`part(first, count, rows)`: frames [count, len(rows), features] of these streams."""


def array_source(sequences: RecordedSequences, streams: int) -> Source:
    """Stream `i` sends sequence `i`, beginning again with the first sequence when there are more streams."""
    which = np.arange(streams) % len(sequences)
    starts = sequences.starts[which]

    def part(first: int, count: int, rows: Rows) -> F32:
        frames: F32 = sequences.frames[starts[rows] + np.arange(first, first + count)[:, None]]
        return frames

    return Source(sequences.lengths[which], part)


class LiveRun:
    """One connection of a live producer."""

    def __init__(
        self, client: AsyncClient, pace: Pace, answers: Answers, terminal: Terminal, stop: Stop, clock: Clock
    ) -> None:
        self.bad_lines = 0
        self._client = client
        self._pace = pace
        self._answers = answers
        self._terminal = terminal
        self._stop = stop
        self._clock = clock
        self._start = clock.now()

    async def send_arrays(self, names: list[str], source: Source) -> None:
        """Send all streams as one group until they end, or it is enough; drain; close."""
        group = await self._client.open_group(names)
        lengths = source.lengths if self._pace.frames is None else np.minimum(source.lengths, self._pace.frames)
        self._start = self._clock.now()
        async with pipeline(self._answers.take) as send:
            steps = CHUNK_STEPS if self._pace.rate_hz is None else 1
            for cut in cuts(lengths, steps, self._client.info.max_block_frames):
                if not await self._wait_for(cut.first):
                    break
                frames = source.part(cut.first, cut.count, cut.rows)
                sent = SentFrames(tuple(names[row] for row in cut.rows), frames)
                await send(sent, partial(step_living, group, frames, cut.rows, self._client.info.outputs))
        with suppress(Refused):  # told of when its frames were refused
            await group.close()

    async def send_lines(self, lines: AsyncIterator[tuple[int, bytes]], names: list[str], named: bool) -> int:
        """Send every line when it comes, or when its stream's next frame is due; drain; close.

        Gives the number of streams. Lines that name no stream go to the streams in turn. A bad line takes its turn: it
        costs its stream this frame and the other streams nothing.
        """
        reader = LineReader(self._client.info.features, named)
        streams: dict[str, AsyncStream | None] = {}
        sent: Counter[str] = Counter()
        turn = bad_together = 0
        async with pipeline(self._answers.take, LINES_ON_THE_WAY) as send:
            self._start = self._clock.now()
            async for number, text in lines:
                try:
                    line = reader.read(text.decode("utf-8-sig" if number == 1 else "utf-8"))
                except ValueError as error:
                    self.bad_lines += 1
                    bad_together += 1
                    if bad_together <= BAD_LINES_NAMED:
                        reason = error if isinstance(error, BadLine) else "it is not UTF-8"
                        self._terminal.error(f"line {number}: {reason}")
                    elif bad_together == BAD_LINES_NAMED + 1:
                        self._terminal.error("and so on: the bad lines that follow are counted, until a good one comes")
                    turn += 1
                    continue
                if line is None:
                    continue
                bad_together = 0
                name = names[turn % len(names)] if line.stream is None else line.stream
                turn += 1
                if name not in streams:
                    streams[name] = await self._open(name)
                stream = streams[name]
                if sent[name] == self._pace.frames and all(sent[name] == self._pace.frames for name in names):
                    break
                if stream is None or sent[name] == self._pace.frames:
                    continue
                if not await self._wait_for(sent[name]):
                    break
                sent[name] += 1
                await send(SentFrames((name,), line.frame[None, None]), partial(stream.step, line.frame[None]))
        for stream in streams.values():
            if stream is not None:
                with suppress(Refused):  # told of when its frames were refused
                    await stream.close()
        return len(streams)

    async def _open(self, name: str) -> AsyncStream | None:
        try:
            return await self._client.open(name)
        except StreamRefused as refused:
            self._terminal.error(f"{refused}; its lines are left out")
            self._answers.refused += 1
            return None

    async def _wait_for(self, frame: int) -> bool:
        """Wait until it is due; False when sending is over before."""
        due = self._start + self._pace.due_s(frame)
        end = self._start + (inf if self._pace.seconds is None else self._pace.seconds)
        if max(due, self._clock.now()) >= end:
            return False
        return await wait_until(due, self._clock, self._stop)
