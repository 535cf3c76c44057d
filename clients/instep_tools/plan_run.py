"""Carries out a plan: sends every block when it is due, on streams that are open while they are needed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from instep_client.aio import AsyncClient, AsyncGroup
from instep_client.protocol.errors import Refused
from instep_client.protocol.wire import F32
from instep_client.states import as_state, state_rows
from instep_tools.pacing import Clock, Stop, wait_until
from instep_tools.pipeline import LivingGroup, pipeline, task_group
from instep_tools.plan import Plan, Rows, Send

LONG_WAIT_S: Final = 2.0
"""The progress line mentions a wait for the next frame that is longer than this."""


@dataclass
class PlanRun:
    """Sends every frame of a plan."""

    client: AsyncClient
    plan: Plan
    names: Sequence[str]
    """Names of the streams, one for each sequence of the plan."""
    take: Callable[[Send, F32 | Refused], None]
    """Called with every block's outputs [T, N, outputs], or its refusal, in the order of sending."""
    stop: Stop
    clock: Clock
    all_ended: bool = False
    """Whether it stopped because the server had ended every open stream."""
    sent_frames: int = 0
    """The number of sent frames, whatever became of them."""
    _due: float = 0.0
    _groups: dict[int, LivingGroup] = field(default_factory=dict)
    _closing: deque[asyncio.Task[None]] = field(default_factory=deque)
    _open_streams: int = 0

    async def run(self) -> None:
        """Send until the plan ends or a stop is requested; then drain and close all streams.

        Raises:
            InstepError: as the client does, except for refused frames.
        """
        async with task_group() as closing, pipeline(self.take) as send:
            start: float | None = None
            for block in self.plan.sends:
                if start is not None:
                    self._due = start + block.due_s
                    if not await wait_until(self._due, self.clock, self.stop):
                        break
                self.all_ended = bool(self._groups) and all(group.ended.all() for group in self._groups.values())
                if self.all_ended:
                    break
                group = self._groups.get(block.cohort)
                if group is None:
                    group = self._groups[block.cohort] = await self._open(block.cohort)
                if start is None:  # the first streams open before the clock starts
                    start = self.clock.now() - block.due_s
                self.sent_frames += block.flat.size
                await send(block, partial(group.step, self.plan.sequences.frames[block.flat], block.rows))
                if block.last:
                    del self._groups[block.cohort]
                    self._closing.append(closing.create_task(self._close(group)))
            self._due = 0.0
            for group in self._groups.values():
                closing.create_task(self._close(group))

    def waits(self) -> str:
        """A sentence about the next due time if it is far away; otherwise empty."""
        left_s = self._due - self.clock.now()
        return f"next frame due in {left_s:.0f} s" if left_s > LONG_WAIT_S else ""

    async def _open(self, cohort: int) -> LivingGroup:
        """Open a cohort, waiting for streams that are being closed if there would be too many."""
        members = self.plan.cohorts[cohort]
        while self._closing and self._open_streams + len(members) > self.client.info.max_streams:
            await self._closing.popleft()
        names = [self.names[member] for member in members]
        group = await self._open_group(names, members)
        self._open_streams += len(members)
        return LivingGroup(group, self.client.info.outputs)

    async def _open_group(self, names: list[str], members: Rows) -> AsyncGroup:
        given, spec = self.plan.sequences.initial_states, self.client.info.state
        with_state = [place for place, member in enumerate(members) if member in given]
        if not with_state:
            return await self.client.open_group(names)
        is_learned = any(leaf.initial is None for leaf in spec.leaves)
        if is_learned:  # only the server knows what the others begin with
            group = await self.client.open_group(names)
            rows = state_rows((await group.read_state())[1], spec, len(members))
        else:
            rows = spec.initial(len(members))
        for place in with_state:
            rows[place] = state_rows(given[int(members[place])], spec, None)[0]
        states = as_state(rows, spec, single=False)
        if not is_learned:
            return await self.client.open_group(names, states)
        await group.reset(states)
        return group

    async def _close(self, group: LivingGroup) -> None:
        await group.close()
        self._open_streams -= len(group.ended)
