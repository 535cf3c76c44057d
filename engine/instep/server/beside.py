"""Work that takes long, in a thread beside the loop that serves."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Final, TypeVar

from instep.models.numerics import prepare as prepare_numerics
from instep.server.preparation import CannotServe
from instep.server.shutdown import Shutdown
from instep.streaming.tasks import in_daemon_thread

R = TypeVar("R")

_TURN_S: Final = 0.0002
"""The time after which the thread gives the interpreter's lock back to the loop. Python's own is 5 ms, and a message
that is served meanwhile could have to wait that long several times."""


class Beside:
    """Does one long piece of work at a time; the server can end meanwhile."""

    def __init__(self, shutdown: Shutdown) -> None:
        self._shutdown = shutdown

    async def do(self, work: Callable[[], R]) -> R:
        """Return or raise what `work` does.

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
