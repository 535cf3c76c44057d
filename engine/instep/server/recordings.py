"""The recordings of a server: one file for each model, continued where it exists."""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Final

import structlog

from instep.config import Config
from instep.recording.database import check_place, holds_recording, lost_tail
from instep.recording.errors import RecordingError
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.recorder import Recorder
from instep.recording.schema import RecordingHeader
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.server.loop import Loop
from instep.server.preparation import Prepared
from instep.server.recording_files import later_recordings, present_recording, recording_file
from instep.server.services import Foundation
from instep.server.shutdown import Shutdown
from instep.streaming.service import ModelService, Recovery

QUEUE_BATCHES: Final = 64
"""Batches that may wait to be written; when the disk falls behind by this many, stepping waits for it."""


def find_recording(
    config: Config, prepared: Prepared, log: structlog.stdlib.BoundLogger, *, is_only: bool
) -> Path | None:
    """The recording of the version of a model that is served; None where nothing is recorded.

    The log, which names the model, says in which recordings of other versions streams are open that nobody serves.

    Raises:
        RecordingError: as `recording_file`, and when a recording of the model cannot be read.
    """
    first = recording_file(config, prepared.model.name, is_only=is_only)
    if first is None:
        return None
    present = present_recording(first, prepared.model.fingerprint)
    _warn_of_others(first, present, log)
    return present


def _warn_of_others(first: Path, present: Path, log: structlog.stdlib.BoundLogger) -> None:
    for other in (first, *later_recordings(first)):
        if other == present or not other.is_file() or not other.stat().st_size or is_being_written(other):
            continue
        place = shlex.quote(str(other))
        try:
            with RecordingReader(other) as reader:
                # Not `streams()`, which holds the final state of every stream that there ever was.
                closed = {row[2] for row in reader.rows("closings")}
                streams = sum(row[2] not in closed for row in reader.openings())
                folder = shlex.quote(reader.header.model_folder)
        except RecordingError as error:  # the version that is served does not need it
            reason = f"streams may be open in the recording of another version of the model, but {error}"
            log.warning("streams not served", file=str(other), reason=reason, next=f"instep verify {place}")
            continue
        if streams:
            log.warning(
                "streams not served",
                file=str(other),
                streams=streams,
                reason="they are open in the recording of another version of the model",
                next=f"instep serve {folder} --record {place} --endpoint tcp://127.0.0.1:PORT",
            )


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
    config: Config, foundation: Foundation, service: ModelService
) -> tuple[RecordingWriter, Recovery | None]:
    """A new recording of a service, or the one that is there, with its streams put back.

    Raises:
        RecordingError: with a sentence.
    """
    path, header, log = service.file, recording_header(foundation.prepared, config), service.log
    assert path is not None
    retention = Retention(config.recording.keep_bytes, round(config.recording.keep_s * 1e9))
    check_place(path)
    if not holds_recording(path):
        return RecordingWriter.create(path, header, retention), None
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
    return writer, recovery


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
