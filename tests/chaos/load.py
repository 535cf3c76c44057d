"""What runs while things break: groups of streams in closed loop, every frame sent and output got kept."""

from __future__ import annotations

import asyncio

import numpy as np

from instep.core.typing import F32
from instep_client import AsyncClient, AsyncGroup
from tests.support.models import SMALL

GROUPS, STREAMS = 4, 8


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


class Load:
    """Groups of streams, each sending its next frames when it has the outputs of the last, over one client.

    Args:
        seed: decides what is sent.
    """

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._groups: list[AsyncGroup] = []
        self._stops = False
        self.kept = [Kept([f"{index}-{number}" for number in range(STREAMS)]) for index in range(GROUPS)]

    @property
    def steps(self) -> list[int]:
        """Steps that each group has had answered."""
        return [len(kept.got) for kept in self.kept]

    async def open(self, client: AsyncClient) -> None:
        """Open the streams."""
        self._groups = [await client.open_group(kept.names) for kept in self.kept]

    async def run(self) -> None:
        """Send until `stop`, then close."""
        await asyncio.gather(*(self._drive(index) for index in range(GROUPS)))

    async def _drive(self, index: int) -> None:
        group, kept = self._groups[index], self.kept[index]
        timesteps = index + 1  # blocks of one timestep and of several
        while not self._stops:
            x = self._rng.standard_normal((timesteps, STREAMS, SMALL.description.features)).astype(np.float32)
            kept.sent.append(x)
            kept.got.append(await group.step(x))
        kept.finals = (await group.close())["h"]

    def stop(self) -> None:
        """Let every group end with the step it is in."""
        self._stops = True
