"""A load of single frames in compiled code, which costs less than the server that it drives."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.connection import SILENT_MS, BareConnection, NotServed
from benchmarks.load import ClosedLoopStreams, Inputs, open_streams
from benchmarks.measurement import Server, cpu_s
from benchmarks.reference import BenchmarkModel, check_and_close
from instep.core.compiled import kernel
from instep.core.typing import F32, I64, U8, Int
from instep.frontends.zmq.native import (
    DONTWAIT,
    SNDMORE,
    PollItems,
    copy_memory,
    message_data,
    message_size,
    new_message,
    poll,
    poll_items,
    receive_part,
    send_part,
)
from instep_client.protocol.wire import DTYPE_F32, MAX_REQUESTS, STEP, STEP_HEADER, STEPPED, STEPPED_HEADER, U64

_STEP_WORDS: Final = 6
"""The uint64 words of a STEP's frame 0 with one column: three of the header, handle, seq, acked."""
_REQUEST, _SEQ, _ACKED = 2, 4, 5
_ANSWERED_AT: Final = STEPPED_HEADER.size // 8
_LONGEST: Final = STEPPED_HEADER.size + 16 * MAX_REQUESTS
_TURN: Final = 4096
"""The messages after which the clock is read."""
_WAIT_MS: Final = 100


@kernel
def _send(sockets: I64, words: U64, x: F32, answered: I64, stream: Int) -> None:
    count, features = x.shape[1], x.shape[2]
    socket = sockets[stream // (count // len(sockets))]
    words[stream, _SEQ] = words[stream, _ACKED] = answered[stream]
    step = answered[stream] % len(x)
    send_part(socket, words.ctypes.data + stream * _STEP_WORDS * 8, _STEP_WORDS * 8, SNDMORE)
    send_part(socket, x.ctypes.data + (step * count + stream) * features * 4, features * 4, 0)


@kernel
def _exchange(
    sockets: I64,
    items: PollItems,
    message: U8,
    header: U8,
    words: U64,
    x: F32,
    answered: I64,
    y: F32,
    sends: bool,
    at_most: int,
) -> tuple[int, int, int]:
    """Take answers, and send the next message of each stream that has one.

    Returns:
        The number of answers; a connection, or -1; and the size of the header that it received, which is no good
        STEPPED.
    """
    outputs, done = y.shape[1], 0
    short, word = header.view(np.uint32), header.view(np.uint64)
    while done < at_most:
        if poll(items.ctypes.data, len(items), _WAIT_MS) <= 0:
            break
        for connection in range(len(sockets)):
            while items["revents"][connection]:
                if receive_part(message.ctypes.data, sockets[connection], DONTWAIT) < 0:
                    break
                size = message_size(message.ctypes.data)
                copy_memory(header.ctypes.data, message_data(message.ctypes.data), min(size, len(header)))
                if header[0] != STEPPED or short[6]:  # its failures
                    return done, connection, size
                receive_part(message.ctypes.data, sockets[connection], DONTWAIT)
                for place in range(short[0] >> 16):
                    stream = np.int64(word[_ANSWERED_AT + 2 * place]) - 1
                    data = message_data(message.ctypes.data) + place * outputs * 4
                    copy_memory(y.ctypes.data + stream * outputs * 4, data, outputs * 4)
                    answered[stream] += 1
                    done += 1
                    if sends:
                        _send(sockets, words, x, answered, stream)
    return done, -1, 0


class Measured(NamedTuple):
    """What a load has found."""

    rate: float
    """Messages per second."""
    cpu_us: float
    """Microseconds of the answering process for each message, all of its threads."""


@dataclass(slots=True)
class _Load:
    """Streams in closed loop, an equal number on each connection: one message of each is in flight."""

    connections: list[BareConnection]
    x: F32
    """float32 [timesteps, streams, features]."""
    handles: U64
    y: F32
    """The newest outputs, float32 [streams, outputs]."""
    answered: I64 = field(init=False)
    _arrays: tuple[Any, ...] = field(init=False)
    _header: U8 = field(init=False)

    def __post_init__(self) -> None:
        _, streams, features = self.x.shape
        words = np.zeros((streams, _STEP_WORDS), np.uint64)
        words[:, :3] = np.frombuffer(STEP_HEADER.pack(STEP, DTYPE_F32, 0, 1, 1, features, 0), np.uint64)
        words[:, _REQUEST], words[:, 3] = np.arange(1, streams + 1), self.handles
        self.answered = np.zeros(streams, np.int64)
        sockets = [each.socket for each in self.connections]
        addresses = np.array([socket.underlying for socket in sockets], np.int64)
        self._header = np.zeros(_LONGEST, np.uint8)
        self._arrays = addresses, poll_items(sockets), new_message(), self._header, words, self.x, self.answered, self.y

    def run(self, seconds: float, pid: int) -> Measured:
        """Send for some time, then wait for the last answers of the process with that id.

        Raises:
            NotServed: when a frame is refused, or no answer comes.
        """
        sockets, _, _, _, words, x, answered, _ = self._arrays
        used_s, left = cpu_s(pid), 0
        began = now = heard = time.perf_counter()
        for stream in range(len(answered)):
            _send(sockets, words, x, answered, stream)
        while (is_sending := now < began + seconds) or left:
            if is_sending:
                left = len(answered)
            turn = _TURN if is_sending else left
            done, connection, size = _exchange(*self._arrays, is_sending, turn)  # type: ignore[call-arg]
            if connection >= 0:
                self.connections[connection].handle_other(self._header[:size].tobytes())
            left -= 0 if is_sending else done
            now = time.perf_counter()
            heard = now if done else heard
            if now > heard + SILENT_MS / 1000:
                raise NotServed(f"the server sent nothing for {SILENT_MS / 1000:g} s")
        messages = int(answered.sum())
        return Measured(messages / (now - began), max(cpu_s(pid) - used_s, 1e-6) / messages * 1e6)


class _AllConnections:
    """Closes streams, an equal number of which belong to each connection."""

    def __init__(self, connections: list[BareConnection]) -> None:
        self._connections = connections
        self.info = connections[0].info

    def close(self, handles: U64) -> U8:
        """As `BareConnection.close`."""
        each = np.split(handles, len(self._connections))
        return np.concatenate([connection.close(own) for connection, own in zip(self._connections, each, strict=True)])


def served_singly(server: Server, model: BenchmarkModel, x: F32, connections: int, seconds: float) -> Measured:
    """Measure a server with new streams of these inputs, float32 [timesteps, streams, features].

    Raises:
        WrongOutput: when the outputs are not the network's.
        NotServed: when the server refuses a request or does not answer.
    """
    inputs = [Inputs.of(x[:, stream : stream + 1]) for stream in range(x.shape[1])]
    each = len(inputs) // connections
    with ExitStack() as stack:
        opened = [stack.enter_context(BareConnection(server.endpoint)) for _ in range(connections)]
        streams: list[ClosedLoopStreams] = []
        for number, connection in enumerate(opened):
            connection.hello()
            streams += open_streams(connection, inputs[number * each :][:each], prefix=f"{number}-")
        handles = np.concatenate([stream.handles for stream in streams])
        load = _Load(opened, x, handles, np.zeros((x.shape[1], model.truth.outputs), np.float32))
        measured = load.run(seconds, server.pid)
        for stream, answered, y in zip(streams, load.answered.tolist(), load.y, strict=True):
            stream.sent, stream.answered, stream.last = answered, answered, y.tobytes()
        check_and_close(_AllConnections(opened), streams, model.truth)
    return measured


def echoed_singly(echo: Server, model: BenchmarkModel, x: F32, connections: int, seconds: float) -> Measured:
    """The same of an echo."""
    with ExitStack() as stack:
        opened = [stack.enter_context(BareConnection(echo.endpoint)) for _ in range(connections)]
        handles = np.arange(1, x.shape[1] + 1, dtype=np.uint64)
        y = np.zeros((x.shape[1], model.truth.outputs), np.float32)
        return _Load(opened, x, handles, y).run(seconds, echo.pid)
