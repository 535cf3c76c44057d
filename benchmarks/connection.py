"""A bare producer's connection: a DEALER that speaks the protocol and does nothing else.

The client library resends, resumes, keeps windows and checks replies. All of that costs CPU time that is not the
engine's, so the engine is measured without it; `instep loadtest` measures with it.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Final, TypeAlias

import numpy as np
import zmq

from instep_client import replies
from instep_client.key_files import ClientKeys
from instep_client.protocol import wire
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import STEPPED, STEPPED_HEADER, U64, Code, Header, Kind, ServerInfo

SILENT_MS: Final = 30_000
"""How long a server may leave a request unanswered."""
LARGE_BYTES: Final = 65_536
"""Frames from this size on are received without a copy. Smaller ones are copied, and so is everything that is sent:
the notice that a buffer is free again costs ten times as much as copying a block of 256 frames (pyzmq 27.3)."""
_MORE: Final = int(zmq.SNDMORE)
_ANSWERED: Final = struct.Struct("<2Q")

Buffer: TypeAlias = bytes | memoryview
Reply: TypeAlias = tuple[int, "bytes | zmq.Frame"]
"""The number of the request that it answers, and the raw outputs."""


class NotServed(Exception):
    """The server refused a request or did not answer it, so nothing can be measured; the message says why."""


class BareConnection:
    """One connection, driven by one thread; use it as a context manager.

    `output_bytes` is the size of the outputs in one answer.
    """

    def __init__(self, endpoint: str, output_bytes: int = 0, keys: ClientKeys | None = None) -> None:
        self._context = zmq.Context()
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.rcvhwm = 65_536
        socket.rcvtimeo = SILENT_MS
        if keys is not None:
            socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = (key.encode() for key in keys)
        socket.connect(endpoint)
        self.socket: zmq.Socket[bytes] = socket
        self._send, self._recv = socket.send, socket.recv
        self._copies = output_bytes < LARGE_BYTES
        self._request = 0
        self._received: deque[Reply] = deque()
        self.info: ServerInfo
        """The server's description of itself; set by `hello`."""

    def __enter__(self) -> BareConnection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.destroy(linger=0)

    def hello(self) -> ServerInfo:
        """Say HELLO.

        Raises:
            NotServed: when the server refuses or does not answer.
        """
        header, frames = self._ask(Kind.HELLO, wire.PROTOCOL_VERSION, "benchmark", "")
        self.info = replies.welcome(header, frames)
        return self.info

    def open(self, names: Sequence[str]) -> U64:
        """Open new streams, all of which start from a state of zeros; their handles [N]."""
        header, frames = self._ask(Kind.OPEN, len(names), 0, 0, frames=(wire.pack_names(names), b"", b""))
        grants, failures = replies.granted(header, frames, len(names))
        _check_none(failures)
        handles: U64 = grants["handle"].copy()
        return handles

    def close(self, handles: U64) -> U8:
        """Close streams that have no frame in flight; their final states as bytes [N, row_bytes]."""
        info, count = self.info, len(handles)
        closings = np.zeros(count, wire.CLOSING)
        closings["handle"], closings["have"] = handles, wire.HAVE_ALL
        header, frames = self._ask(Kind.CLOSE, count, frames=(closings.tobytes(),))
        states, failures = replies.closed(header, frames, count, info.state.row_bytes)
        _check_none(failures)
        return states

    def send(self, header: Buffer, x: Buffer) -> None:
        """Send one STEP; the caller may change the buffers as soon as this returns."""
        self._send(header, _MORE)
        self._send(x)

    def receive(self) -> Reply:
        """Wait for the next answer to a STEP.

        Raises:
            NotServed: when the answer refuses a frame, or the server sends anything else that ends the measurement.
        """
        recv, received = self._recv, self._received
        while True:
            if received:
                return received.popleft()
            header = self._next()
            if header[0] != STEPPED:
                self.handle_other(header)
                continue
            y = recv(0, self._copies)
            _, _, requests, timesteps, columns, *_, failures, _ = STEPPED_HEADER.unpack_from(header)
            if failures:
                failure = np.frombuffer(header, wire.FAILURE, 1, len(header) - failures * wire.FAILURE.itemsize)
                raise NotServed(f"a frame was refused: {Code(int(failure['code'][0])).sentence}")
            answered = _ANSWERED.iter_unpack(header[STEPPED_HEADER.size :])
            if requests == 1:
                return next(answered)[0], y
            received.extend(_split(answered, y, timesteps, columns))

    @property
    def is_readable(self) -> bool:
        """Whether `receive` would return at once. One message may answer several requests."""
        return bool(self._received or wire.ready(self.socket))

    def _next(self) -> bytes:
        try:
            return self._recv()
        except zmq.Again:
            raise NotServed(f"the server sent nothing for {SILENT_MS / 1000:g} s") from None

    def _rest(self, header: bytes) -> list[bytes]:
        message = [header]
        while self.socket.rcvmore:
            message.append(self._recv())
        return message

    def _ask(self, kind: Kind, *fields: int | str, frames: Sequence[Buffer] = ()) -> tuple[Header, list[bytes]]:
        """Send one request outside of what is measured, while nothing else is in flight, and wait for its reply."""
        self._request += 1
        self.socket.send_multipart([wire.pack_header(kind, self._request, *fields), *frames])
        while True:
            header = self._next()
            # A msgpack header is an array, so its second byte is the kind, which is below 128.
            if header[1] in (Kind.PING, Kind.ERROR, Kind.EVICTED, Kind.GOODBYE):
                self.handle_other(header)
                continue
            message = self._rest(header)
            return wire.unpack_header(message), message

    def handle_other(self, first: bytes) -> None:
        """Answer the server's PING; give up after anything else that was not asked for."""
        header = wire.unpack_header(self._rest(first))
        if header.kind is Kind.PING:
            self._send(wire.pack_header(Kind.PONG, header.request))
            return
        sentence = next((field for field in header.fields if type(field) is str), "")
        raise NotServed(f"the server answered {header.kind.name}: {sentence}")


def _split(answered: Iterator[tuple[int, ...]], y: bytes | zmq.Frame, timesteps: int, columns: int) -> Iterator[Reply]:
    """The replies to several requests that came in one message."""
    outputs = np.frombuffer(y if isinstance(y, bytes) else y.buffer, "<f4").reshape(timesteps, columns, -1)
    start = 0
    for request, width in answered:
        yield request, outputs[:, start : start + width].tobytes()
        start += width


def _check_none(failures: Sequence[replies.ColumnError]) -> None:
    if failures:
        raise NotServed(failures[0].sentence)
