"""A TCP proxy that breaks connections in the middle of a message and lets others wait."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from types import TracebackType

_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Forwards to one endpoint; while `enabled`, resets and stalls at random.

    Args:
        endpoint: `tcp://HOST:PORT` of the server.
        random_: decides what happens when.
        enabled: whether it misbehaves; otherwise `endpoint` is the server's own and nothing is between.
    """

    def __init__(self, endpoint: str, random_: random.Random, *, enabled: bool) -> None:
        self._host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._port = int(port)
        self._random = random_
        self._enabled = enabled
        self._misbehaves = enabled
        self.endpoint = endpoint
        self.resets = 0
        """Connections broken so far."""

    async def __aenter__(self) -> Proxy:
        if self._enabled:
            self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
            self.endpoint = f"tcp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            self._server.close()

    def behave(self) -> None:
        """Forward everything from now on."""
        self._misbehaves = False

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(self._host, self._port)
        except OSError:
            writer.transport.abort()
            return
        patience = self._random.randint(5, 60)  # chunks until the connection breaks
        pumps = [
            asyncio.create_task(self._pump(reader, back, patience)),
            asyncio.create_task(self._pump(there, writer, patience)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        for side in (writer, back):
            side.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, patience: int) -> None:
        with contextlib.suppress(ConnectionError):
            while chunk := await source.read(4096):
                patience -= 1
                if self._misbehaves and patience < 0:
                    sink.write(chunk[: self._random.randint(0, len(chunk))])
                    raw = sink.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    self.resets += 1
                    return
                if self._misbehaves and self._random.random() < 0.01:
                    await asyncio.sleep(self._random.uniform(0, 0.05))
                sink.write(chunk)
                await sink.drain()
