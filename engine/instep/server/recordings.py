"""The recordings of a server: one file for each version of a model, and the streams that continue in the next."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import structlog

from instep.config import Config
from instep.config.sections import StreamPolicy
from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.typing import I64, U8
from instep.frontends.shards import Shard
from instep.models.base import RecurrentModel, StateSpec
from instep.models.errors import ModelError
from instep.models.folder import check_name, load_model
from instep.models.model import Model
from instep.recording.database import check_place, lost_tail, remove_database
from instep.recording.errors import RecordingError
from instep.recording.reader import load_open_streams
from instep.recording.recorder import Recorder
from instep.recording.records import MovedStreams, OpenStream, StateRows
from instep.recording.recovery import Recovered
from instep.recording.schema import MOVED_EVENT, RecordingHeader
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.replay.warm_up import WarmUpReplay
from instep.runtime.stepper import Stepper
from instep.server.loop import Loop, Shutdown
from instep.server.preparation import CannotServe, Prepared, prepare_loaded
from instep.server.recording_files import (
    Former,
    Versions,
    find_versions,
    holds_nothing,
    recording_file,
    say_not_served,
)
from instep.server.services import Foundation, lay_foundation
from instep.streaming.service import ModelService, Recovery
from instep.streaming.states import state_rows
from instep_client.protocol.wire import ServerInfo

QUEUE_BATCHES: Final = 64
"""The most batches that may wait to be written. If the disk is further behind, stepping waits."""


_FINGERPRINT: Final = 8


def check_sizes(former: RecordingHeader | ServerInfo, network: RecurrentModel, *, allowed: bool) -> None:
    """Refuse a version with other sizes of frames or outputs than the former one, unless `allowed`.

    Raises:
        CannotServe: with a sentence.
    """
    there, here = (former.features, former.outputs), (network.description.features, network.description.outputs)
    if there != here and not allowed:
        raise CannotServe(
            f"it takes {here[0]:,} features and gives {here[1]:,} outputs, and the version before {there[0]:,} and "
            f"{there[1]:,}: clients would break; set model.allow_other_sizes if that is meant"
        )


def check_policy(
    policy: StreamPolicy, former: RecordingHeader | ServerInfo, state: StateSpec, network: RecurrentModel
) -> None:
    """Refuse a version in which streams of the former one cannot continue by this policy.

    Raises:
        CannotServe: with a sentence.
    """
    if policy.word == "keep":
        return
    if (former.features, former.outputs) != (network.description.features, network.description.outputs):
        raise CannotServe(f"its frames or outputs have other sizes, so no stream can be moved to it: {use('keep')}")
    if policy.word == "move" and state != network.state:
        raise CannotServe(
            f"its state differs from that of the version before, so no stream can be moved to it: "
            f"{use('replay:N', 'keep')}"
        )


def use(*policies: str) -> str:
    """Advice to use another policy."""
    return f"use `model.on_reload: {'` or `'.join(policies)}`"


def find_recording(config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger) -> Versions | None:
    """The recording of the version to serve, and those of earlier versions; None without recordings.

    Raises:
        RecordingError: as `recording_file` and `find_versions`.
        CannotServe: when streams of an earlier version cannot continue in this one as `model.on_reload` says.
    """
    first = recording_file(config, prepared.model.name)
    if first is None:
        return None
    if config.recording.is_one_file:
        return Versions(first, None, [])
    versions = find_versions(first, prepared.model.fingerprint, log)
    policy = StreamPolicy.parse(config.model.on_reload)
    try:
        if versions.newest is not None:
            check_sizes(versions.newest, prepared.network, allowed=config.model.allow_other_sizes)
        for former in formers_to_move(versions, prepared.model.fingerprint, policy):
            if former.streams:
                check_policy(policy, former.header, former.header.state_spec, prepared.network)
    except CannotServe as error:
        raise CannotServe(f"{prepared.model_path}: {error}") from None
    return versions


@dataclass(frozen=True, slots=True)
class Planned:
    """A version of a model that is to be served."""

    prepared: Prepared
    log: structlog.stdlib.BoundLogger
    file: Path | None = None
    formers: Sequence[Former] = ()
    """The former recordings whose streams continue in it."""
    kept_as: str = ""
    """The name of a former version that keeps its streams."""


def plan(config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger) -> list[Planned]:
    """Plan a model, and former versions of it that keep their streams.

    If a server was killed during a change, the change is first completed in the recordings.

    Raises:
        RecordingError, CannotServe: as `find_recording`.
    """
    versions = find_recording(config, prepared, log)
    if versions is None:
        return [Planned(prepared, log)]
    for former in versions.formers:
        end_moved(former)
    moves = formers_to_move(versions, prepared.model.fingerprint, StreamPolicy.parse(config.model.on_reload))
    planned = [Planned(prepared, log, versions.file, [each for each in moves if each.streams])]
    keep = [each for each in versions.formers if each not in moves and each.streams]
    while keep:
        former, fingerprint = keep[-1], keep.pop().header.model_fingerprint
        kept_as = name_kept(prepared.model.name, fingerprint)
        its_log = log.bind(model=kept_as)
        try:
            loaded = prepare_former(config, former, its_log)
        except (ModelError, CannotServe) as error:
            say_not_served(former.file, f"streams keep the version that they have, but {error}", log)
            continue
        older = [each for each in keep if each.header.model_fingerprint == fingerprint]
        keep = [each for each in keep if each not in older]
        planned.append(Planned(loaded, its_log, former.file, older, kept_as))
    return planned


def name_kept(name: str, fingerprint: str) -> str:
    """The name of a replaced version that keeps its streams."""
    return check_name(f"{name}@{fingerprint[:_FINGERPRINT]}", "give the model a shorter one")


def formers_to_move(versions: Versions, fingerprint: str, policy: StreamPolicy) -> list[Former]:
    """The recordings whose streams continue in the version with that fingerprint; others keep their versions."""
    return [each for each in versions.formers if policy.word != "keep" or each.header.model_fingerprint == fingerprint]


def recording_header(prepared: Prepared, config: Config) -> RecordingHeader:
    """The header for a recording of this model."""
    return RecordingHeader(
        instep_version=version("instep"),
        created_ns=time.time_ns(),
        model_name=prepared.model.name,
        model_folder=str(prepared.model_path),
        description=prepared.model.description.as_json(),
        features=prepared.model.description.features,
        outputs=prepared.model.description.outputs,
        state=prepared.model.description.state.encode(),
        model_fingerprint=prepared.model.fingerprint,
        arithmetic=prepared.arithmetic,
        durability=config.recording.durability,
        output_names=prepared.model.output_names,
    )


def open_recording(
    config: Config, foundation: Foundation, service: ModelService, formers: Sequence[Former] = ()
) -> tuple[RecordingWriter, Recovery | None]:
    """Open or create a service's recording, and restore its streams and those of `formers`.

    Raises:
        RecordingError: with a sentence.
    """
    path, header, log = service.file, recording_header(foundation.prepared, config), service.log
    assert path is not None
    retention = Retention(config.recording.keep_bytes, round(config.recording.keep_s * 1e9))
    if not config.recording.is_one_file:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordingError(f"the folder {path.parent} cannot be made: {error.strerror}") from None
    check_place(path)
    if holds_nothing(path):
        remove_database(path)
        writer = RecordingWriter.create(path, header, retention)
        if not formers:
            return writer, None
        return writer, _continued(config, foundation, service, formers, writer, Recovery(0, 0, 0.0, 0, {}, 0))
    if tail := lost_tail(path):
        log.warning("recording lost its end", file=str(path), reason=tail)
    log.info("recovering", recording=str(path))
    engine = service.engine
    writer, recovery = resume_recording(
        path,
        header,
        engine.tables,
        engine.table,
        engine.journal.dirty,
        foundation.stepper,
        retention,
    )
    seconds = round(recovery.seconds, 4)
    log.info("recovered", streams=recovery.streams, frames_replayed=recovery.frames, seconds=seconds)
    return writer, _continued(config, foundation, service, formers, writer, recovery)


def _continued(
    config: Config,
    foundation: Foundation,
    service: ModelService,
    formers: Sequence[Former],
    writer: RecordingWriter,
    recovery: Recovery,
) -> Recovery:
    try:
        for former in formers:
            recovery = continue_streams(config, former, foundation, service, writer, recovery)
        return recovery
    except BaseException as error:
        writer.abandon()
        if isinstance(error, sqlite3.Error):
            raise RecordingError(f"cannot continue the recording {writer.path}: {error}") from None
        raise


def record(
    service: ModelService,
    writer: RecordingWriter,
    recovery: Recovery | None,
    config: Config,
    loop: Loop,
    shutdown: Shutdown,
    shard: Shard,
) -> None:
    """Record everything that a service does from now on. Nothing here can fail."""
    durability = config.recording.durability
    service.log.info("recording", file=str(writer.path), durability=durability)
    writer.second_place = shard.second_place
    service.recorder = recorder = _recorder(service, writer, config, loop, shutdown)
    service.recovery = recovery
    last_stream = 0 if recovery is None else recovery.last_stream
    service.operations.hibernation.restarted({} if recovery is None else recovery.hibernated)
    replayed_ns = round(recovery.seconds * 1e9) if recovery is not None and recovery.frames else 0
    waits = durability != "memory"
    service.engine.journal.record(recorder, last_stream, writer.position, waits=waits, replayed_ns=replayed_ns)


def _recorder(
    service: ModelService,
    writer: RecordingWriter,
    config: Config,
    loop: Loop,
    shutdown: Shutdown,
) -> Recorder:
    running, journal = asyncio.get_running_loop(), service.engine.journal

    def on_loop(call: Callable[..., None], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was forced to end
            running.call_soon_threadsafe(call, *values)

    def failed(error: Exception) -> None:
        on_loop(shutdown.fail, f"the recording {writer.path} failed: {error}")

    return Recorder(
        writer,
        QUEUE_BATCHES,
        on_room=lambda: on_loop(loop.wake),
        on_failure=failed,
        on_durable=lambda lsn: on_loop(journal.advance, lsn),
        commit_us=service.engine.stats.commit_us,
        on_trimmed=lambda position: service.log.info("recording trimmed", position=position),
    )


_AT_ONCE: Final = 4096
"""The number of streams that continue in one transaction."""


def prepare_former(config: Config, former: Former, log: structlog.stdlib.BoundLogger) -> Prepared:
    """Load the version of the model that made a recording, from the folder that it had.

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
    """Record the ends of streams that already continue elsewhere, which a killed server did not record.

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
    """Move the streams of a recording to the recording of another version, where they hibernate, and end them here.

    If the process is killed, each stream is in exactly one of the two: in the target if its `moved` event is there.
    Streams whose names are in use are left, and so are all streams if frames were recorded after the newest states and
    the former version, which would have to step them, cannot be loaded. This is logged.

    Args:
        config: decides whether they move in their states or are replayed.
        former: the recording that they leave.
        foundation: of the version in which they continue.
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
    log.info("moved", file=str(former.file), streams=len(numbers), on_reload=config.model.on_reload)
    return recovery


def _replayed(config: Config, former: Former, foundation: Foundation) -> WarmUpReplay | None:
    """The streams replayed in the version they continue in; None if they move with their states."""
    policy, prepared = StreamPolicy.parse(config.model.on_reload), foundation.prepared
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
    """The last states in the former version, uint8 [N, row_bytes]."""
    spec = former.header.state_spec
    initial = spec.missing(1)[0]
    if any(stream.state is None for stream in streams):
        if any(leaf.initial is None for leaf in spec.leaves):
            spec = _model(former).state  # the one that has learned what streams begin with
        initial = spec.initial(1)[0]
    return np.stack([initial if stream.state is None else stream.state for stream in streams])


def _tails(streams: Sequence[OpenStream], moved: MovedStreams) -> StateRows:
    tail_seqs = np.array([each.tail_seq for each in streams], np.int64)
    x, y = (np.concatenate([getattr(each, name) for each in streams]) for name in ("tail_x", "tail_y"))
    return StateRows(moved.streams, moved.next_seqs, moved.states, tail_seqs, x, y)
