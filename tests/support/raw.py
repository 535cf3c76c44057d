"""A DEALER that says exactly what a test wants it to say, good or bad, and shows what comes back."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from types import TracebackType

import msgpack
import numpy as np
import zmq
import zmq.asyncio

from instep.core.typing import F32, U64
from instep_client.protocol import wire
from instep_client.protocol.codes import PROTOCOL_VERSION
from instep_client.protocol.wire import Code, Kind
from tests.support.keys import Curve
from tests.support.step_messages import apart, parts, step_header


class Reply:
    """One message from the server, its header unpacked without the code under test."""

    def __init__(self, frames: list[bytes]) -> None:
        self.header, self.frames = parts(frames)
        self.kind = Kind(self.header[0])
        self.request: int = self.header[1]

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
        """The handles of an OPENED, RESUMED or EVICTED."""
        if self.kind is Kind.EVICTED:
            return np.frombuffer(self.frames[0], "<u8")
        return self.grants()["handle"].copy()

    def grants(self) -> wire.GrantArray:
        """The grants of an OPENED or RESUMED."""
        return np.frombuffer(self.frames[0], wire.GRANT)

    def epochs(self) -> list[int]:
        """The epochs of an OPENED or RESUMED."""
        return [int(epoch) for epoch in self.grants()["epoch"]]

    def seqs(self) -> list[int]:
        """The next seqs of an OPENED, RESUMED or STATE_READ."""
        seqs = np.frombuffer(self.frames[0], "<u8") if self.kind is Kind.STATE_READ else self.grants()["next_seq"]
        return [int(seq) for seq in seqs]

    def floats(self) -> F32:
        """The floats of a STEPPED, CLOSED or STATE_READ, flat."""
        return np.frombuffer(self.frames[1 if self.kind is Kind.STATE_READ else 0], "<f4")

    def failures(self) -> list[tuple[int, int, Code, int]]:
        """(column, timestep, code, expected seq) of each failure."""
        entries = np.frombuffer(self.frames[-1], wire.FAILURE)
        return [(int(e["column"]), int(e["timestep"]), Code(int(e["code"])), int(e["expected_seq"])) for e in entries]

    def codes(self) -> list[Code]:
        """The codes of the failures."""
        return [code for _, _, code, _ in self.failures()]


class RawClient:
    """One connection."""

    def __init__(
        self,
        endpoint: str,
        *,
        identity: bytes | None = None,
        options: Mapping[zmq.SocketOption, int] | None = None,
        curve: Curve | None = None,
    ) -> None:
        self._context = zmq.asyncio.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        for option, value in (options or {}).items():
            self.socket.setsockopt(option, value)
        if curve is not None:
            curve.apply(self.socket)
        if identity is not None:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.connect(endpoint)
        self._request = 0
        self._came: deque[list[bytes]] = deque()

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
        """The next message, one for each request that is answered.

        On the way, the server's PINGs are answered, and a WELCOME that comes unasked is passed over.
        """
        while True:
            if not self._came:
                self._came.extend(apart(await self.socket.recv_multipart()))
            reply = Reply(self._came.popleft())
            if reply.kind is Kind.PING:
                await self.send(msgpack.packb([Kind.PONG, reply.request]))
            elif reply.kind is not Kind.WELCOME or reply.request:
                return reply

    async def ask(self, *frames: bytes) -> Reply:
        """Send, and the next message."""
        await self.send(*frames)
        return await self.receive()

    def next_request(self) -> int:
        """A new request number."""
        self._request += 1
        return self._request

    def hello_message(self, version: int = PROTOCOL_VERSION, model: str = "") -> list[bytes]:
        """A HELLO."""
        return [msgpack.packb([Kind.HELLO, self.next_request(), version, "raw", model])]

    async def hello(self, model: str = "") -> Reply:
        """Say HELLO."""
        reply = await self.ask(*self.hello_message(model=model))
        assert reply.kind is Kind.WELCOME, reply.header
        return reply

    def open_message(
        self, *names: str, states: F32 | None = None, first_seqs: Sequence[int] | None = None
    ) -> list[bytes]:
        """An OPEN."""
        fields = [len(names), int(states is not None), int(first_seqs is not None)]
        header = msgpack.packb([Kind.OPEN, self.next_request(), *fields])
        return [header, _lines(names), _array(states, "<f4"), _array(first_seqs, "<u8")]

    async def open(self, *names: str, states: F32 | None = None, first_seqs: Sequence[int] | None = None) -> Reply:
        """Open streams."""
        return await self.ask(*self.open_message(*names, states=states, first_seqs=first_seqs))

    def step_message(
        self, handles: Sequence[int] | U64, seqs: Sequence[int], x: F32, acked: Sequence[int] | None = None
    ) -> list[bytes]:
        """A STEP of x float32 [T, N, features] that acknowledges nothing unless told what."""
        timesteps, columns, features = x.shape
        header = step_header(self.next_request(), timesteps, columns, features)
        column = np.empty(columns, wire.COLUMN)
        column["handle"] = handles
        column["seq"] = seqs
        column["acked"] = 0 if acked is None else acked
        return [header + column.tobytes(), x.astype("<f4").tobytes()]

    async def step(
        self, handles: Sequence[int] | U64, seqs: Sequence[int], x: F32, acked: Sequence[int] | None = None
    ) -> Reply:
        """Step streams, and the answer."""
        return await self.ask(*self.step_message(handles, seqs, x, acked))

    def close_message(self, handles: Sequence[int] | U64, have: Sequence[int] | None = None) -> list[bytes]:
        """A CLOSE; by default whatever outputs are missing are not wanted."""
        closings = np.zeros(len(handles), wire.CLOSING)
        closings["handle"], closings["have"] = handles, wire.HAVE_ALL if have is None else have
        return [msgpack.packb([Kind.CLOSE, self.next_request(), len(handles)]), closings.tobytes()]

    async def close(self, handles: Sequence[int] | U64, have: Sequence[int] | None = None) -> Reply:
        """Close streams."""
        return await self.ask(*self.close_message(handles, have))

    def resume_message(
        self, names: Sequence[str], have: Sequence[int], epochs: Sequence[int], *, take_over: bool = False
    ) -> list[bytes]:
        """A RESUME."""
        claims = np.empty(len(names), wire.CLAIM)
        claims["have"] = have
        claims["epoch"] = epochs
        header = msgpack.packb([Kind.RESUME, self.next_request(), len(names), int(take_over)])
        return [header, _lines(names), claims.tobytes()]

    async def resume(
        self, names: Sequence[str], have: Sequence[int], epochs: Sequence[int], *, take_over: bool = False
    ) -> Reply:
        """Resume streams."""
        return await self.ask(*self.resume_message(names, have, epochs, take_over=take_over))

    def read_state_message(self, handles: Sequence[int] | U64) -> list[bytes]:
        """A READ_STATE by handle."""
        return [msgpack.packb([Kind.READ_STATE, self.next_request(), len(handles), 0]), _array(handles, "<u8")]

    async def read_state(self, handles: Sequence[int] | U64) -> Reply:
        """Read states by handle."""
        return await self.ask(*self.read_state_message(handles))

    def read_named_message(self, names: Sequence[str]) -> list[bytes]:
        """A READ_STATE by name."""
        return [msgpack.packb([Kind.READ_STATE, self.next_request(), len(names), 1]), _lines(names)]

    def reset_message(self, handles: Sequence[int] | U64, states: F32 | None = None) -> list[bytes]:
        """A RESET."""
        header = msgpack.packb([Kind.RESET, self.next_request(), len(handles), int(states is not None)])
        return [header, _array(handles, "<u8"), _array(states, "<f4")]

    async def reset(self, handles: Sequence[int] | U64, states: F32 | None = None) -> Reply:
        """Give streams other states, or zeros."""
        return await self.ask(*self.reset_message(handles, states))

    def fork_message(self, handles: Sequence[int] | U64, names: Sequence[str]) -> list[bytes]:
        """A FORK."""
        header = msgpack.packb([Kind.FORK, self.next_request(), len(handles)])
        return [header, _array(handles, "<u8"), _lines(names)]

    async def fork(self, handles: Sequence[int] | U64, names: Sequence[str]) -> Reply:
        """Copy streams."""
        return await self.ask(*self.fork_message(handles, names))

    async def statistics(self) -> dict[str, float]:
        """What the server counts."""
        reply = await self.ask(msgpack.packb([Kind.STATS, self.next_request()]))
        return {name: float(value) for name, value in reply.header[2]}


def _lines(names: Sequence[str]) -> bytes:
    return "\n".join(names).encode()


def _array(values: Sequence[int] | U64 | F32 | None, dtype: str) -> bytes:
    return b"" if values is None else np.asarray(values, dtype).tobytes()
