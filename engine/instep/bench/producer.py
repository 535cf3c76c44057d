"""The load generator: the same loops drive the engine and the bare echo that it is compared with.

Nothing in them is checked but what every answer says of itself; whether the outputs are right is asked afterwards
(`reference.py`), outside of what is timed.
"""

from __future__ import annotations

import ctypes
import select
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zmq

from instep.bench.connection import Connection
from instep.bench.lanes import Lane

F64: TypeAlias = npt.NDArray[np.float64]

_PR_SET_TIMERSLACK: Final = 29

MOST_BEHIND: Final = 24
"""Messages of one stream that `open_loop` has on their way; beyond it the next ones are late, which counts."""


def closed_loop(connection: Connection, lanes: Sequence[Lane], in_flight: int, seconds: float) -> float:
    """Keep messages of `in_flight` lanes on their way, each lane in its turn, and then wait for the last answers.

    Args:
        connection: theirs.
        lanes: with nothing on its way; `Lane.last` and `Lane.answered` tell afterwards what came.
        in_flight: at most as many as there are lanes.
        seconds: after which nothing more is sent; infinity to send all that the lanes have.

    Returns:
        Frames a second, over the time until the last answer came.
    """
    now, receive = time.perf_counter, connection.receive
    waiting = deque(sorted(lanes, key=lambda lane: lane.sent))  # goes on where it ended the last time
    first = lanes[0].number
    frames = 0
    start = now()
    deadline = start + seconds
    for _ in range(in_flight):
        waiting.popleft().send(connection)
    flying = in_flight
    while flying:
        request, y = receive()
        lane = lanes[request - 1 - first]
        lane.last = y
        lane.answered += 1
        frames += lane.frames
        if not lane.is_done:
            waiting.append(lane)
        if waiting and now() < deadline:
            waiting.popleft().send(connection)
        else:
            flying -= 1
    return frames / (now() - start)


def round_trips(connection: Connection, lane: Lane, seconds: float) -> F64:
    """Send one message after the other, each when the last is answered: seconds that each took."""
    now, receive = time.perf_counter, connection.receive
    times = []
    deadline = now() + seconds
    while (began := now()) < deadline:
        lane.send(connection)
        _, lane.last = receive()
        times.append(now() - began)
        lane.answered += 1
    return np.array(times)


def open_loop(connection: Connection, lanes: Sequence[Lane], rate_hz: float, seconds: float) -> F64:
    """Send a message of every lane `rate_hz` times a second, one lane after the other at equal distances.

    Args:
        connection: theirs.
        lanes: of one stream each, numbered from 0.
        rate_hz: messages of one lane a second.
        seconds: for how long.

    Returns:
        Seconds from when each message was due until its answer was here.
    """
    now, receive = time.perf_counter, connection.receive
    fd = int(connection.socket.get(zmq.FD))
    count = max(1, round(seconds * rate_hz)) * len(lanes)
    between = 1 / (rate_hz * len(lanes))
    latencies = np.zeros(count)
    sent = answered = 0
    start = now() + between
    with waking_on_time():
        while True:
            # Receiving after every send: ZeroMQ signals an arrival once, and a send may take the signal.
            while connection.is_readable:
                request, y = receive()
                lane = lanes[(request - 1) % len(lanes)]
                lane.last = y
                lane.answered += 1
                latencies[request - 1] = now() - (start + (request - 1) * between)
                answered += 1
            if answered == count:
                return latencies
            lane = lanes[sent % len(lanes)]
            may_send = sent < count and lane.sent - lane.answered < MOST_BEHIND
            wait_s = start + sent * between - now() if may_send else 1.0
            if wait_s > 0:
                _wait(fd, wait_s)
            else:
                lane.send_also(connection, sent + 1)
                sent += 1


@contextmanager
def waking_on_time() -> Iterator[None]:
    """Within, this thread's sleeps end when they are to: by default Linux lets each last 50 µs longer."""
    if sys.platform != "linux":
        yield
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)  # nanoseconds; it is no loss where that is refused
    try:
        yield
    finally:
        prctl(_PR_SET_TIMERSLACK, 0, 0, 0, 0)  # back to what the thread began with


def _wait(fd: int, seconds: float) -> None:
    """Until ZeroMQ signals something or the time is up; its own poll knows whole milliseconds only."""
    select.select([fd], [], [], seconds)
