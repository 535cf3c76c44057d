"""The producers: each streams one recording at its own speed, and listens to the answers while it sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I32, I64, Bool
from instep.server.open_files import allow_open_files
from instep_client import AsyncClient, AsyncStream


class Heard:
    """Outputs so far, a row for each recording; producers fill it, anybody may look.

    Args:
        lengths: frames of each recording.
        outputs: values of an output.

    Attributes:
        lengths: int64 [recordings].
        outputs: one float32 [T, speakers] a recording, NaN where nothing came yet.
        latency_s: one float64 [T] a recording: from when a frame was due to be sent until its output was there.
        answered: int64 [recordings]: how many frames came back.
    """

    def __init__(self, lengths: Sequence[int], outputs: int) -> None:
        self.lengths: I64 = np.array(lengths, np.int64)
        self.outputs: list[F32] = [np.full((length, outputs), np.nan, np.float32) for length in lengths]
        self.latency_s: list[F64] = [np.full(length, np.nan) for length in lengths]
        self.answered: I64 = np.zeros(len(lengths), np.int64)
        self._decisions: I64 = np.full(len(lengths), -1, np.int64)

    def add(self, row: int, y: F32, latency_s: F64) -> None:
        """The next frames of a recording came back: y [T, speakers], latency_s [T]."""
        first = int(self.answered[row])
        last = first + len(y)
        self.outputs[row][first:last] = y
        self.latency_s[row][first:last] = latency_s
        self.answered[row] = last
        self._decisions[row] = y[-1].argmax()

    @property
    def frames(self) -> int:
        """Frames that came back."""
        return int(self.answered.sum())

    @property
    def finished(self) -> int:
        """Recordings whose frames have all come back."""
        return int((self.answered == self.lengths).sum())

    def accuracy_now(self, speakers: I32) -> float:
        """Of the recordings heard at all, the share whose newest decision is right; 0 before the first."""
        begun = self.answered > 0
        return float((self._decisions == speakers)[begun].mean()) if begun.any() else 0.0


def right_after(outputs: Sequence[F32], speakers: I32) -> Bool:
    """Whether the decision is right after each number of frames.

    `outputs` holds one [T, speakers] a recording; `speakers` are the true ones, int32 [recordings].

    Returns:
        bool [recordings, longest T]; column k is after k + 1 frames. A recording that is shorter counts with the
        decision at its end.
    """
    longest = max(len(each) for each in outputs)
    decisions = [each.argmax(axis=1) for each in outputs]
    padded = np.array([np.pad(each, (0, longest - len(each)), mode="edge") for each in decisions])
    right: Bool = padded == speakers[:, None]
    return right


def probabilities(outputs: F32) -> F32:
    """Softmax over the last axis."""
    raised = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    shares: F32 = raised / raised.sum(axis=-1, keepdims=True)
    return shares


F64: TypeAlias = npt.NDArray[np.float64]

FASTEST_S: Final = 0.005
SLOWEST_S: Final = 0.25
"""The fastest producer has a frame every `FASTEST_S` seconds, the slowest every `SLOWEST_S`."""
WINDOW_S: Final = 7.0
"""Producers start when they will be done about then."""
BURSTY_SHARE: Final = 0.2
BURST_FRAMES: Final = 4
"""A bursty producer collects this many frames, as sound cards do, and sends them as one chunk."""
_SEED: Final = 370


@dataclass(frozen=True, eq=False)
class Part:
    """The work of one producer."""

    due_s: F64
    """float64 [T]: when each frame is due to be sent, in seconds after the common start; never decreasing."""
    chunk: int
    """So many frames are due, and sent, at once; the last chunk may be shorter."""


def timetable(lengths: Sequence[int], speed: float = 1.0) -> list[Part]:
    """The parts of all producers, the same each time.

    `lengths` are the frames of each producer's recording; with `speed` 2 everything is twice as fast.
    """
    random = np.random.default_rng(_SEED)
    count = len(lengths)
    periods_s = random.permutation(np.linspace(FASTEST_S, SLOWEST_S, count))
    is_bursty = random.permutation(np.arange(count) < round(BURSTY_SHARE * count))
    parts = []
    for length, period_s, bursty in zip(lengths, periods_s, is_bursty, strict=True):
        chunk = BURST_FRAMES if bursty else 1
        at = np.arange(length)
        # A chunk goes when its last frame is there.
        sent_at = np.minimum(at // chunk * chunk + chunk - 1, length - 1)
        start_s = random.uniform(0.0, max(0.0, WINDOW_S - length * period_s))
        parts.append(Part(due_s=(start_s + sent_at * period_s) / speed, chunk=chunk))
    return parts


DESCRIPTORS_A_CONNECTION: Final = 2
"""ZeroMQ's socket, and what wakes the event loop for it."""
DESCRIPTORS_BESIDE: Final = 150


@dataclass(frozen=True, eq=False)
class Producer:
    """Who sends what, and when."""

    name: str
    """Of its stream."""
    frames: F32
    """float32 [T, features]."""
    part: Part


def connections_for(producers: int) -> int:
    """One connection for each producer, or fewer to be shared where this process may not open enough files.

    Raises this process's soft limit of open files as far as is needed and allowed.
    """
    return connections_within(allow_open_files(producers * DESCRIPTORS_A_CONNECTION + DESCRIPTORS_BESIDE), producers)


def connections_within(descriptors: int, producers: int) -> int:
    """How many connections, at most one a producer, fit into this number of file descriptors."""
    return max(1, min(producers, (descriptors - DESCRIPTORS_BESIDE) // DESCRIPTORS_A_CONNECTION))


async def stream_all(endpoint: str, producers: Sequence[Producer], connections: int, heard: Heard) -> float:
    """Stream all recordings at once, from a common start, and close the streams.

    Producers share the connections in turn. `heard` is filled while it goes; its rows are the producers.

    Returns:
        The seconds from the start to the last answer.

    Raises:
        InstepError: when the server refuses or goes away.
    """
    clients = [AsyncClient(endpoint, f"producer-{number + 1}") for number in range(connections)]
    try:
        await asyncio.gather(*(client.connect() for client in clients))
        streams = await asyncio.gather(
            *(clients[row % connections].open(producer.name) for row, producer in enumerate(producers))
        )
        start_s = time.monotonic()
        work = []
        for row, (producer, stream) in enumerate(zip(producers, streams, strict=True)):
            work += [_send(producer, stream, start_s), _listen(producer, stream, start_s, heard, row)]
        await asyncio.gather(*work)
        seconds = time.monotonic() - start_s
        await asyncio.gather(*(stream.close() for stream in streams))
        return seconds
    finally:
        await asyncio.gather(*(client.close() for client in clients))


async def _send(producer: Producer, stream: AsyncStream, start_s: float) -> None:
    chunk, due_s = producer.part.chunk, producer.part.due_s
    for first in range(0, len(due_s), chunk):
        await asyncio.sleep(start_s + float(due_s[first]) - time.monotonic())
        await stream.send(producer.frames[first : first + chunk])
    stream.finish()


async def _listen(producer: Producer, stream: AsyncStream, start_s: float, heard: Heard, row: int) -> None:
    first = 0
    async for y in stream:
        last = first + len(y)
        heard.add(row, y, time.monotonic() - start_s - producer.part.due_s[first:last])
        first = last
