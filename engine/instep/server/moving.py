"""Streams that continue in another version of their model, from the states that they have or by a replay."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from instep.config.sections import StreamPolicy
from instep.core.typing import I64, U8
from instep.models.base import RecurrentModel, StateSpec
from instep.replay.warm_up import WarmUpReplay
from instep.server.beside import Beside
from instep.server.preparation import CannotServe
from instep.streaming.service import ModelService

_MOST_PAUSE_S: Final = 1.0
"""Time in which nothing is received, so that what was received before can end and streams can be moved."""
_LOOK_S: Final = 0.0005
_SHORT_S: Final = 0.01
"""A replay has caught up when it takes less to read and step what was recorded since the last time."""
_LONG_S: Final = 0.5
"""While nothing is received, it may not take more."""
_SHORTER: Final = 0.9
"""A pass has brought the replay nearer if it took less than this part of the shortest one before."""
_MOST_IN_VAIN: Final = 4
"""After so many passes in a row that brought it no nearer it cannot catch up; a busy machine may cause fewer."""


class Sizes(Protocol):
    """What has the sizes of a version: its recording's header, or what clients are told of it."""

    @property
    def features(self) -> int:
        """Floats in a frame."""

    @property
    def outputs(self) -> int:
        """Floats in an output."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Streams that have left a version of their model."""

    lsn: int
    """What the other version's recording must have committed before the streams may end in theirs."""
    numbers: I64
    """int64 [N], in their recording."""
    next_seqs: I64
    states: U8
    """[N, row_bytes], as they left it."""

    async def end(self, old: ModelService, new: ModelService) -> None:
        """Say in the recording of the old version that they have left, once that of the new one has them."""
        await new.engine.journal.committed(self.lsn)
        none_lost = np.zeros(len(self.numbers), np.bool_)
        old.engine.journal.ended(self.numbers, "moved", self.next_seqs, self.states, none_lost)


def check_sizes(former: Sizes, network: RecurrentModel, *, allowed: bool) -> None:
    """Refuse a version of a model with other sizes of frames or outputs than the former one, unless that is `allowed`.

    Raises:
        CannotServe: with a sentence.
    """
    there, here = (former.features, former.outputs), (network.description.features, network.description.outputs)
    if there != here and not allowed:
        raise CannotServe(
            f"it takes {here[0]:,} features and gives {here[1]:,} outputs, and the version before {there[0]:,} and "
            f"{there[1]:,}: clients would break; set model.allow_other_sizes if that is meant"
        )


def check_policy(policy: StreamPolicy, former: Sizes, state: StateSpec, network: RecurrentModel) -> None:
    """Refuse a version in which streams of the former one, whose state is given, cannot continue by this policy.

    Raises:
        CannotServe: with a sentence.
    """
    if policy.word == "keep":
        return
    if (former.features, former.outputs) != (network.description.features, network.description.outputs):
        raise CannotServe(f"its frames or outputs have other sizes, so no stream can be moved to it: {_use('keep')}")
    if policy.word == "move" and state != network.state:
        raise CannotServe(
            f"its state differs from that of the version before, so no stream can be moved to it: "
            f"{_use('replay:N', 'keep')}"
        )


class CatchingUp:
    """The passes of a replay, each over the frames that were recorded during the one before."""

    def __init__(self) -> None:
        self._least_s = math.inf
        self._in_vain = 0

    def is_over(self, frames: int, took_s: float) -> bool:
        """Whether the replay has caught up: little is left to do, and another pass would hardly leave less.

        Args:
            frames: replayed in this pass.
            took_s: how long it took.

        Raises:
            CannotServe: when frames arrive too quickly for that.
        """
        if took_s <= _SHORT_S:
            return True
        # Without any frames it has caught up, on a machine with too much to do.
        if took_s >= self._least_s / 2 and (took_s <= _LONG_S or not frames):
            return True
        self._in_vain = 0 if took_s < _SHORTER * self._least_s else self._in_vain + 1
        if self._in_vain == _MOST_IN_VAIN:
            raise CannotServe("its frames arrive as quickly as they are replayed: try again when there are fewer")
        self._least_s = min(self._least_s, took_s)
        return False


async def catch_up(replay: WarmUpReplay, beside: Beside) -> None:
    """Replay until little is left to do while nothing is received; the old version serves meanwhile.

    Raises:
        CannotServe: when frames arrive too quickly for that.
    """
    catching_up, is_over = CatchingUp(), False
    while not is_over:
        began_s = time.monotonic()
        frames = await beside.do(replay.follow)
        is_over = catching_up.is_over(frames, time.monotonic() - began_s)


async def move(
    old: ModelService,
    new: ModelService,
    replay: WarmUpReplay | None,
    beside: Beside,
    begin_recording: Callable[[], None],
) -> Moved:
    """Let all streams continue in another version; everything that was received before is answered by the old one.

    Nothing is received meanwhile. The new version has the tables of the old one, and is not served yet. A replay, which
    has caught up, gives the states there; without one they are those that the streams have.

    Raises:
        CannotServe: when it takes too long, or there is no room for all streams.
    """
    await _settle(old)
    await old.engine.journal.committed(old.engine.journal.newest)
    if replay is not None:
        await beside.do(replay.follow)
        await _settle(old)  # streams may have gone to sleep meanwhile
    # From here on nothing waits, so nothing changes.
    engine, table = new.engine, new.engine.table
    slots = table.open_slots()
    names, numbers, next_seqs = table.names(slots), table.recording_ids(slots), table.next_seq[slots].copy()
    last_states = states = old.states.access.read(slots)
    first_seqs = None
    if replay is not None:
        states, first_seqs = replay.states(numbers, next_seqs)
    new.states.access.load(slots, states)
    begin_recording()
    lsn = engine.journal.moved(slots, names, states, first_seqs, old.file)
    # The next checkpoint has their frames too whose outputs the clients may lack.
    engine.journal.dirty.mark_dirty(slots)
    new.tasks.start(new.checkpoints.take())
    engine.events.add_all("moved", names, new.about.fingerprint, next_seqs)
    return Moved(lsn, numbers, next_seqs, last_states)


async def _settle(service: ModelService) -> None:
    """Wait until all that was received for a model is answered and all of its streams are in memory.

    Nothing is received meanwhile. No stream leaves memory before the caller's next wait.

    Raises:
        CannotServe: when that takes too long, or there is no room for all of them.
    """
    hibernation, table = service.operations.hibernation, service.engine.table
    free = table.slots.free_count
    if len(hibernation) > free:
        raise CannotServe(
            f"{len(hibernation)} streams hibernate, and there is room in memory for {free}: {_use('keep')}"
        )
    until = time.monotonic() + _MOST_PAUSE_S
    while True:
        while not service.is_quiet or service.reaper.is_detaching:
            if time.monotonic() > until:
                raise CannotServe(f"what was admitted took longer than {_MOST_PAUSE_S:g} s: try again")
            await asyncio.sleep(_LOOK_S)
        if not hibernation:
            return
        await hibernation.wake(list(hibernation))
        if hibernation and time.monotonic() > until:
            raise CannotServe(f"streams hibernate that cannot be read: {_use('keep')}")


def _use(*policies: str) -> str:
    return f"use `model.on_reload: {'` or `'.join(policies)}`"
