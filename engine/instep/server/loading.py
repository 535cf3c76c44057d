"""Models that are loaded and unloaded while others are served."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TypeVar

import structlog

from instep.recording.errors import RecordingError, with_advice
from instep.server.limits import LimitsError
from instep.server.loop import Loop
from instep.server.preparation import CannotServe, prepare_another
from instep.server.recordings import open_recording, record, recording_file
from instep.server.server import Server
from instep.server.services import lay_foundation, make_served, make_service
from instep.server.shutdown import Shutdown
from instep.streaming.api import Refusal
from instep.streaming.tasks import Tasks, in_daemon_thread
from instep_client.protocol.wire import Code

R = TypeVar("R")

_SEVERAL = 2
"""A model that is loaded is never the only one."""


class Loader:
    """Loads a model in a thread, beside serving, and adds it once nothing can fail any more: an `Operator`.

    Its steps run in a thread, because no process can be forked once ZeroMQ has threads.
    """

    def __init__(self, server: Server, loop: Loop, shutdown: Shutdown, log: structlog.stdlib.BoundLogger) -> None:
        self.tasks = Tasks(shutdown.bug)
        """The loading or unloading that is under way: one at most."""
        self._server = server
        self._loop = loop
        self._shutdown = shutdown
        self._log = log

    async def load(self, name: str, folder: Path) -> None:
        """Serve another model.

        Raises:
            Refusal: NOT_LOADED with the reason; nothing has changed.
        """
        log = self._log.bind(model=name)
        with ExitStack() as undo:
            try:
                await self._load(name, folder, log, undo)
            except (CannotServe, LimitsError) as error:
                raise self._not_loaded(str(error), log) from None
            except RecordingError as error:
                raise self._not_loaded(with_advice(error), log) from None
            except Exception as error:  # no memory, or a folder with things in it that nobody thought of
                raise self._not_loaded(f"{type(error).__name__}: {error}", log) from None
            undo.pop_all()
        log.info("loaded", folder=str(folder))

    async def _load(self, name: str, folder: Path, log: structlog.stdlib.BoundLogger, undo: ExitStack) -> None:
        server, config = self._server, self._server.config
        if any(service.name == name for service in server.services):
            raise CannotServe(
                f"a model of the name {name!r} is served already: unload it first, or name this one otherwise"
            )
        file = recording_file(config, name, _SEVERAL)
        prepared = await self._in_thread(partial(prepare_another, config, name, folder, log))
        foundation = lay_foundation(config, prepared, forks=False)
        undo.callback(foundation.executor.stop)  # it is idle, and closes its pipe once its thread has ended
        service = make_service(config, foundation, file, self._loop.wake, self._shutdown.bug, log)
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
        if opened is not None:
            record(service, *opened, config, self._loop, self._shutdown)
        self._loop.busy_poll_ns = 0  # the thread that steps would lack the interpreter's lock
        server.add(make_served(config, foundation, service))
        server.configure(server.config)  # it may have been reloaded meanwhile

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

    async def unload(self, name: str) -> None:
        """Serve a model no longer."""
        await self._server.remove(name, f"the model {name!r} is unloaded")
        self._log.info("unloaded", model=name)

    def _not_loaded(self, reason: str, log: structlog.stdlib.BoundLogger) -> Refusal:
        log.warning("not loaded", reason=reason)
        return Refusal(Code.NOT_LOADED, reason)
