"""Moves the streams of one version of a model to another: while they are served, and from recordings at a start."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Final, TypeVar

import numpy as np
import structlog

from instep.config import Config
from instep.config.sections import StreamPolicy
from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.typing import I64, U8
from instep.models.errors import ModelError
from instep.models.numerics import prepare as prepare_numerics
from instep.recording.errors import RecordingError
from instep.recording.reader import load_open_streams
from instep.recording.records import MovedStreams, OpenStream, StateRows
from instep.recording.recovery import Recovered
from instep.recording.schema import MOVED_EVENT
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.replay.warm_up import WarmUpReplay
from instep.runtime.stepper import Stepper
from instep.server.loop import Shutdown
from instep.server.preparation import CannotServe
from instep.server.recording_files import Former, say_not_served
from instep.server.services import Allocation, allocate
from instep.server.versions import Planned, model_of, prepare_former, use
from instep.streaming.service import ModelService, Recovery
from instep.streaming.states import state_rows
from instep.streaming.tasks import in_daemon_thread

R = TypeVar("R")

_TURN_S: Final = 0.0002
"""The time after which the loading thread yields the interpreter's lock to the loop. Python's default of 5 ms could
delay a message several times.
"""


class LoadingThread:
    """Runs one long task at a time, without keeping the process alive."""

    def __init__(self, shutdown: Shutdown) -> None:
        self._shutdown = shutdown

    async def do(self, work: Callable[[], R]) -> R:
        """Return the result of `work`, or raise its error.

        Raises:
            CannotServe: when the server ends before that.
        """

        def run() -> R:
            prepare_numerics()  # torch counts threads by thread
            return work()

        usual = sys.getswitchinterval()
        sys.setswitchinterval(_TURN_S)
        working = asyncio.ensure_future(in_daemon_thread(run, "instep-loader"))
        ending = asyncio.ensure_future(self._shutdown.requested.wait())
        try:
            await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise CannotServe("the server is shutting down")
            return working.result()
        finally:
            working.cancel()
            ending.cancel()
            sys.setswitchinterval(usual)


_MOST_PAUSE_S: Final = 1.0
"""The longest pause in receiving while earlier messages are answered."""
_LOOK_S: Final = 0.0005
_SHORT_S: Final = 0.01
"""A replay has caught up when a pass takes less time than this."""
_LONG_S: Final = 0.5
"""The longest expected last pass, during which nothing is received."""
_MOST_PASSES: Final = 12
"""The number of passes after which a replay that does not catch up is given up."""


@dataclass(frozen=True, slots=True)
class Moved:
    """Streams that have left a version of their model."""

    lsn: int
    """The lsn that the other version's recording must have committed before the streams may end in this one."""
    numbers: I64
    """int64 [N], their numbers in the recording they left."""
    next_seqs: I64
    states: U8
    """[N, row_bytes], their states in the old version."""

    async def end(self, old: ModelService, new: ModelService) -> None:
        """Record that the streams have left the old version, once the new recording has committed them."""
        await new.engine.journal.committed(self.lsn)
        none_lost = np.zeros(len(self.numbers), np.bool_)
        old.engine.journal.ended(self.numbers, "moved", self.next_seqs, self.states, none_lost)


async def catch_up(replay: WarmUpReplay, thread: LoadingThread) -> None:
    """Replay the frames recorded during the last pass, until few are left for the pause in which nothing is received.

    Raises:
        CannotServe: when frames arrive too quickly for that.
    """
    least_s = math.inf
    for _ in range(_MOST_PASSES):
        began_s = time.monotonic()
        frames = await thread.do(replay.follow)
        took_s = time.monotonic() - began_s
        # Another pass would hardly leave less; without any frames, the machine only has too much to do.
        if took_s <= _SHORT_S or (took_s >= least_s / 2 and (took_s <= _LONG_S or not frames)):
            return
        least_s = min(least_s, took_s)
    raise CannotServe("its frames arrive as quickly as they are replayed: try again when there are fewer")


async def move(
    old: ModelService,
    new: ModelService,
    replay: WarmUpReplay | None,
    thread: LoadingThread,
    begin_recording: Callable[[], None],
) -> Moved:
    """Let all streams continue in another version; the old one answers everything received before.

    Nothing is received meanwhile. The new version has the tables of the old one, and is not served yet. Its states come
    from a replay that has caught up or, without one, from the old version.

    Raises:
        CannotServe: when it takes too long, or memory cannot hold all streams.
    """
    await _wait_until_idle(old)
    await old.engine.journal.committed(old.engine.journal.newest)
    if replay is not None:
        await thread.do(replay.follow)
    await _wait_until_idle(old)  # streams may have gone to sleep meanwhile
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
    now = state_rows(engine.tables, table, slots, states)
    lsn = engine.journal.moved(slots, names, now, first_seqs, old.file)
    engine.journal.dirty.mark_dirty(slots)
    new.tasks.start(new.checkpoints.take())
    engine.events.add_all("moved", names, new.about.fingerprint, next_seqs)
    return Moved(lsn, numbers, next_seqs, last_states)


async def _wait_until_idle(service: ModelService) -> None:
    """Wait until all received messages of a model are answered and all of its streams are in memory.

    Nothing is received meanwhile. No stream leaves memory before the caller's next wait.

    Raises:
        CannotServe: when that takes too long, or memory cannot hold all streams.
    """
    hibernation, table = service.operations.hibernation, service.engine.table
    free = table.slots.free_count
    if len(hibernation) > free:
        raise CannotServe(
            f"{len(hibernation)} streams hibernate, and there is room in memory for {free}: {use('keep')}"
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
            raise CannotServe(f"streams hibernate that cannot be read: {use('keep')}")


_AT_ONCE: Final = 4096
"""The number of streams that continue in one transaction."""


def continue_streams(
    config: Config,
    former: Former,
    allocation: Allocation,
    service: ModelService,
    target: RecordingWriter,
    recovery: Recovery,
) -> Recovery:
    """Move the streams of a recording to the recording of another version, where they hibernate, and end them here.

    If the process is killed, each stream is in exactly one of the two: in the target if its `moved` event is there.
    Streams whose names are in use are left, and so are all streams if frames were recorded after the newest states and
    the former version, which would have to step them, cannot be loaded. This is logged.

    Args:
        config: decides whether they move in their states or are replayed.
        former: the recording that they leave.
        allocation: of the version in which they continue.
        service: of that version; it does not serve yet.
        target: writes the recording of that version.
        recovery: the present contents of the target.

    Returns:
        The contents of the target afterwards.
    """
    log, table = service.log, service.engine.table
    names = {*recovery.hibernated, *table.names(table.open_slots())}
    numbers = [number for number, name in former.streams.items() if name not in names]
    if len(numbers) < len(former.streams):
        say_not_served(former.file, "streams of these names are open in the recording of a later version", log)
    if not numbers:
        return recovery
    with ExitStack() as undo:
        try:
            source = _complete(config, former, log)
            undo.callback(source.abandon)
            parts = [
                load_open_streams(former.file, numbers[first : first + _AT_ONCE])
                for first in range(0, len(numbers), _AT_ONCE)
            ]
            left = [_states(part, former) for part in parts]
            replay = _replayed(config, former, allocation)
        except (RecordingError, ModelError, CannotServe) as error:
            say_not_served(former.file, f"streams are open in the recording of another version, but {error}", log)
            return recovery
        moved = []
        for streams, states in zip(parts, left, strict=True):
            moved.append(_moved(streams, states, recovery.last_stream, replay))
            target.move_streams(time.time_ns(), moved[-1], former.file.name)
            target.add_states(time.time_ns(), target.position, _tails(streams, moved[-1]))
            table.last_epoch = max(table.last_epoch, *(epoch for epoch, *_ in moved[-1].owners))
            service.events.add_all("moved", moved[-1].names, service.about.fingerprint, moved[-1].next_seqs)
            recovery.hibernated.update(zip(moved[-1].names, moved[-1].streams.tolist(), strict=True))
            recovery = replace(
                recovery, streams=recovery.streams + len(streams), last_stream=int(moved[-1].streams[-1])
            )
        target.commit()
        for each, states in zip(moved, left, strict=True):
            none_lost = np.zeros(len(states), np.bool_)
            source.close_streams(time.time_ns(), each.numbers, MOVED_EVENT, each.next_seqs, states, none_lost)
        source.close()
        undo.pop_all()
    log.info("moved", file=str(former.file), streams=len(numbers), on_reload=config.model.on_reload)
    return recovery


def _replayed(config: Config, former: Former, allocation: Allocation) -> WarmUpReplay | None:
    """The streams replayed in the version they continue in; None if they move with their states."""
    policy, prepared = StreamPolicy.parse(config.model.on_reload), allocation.prepared
    if policy.word != "replay" or former.header.model_fingerprint == prepared.model.fingerprint:
        return None
    most = len(former.streams)
    stepper = Stepper(prepared.network, config.engine.max_batch_size, most, prepared.device)
    replay = WarmUpReplay(former.file, stepper, most, policy.frames)
    replay.follow()
    return replay


def _complete(config: Config, former: Former, log: structlog.stdlib.BoundLogger) -> RecordingWriter:
    """Continue a recording until it has the newest states of its streams."""
    with Recovered(former.file) as found:
        if not any(len(segment.frames) or segment.marks for segment in found.segments()):
            return RecordingWriter.resume(former.file, former.header)
    allocation = allocate(config, Planned(prepare_former(config, former, log), log), forks=False)
    allocation.executor.stop()
    tables, stepper, most = allocation.tables, allocation.stepper, config.engine.max_streams
    table, dirty = StreamTable(tables, np.ones(most + 1, np.uint32)), DirtyTracker(most)
    writer, _ = resume_recording(former.file, former.header, tables, table, dirty, stepper)
    slots = table.open_slots()
    writer.checkpoint(time.time_ns(), writer.position, state_rows(tables, table, slots, stepper.read(slots)))
    writer.commit()
    return writer


def _moved(streams: Sequence[OpenStream], states: U8, last_stream: int, replay: WarmUpReplay | None) -> MovedStreams:
    numbers, seqs = (np.array([getattr(each, name) for each in streams], np.int64) for name in ("stream", "seq"))
    replayed_from = None
    if replay is not None:
        states, replayed_from = replay.states(numbers, seqs)
    owners = [(each.epoch, each.former_epoch, each.granted_seq) for each in streams]
    new_numbers: I64 = np.arange(last_stream + 1, last_stream + 1 + len(streams))
    return MovedStreams(new_numbers, [each.name for each in streams], owners, seqs, states, replayed_from, numbers)


def _states(streams: Sequence[OpenStream], former: Former) -> U8:
    """The last states in the former version, uint8 [N, row_bytes]."""
    spec = former.header.state_spec
    initial = spec.missing(1)[0]
    if any(stream.state is None for stream in streams):
        if any(leaf.initial is None for leaf in spec.leaves):
            spec = model_of(former).state  # the one that has learned what streams begin with
        initial = spec.initial(1)[0]
    return np.stack([initial if stream.state is None else stream.state for stream in streams])


def _tails(streams: Sequence[OpenStream], moved: MovedStreams) -> StateRows:
    tail_seqs = np.array([each.tail_seq for each in streams], np.int64)
    x, y = (np.concatenate([getattr(each, name) for each in streams]) for name in ("tail_x", "tail_y"))
    return StateRows(moved.streams, moved.next_seqs, moved.states, tail_seqs, x, y)
