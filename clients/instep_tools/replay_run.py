"""Carrying out the plan of a replay."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from contextlib import suppress
from functools import partial

import numpy as np
import numpy.typing as npt

from instep_client.aio import AsyncClient
from instep_client.aio_streams import AsyncGroup
from instep_client.protocol.errors import FramesRefused, Refused
from instep_client.protocol.wire import F32
from instep_client.states import State, as_state, state_rows
from instep_tools.living import step_living
from instep_tools.pacing import Clock, Stop, wait_until
from instep_tools.pipeline import pipeline, task_group
from instep_tools.plan import Plan, Rows, Send


class ReplayRun:
    """Sends every frame of a plan, and keeps the outputs."""

    def __init__(self, client: AsyncClient, plan: Plan, stop: Stop, clock: Clock) -> None:
        frames = len(plan.sequences.frames)
        self.outputs: F32 = np.full((frames, client.info.outputs), np.nan, np.float32)
        """[sum, outputs], filled in as the answers come."""
        self.done = np.zeros(frames, np.bool_)
        """[sum] which frames were applied and answered."""
        self.answered = 0
        self.refusals: dict[str, None] = {}
        """Why frames were refused, each sentence once."""
        self._client = client
        self._plan = plan
        self._stop = stop
        self._clock = clock
        self._name = f"replay-{secrets.token_hex(4)}"
        self._groups: dict[int, AsyncGroup] = {}
        self._closing: deque[asyncio.Task[None]] = deque()
        self._open_streams = 0

    async def run(self) -> None:
        """Send until the plan's end or a stop; drain; close all streams.

        Raises:
            InstepError: as the client does, but for refused frames.
        """
        async with task_group() as closing, pipeline(self._take) as send:
            start: float | None = None
            for block in self._plan.sends:
                if start is not None and not await wait_until(start + block.due_s, self._clock, self._stop):
                    break
                group = self._groups.get(block.cohort)
                if group is None:
                    group = self._groups[block.cohort] = await self._open(block.cohort)
                if start is None:  # the first streams open before the clock starts
                    start = self._clock.now() - block.due_s
                frames = self._plan.sequences.frames[block.flat]
                await send(block, partial(step_living, group, frames, block.rows, self.outputs.shape[1]))
                if block.last:
                    del self._groups[block.cohort]
                    self._closing.append(closing.create_task(self._close(group, self._plan.cohorts[block.cohort])))
            for cohort, group in self._groups.items():
                closing.create_task(self._close(group, self._plan.cohorts[cohort]))

    async def _open(self, cohort: int) -> AsyncGroup:
        """Open a cohort, after streams that are on their way out where there would be too many."""
        members = self._plan.cohorts[cohort]
        while self._closing and self._open_streams + len(members) > self._client.info.max_streams:
            await self._closing.popleft()
        names = [f"{self._name}-{member}" for member in members]
        group = await self._client.open_group(names, self._initial_states(members))
        self._open_streams += len(members)
        return group

    def _initial_states(self, members: Rows) -> State | None:
        given, spec = self._plan.sequences.initial_states, self._client.info.state
        with_state = [place for place, member in enumerate(members) if member in given]
        if not with_state:
            return None
        rows = spec.initial(len(members))
        for place in with_state:
            rows[place] = state_rows(given[int(members[place])], spec, None)[0]
        return as_state(rows, spec, single=False)

    async def _close(self, group: AsyncGroup, members: Rows) -> None:
        """Close a cohort after its last answer; streams that the server ended are told of by their frames."""
        with suppress(Refused):
            await group.close()
        self._open_streams -= len(members)

    def _take(self, block: Send, result: F32 | Refused) -> None:
        applied: npt.NDArray[np.bool_] = np.ones(block.flat.shape, np.bool_)
        if isinstance(result, Refused):
            self.refusals.setdefault(str(result))
            if not isinstance(result, FramesRefused):
                return
            result = result.outputs
            applied = np.asarray(np.isfinite(result).any(axis=2))
        flat = block.flat[applied]
        self.outputs[flat] = result[applied]
        self.done[flat] = True
        self.answered += len(flat)
