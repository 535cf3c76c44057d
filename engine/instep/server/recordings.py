"""The recordings of a server: one file for each model, continued where it exists."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

import structlog

from instep.config import Config
from instep.config.sections import StreamPolicy
from instep.models.errors import ModelError
from instep.models.folder import check_name
from instep.recording.database import check_place, lost_tail, remove_database
from instep.recording.errors import RecordingError
from instep.recording.recorder import Recorder
from instep.recording.schema import RecordingHeader
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.server.continuation import continue_streams, end_moved, prepare_former
from instep.server.loop import Loop
from instep.server.moving import check_policy, check_sizes
from instep.server.preparation import CannotServe, Prepared
from instep.server.recording_files import (
    Former,
    Versions,
    find_versions,
    holds_nothing,
    recording_file,
    say_not_served,
)
from instep.server.services import Foundation
from instep.server.shutdown import Shutdown
from instep.streaming.service import ModelService, Recovery

QUEUE_BATCHES: Final = 64
"""Batches that may wait to be written; when the disk falls behind by this many, stepping waits for it."""


_FINGERPRINT: Final = 8
"""Digits of a fingerprint in a name."""


def find_recording(
    config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger, *, is_only: bool
) -> Versions | None:
    """The recording of the version of a model that is to be served, and those of earlier ones; None without any.

    Raises:
        RecordingError: as `recording_file` and `find_versions`.
        CannotServe: when streams of an earlier version cannot continue in this one as `model.on_reload` says.
    """
    first = recording_file(config, prepared.model.name, is_only=is_only)
    if first is None:
        return None
    if first == config.recording.file:  # there is no place for another version
        return Versions(first, None, [])
    versions = find_versions(first, prepared.model.fingerprint, log)
    if versions.newest is not None:
        check_sizes(versions.newest, prepared.network, allowed=config.model.allow_other_sizes)
    policy = StreamPolicy.parse(config.model.on_reload)
    for former in formers_to_move(versions, prepared.model.fingerprint, policy):
        if former.streams:
            check_policy(policy, former.header, former.header.state_spec, prepared.network)
    return versions


@dataclass(frozen=True, slots=True)
class Planned:
    """A version of a model that is to be served."""

    prepared: Prepared
    log: structlog.stdlib.BoundLogger
    file: Path | None = None
    """Its recording."""
    formers: Sequence[Former] = ()
    """Those whose streams continue in it."""
    kept_as: str = ""
    """What a former version is called, which keeps its streams."""


def plan(config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger, *, is_only: bool) -> list[Planned]:
    """A model, and the former versions of it that keep their streams.

    What is left to be done in their recordings, because a server was killed, is done first.

    Raises:
        RecordingError, CannotServe: as `find_recording`.
    """
    versions = find_recording(config, prepared, log, is_only=is_only)
    if versions is None:
        return [Planned(prepared, log)]
    for former in versions.formers:
        end_moved(former)
    moves = formers_to_move(versions, prepared.model.fingerprint, StreamPolicy.parse(config.model.on_reload))
    planned = [Planned(prepared, log, versions.file, [each for each in moves if each.streams])]
    for former in versions.formers:
        if former in moves or not former.streams:
            continue
        kept_as = name_kept(prepared.model.name, former.header.model_fingerprint)
        try:
            if kept_as in [each.kept_as for each in planned]:
                raise CannotServe("another recording of that version has open streams, too")
            its_log = log.bind(model=kept_as)
            planned.append(Planned(prepare_former(config, former, its_log), its_log, former.file, (), kept_as))
        except (ModelError, CannotServe) as error:
            say_not_served(former.file, f"streams keep the version that they have, but {error}", log)
    return planned


def name_kept(name: str, fingerprint: str) -> str:
    """What a version of a model is called that keeps its streams when another one replaces it."""
    return check_name(f"{name}@{fingerprint[:_FINGERPRINT]}", "give the model a shorter one")


def formers_to_move(versions: Versions, fingerprint: str, policy: StreamPolicy) -> list[Former]:
    """The recordings whose streams continue in the version of that fingerprint; the others keep their versions."""
    return [each for each in versions.formers if policy.word != "keep" or each.header.model_fingerprint == fingerprint]


def recording_header(prepared: Prepared, config: Config) -> RecordingHeader:
    """The header of a recording of this model."""
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
    """A new recording of a service, or the one that is there, with its streams put back, and those of `formers`.

    Raises:
        RecordingError: with a sentence.
    """
    path, header, log = service.file, recording_header(foundation.prepared, config), service.log
    assert path is not None
    retention = Retention(config.recording.keep_bytes, round(config.recording.keep_s * 1e9))
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
) -> None:
    """Record what a service does from now on. Nothing here can fail."""
    durability = config.recording.durability
    service.log.info("recording", file=str(writer.path), durability=durability)
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
