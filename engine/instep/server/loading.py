"""Models that are loaded, swapped and unloaded while others are served."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from instep.config import ModelConfig
from instep.config.sections import StreamPolicy
from instep.frontends.zmq.served import Served
from instep.models.errors import ModelError
from instep.models.folder import check_name
from instep.recording.errors import RecordingError, with_advice
from instep.recording.writer import RecordingWriter
from instep.runtime.stepper import Stepper
from instep.server.beside import Beside
from instep.server.loop import Loop
from instep.server.moving import Moved, catch_up, check_sizes, move
from instep.server.preparation import CannotServe, Version, prepare_another, versions
from instep.server.recording_files import next_recording, present_recording, recording_file
from instep.server.recordings import open_recording, record
from instep.server.services import lay_foundation, make_served, make_service
from instep.server.shutdown import Shutdown
from instep.streaming.replaying import WarmUpReplay
from instep.streaming.service import Recovery
from instep.streaming.tasks import Tasks

if TYPE_CHECKING:
    from instep.server.server import Server

_KEEP: Final = StreamPolicy("keep")
_FINGERPRINT: Final = 8
"""Digits of a fingerprint in a name."""

_Opened: TypeAlias = tuple[RecordingWriter, Recovery | None] | None


@dataclass(frozen=True, slots=True)
class _Made:
    """A model that nobody uses yet."""

    served: Served
    stepper: Stepper
    opened: _Opened
    """The file that will be its recording."""


class Loader:
    """Makes the models that are served those of the configuration, in a thread beside serving.

    A model's steps run in a thread, because no process can be forked once ZeroMQ has threads.
    """

    def __init__(
        self,
        server: Server,
        loop: Loop,
        shutdown: Shutdown,
        beside: Beside,
        log: structlog.stdlib.BoundLogger,
        configured: Mapping[str, Version],
    ) -> None:
        self.tasks = Tasks(shutdown.bug)
        """The reload, or the unloading of a version that nobody uses, that is under way: one at most."""
        self.problem = ""
        """Why the models that are served are not those of the configuration read last; empty where they are."""
        self._server = server
        self._loop = loop
        self._shutdown = shutdown
        self._beside = beside
        self._log = log
        self._configured = configured
        """The models by name that the configuration named when it was last read, as far as it is in force."""
        self._wanted: ModelConfig | None = None
        """The configuration of the newest reload, until it begins."""
        self._followed: ModelConfig | None = None
        """The configuration of the reload that is under way."""

    @property
    def config(self) -> ModelConfig:
        """The configuration that is in force, or will be once the reload that is under way has ended."""
        return self._followed or self._server.config.model

    @property
    def is_reloading(self) -> bool:
        """Whether a reload is under way or waits for its turn."""
        return self._followed is not None or self._wanted is not None

    def reload(self, wanted: ModelConfig) -> None:
        """Load, swap and unload models until they are those of a configuration, once what is under way has ended."""
        self._wanted = wanted
        self.tick()

    def tick(self) -> None:
        """Unload a version that was replaced and that nobody uses any more; then follow the newest configuration."""
        if len(self.tasks) or self._shutdown.requested.is_set():
            return
        unused = [service for service in self._server.services if service.is_former and service.is_unused]
        if unused:
            self.tasks.start(self._unload(unused[0].name))
        elif self._wanted is not None:
            self._followed, self._wanted = self._wanted, None
            self.tasks.start(self._reload(self._followed), self._reload_ended)

    def _reload_ended(self) -> None:
        self._followed = None

    async def _reload(self, wanted: ModelConfig) -> None:
        loaded, swapped, at = list[str](), list[str](), ""
        try:
            found = await self._beside.do(partial(versions, wanted.folders))
            served = {service.name: service for service in self._server.services}
            for name, (folder, _) in found.items():
                if name not in served:
                    at = f"{name!r}: "
                    await self._load(name, folder)
                    loaded.append(name)
            for name, (folder, fingerprint) in found.items():
                if name in served and served[name].about.fingerprint != fingerprint:
                    at = f"{name!r}: "
                    await self._swap(name, folder, StreamPolicy.parse(wanted.on_reload))
                    swapped.append(name)
        except Exception as error:  # also no memory, or a folder with things in it that nobody thought of
            if not swapped:
                for name in loaded:
                    await self._unload(name)
                loaded = []
            if self._shutdown.requested.is_set():
                return
            extent = "models are as before"
            if swapped:
                extent = "of model.folder only the models loaded and swapped are in force"
            self.problem = f"{extent}: {at}{_why(error)}"
            self._log.error("models not reloaded", loaded=loaded, swapped=swapped, reason=self.problem)
            if swapped:
                now = {service.name: service.about.fingerprint for service in self._server.services}
                in_force = {name: version for name, version in found.items() if now.get(name) == version[1]}
                self._enter({**self._configured, **in_force})
            return
        unloaded = [name for name, service in served.items() if name not in found and not service.is_former]
        for name in unloaded:
            await self._unload(name)
        self._server.reorder(list(found))
        self._enter(found)
        self._server.config = self._server.config.model_copy(update={"model": wanted})
        self.problem = ""
        if loaded or swapped or unloaded:
            self._log.info("models reloaded", loaded=loaded, swapped=swapped, unloaded=unloaded)

    def _enter(self, configured: Mapping[str, Version]) -> None:
        self._configured = configured
        for service in self._server.services:
            _, fingerprint = configured.get(service.name, (None, None))
            service.is_configured = service.about.fingerprint == fingerprint

    async def _load(self, name: str, folder: Path) -> None:
        """Serve another model."""
        log = self._log.bind(model=name)
        with ExitStack() as undo:
            made = await self._make(name, folder, log, undo)
            self._record(made)
            self._server.add(made.served)
            undo.pop_all()
        log.info("loaded", folder=str(folder))

    async def _swap(self, name: str, folder: Path, policy: StreamPolicy) -> None:
        """Serve another version of a model under its name.

        To keep the streams, they and the connections there are stay with the former version, which is unloaded when it
        has none any more. To move them, they continue in the new one from the states that they have, and after a
        replay from those that it has after their newest frames.
        """
        log, former = self._log.bind(model=name), self._server.served(name)
        keeps = policy.word == "keep"
        kept_as = f"{name}@{former.info.fingerprint[:_FINGERPRINT]}" if keeps else ""
        with ExitStack() as undo:
            if kept_as and any(service.name == check_name(kept_as) for service in self._server.services):
                raise CannotServe(f"{kept_as!r} has connections or streams left from an earlier reload: close them")
            made = await self._make(name, folder, log, undo, former, policy)
            if keeps:
                self._record(made)
                self._server.replace(former, made.served, kept_as)
            else:
                moved = await self._move(former, made, policy, log)
            undo.pop_all()
        fingerprint = made.served.info.fingerprint
        made.served.service.events.add("swapped", detail=fingerprint)
        if not keeps:  # not before: if this is cancelled, nothing that is served may be undone
            await moved.end(former.service, made.served.service)
            await self._server.close(former.service)
        kept = {"kept_as": kept_as} if kept_as else {}
        streams = f"replay:{policy.frames}" if policy.frames else policy.word
        log.info("swapped", folder=str(folder), fingerprint=fingerprint, **kept, streams=streams)

    async def _unload(self, name: str) -> None:
        """Serve a model no longer."""
        await self._server.remove(name, f"the model {name!r} is unloaded")
        self._log.info("unloaded", model=name)

    async def _make(
        self,
        name: str,
        folder: Path,
        log: structlog.stdlib.BoundLogger,
        undo: ExitStack,
        former: Served | None = None,
        policy: StreamPolicy = _KEEP,
    ) -> _Made:
        """A model that nobody uses yet; `former` is the version that it replaces."""
        config = self._server.config
        file = recording_file(config, name, is_only=False)  # one that cannot be is told before anything takes long
        prepared = await self._beside.do(partial(prepare_another, config, name, folder, log))
        moved = None
        if former is not None and policy.word != "keep":
            check_sizes(former, prepared.network, policy)
            moved = former.service
        tables = None if moved is None else moved.engine.tables
        foundation = await self._beside.do(partial(lay_foundation, config, prepared, forks=False, tables=tables))
        undo.callback(foundation.executor.stop)  # it is idle, and closes its pipe once its thread has ended
        if file is not None:
            file = present_recording(file, prepared.model.fingerprint) if former is None else next_recording(file)
        service = make_service(config, foundation, file, self._loop.wake, self._shutdown.bug, log, moved)
        service.is_configured = name in self._configured and self._configured[name][0] == prepared.model_path
        opened = None
        if file is not None:
            opened = writer, recovery = await self._beside.do(partial(open_recording, config, foundation, service))
            undo.callback(writer.discard if recovery is None else writer.abandon)
        if self._shutdown.requested.is_set():
            raise CannotServe("the server is shutting down")
        return _Made(make_served(config, foundation, service), foundation.stepper, opened)

    def _record(self, made: _Made) -> None:
        if made.opened is not None:
            record(made.served.service, *made.opened, self._server.config, self._loop, self._shutdown)

    async def _move(
        self, former: Served, made: _Made, policy: StreamPolicy, log: structlog.stdlib.BoundLogger
    ) -> Moved:
        """Let all streams and connections continue in another version."""
        old, replay = former.service, None
        if policy.word == "replay":
            assert old.file is not None, "`check_sizes` has refused it"
            replay = WarmUpReplay(old.file, made.stepper, len(old.engine.table.owner) - 1, policy.frames)
            log.info("replaying")
            await catch_up(replay, self._beside)
        paused_s = time.monotonic()
        with self._server.paused():
            moved = await move(old, made.served.service, replay, self._beside, partial(self._record, made))
            self._server.replace(former, made.served, "")
        log.info("moved", streams=len(moved.numbers), paused_ms=round(1e3 * (time.monotonic() - paused_s), 1))
        return moved


def _why(error: Exception) -> str:
    is_sentence = isinstance(error, CannotServe | ModelError | RecordingError)
    return with_advice(error) if is_sentence else f"{type(error).__name__}: {error}"
