"""The producers: each streams one recording at its own speed, and listens to the answers while it sends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from instep.core.typing import F32
from instep.demo.heard import Heard
from instep.demo.timetable import Part
from instep.server.open_files import allow_open_files
from instep_client import AsyncClient, AsyncStream

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
    """One connection for each producer if this process may open so many files; fewer, to be shared, if not.

    Raises this process's soft limit of open files as far as is needed and allowed.
    """
    return connections_within(allow_open_files(producers * DESCRIPTORS_A_CONNECTION + DESCRIPTORS_BESIDE), producers)


def connections_within(descriptors: int, producers: int) -> int:
    """How many connections, at most one a producer, a process may have that may open so many files."""
    return max(1, min(producers, (descriptors - DESCRIPTORS_BESIDE) // DESCRIPTORS_A_CONNECTION))


async def stream_all(endpoint: str, producers: Sequence[Producer], connections: int, heard: Heard) -> float:
    """Stream all recordings at once, from a common start, and close the streams.

    Args:
        endpoint: where the server is.
        producers: everybody.
        connections: how many there are; producers share them in turn.
        heard: filled while it goes; its rows are the producers.

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
