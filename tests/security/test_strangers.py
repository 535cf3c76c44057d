"""What strangers do to a server with keys: very many connections, claimed routing ids, half a handshake."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

import numpy as np
import psutil
import pytest

from instep.models.folder import write_model
from instep.security.authenticator import MAX_FILES, MAX_STRANGERS
from tests.support.keys import KeyRing
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.served import serving
from tests.support.streaming import random_frames

H = 8
AT_ONCE = 500
MOST_BYTES = 64 * 2**20


def greeting(mechanism: bytes) -> bytes:
    """The first 64 bytes of ZMTP 3.1."""
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


def said_by(number: int) -> bytes:
    """Nothing, half a handshake with CURVE, or a claim of a routing id of those that ZeroMQ gives out itself."""
    if number % 7 < 2:
        return b""
    return greeting(b"CURVE") if number % 7 < 4 else greeting(b"NULL") + ready(number * 286_331 % 2**32)


def ready(routing_id: int) -> bytes:
    """The other half of a handshake without keys, by a client that calls itself this."""
    properties = {b"Socket-Type": b"DEALER", b"Identity": b"\0" + struct.pack(">I", routing_id)}
    body = b"\x05READY"
    for name, value in properties.items():
        body += struct.pack(">B", len(name)) + name + struct.pack(">I", len(value)) + value
    return struct.pack(">BB", 4, len(body)) + body


async def keep_open(port: int, first: bytes, opened: asyncio.Semaphore) -> None:
    """One connection, until the server ends it."""
    async with opened:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(first)
    with contextlib.suppress(OSError, UnboundLocalError), contextlib.closing(writer):
        while await reader.read(4096):
            pass


@pytest.mark.parametrize("count", [3000, pytest.param(35_000, marks=pytest.mark.long)])
async def test_very_many_connections_cost_a_bounded_memory_and_nobody_s_frames(
    tmp_path: Path, rng: np.random.Generator, count: int
) -> None:
    """In the long test 20,000 take up connections and 15,000 claim routing ids; either ends a server without keys."""
    write_model(tmp_path / "model", SMALL)
    ring = KeyRing(tmp_path, mic={})
    x = random_frames(rng, 1000)
    with serving(tmp_path / "model", *ring.arguments) as served:
        endpoint = served.until("serving")["endpoint"]
        port, process = int(endpoint.rpartition(":")[2]), psutil.Process(served.process.pid)
        async with RawClient(endpoint, curve=ring.curve("mic")) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            outputs, before = [(await client.step(handles, [0], x[:1])).floats()], process.memory_info().rss
            opened = asyncio.Semaphore(AT_ONCE)
            strangers = [asyncio.create_task(keep_open(port, said_by(each), opened)) for each in range(count)]
            most_bytes = most_files = 0
            while sum(task.done() for task in strangers) < count - MAX_STRANGERS and len(outputs) < len(x):
                seq = len(outputs)
                outputs.append((await client.step(handles, [seq], x[seq : seq + 1], [seq])).floats())
                most_bytes, most_files = max(most_bytes, process.memory_info().rss), max(most_files, process.num_fds())
                await asyncio.sleep(count / 10**6)
            for _ in range(20):
                async with RawClient(endpoint, curve=ring.curve("mic")) as other:
                    await other.hello()
            for task in strangers:
                task.cancel()
            await asyncio.gather(*strangers, return_exceptions=True)
        assert most_bytes - before < MOST_BYTES
        assert most_files < MAX_FILES + 100
    np.testing.assert_array_equal(np.stack(outputs), whole(SMALL, x[: len(outputs), 0])[0])
