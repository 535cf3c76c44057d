"""Reloads: models are loaded, swapped and unloaded while others are served."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from instep.config import Config, ModelConfig
from instep.config.sections import ONE_FILE, StreamPolicy
from instep.frontends.models import Served
from instep.models.errors import ModelError
from instep.recording.errors import RecordingError, with_advice
from instep.replay.warm_up import WarmUpReplay
from instep.server.loop import Loop, Shutdown
from instep.server.moves import LoadingThread, Moved, catch_up, move
from instep.server.preparation import CannotServe, Prepared, load_models, prepare_loaded
from instep.server.recording_files import next_recording, recording_file
from instep.server.recordings import NextModel
from instep.server.services import allocate, make_service
from instep.server.versions import Planned, check_policy, check_sizes, name_kept, plan
from instep.streaming.service import ModelService
from instep.streaming.tasks import Tasks
from instep_client.protocol.wire import ServerInfo

if TYPE_CHECKING:
    from instep.server.server import Server

UNDER_WAY: Final = "models are as before: the last reload has not ended"
"""The `problem` of a loader from a reload's start until it begins to change models."""


@dataclass(eq=False)
class Loader:
    """Loads, swaps and unloads models until they match the configuration, in a thread next to the loop.

    The models it loads step in a thread, because no process can be forked once ZeroMQ has threads.
    """

    server: Server
    loop: Loop
    shutdown: Shutdown
    thread: LoadingThread
    log: structlog.stdlib.BoundLogger

    def __post_init__(self) -> None:
        self.tasks = Tasks(self.shutdown.bug)
        """The reload, or the unloading of an unused version, that is under way; at most one."""
        self.problem = ""
        """The reason that the served models differ from the last configuration; empty if they do not."""
        self._accepted: dict[str, str] = {}
        """Fingerprints of the models that are about to be served."""
        self._wanted: ModelConfig | None = None
        """The configuration of the newest reload, until it begins."""
        self._on_change: Callable[[], object] = lambda: None
        self._followed: ModelConfig | None = None
        """The configuration of the reload under way, until it begins to change models."""

    @property
    def config(self) -> ModelConfig:
        """The configuration in force, or the one in force after the reload under way."""
        return self._followed or self.server.config.model

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the configured models, by name."""
        return self._accepted or {each.name: each.about.fingerprint for each in self._current}

    @property
    def _current(self) -> list[ModelService]:
        return [service for service in self.server.services if not service.is_former]

    def reload(self, wanted: ModelConfig, on_change: Callable[[], object] = lambda: None) -> None:
        """Load, swap and unload models until they match a configuration, after any reload that is under way.

        Everything is loaded and checked before the first model changes. `on_change` is called just before that, when
        the configuration has the models that the next server would have to serve, and at the end of each reload,
        successful or not.
        """
        self._wanted, self._on_change, self.problem = wanted, on_change, UNDER_WAY
        self.tick()

    def tick(self) -> None:
        """Unload a replaced version that nobody uses any more; then follow the newest configuration."""
        if len(self.tasks) or self.shutdown.requested.is_set():
            return
        unused = [service for service in self.server.services if service.is_former and service.is_unused]
        if unused:
            self.tasks.start(self._unload(unused[0].name))
        elif self._wanted is not None:
            self._followed, self._wanted = self._wanted, None
            self.tasks.start(self._reload(self._followed))

    async def _reload(self, wanted: ModelConfig) -> None:
        loaded, swapped, at = list[str](), list[str](), ""
        before, config = self.server.config.model.folder, self.server.config.model_copy(update={"model": wanted})
        served, changed = {service.name: service for service in self.server.services}, dict[str, Prepared]()
        try:
            found = await self.thread.do(partial(load_models, wanted.folders))
            for model, folder in found:
                if model.name not in served or served[model.name].about.fingerprint != model.fingerprint:
                    at, log = f"{model.name!r}: ", self.log.bind(model=model.name)
                    if config.recording.is_one_file:
                        raise CannotServe(ONE_FILE)
                    prepared = await self.thread.do(partial(prepare_loaded, config, model, folder, log))
                    if model.name in served:
                        self._check_swap(config, prepared)
                    changed[model.name] = prepared
            accept = partial(self._adopt, wanted, accepted={model.name: model.fingerprint for model, _ in found})
            for name in [name for name in changed if name not in served]:
                at = f"{name!r}: "
                accept()
                await self._load(config, changed[name])
                loaded.append(name)
            for name in [name for name in changed if name in served]:
                at = f"{name!r}: "
                await self._swap(config, changed[name], accept, swapped)
            accept()
        except Exception as error:  # also no memory, or a folder with things in it that nobody thought of
            if not swapped:
                for name in loaded:
                    await self._unload(name)
                loaded = []
            if self.shutdown.requested.is_set():
                return
            extent, folders = "models are as before", before
            if swapped:
                extent = "of model.folder only the models loaded and swapped are in force"
                folders = {service.name: service.folder for service in self._current}
            reason = f"{extent}: {at}{_why(error)}"
            self._adopt(self.server.config.model.model_copy(update={"folder": folders}), reason)
            self.log.error("models not reloaded", loaded=loaded, swapped=swapped, reason=reason)
            return
        names = [model.name for model, _ in found]
        unloaded = [name for name, service in served.items() if name not in names and not service.is_former]
        for name in unloaded:
            await self._unload(name)
        self.server.models.reorder(names)
        self._adopt(self.server.config.model)
        if loaded or swapped or unloaded:
            self.log.info("models reloaded", loaded=loaded, swapped=swapped, unloaded=unloaded)

    def _adopt(self, models: ModelConfig, problem: str = "", accepted: dict[str, str] | None = None) -> None:
        """Make `models` the server's configuration; they are served already, or about to be if `accepted`."""
        self._followed, self._accepted = None, accepted or {}
        self.problem = problem if self._wanted is None else UNDER_WAY
        self.server.config = self.server.config.model_copy(update={"model": models})
        self._on_change()

    async def _load(self, config: Config, prepared: Prepared) -> None:
        """Serve another model, and former versions of it that keep their streams."""
        log = self.log.bind(model=prepared.model.name)
        with ExitStack() as undo:
            planned = await self.thread.do(partial(plan, config, prepared, log))
            for each in [await self._make(config, each, undo) for each in planned]:
                self.server.add(self._begin(each))
            undo.pop_all()
        log.info("loaded", folder=str(prepared.model_path), fingerprint=prepared.model.fingerprint)

    def _check_swap(self, config: Config, prepared: Prepared) -> None:
        """Refuse a version that cannot replace the served one.

        Raises:
            RecordingError, CannotServe: with a sentence.
        """
        policy, former = StreamPolicy.parse(config.model.on_reload), self.server.models.find(prepared.model.name).info
        kept_as = _kept_as(policy, former)
        if kept_as in [service.name for service in self.server.services]:
            raise CannotServe(f"{kept_as!r} has connections or streams left from an earlier reload: close them")
        if policy.word == "replay" and config.recording.path is None:
            raise CannotServe("frames are replayed from a recording, and there is none: use another model.on_reload")
        check_sizes(former, prepared.network, allowed=config.model.allow_other_sizes)
        check_policy(policy, former, former.state, prepared.network)

    async def _swap(self, config: Config, prepared: Prepared, accept: Callable[[], None], swapped: list[str]) -> None:
        """Serve another version of a model under its name, and add the name to `swapped` once it is in force.

        With `keep`, streams and present connections stay with the former version, which is unloaded once it has none.
        With `move`, streams continue in the new version from their states, and with `replay` from the states that the
        replay has reached.
        """
        name, fingerprint = prepared.model.name, prepared.model.fingerprint
        policy, log = StreamPolicy.parse(config.model.on_reload), self.log.bind(model=name)
        former = self.server.models.find(name)
        kept_as = _kept_as(policy, former.info)
        first = recording_file(config, name)
        planned = Planned(prepared, log, None if first is None else next_recording(first))
        with ExitStack() as undo:
            new = await self._make(config, planned, undo, None if kept_as else former.service)
            if kept_as:
                accept()
                self.server.replace(former, self._begin(new), kept_as)
            else:
                moved = await self._move(former, new, policy, log, accept)
            undo.pop_all()
        swapped.append(name)
        new.service.events.add("swapped", detail=fingerprint)
        if not kept_as:  # not before: if this is cancelled, nothing that is served may be undone
            await moved.end(former.service, new.service)
            await self.server.close(former.service)
        kept = {"kept_as": kept_as} if kept_as else {}
        folder = str(prepared.model_path)
        log.info("swapped", folder=folder, fingerprint=fingerprint, **kept, streams=config.model.on_reload)

    async def _unload(self, name: str) -> None:
        await self.server.remove(name, f"the model {name!r} is unloaded")
        self.log.info("unloaded", model=name)

    async def _make(
        self, config: Config, planned: Planned, undo: ExitStack, moves: ModelService | None = None
    ) -> NextModel:
        """Make a version that is not in use yet; it takes over streams and connections of the service that `moves`."""
        tables = None if moves is None else moves.engine.tables
        allocation = await self.thread.do(partial(allocate, config, planned, forks=False, tables=tables))
        undo.callback(allocation.executor.stop)  # it is idle, and closes its pipe once its thread has ended
        service = make_service(config, allocation, self.loop.wake, self.shutdown.bug, moves)
        new = NextModel(allocation, service)
        await self.thread.do(partial(new.open_recording, config, undo))
        if self.shutdown.requested.is_set():
            raise CannotServe("the server is shutting down")
        return new

    def _begin(self, new: NextModel) -> Served:
        """Begin its recording, and return what its connections will see."""
        config, shard = self.server.config, self.server.models.shard
        new.record(config, self.loop, self.shutdown, shard)
        return new.served(config, shard)

    async def _move(
        self,
        former: Served,
        new: NextModel,
        policy: StreamPolicy,
        log: structlog.stdlib.BoundLogger,
        accept: Callable[[], None],
    ) -> Moved:
        old, replay, served = former.service, None, list[Served]()

        def begin() -> None:
            accept()  # from here on, a server that follows this one would move the streams, too
            served.append(self._begin(new))

        if policy.word == "replay":
            assert old.file is not None, "`_swap` has refused it"
            replay = WarmUpReplay(old.file, new.allocation.stepper, len(old.engine.table.owner) - 1, policy.frames)
            log.info("replaying")
            await catch_up(replay, self.thread)
        paused_s = time.monotonic()
        with self.server.paused():
            moved = await move(old, new.service, replay, self.thread, begin)
            self.server.replace(former, served[0], "")
        log.info("moved", streams=len(moved.numbers), paused_ms=round(1e3 * (time.monotonic() - paused_s), 1))
        return moved


def _kept_as(policy: StreamPolicy, former: ServerInfo) -> str:
    return name_kept(former.model, former.fingerprint) if policy.word == "keep" else ""


def _why(error: Exception) -> str:
    is_sentence = isinstance(error, CannotServe | ModelError | RecordingError)
    return with_advice(error) if is_sentence else f"{type(error).__name__}: {error}"
