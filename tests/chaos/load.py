"""What runs while things break: groups of streams in closed loop, every frame sent and output got kept."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from instep.core.typing import F32
from instep_client import AsyncClient, AsyncGroup
from tests.support.models import SMALL, whole

LEAST_STEPS: Final = 5
"""Steps that every group must make between two faults."""
PATIENCE_S: Final = 60.0


class Kept:
    """What some streams sent and got, in lockstep.

    Args:
        names: of the streams.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.sent: list[F32] = []
        """float32 [T, N, features] each."""
        self.got: list[F32] = []
        """float32 [T, N, outputs] each."""
        self.finals: F32 | None = None
        """The states at their ends, float32 [N, layers, hidden]."""

    @property
    def outputs(self) -> int:
        return sum(map(len, self.got)) * len(self.names)

    def differing(self) -> tuple[int, int]:
        """How many outputs and how many final states are not those of `nn.GRU` over the whole of what was sent."""
        sent, got, finals = np.concatenate(self.sent), np.concatenate(self.got), self.finals
        assert len(sent) == len(got)
        assert finals is not None
        outputs = states = 0
        for column in range(len(self.names)):
            expected, final = whole(SMALL, sent[:, column])
            outputs += int((expected.view(np.int32) != got[:, column].view(np.int32)).any(axis=1).sum())
            states += int((final.view(np.int32) != finals[column].view(np.int32)).any())
        return outputs, states


class Load:
    """Groups of streams, each sending its next frames when it has the outputs of the last, over one client.

    Args:
        seed: decides what is sent.
        names: of the streams of each group.
        pause_s: after each answer.
    """

    def __init__(self, seed: int, names: Sequence[list[str]], pause_s: float = 0.0) -> None:
        self._rng = np.random.default_rng(seed)
        self._pause_s = pause_s
        self._groups: list[AsyncGroup] = []
        self._stops = False
        self.kept = [Kept(each) for each in names]
        self.times: list[list[float]] = [[] for _ in names]
        """When each group got its outputs."""

    @property
    def steps(self) -> list[int]:
        """Steps that each group has had answered."""
        return [len(kept.got) for kept in self.kept]

    async def progress(self) -> None:
        """Until every group has made some steps more."""
        await until_progress(lambda: self.steps)

    async def open(self, client: AsyncClient) -> None:
        """Open the streams."""
        self._groups = [await client.open_group(kept.names) for kept in self.kept]

    async def run(self) -> None:
        """Send until `stop`, then close."""
        await asyncio.gather(*(self._drive(index) for index in range(len(self._groups))))

    async def _drive(self, index: int) -> None:
        group, kept = self._groups[index], self.kept[index]
        timesteps = index + 1  # blocks of one timestep and of several
        while not self._stops:
            x = self._rng.standard_normal((timesteps, len(kept.names), SMALL.description.features)).astype(np.float32)
            kept.sent.append(x)
            kept.got.append(await group.step(x))
            self.times[index].append(time.monotonic())
            await asyncio.sleep(self._pause_s)
        kept.finals = (await group.close())["h"]

    def stop(self) -> None:
        """Let every group end with the step it is in."""
        self._stops = True


async def until_progress(made: Callable[[], list[int]], steps: int = LEAST_STEPS) -> None:
    """Until each of these counts has grown by as many steps."""
    target = [before + steps for before in made()]
    deadline = time.monotonic() + PATIENCE_S
    while any(now < least for now, least in zip(made(), target, strict=True)):
        assert time.monotonic() < deadline, f"no progress: {made()} steps, {target} were expected"
        await asyncio.sleep(0.002)
