"""The load generator: the same loops drive the engine and the bare echo that it is compared with.

`instep loadtest` generates load through the client library, so its figures contain the library's work. These
loops add as little as Python allows. They check only what every answer says of itself; `reference.py` compares the
outputs afterwards, outside of what is timed.
"""

from __future__ import annotations

import ctypes
import select
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zmq

from benchmarks.connection import BareConnection, Buffer
from instep_client.protocol import wire
from instep_client.protocol.wire import DTYPE_F32, F32, STEP, STEP_HEADER, U64

F64: TypeAlias = npt.NDArray[np.float64]

_SINGLE: Final = struct.Struct(STEP_HEADER.format + "3Q")
"""Frame 0 of a STEP of one stream."""
_SMALL_BYTES: Final = 4096
"""Smaller frames are kept as `bytes`, which ZeroMQ takes faster than a view."""
_PR_SET_TIMERSLACK: Final = 29
_MAX_IN_FLIGHT: Final = 24
"""Messages of one stream that `open_loop` has in flight; those after them are sent late, which counts as latency."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Inputs ready to be sent; several groups of streams may share them.

    Attributes:
        x: float32 [timesteps, N, features]; a load that needs more starts again at the beginning.
        steps: timesteps in one message.
        messages: `x` cut into messages.
    """

    x: F32
    steps: int
    messages: list[Buffer]

    @classmethod
    def of(cls, x: F32, steps: int = 1) -> Inputs:
        """Cut `x`, whose timesteps are a multiple of `steps`."""
        x = np.ascontiguousarray(x)
        views = [wire.raw(x[at : at + steps]) for at in range(0, len(x), steps)]
        small = views[0].nbytes < _SMALL_BYTES
        return cls(x, steps, [view.tobytes() for view in views] if small else list(views))


class ClosedLoopStreams:
    """N streams that always send together, as one block; except in `open_loop`, one block is in flight at a time.

    Args:
        number: from 0; it is also the request number, less 1.
        handles: uint64 [N].
        inputs: what they send.
        first: the message of `inputs` to start with.
        once: whether the inputs are sent once; otherwise they are repeated.
    """

    def __init__(self, number: int, handles: U64, inputs: Inputs, first: int = 0, once: bool = False) -> None:
        self.number, self.handles, self.inputs, self.first, self.once = number, handles, inputs, first, once
        self.frames = inputs.steps * len(handles)
        """In one message."""
        self.sent = 0
        """Messages."""
        self.answered = 0
        """Messages."""
        self.last: bytes | zmq.Frame = b""
        """The outputs of the newest answer, float32 [steps, N, outputs]."""
        self._messages = inputs.messages
        _, streams, features = inputs.x.shape
        self._fields = STEP, DTYPE_F32, 0, inputs.steps, streams, features, number + 1
        # Three words of header, then three for each column.
        words: U64 = np.zeros((1 + len(handles), 3), np.uint64)
        words[0] = np.frombuffer(STEP_HEADER.pack(*self._fields), "<u8")
        words[1:, 0] = handles
        self._header = words.reshape(-1).view("u1").data
        self._seqs_and_acked = words[1:, 1:]
        self._handle = int(handles[0]) if len(handles) == 1 else None

    @property
    def is_done(self) -> bool:
        """Whether everything was sent."""
        return self.once and self.sent == len(self._messages)

    def send(self, connection: BareConnection) -> None:
        """Send the next message. Only a single stream may send while its earlier messages are unanswered."""
        x = self._messages[(self.first + self.sent) % len(self._messages)]
        if self._handle is None:
            connection.send(self._header, x)
            self._seqs_and_acked += self.inputs.steps
        else:
            steps = self.inputs.steps
            column = self._handle, self.sent * steps, self.answered * steps
            connection.send(_SINGLE.pack(*self._fields, *column), x)
        self.sent += 1

    def outputs(self, size: int) -> F32:
        """The newest outputs [steps, N, size]; zeros where nothing was answered."""
        shape = (self.inputs.steps, len(self.handles), size)
        if not self.answered:
            return np.zeros(shape, np.float32)
        buffer = self.last.buffer if isinstance(self.last, zmq.Frame) else self.last
        return wire.array_frame(memoryview(buffer), "<f4", shape, "y")


def open_streams(
    connection: BareConnection,
    inputs: Sequence[Inputs],
    *,
    groups: int | None = None,
    once: bool = False,
    prefix: str = "",
) -> list[ClosedLoopStreams]:
    """Open the streams of `groups` groups, one for each of `inputs` by default.

    With more groups than inputs, the groups that share inputs start at different places in them. Names of streams begin
    with the prefix.
    """
    opened = []
    for number in range(len(inputs) if groups is None else groups):
        own = inputs[number % len(inputs)]
        handles = connection.open([f"{prefix}group-{number}-{stream}" for stream in range(own.x.shape[1])])
        opened.append(ClosedLoopStreams(number, handles, own, first=number // len(inputs), once=once))
    return opened


Drive: TypeAlias = Callable[[BareConnection, Sequence[ClosedLoopStreams]], float]
"""A loop that measures over one connection with these streams."""


def all_in_flight(seconds: float) -> Drive:
    """`closed_loop` with a message of every group in flight."""
    return lambda connection, groups: closed_loop(connection, groups, len(groups), seconds)


def closed_loop(
    connection: BareConnection, groups: Sequence[ClosedLoopStreams], in_flight: int, seconds: float
) -> float:
    """Keep messages of `in_flight` groups in flight, the groups taking turns, and then wait for the last answers.

    Args:
        connection: of these groups, numbered from 0.
        groups: with nothing in flight.
        in_flight: at most the number of groups.
        seconds: nothing more is sent after this time; infinity to send everything that the groups have.

    Returns:
        Frames per second, over the time until the last answer.
    """
    now, receive = time.perf_counter, connection.receive
    waiting = deque(sorted(groups, key=lambda group: group.sent))  # continues where the last call ended
    frames = 0
    start = now()
    deadline = start + seconds
    for _ in range(in_flight):
        waiting.popleft().send(connection)
    flying = in_flight
    while flying:
        request, y = receive()
        group = groups[request - 1]
        group.last = y
        group.answered += 1
        frames += group.frames
        if not group.is_done:
            waiting.append(group)
        if waiting and now() < deadline:
            waiting.popleft().send(connection)
        else:
            flying -= 1
    return frames / (now() - start)


def round_trips(connection: BareConnection, stream: ClosedLoopStreams, seconds: float) -> F64:
    """Send one message at a time, each once the last is answered: the seconds that each took."""
    now, receive = time.perf_counter, connection.receive
    times = []
    deadline = now() + seconds
    while (began := now()) < deadline:
        stream.send(connection)
        _, stream.last = receive()
        times.append(now() - began)
        stream.answered += 1
    return np.array(times)


def open_loop(connection: BareConnection, streams: Sequence[ClosedLoopStreams], rate_hz: float, seconds: float) -> F64:
    """Send a message of every stream `rate_hz` times a second, the streams taking turns at equal distances.

    Args:
        connection: of these streams.
        streams: of one frame a message, numbered from 0, to which nothing was sent before.
        rate_hz: messages of one stream per second.
        seconds: how long to send.

    Returns:
        Seconds from when each message was due until its answer had arrived. A load generator that is held up therefore
        does not hide the time that its messages waited.
    """
    now, receive = time.perf_counter, connection.receive
    fd = int(connection.socket.get(zmq.FD))
    count = max(1, round(seconds * rate_hz)) * len(streams)
    interval = 1 / (rate_hz * len(streams))
    latencies = np.zeros(count)
    sent = answered = 0
    start = now() + interval
    with waking_on_time():
        while True:
            # Receive after every send: ZeroMQ signals an arrival once, and a send may take the signal.
            while connection.is_readable:
                request, y = receive()
                stream = streams[request - 1]
                number = stream.answered * len(streams) + stream.number  # answers of one stream arrive in order
                latencies[number] = now() - (start + number * interval)
                stream.last = y
                stream.answered += 1
                answered += 1
            if answered == count:
                return latencies
            stream = streams[sent % len(streams)]
            may_send = sent < count and stream.sent - stream.answered < _MAX_IN_FLIGHT
            wait_s = start + sent * interval - now() if may_send else 1.0
            if wait_s > 0:
                select.select([fd], [], [], wait_s)  # ZeroMQ's own poll knows only whole milliseconds
            else:
                stream.send(connection)
                sent += 1


@contextmanager
def waking_on_time() -> Iterator[None]:
    """Make this thread's sleeps end on time: by default Linux lets each of them last 50 µs longer."""
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # nanoseconds
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, 0, 0, 0, 0)  # back to the thread's default
