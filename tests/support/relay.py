"""TCP connections to a server that a test can break."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from types import TracebackType
from typing import Self

_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER of no time: closing resets the connection, and what it holds is lost."""


class Link:
    """One connection through a relay: the client's side and the server's."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near = near
        self._sides = (near, far)

    def cut(self) -> None:
        """Reset both sides."""
        for side in self._sides:
            if side.transport.is_closing():
                continue
            side.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            side.transport.abort()


class Relay:
    """Listens on loopback and forwards every connection; `async with Relay(endpoint) as relay`.

    Args:
        target: `tcp://HOST:PORT` of the server; it may be changed for connections to come.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.endpoint = ""
        """Where it listens."""
        self.links: set[Link] = set()
        """The connections that are there."""

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        self.cut()
        while self.links:
            await asyncio.sleep(0)

    def cut(self) -> None:
        """Break every connection."""
        for link in self.links:
            link.cut()

    async def forward(self, chunk: bytes, sink: asyncio.StreamWriter, link: Link) -> None:
        """What one side has sent goes to the other."""
        sink.write(chunk)
        await sink.drain()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = self.target.removeprefix("tcp://").rpartition(":")
        try:
            far_reader, far_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.transport.abort()
            return
        link = Link(writer, far_writer)
        self.links.add(link)
        pumps = [
            asyncio.create_task(self._pump(reader, far_writer, link)),
            asyncio.create_task(self._pump(far_reader, writer, link)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            link.cut()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            self.links.discard(link)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, link: Link) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await source.read(4096):
                await self.forward(chunk, sink, link)
