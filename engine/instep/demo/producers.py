"""The producers: each streams one recording at its own speed, and receives answers while it sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I32, I64, Bool
from instep_client import AsyncClient, AsyncStream

F64: TypeAlias = npt.NDArray[np.float64]

TEST: Final = Path(__file__).parent / "data" / "japanese_vowels_test.npz"
"""The recordings that ship with the package; the model was not trained with them."""
SPEAKERS: Final = 9

FASTEST_S: Final = 0.005
SLOWEST_S: Final = 0.25
"""Seconds between frames of the slowest producer; `FASTEST_S` for the fastest one."""
WINDOW_S: Final = 7.0
"""Producers start so that they end at about the end of this window."""
BURSTY_SHARE: Final = 0.2
BURST_FRAMES: Final = 4
"""A bursty producer collects this many frames, as sound cards do, and sends them as one chunk."""
_SEED: Final = 370


@dataclass(frozen=True, eq=False)
class Utterances:
    """Recordings and their speakers."""

    frames: tuple[F32, ...]
    """An array [T, 12] for each utterance."""
    speakers: I32
    """A number from 0 to 8 for each utterance."""


def load_utterances(path: Path = TEST) -> Utterances:
    """Load the utterances of a file, which the README next to it describes."""
    with np.load(path, allow_pickle=False) as arrays:
        frames = np.split(arrays["frames"], np.cumsum(arrays["lengths"])[:-1])
        return Utterances(tuple(frames), arrays["speaker"])


@dataclass(frozen=True, eq=False)
class Producer:
    """One recording and the times at which its frames are sent."""

    name: str
    frames: F32
    """float32 [T, features]."""
    due_s: F64
    """float64 [T]: the time at which each frame is due, in seconds after the common start; never decreasing."""
    chunk: int
    """The number of frames that are due, and sent, together; the last chunk may be shorter."""


def make_producers(recordings: Sequence[F32], speed: float = 1.0) -> list[Producer]:
    """One producer for each recording, the same each time; `speed` 2 halves all times."""
    random = np.random.default_rng(_SEED)
    count = len(recordings)
    periods_s = random.permutation(np.linspace(FASTEST_S, SLOWEST_S, count))
    is_bursty = random.permutation(np.arange(count) < round(BURSTY_SHARE * count))
    producers = []
    for number, (frames, period_s, bursty) in enumerate(zip(recordings, periods_s, is_bursty, strict=True), start=1):
        chunk = BURST_FRAMES if bursty else 1
        at = np.arange(len(frames))
        # A chunk goes when its last frame is there.
        sent_at = np.minimum(at // chunk * chunk + chunk - 1, len(frames) - 1)
        start_s = random.uniform(0.0, max(0.0, WINDOW_S - len(frames) * period_s))
        producers.append(Producer(f"utterance-{number}", frames, (start_s + sent_at * period_s) / speed, chunk))
    return producers


class Heard:
    """The outputs so far, with one entry for each producer, which the producers fill.

    Attributes:
        outputs: float32 [T, outputs] each, NaN until an output has arrived.
        latency_s: float64 [T] each, from the time at which a frame was due to the arrival of its output.
        answered: int64 [producers], the numbers of answered frames.
    """

    def __init__(self, producers: Sequence[Producer], outputs: int) -> None:
        self.lengths: I64 = np.array([len(producer.frames) for producer in producers])
        self.outputs: list[F32] = [np.full((length, outputs), np.nan, np.float32) for length in self.lengths]
        self.latency_s: list[F64] = [np.full(length, np.nan) for length in self.lengths]
        self.answered: I64 = np.zeros(len(producers), np.int64)

    @property
    def frames(self) -> int:
        """The number of frames of all producers, answered or not."""
        return int(self.lengths.sum())

    def add(self, row: int, y: F32, latency_s: F64) -> None:
        """Add answers to a producer's next frames: y [T, outputs], latency_s [T]."""
        first, last = int(self.answered[row]), int(self.answered[row]) + len(y)
        self.outputs[row][first:last] = y
        self.latency_s[row][first:last] = latency_s
        self.answered[row] = last


def right_after(outputs: Sequence[F32], speakers: I32) -> Bool:
    """Whether the decision is right after each number of frames.

    `outputs` has one [T, speakers] per recording; `speakers` are the true ones, int32 [recordings].

    Returns:
        bool [recordings, longest T]; column k is after k + 1 frames. A shorter recording counts with its last decision.
    """
    longest = max(len(each) for each in outputs)
    decisions = [each.argmax(axis=1) for each in outputs]
    padded = np.array([np.pad(each, (0, longest - len(each)), mode="edge") for each in decisions])
    right: Bool = padded == speakers[:, None]
    return right


async def stream_all(endpoint: str, producers: Sequence[Producer], connections: int, heard: Heard) -> float:
    """Stream all recordings at once, from a common start, and close the streams.

    Producers share the connections in turn, and fill `heard` meanwhile.

    Returns:
        The seconds from the start to the last answer.

    Raises:
        InstepError: when the server refuses or goes away.
    """
    clients = [  # without what the environment says of another server
        AsyncClient(endpoint, f"producer-{number + 1}", model="", key_file="", server_key="")
        for number in range(connections)
    ]
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
    for first in range(0, len(producer.frames), producer.chunk):
        await asyncio.sleep(start_s + float(producer.due_s[first]) - time.monotonic())
        await stream.send(producer.frames[first : first + producer.chunk])
    stream.finish()


async def _listen(producer: Producer, stream: AsyncStream, start_s: float, heard: Heard, row: int) -> None:
    first = 0
    async for y in stream:
        last = first + len(y)
        heard.add(row, y, time.monotonic() - start_s - producer.due_s[first:last])
        first = last
