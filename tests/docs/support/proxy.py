"""A TCP proxy in the test's loop that breaks connections just before an answer would pass."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from types import TracebackType


class Proxy:
    """Forwards to `target`; a connection breaks when the server has sent something and the first of `breaks` is true.

    Args:
        target: the server's endpoint, which may be changed for connections to come.
        breaks: each breaks one connection, in order; what the server had sent then is lost.
    """

    def __init__(self, target: str, *breaks: Callable[[], bool]) -> None:
        self.target = target
        self.breaks = list(breaks)
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def endpoint(self) -> str:
        """Where the client connects."""
        return f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", int(self.target.rpartition(":")[2]))

        async def forward(source: asyncio.StreamReader, sink: asyncio.StreamWriter, *, may_break: bool) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65_536):
                    if may_break and self.breaks and self.breaks[0]():
                        del self.breaks[0]
                        break
                    sink.write(data)
                    await sink.drain()
            writer.transport.abort()
            there_writer.transport.abort()

        for task in (
            asyncio.create_task(forward(reader, there_writer, may_break=False)),
            asyncio.create_task(forward(there_reader, writer, may_break=True)),
        ):
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
