"""Streams that come, step at their own speed and leave, through official clients, whatever becomes of the server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from instep.core.typing import F32, U8
from instep_client import AsyncClient, AsyncGroup, ConnectionFailed, FramesRefused
from instep_client.protocol.state_spec import StateSpec
from instep_client.states import as_state, state_rows

HUGE: Final = np.array([1e30, -1e30, np.finfo(np.float32).max, np.finfo(np.float32).min], np.float32)
LONGEST_CHUNK: Final = 8


@dataclass(eq=False)
class Visitor:
    """One stream: what it sends, and what came back."""

    name: str
    x: F32
    """float32 [T, features]."""
    initial: U8
    """The state that it begins with [row_bytes]."""
    y: F32
    """float32 [T, outputs], NaN where nothing came back yet."""
    pace: float
    """The chance that it takes part in a round."""
    is_hostile: bool
    """Whether it sends huge values, and NaN, which must be refused."""
    sent: int = 0
    final: U8 | None = None
    """The state after its last frame [row_bytes]."""
    closed: U8 | None = None
    """The state that its end gave [row_bytes]; the server may have been killed in between, and have replayed it."""

    @property
    def remaining(self) -> int:
        return len(self.x) - self.sent


def make_visitors(
    rng: np.random.Generator, spec: StateSpec, features: int, outputs: int, count: int, *, any_state: bool
) -> list[Visitor]:
    """Streams of random frames and lengths, an eighth of them hostile.

    Args:
        rng: decides everything.
        spec: of the state.
        features: of a frame.
        outputs: of an answer.
        count: how many streams.
        any_state: whether a third of them begin with random values in their float32 leaves.
    """
    visitors = []
    for index in range(count):
        length, is_hostile = int(rng.integers(6, 41)), rng.random() < 1 / 8
        x = (rng.choice([0.1, 1, 3]) * rng.standard_normal((length, features))).astype(np.float32)
        if is_hostile:
            huge = rng.random(x.shape) < 0.2
            x[huge] = rng.choice(HUGE, int(huge.sum()))
        initial = spec.initial(1)
        if any_state and rng.random() < 1 / 3:
            for leaf in spec.unpack(initial).values():
                if leaf.dtype == np.float32:
                    leaf[...] = rng.uniform(-0.5, 0.5, leaf.shape)
        y = np.full((length, outputs), np.nan, np.float32)
        visitors.append(
            Visitor(f"visitor-{index}", x, initial[0], y, float(rng.choice([0.2, 0.5, 1.0])), bool(is_hostile))
        )
    return visitors


async def visit(
    endpoint: str, visitors: Sequence[Visitor], rng: np.random.Generator, may_step: asyncio.Event, at_once: int
) -> int:
    """One client that takes all these streams from their opening to their end, in groups of 1 to 12.

    Args:
        endpoint: of the server, which may die and come back meanwhile.
        visitors: the streams.
        rng: decides everything but the order in which answers come.
        may_step: the client waits while it is not set.
        at_once: how many streams are open at most.

    Returns:
        How many frames were refused, as they had to be.
    """
    waiting, groups, refused = list(visitors), list[tuple[AsyncGroup, list[Visitor]]](), 0
    async with AsyncClient(endpoint, timeout_s=60) as client:
        while waiting or groups:
            await may_step.wait()
            room = at_once - sum(len(own) for _, own in groups)
            if waiting and room and (not groups or rng.random() < 0.5):
                count = min(int(rng.integers(1, 13)), room)
                own, waiting = waiting[:count], waiting[count:]
                states = as_state(np.stack([each.initial for each in own]), client.info.state, single=False)
                names = [each.name for each in own]
                try:
                    group = await client.open_group(names, states)
                except ConnectionFailed:  # the server was killed before it could answer, and has opened them
                    group = await client.resume_group(names, take_over=True)
                groups.append((group, own))
            refused += sum(await asyncio.gather(*(_step(group, own, rng) for group, own in groups)))
            for group, own in [each for each in groups if not any(visitor.remaining for visitor in each[1])]:
                groups.remove((group, own))
                spec = client.info.state
                _, states = await group.read_state()  # if the server is killed as it closes them, the answer is lost
                closed = state_rows(await group.close(), spec, len(own))
                for visitor, final, also in zip(own, state_rows(states, spec, len(own)), closed, strict=True):
                    visitor.final = final
                    visitor.closed = None if also.tobytes() == spec.missing(1).tobytes() else also
    return refused


async def _step(group: AsyncGroup, own: Sequence[Visitor], rng: np.random.Generator) -> int:
    """Send a block of frames of some streams; how many of them were refused."""
    rows = [row for row, visitor in enumerate(own) if visitor.remaining and rng.random() < visitor.pace]
    if not rows:
        return 0
    chosen = [own[row] for row in rows]
    count = min(int(rng.integers(1, LONGEST_CHUNK + 1)), *(visitor.remaining for visitor in chosen))
    x = np.stack([visitor.x[visitor.sent :][:count] for visitor in chosen], axis=1)
    applied = np.full(len(chosen), count)
    for column, visitor in enumerate(chosen):
        if visitor.is_hostile and rng.random() < 0.3:
            applied[column] = rng.integers(count)
            x[applied[column], column, rng.integers(x.shape[2])] = np.nan
    failed = set[str]()
    try:
        y = await group.step(x, rows)
    except FramesRefused as error:
        y, failed = error.outputs, {failure.stream for failure in error.failures}
    assert failed == {visitor.name for visitor, frames in zip(chosen, applied, strict=True) if frames < count}
    for column, (visitor, frames) in enumerate(zip(chosen, applied.tolist(), strict=True)):
        visitor.y[visitor.sent : visitor.sent + frames] = y[:frames, column]
        visitor.sent += frames
    return int((count - applied).sum())
