"""Models that are loaded, swapped and unloaded while others are served."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import numpy as np
import structlog

from instep.config import ModelConfig
from instep.core.typing import I64, U8
from instep.frontends.zmq.served import Served
from instep.models.errors import ModelError
from instep.models.folder import check_name
from instep.models.numerics import prepare as prepare_numerics
from instep.recording.errors import RecordingError, with_advice
from instep.recording.writer import RecordingWriter
from instep.runtime.stepper import Stepper
from instep.server.loop import Loop
from instep.server.moving import begin_replay, check_sizes, settle
from instep.server.preparation import CannotServe, Prepared, Version, prepare_another, versions
from instep.server.recordings import next_recording, open_recording, present_recording, record, recording_file
from instep.server.server import Server
from instep.server.services import Foundation, lay_foundation, make_served, make_service
from instep.server.shutdown import Shutdown
from instep.streaming.api import Refusal
from instep.streaming.recovery import Recovery
from instep.streaming.replaying import WarmUpReplay
from instep.streaming.service import ModelService
from instep.streaming.tasks import Tasks, in_daemon_thread
from instep_client.protocol.wire import Code, Streams, SwapPolicy

R = TypeVar("R")

_SHORT_S: Final = 0.01
"""A replay has caught up when it takes less to read and step what was recorded since the last time."""
_LONG_S: Final = 0.5
"""While nothing is received, it may not take more."""
_TURN_S: Final = 0.0002
"""Python's own is 5 ms, which every message that is served meanwhile could have to wait several times."""
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
    not_shadowed: str
    """Why the candidate of the configuration cannot shadow it; empty where there is none, or it does."""


class Loader:
    """Loads a model in a thread, beside serving, and serves it once nothing can fail any more: an `Operator`.

    Its steps run in a thread, because no process can be forked once ZeroMQ has threads.
    """

    def __init__(
        self,
        server: Server,
        loop: Loop,
        shutdown: Shutdown,
        log: structlog.stdlib.BoundLogger,
        configured: Mapping[str, Version],
    ) -> None:
        self.tasks = Tasks(shutdown.bug)
        """The loading, swapping or unloading that is under way: one at most."""
        self._server = server
        self._loop = loop
        self._shutdown = shutdown
        self._log = log
        self._configured = configured
        """The models that the configuration named when it was last read, by name."""
        self._stepped_here = set[ModelService]()
        """Models that were loaded, which step in threads of this process."""
        self._busy_poll_ns = loop.busy_poll_ns
        """Time to poll while there are none."""
        self._kept: set[ModelService] = set()
        """Versions that were replaced, and still serve the connections that they had."""

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
            file = recording_file(self._server.config, name, is_only=False)
            made = await self._make(name, folder, file, log, undo)
            self._record(made)
            made.served.service.is_configured = self._is_configured(name, folder)
            self._server.add(made.served)
            self._server.configure(self._server.config)  # it may have been reloaded meanwhile
        log.info("loaded", folder=str(folder))
        _say_whether_shadowed(made, log)

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
            if former.service in self._kept:
                raise CannotServe(f"{name!r} is a former version, kept for the connections that it has")
            if kept_as and any(service.name == check_name(kept_as) for service in self._server.services):
                raise CannotServe(f"{kept_as!r} has connections left from an earlier swap: unload it first")
            file = recording_file(self._server.config, name, is_only=False)
            made = await self._make(
                name, folder, None if file is None else next_recording(file), log, undo, former, policy
            )
            if keeps:
                self._record(made)
                self._server.replace(former, made.served, kept_as)
                self._kept.add(former.service)
                await self._server.end_shadow(former.service, "another version is served now")
            else:
                lsn, ended = await self._move(former, made, policy, log)
            made.served.service.is_configured = self._is_configured(name, folder)
            self._server.configure(self._server.config)  # it may have been reloaded meanwhile
        fingerprint = made.served.info.fingerprint
        made.served.service.events.add("swapped", detail=fingerprint)
        if not keeps:  # the new recording has them before the old one says that they have left
            await made.served.service.engine.journal.committed(lsn)
            numbers, next_seqs, states = ended
            former.service.engine.journal.ended(numbers, "moved", next_seqs, states, np.zeros(len(numbers), np.bool_))
            await self._server.close(former.service)
            self._stepped_here.discard(former.service)
        kept = {"kept_as": kept_as} if kept_as else {}
        log.info("swapped", folder=str(folder), fingerprint=fingerprint, **kept, streams=str(policy))
        _say_whether_shadowed(made, log)

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
        self._kept.discard(service)
        await self._server.remove(name, f"the model {name!r} is unloaded")
        self._stepped_here.discard(service)
        if not self._stepped_here:
            self._loop.busy_poll_ns = self._busy_poll_ns
        self._log.info("unloaded", model=name)

    def reload(self, wanted: ModelConfig) -> None:
        """Begin to load, swap and unload models until they are those of another configuration."""
        if len(self.tasks):
            reason = "model.folder was not looked at: another model is being loaded, swapped or unloaded; reload again"
            self._log.error("not reloaded", reason=reason)
        else:
            self.tasks.start(self._reload(wanted))

    async def _reload(self, wanted: ModelConfig) -> None:
        loaded, swapped = list[str](), list[str]()
        try:
            found = await self._in_thread(partial(versions, wanted.folders))
            served = {service.name for service in self._server.services}
            changed = [name for name, version in found.items() if version != self._configured.get(name)]
            for name in changed:
                if name not in served:
                    await self.load(name, found[name][0])
                    loaded.append(name)
            for name in changed:
                if name in served and found[name][1] != self._server.served(name).info.fingerprint:
                    await self.swap(name, found[name][0], SwapPolicy.parse(wanted.on_reload))
                    swapped.append(name)
        except (CannotServe, ModelError, Refusal) as error:
            if not swapped:
                for name in loaded:
                    await self.unload(name)
            if self._shutdown.requested.is_set():
                return
            self._log.error("not reloaded", reason=f"the models were not changed as model.folder has it: {error}")
            return
        unloaded = [name for name in self._configured if name in served and name not in found]
        for name in unloaded:
            await self.unload(name)
        self._server.reorder(list(found))
        self._configured = found
        for service in self._server.services:
            _, fingerprint = found.get(service.name, (None, None))
            service.is_configured = service.about.fingerprint == fingerprint
        self._server.config = self._server.config.model_copy(update={"model": wanted})
        await self._server.shadow_as(wanted, list(found), self._in_thread)
        if loaded or swapped or unloaded:
            self._log.info("models reloaded", loaded=loaded, swapped=swapped, unloaded=unloaded)

    def tick(self) -> None:
        """Unload a version that was replaced and that nobody uses any more."""
        unused = [service for service in self._kept if service.is_unused]
        if unused and not len(self.tasks):
            self.tasks.start(self.unload(unused[0].name))

    async def _make(
        self,
        name: str,
        folder: Path,
        file: Path | None,
        log: structlog.stdlib.BoundLogger,
        undo: ExitStack,
        former: Served | None = None,
        policy: SwapPolicy = _KEEP,
    ) -> _Made:
        """A model that nobody uses yet; `former` is the version that it replaces."""
        config = self._server.config
        with _short_turns():
            prepared = await self._in_thread(
                partial(prepare_another, config, name, folder, log, is_only=name in self._configured)
            )
        if former is not None and prepared.model.fingerprint == former.info.fingerprint:
            raise CannotServe(f"{folder} holds the version of {name!r} that is served already")
        moved = None
        if former is not None and policy.streams is not Streams.KEEP:
            check_sizes(former, prepared.network, policy)
            moved = former.service
        with _short_turns():
            foundation = await self._in_thread(partial(self._lay_foundation, prepared, moved))
        undo.callback(foundation.executor.stop)  # it is idle, and closes its pipe once its thread has ended
        if file is not None and former is None:
            file = present_recording(file, prepared.model.fingerprint)
        service = make_service(config, foundation, file, self._loop.wake, self._shutdown.bug, log, moved)
        opened = None
        if file is not None:
            opened = writer, recovery = await self._in_thread(
                partial(
                    open_recording, file, config, prepared, service, foundation.stepper, accept_numerics_change=False
                )
            )
            undo.callback(writer.discard if recovery is None else writer.abandon)
        if self._shutdown.requested.is_set():
            raise CannotServe("the server is shutting down")
        return _Made(make_served(config, foundation, service), foundation.stepper, opened, prepared.not_shadowed)

    def _is_configured(self, name: str, folder: Path) -> bool:
        return name in self._configured and self._configured[name][0] == folder.resolve()

    def _lay_foundation(self, prepared: Prepared, moved: ModelService | None) -> Foundation:
        prepare_numerics(self._server.config.engine.threads)  # torch counts threads by thread
        tables = None if moved is None else moved.engine.tables
        return lay_foundation(self._server.config, prepared, forks=False, tables=tables)

    async def _in_thread(self, work: Callable[[], R]) -> R:
        """Do what takes long beside the loop; the end of the server does not wait for it."""
        working = asyncio.ensure_future(in_daemon_thread(work, "instep-loader"))
        ending = asyncio.ensure_future(self._shutdown.requested.wait())
        try:
            await asyncio.wait((working, ending), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise CannotServe("the server is shutting down")
            return working.result()
        finally:
            working.cancel()
            ending.cancel()

    def _record(self, made: _Made) -> None:
        if made.opened is not None:
            record(made.served.service, *made.opened, self._server.config, self._loop, self._shutdown)
        self._stepped_here.add(made.served.service)
        self._loop.busy_poll_ns = 0  # the thread that steps would lack the interpreter's lock

    async def _move(
        self, former: Served, made: _Made, policy: SwapPolicy, log: structlog.stdlib.BoundLogger
    ) -> tuple[int, tuple[I64, I64, U8]]:
        """Let all streams continue in another version; everything that was received before was answered by the former.

        Returns:
            lsn: what the new recording must have committed before the streams may end in the old one.
            ended: by stream, its number in the old recording, its next seq and its state.
        """
        old, new = former.service, made.served.service
        replay = None
        if policy.streams is Streams.REPLAY:
            replay = begin_replay(old, made.stepper, policy.frames)
            await self._catch_up(replay, log)
        paused_s = time.monotonic()
        with self._server.paused():
            await settle(old)
            if replay is not None:
                await old.engine.journal.committed(old.engine.journal.newest)
                await self._in_thread(partial(self._follow, replay))
                await settle(old)  # streams may have gone to sleep meanwhile
            # From here on nothing waits, so nothing changes.
            old.withdrawal.tick(time.monotonic())  # its recording says what its last recheck has found
            engine, table = new.engine, new.engine.table
            slots = table.open_slots()
            names, numbers, next_seqs = table.names(slots), table.recording_ids(slots), table.next_seq[slots].copy()
            last_states = states = old.states.access.read(slots)
            if replay is not None:
                states, first_seqs = replay.states(numbers, next_seqs)
            new.states.access.load(slots, states)
            self._record(made)
            lsn = engine.journal.opened(slots, names, states)
            if replay is not None:
                engine.journal.replayed(slots, first_seqs)
            # The next checkpoint has their frames too whose outputs the clients may lack.
            engine.journal.dirty.mark_dirty(slots)
            new.tasks.start(new.checkpoints.take())
            self._server.replace(former, made.served, "")
            engine.events.add_all("moved", names, made.served.info.fingerprint, next_seqs)
        log.info("moved", streams=len(slots), paused_ms=round(1e3 * (time.monotonic() - paused_s), 1))
        return lsn, (numbers, next_seqs, last_states)

    async def _catch_up(self, replay: WarmUpReplay, log: structlog.stdlib.BoundLogger) -> None:
        """Replay until little is left to do while nothing is received; the old version serves meanwhile."""
        log.info("replaying")
        frames, took_s, before_s = 0, 0.0, math.inf
        while took_s == 0 or _SHORT_S < took_s < before_s / 2:  # as long as each time leaves much less for the next
            began_s, before_s = time.monotonic(), took_s or math.inf
            with _short_turns():
                frames = await self._in_thread(partial(self._follow, replay))
            took_s = time.monotonic() - began_s
        if frames and took_s > _LONG_S:  # without any it has caught up, on a machine with too much to do
            raise CannotServe("its frames arrive as quickly as they are replayed: try again when there are fewer")

    def _follow(self, replay: WarmUpReplay) -> int:
        prepare_numerics(self._server.config.engine.threads)  # torch counts threads by thread
        return replay.follow()

    @contextmanager
    def _undone(self, log: structlog.stdlib.BoundLogger) -> Iterator[ExitStack]:
        """Undo and refuse what fails in the block, with the reason in a sentence."""
        with ExitStack() as undo:
            try:
                yield undo
            except (CannotServe, ModelError) as error:
                raise self._not_loaded(str(error), log) from None
            except RecordingError as error:
                raise self._not_loaded(with_advice(error), log) from None
            except Exception as error:  # no memory, or a folder with things in it that nobody thought of
                raise self._not_loaded(f"{type(error).__name__}: {error}", log) from None
            undo.pop_all()

    def _not_loaded(self, reason: str, log: structlog.stdlib.BoundLogger) -> Refusal:
        log.warning("not loaded", reason=reason)
        return Refusal(Code.NOT_LOADED, reason)


def _say_whether_shadowed(made: _Made, log: structlog.stdlib.BoundLogger) -> None:
    if made.not_shadowed:
        log.info("not shadowed", reason=made.not_shadowed)


@contextmanager
def _short_turns() -> Iterator[None]:
    """While the block runs, a thread that certifies gives the interpreter's lock back to the loop sooner than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)
