"""Streams that continue in the recording of another version of their model before anybody is served."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from instep.config import Config
from instep.config.sections import StreamPolicy
from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.typing import I64, U8
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.model import Model
from instep.recording.errors import RecordingError
from instep.recording.reader import load_open_streams
from instep.recording.records import MovedStreams, OpenStream, StateRows
from instep.recording.recovery import Recovered
from instep.recording.schema import MOVED_EVENT
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.replay.warm_up import WarmUpReplay
from instep.runtime.stepper import Stepper
from instep.server.preparation import CannotServe, Prepared, prepare_loaded
from instep.server.recording_files import Former, say_not_served
from instep.server.services import Foundation, lay_foundation
from instep.streaming.service import ModelService, Recovery
from instep.streaming.states import state_rows

_AT_ONCE: Final = 4096
"""Streams that continue in one transaction."""


def prepare_former(config: Config, former: Former, log: structlog.stdlib.BoundLogger) -> Prepared:
    """The version that a recording is of, from the folder that it had.

    Raises:
        ModelError: when that cannot be loaded, or holds another version now.
        CannotServe: when it cannot be served.
    """
    return prepare_loaded(config, _model(former), Path(former.header.model_folder), log)


def _model(former: Former) -> Model:
    header = former.header
    model = replace(load_model(header.model_folder), name=header.model_name)
    if model.fingerprint != header.model_fingerprint:
        raise ModelError(f"{header.model_folder} holds another version of the model now")
    return model


def end_moved(former: Former) -> None:
    """Write the ends of streams that continue elsewhere already: the server was killed before it did.

    Raises:
        RecordingError: when the recording cannot be written.
    """
    if former.moved:
        writer = RecordingWriter.resume(former.file, former.header)
        try:
            numbers, seqs = (np.array(list(each), np.int64) for each in (former.moved, former.moved.values()))
            states, lost = former.header.state_spec.missing(len(numbers)), np.ones(len(numbers), np.bool_)
            writer.close_streams(time.time_ns(), numbers, MOVED_EVENT, seqs, states, lost)
            writer.close()
        except BaseException:
            writer.abandon()
            raise


def continue_streams(
    config: Config,
    former: Former,
    foundation: Foundation,
    service: ModelService,
    target: RecordingWriter,
    recovery: Recovery,
) -> Recovery:
    """Let the streams of a recording continue in that of another version, where they hibernate; in this one they end.

    Each stream is in exactly one of the two, whenever the process is killed: it counts where its `moved` event is.
    Streams whose names are taken are left, and so are all where frames were recorded after the newest states and the
    former version, which alone could step them, cannot be loaded. The log is told.

    Args:
        config: says whether they move in their states or are replayed.
        former: the recording that they leave.
        foundation: of the version in which they continue.
        service: of that, which serves nobody yet.
        target: writes its recording.
        recovery: what that holds.

    Returns:
        What it holds now.
    """
    log, table = service.log, service.engine.table
    names = {*recovery.hibernated, *table.names(table.open_slots())}
    numbers = [number for number, name in former.streams.items() if name not in names]
    if len(numbers) < len(former.streams):
        say_not_served(former.file, "streams of these names are open in the recording of a later version", log)
    if not numbers:
        return recovery
    try:
        source = _complete(config, former, log)
    except (RecordingError, ModelError, CannotServe) as error:
        say_not_served(former.file, f"streams are open in the recording of another version, but {error}", log)
        return recovery
    with ExitStack() as undo:
        undo.callback(source.abandon)
        try:
            parts = [
                load_open_streams(former.file, numbers[first : first + _AT_ONCE])
                for first in range(0, len(numbers), _AT_ONCE)
            ]
            left = [_states(part, former) for part in parts]
            replay = _replayed(config, former, foundation)
        except (RecordingError, ModelError) as error:
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
    log.info("moved", file=str(former.file), streams=len(numbers))
    return recovery


def _replayed(config: Config, former: Former, foundation: Foundation) -> WarmUpReplay | None:
    """The streams in the version in which they continue; None where they move in their states."""
    policy, prepared = StreamPolicy.parse(config.model.on_reload), foundation.prepared
    if policy.word != "replay" or former.header.model_fingerprint == prepared.model.fingerprint:
        return None
    most = config.engine.max_streams
    stepper = Stepper(prepared.network, config.engine.max_batch_size, most, prepared.device)
    replay = WarmUpReplay(former.file, stepper, most, policy.frames)
    replay.follow()
    return replay


def _complete(config: Config, former: Former, log: structlog.stdlib.BoundLogger) -> RecordingWriter:
    """Continue a recording until the newest states of its streams are in it."""
    with Recovered(former.file) as found:
        if not any(len(portion.frames) or portion.marks for portion in found.portions()):
            return RecordingWriter.resume(former.file, former.header)
    foundation = lay_foundation(config, prepare_former(config, former, log), forks=False)
    foundation.executor.stop()
    tables, stepper, most = foundation.tables, foundation.stepper, config.engine.max_streams
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
    """As the former version left them, uint8 [N, row_bytes]."""
    spec = former.header.state_spec
    initial = spec.missing(1)[0]
    if any(stream.state is None for stream in streams):
        if any(leaf.initial is None for leaf in spec.leaves):
            spec = _model(former).state  # the one that has learned what streams begin with
        initial = spec.initial(1)[0]
    return np.stack([initial if stream.state is None else stream.state for stream in streams])


def _tails(streams: Sequence[OpenStream], moved: MovedStreams) -> StateRows:
    """The states, with the outputs that clients may lack."""
    tail_seqs = np.array([each.tail_seq for each in streams], np.int64)
    x, y = (np.concatenate([getattr(each, name) for each in streams]) for name in ("tail_x", "tail_y"))
    return StateRows(moved.streams, moved.next_seqs, moved.states, tail_seqs, x, y)
