"""Opens the recording of each model before it is served, and restores its streams."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from typing import Final

from instep.config import Config
from instep.frontends.models import Served
from instep.frontends.shards import Shard
from instep.recording.database import check_place, lost_tail, remove_database
from instep.recording.errors import RecordingError
from instep.recording.recorder import Recorder
from instep.recording.schema import RecordingHeader
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from instep.replay.recovery import resume_recording
from instep.server.loop import Loop, Shutdown
from instep.server.moves import continue_streams
from instep.server.preparation import Prepared
from instep.server.recording_files import holds_nothing
from instep.server.services import Allocation, make_served
from instep.streaming.service import ModelService, Recovery

QUEUE_BATCHES: Final = 64
"""The most batches that may wait to be written. If the disk is further behind, stepping waits."""


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


@dataclass(slots=True)
class NextModel:
    """A model that is not served yet, and its recording, if there is to be one."""

    allocation: Allocation
    service: ModelService
    writer: RecordingWriter | None = None
    recovery: Recovery | None = None

    def open_recording(self, config: Config, undo: ExitStack) -> None:
        """Open or create the recording, and restore its streams and those of earlier versions that continue here.

        Raises:
            RecordingError: with a sentence.
        """
        if self.service.file is not None:
            self.writer, self.recovery = _open(config, self.allocation, self.service)
            undo.callback(self.writer.discard if self.recovery is None else self.writer.abandon)

    def record(self, config: Config, loop: Loop, shutdown: Shutdown, shard: Shard) -> None:
        """Record everything that the service does from now on. Nothing here can fail."""
        service, writer, recovery = self.service, self.writer, self.recovery
        if writer is None:
            return
        durability = config.recording.durability
        service.log.info("recording", file=str(writer.path), durability=durability)
        writer.second_place = shard.second_place
        service.recorder = recorder = _recorder(service, writer, loop, shutdown)
        service.recovery = recovery
        last_stream = 0 if recovery is None else recovery.last_stream
        service.operations.hibernation.restarted({} if recovery is None else recovery.hibernated)
        replayed_ns = round(recovery.seconds * 1e9) if recovery is not None and recovery.frames else 0
        waits = durability != "memory"
        service.engine.journal.record(recorder, last_stream, writer.position, waits=waits, replayed_ns=replayed_ns)

    def served(self, config: Config, shard: Shard) -> Served:
        """The model as its connections will see it."""
        served = make_served(config, self.allocation, self.service, shard)
        if self.allocation.planned.kept_as:
            served.keep_as(self.allocation.planned.kept_as)
        return served


def _open(config: Config, allocation: Allocation, service: ModelService) -> tuple[RecordingWriter, Recovery | None]:
    path, header, log = service.file, recording_header(allocation.prepared, config), service.log
    formers = allocation.planned.formers
    assert path is not None
    retention = Retention(config.recording.keep_bytes, round(config.recording.keep_s * 1e9))
    if not config.recording.is_one_file:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RecordingError(f"the folder {path.parent} cannot be made: {error.strerror}") from None
    check_place(path)
    if is_new := holds_nothing(path):
        remove_database(path)
        writer, recovery = RecordingWriter.create(path, header, retention), Recovery(0, 0, 0.0, 0, {}, 0)
    else:
        if tail := lost_tail(path):
            log.warning("recording lost its end", file=str(path), reason=tail)
        log.info("recovering", recording=str(path))
        engine = service.engine
        stepper, dirty = allocation.stepper, engine.journal.dirty
        writer, recovery = resume_recording(path, header, engine.tables, engine.table, dirty, stepper, retention)
        seconds = round(recovery.seconds, 4)
        log.info("recovered", streams=recovery.streams, frames_replayed=recovery.frames, seconds=seconds)
    try:
        for former in formers:
            recovery = continue_streams(config, former, allocation, service, writer, recovery)
    except BaseException as error:
        writer.abandon()
        if isinstance(error, sqlite3.Error):
            raise RecordingError(f"cannot continue the recording {path}: {error}") from None
        raise
    return writer, None if is_new and not formers else recovery


def _recorder(service: ModelService, writer: RecordingWriter, loop: Loop, shutdown: Shutdown) -> Recorder:
    running, journal = asyncio.get_running_loop(), service.engine.journal

    def on_loop(call: Callable[..., None], *values: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was forced to end
            running.call_soon_threadsafe(call, *values)

    return Recorder(
        writer,
        QUEUE_BATCHES,
        on_room=lambda: on_loop(loop.wake),
        on_failure=lambda error: on_loop(shutdown.fail, f"the recording {writer.path} failed: {error}"),
        on_durable=lambda lsn: on_loop(journal.advance, lsn),
        commit_us=service.engine.stats.commit_us,
        on_trimmed=lambda position: service.log.info("recording trimmed", position=position),
    )
