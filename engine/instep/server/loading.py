"""Models that are loaded, swapped and unloaded while others are served."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, TypeVar

import numpy as np
import structlog

from instep.core.typing import I64, U8
from instep.frontends.zmq.served import Served
from instep.models.base import RecurrentModel
from instep.models.errors import ModelError
from instep.models.folder import check_name
from instep.recording.errors import RecordingError, with_advice
from instep.recording.writer import RecordingWriter
from instep.server.limits import LimitsError
from instep.server.loop import Loop
from instep.server.preparation import CannotServe, prepare_another
from instep.server.recordings import next_recording, open_recording, present_recording, record, recording_file
from instep.server.server import Server
from instep.server.services import lay_foundation, make_served, make_service
from instep.server.shutdown import Shutdown
from instep.streaming.api import Refusal
from instep.streaming.recovery import Recovery
from instep.streaming.service import ModelService
from instep.streaming.tasks import Tasks, in_daemon_thread
from instep_client.protocol.wire import Code, ServerInfo

R = TypeVar("R")

_SEVERAL: Final = 2
"""A model that is loaded is never the only one."""
_MOST_PAUSE_S: Final = 1.0
"""How long nothing is received so that what was received before can end and streams can be moved."""
_LOOK_S: Final = 0.0005
_TURN_S: Final = 0.0002
"""Python's own is 5 ms, which every message that is served meanwhile could have to wait several times."""
_FINGERPRINT: Final = 8
"""Digits of a fingerprint in a name."""

_Opened: TypeAlias = tuple[RecordingWriter, Recovery | None] | None


class Loader:
    """Loads a model in a thread, beside serving, and serves it once nothing can fail any more: an `Operator`.

    Its steps run in a thread, because no process can be forked once ZeroMQ has threads.
    """

    def __init__(self, server: Server, loop: Loop, shutdown: Shutdown, log: structlog.stdlib.BoundLogger) -> None:
        self.tasks = Tasks(shutdown.bug)
        """The loading, swapping or unloading that is under way: one at most."""
        self._server = server
        self._loop = loop
        self._shutdown = shutdown
        self._log = log
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
            file = recording_file(self._server.config, name, _SEVERAL)
            served, opened = await self._make(name, folder, file, log, undo)
            self._record(served.service, opened)
            self._server.add(served)
            self._server.configure(self._server.config)  # it may have been reloaded meanwhile
        log.info("loaded", folder=str(folder))

    async def swap(self, name: str, folder: Path, *, moves: bool) -> None:
        """Serve another version of a model under its name.

        Args:
            name: of a model that is served.
            folder: of the version.
            moves: whether the streams there are continue in it, from the states that they have. Otherwise they, and the
                connections there are, stay with the former version, which is unloaded when it has none any more.

        Raises:
            Refusal: NOT_LOADED with the reason; nothing has changed.
        """
        log, former = self._log.bind(model=name), self._server.served(name)
        kept_as = "" if moves else f"{name}@{former.info.fingerprint[:_FINGERPRINT]}"
        with self._undone(log) as undo:
            if former.service in self._kept:
                raise CannotServe(f"{name!r} is a former version, kept for the connections that it has")
            if kept_as and any(service.name == check_name(kept_as) for service in self._server.services):
                raise CannotServe(f"{kept_as!r} has connections left from an earlier swap: unload it first")
            file = recording_file(self._server.config, name, _SEVERAL)
            served, opened = await self._make(
                name, folder, None if file is None else next_recording(file), log, undo, former, moves=moves
            )
            if moves:
                lsn, ended = await self._move(former, served, opened)
            else:
                self._record(served.service, opened)
                self._server.replace(former, served, kept_as)
                self._kept.add(former.service)
            self._server.configure(self._server.config)  # it may have been reloaded meanwhile
        served.service.events.add("swapped", detail=served.info.fingerprint)
        if moves:  # the new recording has them before the old one says that they have left
            await served.service.engine.journal.committed(lsn)
            numbers, next_seqs, states = ended
            former.service.engine.journal.ended(numbers, "moved", next_seqs, states, np.zeros(len(numbers), np.bool_))
            await self._server.close(former.service)
        log.info("swapped", folder=str(folder), fingerprint=served.info.fingerprint, kept_as=kept_as)

    async def unload(self, name: str) -> None:
        """Serve a model no longer."""
        self._kept.discard(self._server.served(name).service)
        await self._server.remove(name, f"the model {name!r} is unloaded")
        self._log.info("unloaded", model=name)

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
        *,
        moves: bool = False,
    ) -> tuple[Served, _Opened]:
        """A model that nobody uses yet, and what will be its recording; `former` is the version that it replaces."""
        config = self._server.config
        with _short_turns():
            prepared = await self._in_thread(partial(prepare_another, config, name, folder, log))
        if former is not None and prepared.model.fingerprint == former.info.fingerprint:
            raise CannotServe(f"{folder} holds the version of {name!r} that is served already")
        if former is not None and moves:
            _check_same_sizes(former.info, prepared.network)
        moved = former.service if former is not None and moves else None
        tables = None if moved is None else moved.engine.tables
        foundation = lay_foundation(config, prepared, forks=False, tables=tables)
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
        return make_served(config, foundation, service), opened

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

    def _record(self, service: ModelService, opened: _Opened) -> None:
        if opened is not None:
            record(service, *opened, self._server.config, self._loop, self._shutdown)
        self._loop.busy_poll_ns = 0  # the thread that steps would lack the interpreter's lock

    async def _move(self, former: Served, served: Served, opened: _Opened) -> tuple[int, tuple[I64, I64, U8]]:
        """Let all streams continue in another version; everything that was received before was answered by the former.

        Returns:
            lsn: what the new recording must have committed before the streams may end in the old one.
            ended: by stream, its number in the old recording, its next seq and its state.
        """
        old, new = former.service, served.service
        with self._server.paused():
            await _settle(old)
            # From here on nothing waits, so nothing changes.
            old.withdrawal.tick(time.monotonic())  # its recording says what its last recheck has found
            engine, table = new.engine, new.engine.table
            slots = table.open_slots()
            states = old.states.access.read(slots)
            new.states.access.load(slots, states)
            names, numbers, next_seqs = table.names(slots), table.recording_ids(slots), table.next_seq[slots].copy()
            self._record(new, opened)
            lsn = engine.journal.opened(slots, names, states)
            # The next checkpoint has their frames too whose outputs the clients may lack.
            engine.journal.dirty.mark_dirty(slots)
            new.tasks.start(new.checkpoints.take())
            self._server.replace(former, served, "")
            engine.events.add_all("moved", names, served.info.fingerprint, next_seqs)
        return lsn, (numbers, next_seqs, states)

    @contextmanager
    def _undone(self, log: structlog.stdlib.BoundLogger) -> Iterator[ExitStack]:
        """What fails in the block is undone and refused, with the reason in a sentence."""
        with ExitStack() as undo:
            try:
                yield undo
            except (CannotServe, LimitsError, ModelError) as error:
                raise self._not_loaded(str(error), log) from None
            except RecordingError as error:
                raise self._not_loaded(with_advice(error), log) from None
            except Exception as error:  # no memory, or a folder with things in it that nobody thought of
                raise self._not_loaded(f"{type(error).__name__}: {error}", log) from None
            undo.pop_all()

    def _not_loaded(self, reason: str, log: structlog.stdlib.BoundLogger) -> Refusal:
        log.warning("not loaded", reason=reason)
        return Refusal(Code.NOT_LOADED, reason)


@contextmanager
def _short_turns() -> Iterator[None]:
    """While the block runs, a thread that certifies gives the interpreter's lock back to the loop sooner than usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _check_same_sizes(former: ServerInfo, network: RecurrentModel) -> None:
    """Refuse a version in which streams of the former one cannot continue."""
    description = network.description
    for what, there, here in (
        ("number of features", former.features, description.features),
        ("number of outputs", former.outputs, description.outputs),
        ("state", former.state, network.state),
    ):
        if there != here:
            sizes = "" if what == "state" else f" ({here} instead of {there})"
            raise CannotServe(
                f"its {what} differs from that of the version that is served{sizes}, so no stream can be moved to it: "
                "swap it with --streams keep"
            )


async def _settle(service: ModelService) -> None:
    """Wait until all that was received for a model is answered and all of its streams are in memory.

    Nothing is received meanwhile. No stream leaves memory before the caller's next wait.
    """
    hibernation, table = service.operations.hibernation, service.engine.table
    asleep, free = len(hibernation), table.slots.free_count
    if asleep > free:
        raise CannotServe(
            f"{asleep} streams hibernate, and there is room in memory for {free}: swap it with --streams keep"
        )
    until = time.monotonic() + _MOST_PAUSE_S
    while True:
        while not service.is_quiet or service.reaper.is_detaching:
            if time.monotonic() > until:
                raise CannotServe(f"what was admitted took longer than {_MOST_PAUSE_S:g} s: try again")
            await asyncio.sleep(_LOOK_S)
        if not len(hibernation):
            return
        await hibernation.wake([name for name, _, _ in hibernation.asleep(0, len(hibernation))])
        if service.is_quiet and not service.reaper.is_detaching and not len(hibernation):
            return
        if time.monotonic() > until:
            raise CannotServe("streams hibernate that cannot be read: swap it with --streams keep")
