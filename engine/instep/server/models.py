"""Reloads: models are loaded, swapped and unloaded while others are served."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import numpy as np
import structlog

from instep.config import Config, ModelConfig
from instep.config.sections import ONE_FILE, StreamPolicy
from instep.core.typing import I64, U8
from instep.frontends.models import Served
from instep.models.errors import ModelError
from instep.models.numerics import prepare as prepare_numerics
from instep.recording.errors import RecordingError, with_advice
from instep.recording.writer import RecordingWriter
from instep.replay.warm_up import WarmUpReplay
from instep.runtime.stepper import Stepper
from instep.server.loop import Loop, Shutdown
from instep.server.preparation import CannotServe, Prepared, load_models, prepare_loaded
from instep.server.recording_files import next_recording, recording_file
from instep.server.recordings import Planned, check_policy, check_sizes, name_kept, open_recording, plan, record, use
from instep.server.services import lay_foundation, make_served, make_service
from instep.streaming.service import ModelService, Recovery
from instep.streaming.states import state_rows
from instep.streaming.tasks import Tasks, in_daemon_thread
from instep_client.protocol.wire import ServerInfo

if TYPE_CHECKING:
    from instep.server.server import Server

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
    await _settle(old)
    await old.engine.journal.committed(old.engine.journal.newest)
    if replay is not None:
        await thread.do(replay.follow)
    await _settle(old)  # streams may have gone to sleep meanwhile
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


async def _settle(service: ModelService) -> None:
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


UNDER_WAY: Final = "models are as before: the last reload has not ended"
"""The `problem` of a loader from a reload's start until it begins to change models."""

_Opened: TypeAlias = tuple[RecordingWriter, Recovery | None] | None


@dataclass(frozen=True, slots=True)
class _Made:
    """A model that is not in use yet."""

    served: Served
    stepper: Stepper
    opened: _Opened
    """The file of its future recording."""


class Loader:
    """Loads, swaps and unloads models until they match the configuration, in a thread next to the loop.

    The models it loads step in a thread, because no process can be forked once ZeroMQ has threads.
    """

    def __init__(
        self,
        server: Server,
        loop: Loop,
        shutdown: Shutdown,
        thread: LoadingThread,
        log: structlog.stdlib.BoundLogger,
    ) -> None:
        self.tasks = Tasks(shutdown.bug)
        """The reload, or the unloading of an unused version, that is under way; at most one."""
        self.problem = ""
        """The reason that the served models differ from the last configuration; empty if they do not."""
        self._accepted: dict[str, str] = {}
        """Fingerprints of the models that are about to be served."""
        self._server = server
        self._loop = loop
        self._shutdown = shutdown
        self._thread = thread
        self._log = log
        self._wanted: ModelConfig | None = None
        """The configuration of the newest reload, until it begins."""
        self._on_change: Callable[[], object] = lambda: None
        self._followed: ModelConfig | None = None
        """The configuration of the reload under way, until it begins to change models."""

    @property
    def config(self) -> ModelConfig:
        """The configuration in force, or the one in force after the reload under way."""
        return self._followed or self._server.config.model

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the configured models, by name."""
        return self._accepted or {each.name: each.about.fingerprint for each in self._current}

    @property
    def _current(self) -> list[ModelService]:
        return [service for service in self._server.services if not service.is_former]

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
        if len(self.tasks) or self._shutdown.requested.is_set():
            return
        unused = [service for service in self._server.services if service.is_former and service.is_unused]
        if unused:
            self.tasks.start(self._unload(unused[0].name))
        elif self._wanted is not None:
            self._followed, self._wanted = self._wanted, None
            self.tasks.start(self._reload(self._followed))

    async def _reload(self, wanted: ModelConfig) -> None:
        loaded, swapped, at = list[str](), list[str](), ""
        before, config = self._server.config.model.folder, self._server.config.model_copy(update={"model": wanted})
        served, changed = {service.name: service for service in self._server.services}, dict[str, Prepared]()
        try:
            found = await self._thread.do(partial(load_models, wanted.folders))
            for model, folder in found:
                if model.name not in served or served[model.name].about.fingerprint != model.fingerprint:
                    at, log = f"{model.name!r}: ", self._log.bind(model=model.name)
                    if config.recording.is_one_file:
                        raise CannotServe(ONE_FILE)
                    prepared = await self._thread.do(partial(prepare_loaded, config, model, folder, log))
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
            if self._shutdown.requested.is_set():
                return
            extent, folders = "models are as before", before
            if swapped:
                extent = "of model.folder only the models loaded and swapped are in force"
                folders = {service.name: service.folder for service in self._current}
            reason = f"{extent}: {at}{_why(error)}"
            self._adopt(self._server.config.model.model_copy(update={"folder": folders}), reason)
            self._log.error("models not reloaded", loaded=loaded, swapped=swapped, reason=reason)
            return
        names = [model.name for model, _ in found]
        unloaded = [name for name, service in served.items() if name not in names and not service.is_former]
        for name in unloaded:
            await self._unload(name)
        self._server.models.reorder(names)
        self._adopt(self._server.config.model)
        if loaded or swapped or unloaded:
            self._log.info("models reloaded", loaded=loaded, swapped=swapped, unloaded=unloaded)

    def _adopt(self, models: ModelConfig, problem: str = "", accepted: dict[str, str] | None = None) -> None:
        """Make `models` the server's configuration; they are served already, or about to be if `accepted`."""
        self._followed, self._accepted = None, accepted or {}
        self.problem = problem if self._wanted is None else UNDER_WAY
        self._server.config = self._server.config.model_copy(update={"model": models})
        self._on_change()

    async def _load(self, config: Config, prepared: Prepared) -> None:
        """Serve another model, and former versions of it that keep their streams."""
        log = self._log.bind(model=prepared.model.name)
        with ExitStack() as undo:
            planned = await self._thread.do(partial(plan, config, prepared, log))
            made = [await self._make(config, each, undo) for each in planned]
            for each in made:
                self._record(each)
                self._server.add(each.served)
            undo.pop_all()
        log.info("loaded", folder=str(prepared.model_path), fingerprint=prepared.model.fingerprint)

    def _check_swap(self, config: Config, prepared: Prepared) -> None:
        """Refuse a version that cannot replace the served one.

        Raises:
            RecordingError, CannotServe: with a sentence.
        """
        policy, former = StreamPolicy.parse(config.model.on_reload), self._server.models.find(prepared.model.name).info
        kept_as = _kept_as(policy, former)
        if kept_as in [service.name for service in self._server.services]:
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
        policy, log = StreamPolicy.parse(config.model.on_reload), self._log.bind(model=name)
        former = self._server.models.find(name)
        kept_as = _kept_as(policy, former.info)
        first = recording_file(config, name)
        planned = Planned(prepared, log, None if first is None else next_recording(first))
        with ExitStack() as undo:
            made = await self._make(config, planned, undo, None if kept_as else former.service)
            if kept_as:
                accept()
                self._record(made)
                self._server.replace(former, made.served, kept_as)
            else:
                moved = await self._move(former, made, policy, log, accept)
            undo.pop_all()
        swapped.append(name)
        made.served.service.events.add("swapped", detail=fingerprint)
        if not kept_as:  # not before: if this is cancelled, nothing that is served may be undone
            await moved.end(former.service, made.served.service)
            await self._server.close(former.service)
        kept = {"kept_as": kept_as} if kept_as else {}
        folder = str(prepared.model_path)
        log.info("swapped", folder=folder, fingerprint=fingerprint, **kept, streams=config.model.on_reload)

    async def _unload(self, name: str) -> None:
        await self._server.remove(name, f"the model {name!r} is unloaded")
        self._log.info("unloaded", model=name)

    async def _make(
        self, config: Config, planned: Planned, undo: ExitStack, moves: ModelService | None = None
    ) -> _Made:
        """Make a version that is not in use yet; it takes over streams and connections of the service that `moves`."""
        prepared = planned.prepared
        tables = None if moves is None else moves.engine.tables
        foundation = await self._thread.do(partial(lay_foundation, config, prepared, forks=False, tables=tables))
        undo.callback(foundation.executor.stop)  # it is idle, and closes its pipe once its thread has ended
        bug, wake = self._shutdown.bug, self._loop.wake
        service = make_service(config, foundation, planned.file, wake, bug, planned.log, moves)
        opened = None
        if planned.file is not None:
            opening = partial(open_recording, config, foundation, service, planned.formers)
            opened = writer, recovery = await self._thread.do(opening)
            undo.callback(writer.discard if recovery is None else writer.abandon)
        if self._shutdown.requested.is_set():
            raise CannotServe("the server is shutting down")
        served = make_served(config, foundation, service, self._server.models.shard)
        if planned.kept_as:
            served.keep_as(planned.kept_as)
        return _Made(served, foundation.stepper, opened)

    def _record(self, made: _Made) -> None:
        if made.opened is not None:
            config, shard = self._server.config, self._server.models.shard
            record(made.served.service, *made.opened, config, self._loop, self._shutdown, shard)

    async def _move(
        self,
        former: Served,
        made: _Made,
        policy: StreamPolicy,
        log: structlog.stdlib.BoundLogger,
        accept: Callable[[], None],
    ) -> Moved:
        old, replay = former.service, None

        def begin_recording() -> None:
            accept()  # from here on, a server that follows this one would move the streams, too
            self._record(made)

        if policy.word == "replay":
            assert old.file is not None, "`_swap` has refused it"
            replay = WarmUpReplay(old.file, made.stepper, len(old.engine.table.owner) - 1, policy.frames)
            log.info("replaying")
            await catch_up(replay, self._thread)
        paused_s = time.monotonic()
        with self._server.paused():
            moved = await move(old, made.served.service, replay, self._thread, begin_recording)
            self._server.replace(former, made.served, "")
        log.info("moved", streams=len(moved.numbers), paused_ms=round(1e3 * (time.monotonic() - paused_s), 1))
        return moved


def _kept_as(policy: StreamPolicy, former: ServerInfo) -> str:
    return name_kept(former.model, former.fingerprint) if policy.word == "keep" else ""


def _why(error: Exception) -> str:
    is_sentence = isinstance(error, CannotServe | ModelError | RecordingError)
    return with_advice(error) if is_sentence else f"{type(error).__name__}: {error}"
