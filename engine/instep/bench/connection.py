"""A bare producer's connection: a DEALER that speaks the protocol and does nothing else.

The client library resends, resumes, keeps windows and makes arrays; all of that costs the machine something that is not
the engine's. What is measured with this is the engine, ZeroMQ, and next to nothing beside them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Final, NoReturn, TypeAlias

import msgpack
import numpy as np
import zmq

from instep_client import replies
from instep_client.protocol import wire
from instep_client.protocol.multipart import READABLE, events
from instep_client.protocol.wire import F32, U64, Code, Header, Kind, ServerInfo

SILENT_MS: Final = 30_000
"""For so long a server that has been asked may say nothing."""
LARGE_BYTES: Final = 65_536
"""Frames from here on are received without a copy. Smaller ones are not, and what is sent is always copied: telling
Python that a buffer was sent takes ZeroMQ ten times as long as copying a block of 256 frames (18 µs and 2 µs; pyzmq
27.3)."""
_MORE: Final = int(zmq.SNDMORE)
_STEP, _STEPPED = int(Kind.STEP), int(Kind.STEPPED)

Buffer: TypeAlias = bytes | memoryview
Reply: TypeAlias = tuple[int, "bytes | zmq.Frame"]
"""The request that it answers, and the outputs as they came."""


class Refused(Exception):
    """The server refused something, or said nothing: nothing can be measured; the message is its sentence."""


class Connection:
    """One connection, driven by one thread; used as a context.

    Args:
        endpoint: where the server is, or what answers in its place.
        output_bytes: the size of the outputs of one message.
    """

    def __init__(self, endpoint: str, output_bytes: int = 0) -> None:
        self._context = zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.rcvhwm = 65_536
        socket.rcvtimeo = SILENT_MS
        socket.connect(endpoint)
        self.socket: zmq.Socket[bytes] = socket
        self._send, self._recv = socket.send, socket.recv
        self._copies = output_bytes < LARGE_BYTES
        self._request = 0
        self._came: deque[Reply] = deque()
        self.info: ServerInfo
        """What the server says of itself; there after `hello`."""

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)

    def hello(self) -> ServerInfo:
        """Say HELLO.

        Raises:
            Refused: also when nobody answers.
        """
        header, _ = self._ask(Kind.HELLO, wire.PROTOCOL_VERSION, "bench")
        self.info = replies.welcome(header)
        return self.info

    def open(self, names: Sequence[str]) -> U64:
        """The handles [N] of new streams, all of which begin with zeros."""
        header, frames = self._ask(Kind.OPEN, len(names), 0, 0, frames=(wire.pack_names(names), b"", b""))
        grants, failures = replies.granted(header, frames, len(names))
        _nothing(failures)
        handles: U64 = grants["handle"].copy()
        return handles

    def close(self, handles: U64) -> F32:
        """End streams of which nothing is on its way: their final states [N, layers, size]."""
        info, count = self.info, len(handles)
        header, frames = self._ask(Kind.CLOSE, count, frames=(handles.tobytes(),))
        states, failures = replies.closed(header, frames, count, info.state_layers * info.state_size)
        _nothing(failures)
        return states.reshape(count, info.state_layers, info.state_size)

    def send(self, header: Buffer, columns: Buffer, x: Buffer) -> None:
        """One STEP; what it is made of may be changed as soon as this returns."""
        send = self._send
        send(header, _MORE)
        send(columns, _MORE)
        send(x)

    def receive(self) -> Reply:
        """The next answer to a STEP, whatever has to be waited for; see `is_readable`.

        Raises:
            Refused: when it is a refusal, in whole or in part, or another message that ends the measurement.
        """
        recv, came = self._recv, self._came
        while True:
            if came:
                return came.popleft()
            header = self._next()
            # A kind below 128 is the byte after that of the array. What only sends back says STEPPED, too.
            if header[1] != _STEPPED:
                self._aside(header)
                continue
            y = recv(0, self._copies)
            failures = recv()
            fields = msgpack.unpackb(header)
            if failures:
                self._failed(fields, failures)
            request: int = fields[1]
            if not fields[-1]:
                return request, y
            self._came.extend(_apart(request, y, fields))

    @property
    def is_readable(self) -> bool:
        """Whether `receive` has something at once: answers that came in one message are given out one by one."""
        return bool(self._came or events(self.socket) & READABLE)

    def _next(self) -> bytes:
        try:
            return self._recv()
        except zmq.Again:
            raise Refused(f"nothing came for {SILENT_MS / 1000:g} s") from None

    def _ask(self, kind: Kind, *fields: int | str, frames: Sequence[Buffer] = ()) -> tuple[Header, list[bytes]]:
        """One request outside of what is measured, while nothing else is on its way."""
        self._request += 1
        self.socket.send_multipart([wire.pack_header(kind, self._request, *fields), *frames])
        while True:
            header = self._next()
            if header[1] in (Kind.PING, Kind.ERROR, Kind.EVICTED, Kind.GOODBYE):
                self._aside(header)
                continue
            message = [header]
            while self.socket.rcvmore:
                message.append(self._recv())
            return wire.unpack_header(message), message

    def _aside(self, header: bytes) -> None:
        """Answer the server's PING; give up after anything else that was not asked for."""
        message = [header]
        while self.socket.rcvmore:
            message.append(self._recv())
        read = wire.unpack_header(message)
        if read.kind is Kind.PING:
            self._send(wire.pack_header(Kind.PONG, read.request))
            return
        said = next((field for field in read.fields if type(field) is str), "")
        raise Refused(f"the server answered {read.kind.name}: {said}")

    def _failed(self, fields: Sequence[Any], failures: bytes) -> NoReturn:
        code = int(np.frombuffer(failures, wire.FAILURE)["code"][0])
        said = dict(fields[-2])
        raise Refused(f"a frame was refused: {said.get(code, wire.SENTENCES[Code(code)])}")


def _apart(first: int, y: bytes | zmq.Frame, fields: Sequence[Any]) -> Iterator[Reply]:
    """Answers that came in one message."""
    timesteps, columns, also = fields[2], fields[3], fields[-1]
    outputs = np.frombuffer(y if isinstance(y, bytes) else y.buffer, "<f4").reshape(timesteps, columns, -1)
    requests, starts = [first, *also[::2]], [0, *also[1::2], columns]
    for request, start, end in zip(requests, starts, starts[1:], strict=False):
        yield request, outputs[:, start:end].tobytes()


def _nothing(failures: Sequence[replies.Failure]) -> None:
    if failures:
        raise Refused(failures[0].sentence)
