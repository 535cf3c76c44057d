"""Clients that are killed, stopped, or never read: the others are served on, every bit of theirs as ever."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from pathlib import Path
from typing import cast

import msgpack
import numpy as np
import psutil
import pytest
import zmq

from instep.models.folder import write_model
from instep.server import assembly
from instep_client.protocol.wire import PROTOCOL_VERSION, Kind
from tests.support.models import SMALL, plain
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.served import WarmServer
from tests.support.traffic import neighbours
from tests.support.warm import WarmProcess

NEIGHBOURS = 4
SMALLER = """
from instep.__main__ import main
from instep.frontends.zmq import router
from instep.server import assembly

assembly.UNREACHABLE_AFTER_S = 3.0
router.HIGH_WATER_MARK = 16
main()
"""
"""`instep`, which gives up early, and in which few messages wait for a connection."""


class SmallServer(WarmServer):
    def _begin(self) -> subprocess.Popen[str]:
        program = Path(self._arguments[1]).parent / "smaller.py"
        program.write_text(SMALLER)
        return cast("subprocess.Popen[str]", WarmProcess(self._arguments, program=str(program)))


LIMITS = {"park_s": 0, "window_frames": 128}
"""Streams of a client that is given up are closed at once, and rude ones have room for what they send ahead."""
RUDE_STREAMS = 40
MEBIBYTE = 2**20

WIDE = plain(1, 512)
"""Answers of this model are 512 times as large as what is sent."""


@contextlib.asynccontextmanager
async def rude_client(endpoint: str, features: int, behaviour: str) -> AsyncIterator[Process]:
    """A client in a process of its own, under way; killed on leaving, whatever has become of it."""
    script = Path(__file__).with_name("rude_client.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(script), endpoint, str(features), behaviour, stdout=PIPE
    )
    try:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"under way\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_client_that_is_killed_or_stopped_leaves_the_others_alone(how: signal.Signals) -> None:
    async with running(SMALL, transport={"heartbeat_s": 0.2}, limits=LIMITS) as server:
        table = server.default.engine.table
        async with neighbours(server.endpoint, SMALL, NEIGHBOURS) as others:
            async with rude_client(server.endpoint, SMALL.description.features, "reads") as rude:
                assert table.open_count == NEIGHBOURS + RUDE_STREAMS
                await others.progress()
                rude.send_signal(how)
                await others.progress(100)
                # ZeroMQ tells of a process that died, not of one that was stopped.
                while how is signal.SIGKILL and table.open_count > NEIGHBOURS:
                    await asyncio.sleep(0.02)
            await others.progress(100)


async def test_a_client_that_is_stopped_while_its_connection_looks_alive_is_given_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no heartbeat to fail, only its unread answers tell."""
    monkeypatch.setattr(assembly, "UNREACHABLE_AFTER_S", 0.5)
    transport = {"max_message_bytes": 65_536, "heartbeat_s": 1000}
    async with running(SMALL, transport=transport, limits=LIMITS) as server:
        async with neighbours(server.endpoint, SMALL, NEIGHBOURS) as others:
            async with rude_client(server.endpoint, SMALL.description.features, "never-reads"):
                await others.progress()
                while server.default.engine.table.open_count > NEIGHBOURS:
                    await asyncio.sleep(0.02)
                await others.progress(100)


async def test_a_flood_that_nobody_reads_takes_bounded_memory(tmp_path: Path) -> None:
    """Answers of ten times the bound would be waiting, were they kept."""
    write_model(tmp_path / "model", WIDE)
    # Few streams, because the first frames of a stream make pages of its ring real.
    arguments = ["engine.max_streams=64", "limits.park_s=0"]
    arguments.append("transport.max_message_bytes=1048576")
    with SmallServer(tmp_path / "model", [part for each in arguments for part in ("--set", each)]) as server:
        process = psutil.Process(server.pid)
        async with neighbours(server.endpoint, WIDE, NEIGHBOURS) as others:
            before = process.memory_info().rss
            async with rude_client(server.endpoint, 1, "floods"):
                growth = 0
                while await streams_open(server.endpoint) > NEIGHBOURS:
                    growth = max(growth, process.memory_info().rss - before)
                    await asyncio.sleep(0.02)
                await others.progress()
                growth = max(growth, process.memory_info().rss - before)
    # 2 MiB that ZeroMQ holds, 4 MiB that wait beside them, and what their handling takes.
    assert growth < 40 * MEBIBYTE, growth


@pytest.mark.parametrize("kind", [Kind.OPEN, Kind.CLOSE])
async def test_a_flood_of_the_largest_messages_takes_bounded_memory(tmp_path: Path, kind: Kind) -> None:
    write_model(tmp_path / "model", SMALL)
    arguments = ["transport.max_message_bytes=1048576"]
    with SmallServer(tmp_path / "model", [part for each in arguments for part in ("--set", each)]) as server:
        process = psutil.Process(server.pid)
        async with neighbours(server.endpoint, SMALL, NEIGHBOURS) as others:
            before = process.memory_info().rss
            flood = asyncio.create_task(asyncio.to_thread(flood_with_columns, server.endpoint, kind))
            growth = 0
            while not flood.done():
                growth = max(growth, process.memory_info().rss - before)
                await asyncio.sleep(0.01)
            await flood
            await others.progress()
            growth = max(growth, process.memory_info().rss - before)
    assert growth < 50 * MEBIBYTE, growth


def flood_with_columns(endpoint: str, kind: Kind, messages: int = 150, columns: int = 32_000) -> None:
    """Open, or close, as many streams as a message can name, again and again; none of them exists."""
    frames = {
        Kind.OPEN: ["\n".join(f"n{index}" for index in range(columns)).encode(), b"", b""],
        Kind.CLOSE: [np.arange(1, 2 * columns + 1, dtype="<u8").tobytes()],
    }[kind]
    fields = {Kind.OPEN: [columns, 0, 0], Kind.CLOSE: [columns]}[kind]
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, 2)
        socket.connect(endpoint)
        socket.send(msgpack.packb([Kind.HELLO, 1, PROTOCOL_VERSION, "flood", ""]))
        for request in range(2, 2 + messages):
            socket.send_multipart([msgpack.packb([kind, request, *fields]), *frames])


async def streams_open(endpoint: str) -> float:
    async with RawClient(endpoint) as client:
        await client.hello()
        return (await client.statistics())["streams_open"]
