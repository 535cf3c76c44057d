"""A DEALER that says exactly what a test wants it to say, good or bad, and shows what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import msgpack
import numpy as np
import zmq
import zmq.asyncio

from instep.core.typing import F32, U64
from instep_client import wire
from instep_client.wire import Code, Kind


class Reply:
    """One message from the server, its header unpacked without the code under test."""

    def __init__(self, frames: list[bytes]) -> None:
        self.header: list[Any] = msgpack.unpackb(frames[0])
        self.kind = Kind(self.header[0])
        self.request: int = self.header[1]
        self.frames = frames[1:]

    @property
    def code(self) -> Code:
        """The code of an ERROR."""
        assert self.kind is Kind.ERROR, self.header
        return Code(self.header[2])

    @property
    def sentence(self) -> str:
        """The sentence of an ERROR."""
        assert self.kind is Kind.ERROR, self.header
        return str(self.header[3])

    def handles(self) -> U64:
        """The handles of an OPENED or EVICTED."""
        if self.kind is Kind.EVICTED:
            return np.frombuffer(self.frames[0], "<u8")
        return self.grants()["handle"].copy()

    def grants(self) -> wire.GrantArray:
        """The grants of an OPENED or RESUMED."""
        return np.frombuffer(self.frames[0], wire.GRANT)

    def floats(self) -> F32:
        """The floats of a STEPPED or CLOSED, flat."""
        return np.frombuffer(self.frames[0], "<f4")

    def failures(self) -> list[tuple[int, int, Code, int]]:
        """(column, timestep, code, expected seq) of each failure."""
        entries = np.frombuffer(self.frames[1], wire.FAILURE)
        return [(int(e["column"]), int(e["timestep"]), Code(int(e["code"])), int(e["expected_seq"])) for e in entries]


class RawClient:
    """One connection."""

    def __init__(self, endpoint: str, *, identity: bytes | None = None) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(endpoint)
        self._request = 0

    async def __aenter__(self) -> RawClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()
        self._context.term()

    async def send(self, *frames: bytes) -> None:
        """Send frames as they are."""
        await self.socket.send_multipart(list(frames))

    async def receive(self) -> Reply:
        """The next message; the server's PINGs are answered on the way."""
        while True:
            reply = Reply(await self.socket.recv_multipart())
            if reply.kind is not Kind.PING:
                return reply
            await self.send(msgpack.packb([Kind.PONG, reply.request]))

    async def ask(self, *frames: bytes) -> Reply:
        """Send, and the next message."""
        await self.send(*frames)
        return await self.receive()

    def next_request(self) -> int:
        """A new request number."""
        self._request += 1
        return self._request

    async def hello(self) -> Reply:
        """Say HELLO."""
        reply = await self.ask(msgpack.packb([Kind.HELLO, self.next_request(), 2, "raw"]))
        assert reply.kind is Kind.WELCOME, reply.header
        return reply

    async def open(self, *names: str, states: F32 | None = None) -> Reply:
        """Open streams."""
        header = msgpack.packb([Kind.OPEN, self.next_request(), len(names), int(states is not None), 0])
        return await self.ask(header, "\n".join(names).encode(), b"" if states is None else states.tobytes(), b"")

    def step_message(
        self, handles: Sequence[int] | U64, seqs: Sequence[int], x: F32, acked: Sequence[int] | None = None
    ) -> list[bytes]:
        """A STEP of x float32 [T, N, features] that acknowledges nothing unless told what."""
        timesteps, columns, features = x.shape
        header = msgpack.packb([Kind.STEP, self.next_request(), timesteps, columns, features, "f4"])
        column = np.empty(columns, wire.COLUMN)
        column["handle"] = handles
        column["seq"] = seqs
        column["acked"] = 0 if acked is None else acked
        return [header, column.tobytes(), x.astype("<f4").tobytes()]

    async def step(self, handles: Sequence[int] | U64, seqs: Sequence[int], x: F32) -> Reply:
        """Step streams, and the answer."""
        return await self.ask(*self.step_message(handles, seqs, x))

    async def close(self, handles: Sequence[int] | U64) -> Reply:
        """Close streams."""
        header = msgpack.packb([Kind.CLOSE, self.next_request(), len(handles)])
        return await self.ask(header, np.asarray(handles, "<u8").tobytes())
