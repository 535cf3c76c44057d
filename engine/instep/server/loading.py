"""Models that are loaded, swapped and unloaded while others are served."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from instep.config import ModelConfig
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
from instep.streaming.api import Refusal
from instep.streaming.recovery import Recovery
from instep.streaming.replaying import WarmUpReplay
from instep.streaming.tasks import Tasks
from instep_client.protocol.wire import Code, Streams, SwapPolicy

if TYPE_CHECKING:
    from instep.server.server import Server

_KEEP: Final = SwapPolicy(Streams.KEEP)
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
    """Loads a model in a thread, beside serving, and serves it once nothing can fail any more: an `Operator`.

    Its steps run in a thread, because no process can be forked once ZeroMQ has threads.
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
        """The loading, swapping or unloading that is under way: one at most."""
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
    def is_busy(self) -> bool:
        """Whether a change is under way, or a reload waits for its turn, which no request may take."""
        return len(self.tasks) > 0 or self._wanted is not None

    async def load(self, name: str, folder: Path) -> None:
        """Serve another model.

        Raises:
            Refusal: NOT_LOADED with the reason; nothing has changed.
        """
        log = self._log.bind(model=name)
        with self._undone(log) as undo:
            if any(service.name == name for service in self._server.services):
                raise CannotServe(
                    f"a model of the name {name!r} is served already: unload it first, or name this one otherwise"
                )
            made = await self._make(name, folder, log, undo)
            self._record(made)
            self._server.add(made.served)
        log.info("loaded", folder=str(folder))

    async def swap(self, name: str, folder: Path, policy: SwapPolicy) -> None:
        """Serve another version of a model under its name.

        Args:
            name: of a model that is served.
            folder: of the version.
            policy: what becomes of the streams there are. With KEEP they, and the connections there are, stay with the
                former version, which is unloaded when it has none any more. With MOVE they continue in the new one from
                the states that they have, with REPLAY from those that it has after their newest frames.

        Raises:
            Refusal: NOT_LOADED with the reason; nothing has changed.
        """
        log, former = self._log.bind(model=name), self._server.served(name)
        keeps = policy.streams is Streams.KEEP
        kept_as = f"{name}@{former.info.fingerprint[:_FINGERPRINT]}" if keeps else ""
        with self._undone(log) as undo:
            if former.service.is_former:
                raise CannotServe(f"{name!r} is a former version, kept for the connections that it has")
            if kept_as and any(service.name == check_name(kept_as) for service in self._server.services):
                raise CannotServe(f"{kept_as!r} has connections or streams left from an earlier swap: unload it first")
            made = await self._make(name, folder, log, undo, former, policy)
            if keeps:
                self._record(made)
                self._server.replace(former, made.served, kept_as)
            else:
                moved = await self._move(former, made, policy, log)
        fingerprint = made.served.info.fingerprint
        made.served.service.events.add("swapped", detail=fingerprint)
        if not keeps:  # not before: if this is cancelled, nothing that is served may be undone
            await moved.end(former.service, made.served.service)
            await self._server.close(former.service)
        kept = {"kept_as": kept_as} if kept_as else {}
        log.info("swapped", folder=str(folder), fingerprint=fingerprint, **kept, streams=str(policy))

    async def unload(self, name: str, *, force: bool = True) -> None:
        """Serve a model no longer.

        Raises:
            Refusal: NOT_ALLOWED while streams are in use, unless with `force`.
        """
        service = self._server.served(name).service
        if not force and service.in_use:
            raise Refusal(
                Code.NOT_ALLOWED,
                sentence=f"{service.in_use} streams of the model {name!r} are in use: close them, or unload it with "
                "--force. A recording keeps them until it is loaded again; without one they end",
            )
        await self._server.remove(name, f"the model {name!r} is unloaded")
        self._log.info("unloaded", model=name)

    @property
    def config(self) -> ModelConfig:
        """The configuration that is in force, or will be once the reload that is under way has ended."""
        return self._followed or self._server.config.model

    def reload(self, wanted: ModelConfig) -> None:
        """Load, swap and unload models until they are those of a configuration, once what is under way has ended."""
        self._wanted = wanted
        self.tick()

    async def _reload(self, wanted: ModelConfig) -> None:
        loaded, swapped, at = list[str](), list[str](), ""
        try:
            found = await self._beside.do(partial(versions, wanted.folders))
            served = {service.name for service in self._server.services}
            changed = [name for name, version in found.items() if version != self._configured.get(name)]
            for name in changed:
                if name not in served:
                    at = f"{name!r}: "
                    await self.load(name, found[name][0])
                    loaded.append(name)
            for name in changed:
                if name in served and found[name][1] != self._server.served(name).info.fingerprint:
                    at = f"{name!r}: "
                    await self.swap(name, found[name][0], SwapPolicy.parse(wanted.on_reload))
                    swapped.append(name)
        except Exception as error:  # also no memory, or a folder with things in it that nobody thought of
            if not swapped:
                for name in loaded:
                    await self.unload(name)
                loaded = []
            if self._shutdown.requested.is_set():
                return
            extent = "models are as before"
            if swapped:
                extent = "of model.folder only the models loaded and swapped are in force"
            reason = f"{extent}: {at}{_why(error)}"
            self._log.error("models not reloaded", loaded=loaded, swapped=swapped, reason=reason)
            if swapped:  # so that a reload of the former configuration takes back what has changed
                now = {service.name: service.about.fingerprint for service in self._server.services}
                in_force = {name: version for name, version in found.items() if now.get(name) == version[1]}
                self._enter({**self._configured, **in_force})
            return
        unloaded = [name for name in self._configured if name in served and name not in found]
        for name in unloaded:
            await self.unload(name)
        self._server.reorder(list(found))
        self._enter(found)
        self._server.config = self._server.config.model_copy(update={"model": wanted})
        if loaded or swapped or unloaded:
            self._log.info("models reloaded", loaded=loaded, swapped=swapped, unloaded=unloaded)

    def _enter(self, configured: Mapping[str, Version]) -> None:
        self._configured = configured
        for service in self._server.services:
            _, fingerprint = configured.get(service.name, (None, None))
            service.is_configured = service.about.fingerprint == fingerprint

    def tick(self) -> None:
        """Unload a version that was replaced and that nobody uses any more; then follow the newest configuration."""
        if len(self.tasks) or self._shutdown.requested.is_set():
            return
        unused = [service for service in self._server.services if service.is_former and service.is_unused]
        if unused:
            self.tasks.start(self.unload(unused[0].name))
        elif self._wanted is not None:
            self._followed, self._wanted = self._wanted, None
            self.tasks.start(self._reload(self._followed), self._reload_ended)

    def _reload_ended(self) -> None:
        self._followed = None

    async def _make(
        self,
        name: str,
        folder: Path,
        log: structlog.stdlib.BoundLogger,
        undo: ExitStack,
        former: Served | None = None,
        policy: SwapPolicy = _KEEP,
    ) -> _Made:
        """A model that nobody uses yet; `former` is the version that it replaces."""
        config = self._server.config
        file = recording_file(config, name, is_only=False)  # one that cannot be is told before anything takes long
        prepared = await self._beside.do(partial(prepare_another, config, name, folder, log))
        if former is not None and prepared.model.fingerprint == former.info.fingerprint:
            reason = f"{folder} holds the version of {name!r} that is served already"
            if policy.streams is not Streams.KEEP and (stayed := self._former_of(name)):
                reason += (
                    "; only the swap that replaces a version can move its streams: those that stayed with "
                    f"{' and '.join(stayed)} are served there until they are closed, or until "
                    f"`instep model unload {stayed[0]} --force`"
                )
            raise CannotServe(reason)
        moved = None
        if former is not None and policy.streams is not Streams.KEEP:
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

    def _former_of(self, name: str) -> list[str]:
        """Names of the versions of a model that were replaced and still have connections or streams."""
        former = (service.name for service in self._server.services if service.is_former)
        return [each for each in former if each.rpartition("@")[0] == name]

    def _record(self, made: _Made) -> None:
        if made.opened is not None:
            record(made.served.service, *made.opened, self._server.config, self._loop, self._shutdown)

    async def _move(self, former: Served, made: _Made, policy: SwapPolicy, log: structlog.stdlib.BoundLogger) -> Moved:
        """Let all streams and connections continue in another version."""
        old, replay = former.service, None
        if policy.streams is Streams.REPLAY:
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

    @contextmanager
    def _undone(self, log: structlog.stdlib.BoundLogger) -> Iterator[ExitStack]:
        """Undo and refuse what fails in the block, with the reason in a sentence."""
        with ExitStack() as undo:
            try:
                yield undo
            except Exception as error:  # also no memory, or a folder with things in it that nobody thought of
                is_sentence = isinstance(error, CannotServe | ModelError | RecordingError)
                reason = with_advice(error) if is_sentence else f"{type(error).__name__}: {error}"
                log.warning("not loaded", reason=reason)
                raise Refusal(Code.NOT_LOADED, reason) from None
            undo.pop_all()


def _why(error: Exception) -> str:
    """Why a reload failed, without saying that nothing has changed: something may have."""
    if isinstance(error, Refusal) and error.code is Code.NOT_LOADED:
        return error.detail
    return str(error) if isinstance(error, CannotServe | ModelError | Refusal) else f"{type(error).__name__}: {error}"
