"""Demands of a swap on a model whose streams are to continue in another version of it."""

from __future__ import annotations

import asyncio
import time
from typing import Final

from instep.frontends.zmq.served import Served
from instep.models.base import RecurrentModel
from instep.runtime.stepper import Stepper
from instep.server.preparation import CannotServe
from instep.streaming.replaying import WarmUpReplay
from instep.streaming.service import ModelService
from instep_client.protocol.wire import Streams, SwapPolicy

_MOST_PAUSE_S: Final = 1.0
"""Time in which nothing is received, so that what was received before can end and streams can be moved."""
_LOOK_S: Final = 0.0005


def check_sizes(former: Served, network: RecurrentModel, policy: SwapPolicy) -> None:
    """Refuse a version in which streams of the former one cannot continue, or not by this policy.

    Raises:
        CannotServe: with a sentence.
    """
    info, description = former.info, network.description
    for what, there, here in (
        ("features", info.features, description.features),
        ("outputs", info.outputs, description.outputs),
    ):
        if there != here:
            raise CannotServe(
                f"its number of {what} differs from that of the version that is served ({here} instead of {there}), so "
                "no stream can be moved to it: swap it with --streams keep"
            )
    if policy.streams is Streams.MOVE and info.state != network.state:
        raise CannotServe(
            "its state differs from that of the version that is served, so no stream can be moved to it: swap it with "
            "--streams replay:N, or keep"
        )
    if policy.streams is Streams.REPLAY and former.service.file is None:
        raise CannotServe(
            "frames are replayed from a recording, and the version that is served has none: serve it with --record, or "
            "swap it with --streams move or keep"
        )


def begin_replay(service: ModelService, stepper: Stepper, frames: int) -> WarmUpReplay:
    """A replay of the newest frames of each stream of a service that is recorded, in another version of its model."""
    assert service.file is not None, "`check_sizes` has refused it"
    return WarmUpReplay(service.file, stepper, len(service.engine.table.owner) - 1, frames)


async def settle(service: ModelService) -> None:
    """Wait until all that was received for a model is answered and all of its streams are in memory.

    Nothing is received meanwhile. No stream leaves memory before the caller's next wait.

    Raises:
        CannotServe: when that takes too long, or there is no room for all of them.
    """
    hibernation, table = service.operations.hibernation, service.engine.table
    asleep, free = len(hibernation), table.slots.free_count
    if asleep > free:
        raise CannotServe(
            f"{asleep} streams hibernate, and there is room in memory for {free}: swap it with --streams keep"
        )
    until = time.monotonic() + _MOST_PAUSE_S
    while True:
        while not service.is_quiet or service.reaper.is_detaching:
            if time.monotonic() > until:
                raise CannotServe(f"what was admitted took longer than {_MOST_PAUSE_S:g} s: try again")
            await asyncio.sleep(_LOOK_S)
        if not len(hibernation):
            return
        await hibernation.wake([name for name, _, _ in hibernation.asleep(0, len(hibernation))])
        if service.is_quiet and not service.reaper.is_detaching and not len(hibernation):
            return
        if time.monotonic() > until:
            raise CannotServe("streams hibernate that cannot be read: swap it with --streams keep")
