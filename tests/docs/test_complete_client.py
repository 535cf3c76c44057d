"""The complete client of docs/protocol.md against a running server."""

from __future__ import annotations

import ast
import asyncio
import struct
import sys
from asyncio.subprocess import Process
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32
from tests.docs.support.protocol_examples import PAGE, SEED
from tests.docs.support.proxy import Proxy
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import plain, whole
from tests.support.raw import RawClient
from tests.support.running import running


@pytest.fixture
def script(tmp_path: Path) -> Path:
    ((_, text),) = PAGE.blocks("python")
    path = tmp_path / "minimal.py"
    path.write_text(text, encoding="utf-8")
    return path


async def start(script: Path, endpoint: str, count: int) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        endpoint,
        str(count),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def feed(process: Process, x: F32) -> tuple[int | None, bytes, str]:
    """Exit status, standard output and standard error."""
    said, complained = await process.communicate(x.tobytes())
    return process.returncode, said, complained.decode()


def test_the_complete_client_needs_neither_numpy_nor_instep(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"msgpack", "struct", "sys", "time", "zmq"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


async def test_the_complete_client_gets_what_the_gru_computes(script: Path, rng: np.random.Generator) -> None:
    model = plain(5, 8, layers=2)
    x = rng.standard_normal((40, 3, 5)).astype(np.float32)
    async with running(model) as server:
        status, said, complained = await feed(await start(script, server.endpoint, 3), x)
        assert (status, complained) == (0, "")
        assert server.default.engine.table.open_count == 0
    values = np.frombuffer(said, "<f4")
    y, states = values[: 40 * 3 * 8].reshape(40, 3, 8), values[40 * 3 * 8 :].reshape(3, 2, 8)
    for column in range(3):
        truth, final = whole(model, x[:, column])
        np.testing.assert_array_equal(y[:, column], truth)
        np.testing.assert_array_equal(states[column], final)


async def test_the_complete_client_waits_while_the_server_is_busy(script: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 1, 3)).astype(np.float32)
    gate = Gate()
    limits = {"max_block_frames": 4, "credit_frames": 4, "max_pending_frames": 4}
    async with running(SEED, stepper=gate.stepper, limits=limits) as server, RawClient(server.endpoint) as other:
        await other.hello()
        handles = (await other.open("other")).handles()
        process = await start(script, server.endpoint, 1)
        while server.default.engine.table.open_count < 2:  # it has opened its stream, and waits for frames to send
            await asyncio.sleep(0.005)
        await other.send(*other.step_message(handles, [0], np.full((4, 1, 3), GATE_VALUE, np.float32)))
        while server.default.engine.pending_frames < 4:
            await asyncio.sleep(0.005)
        fed = asyncio.create_task(feed(process, x))
        try:
            while server.default.engine.stats.busy_total < 3 and not fed.done():
                await asyncio.sleep(0.005)
        finally:
            gate.open()
        status, said, complained = await fed
        assert server.default.engine.stats.busy_total >= 3
    assert (status, complained) == (0, "")
    truth, final = whole(SEED, x[:, 0])
    np.testing.assert_array_equal(np.frombuffer(said, "<f4"), np.concatenate([truth.ravel(), final.ravel()]))


async def test_the_complete_client_tells_what_was_refused(script: Path) -> None:
    x = np.zeros((2, 2, 3), np.float32)
    x[1, 1, 0] = np.nan
    async with running(SEED) as server:
        status, said, complained = await feed(await start(script, server.endpoint, 2), x)
    assert status == 1
    assert complained == "column 1, timestep 0: code 100, expected seq 1\n"
    assert len(said) == struct.calcsize("<8f")


async def test_the_complete_client_loses_and_doubles_nothing_when_its_connection_breaks(
    script: Path, rng: np.random.Generator
) -> None:
    model = plain(5, 8, layers=2)
    x = rng.standard_normal((30, 3, 5)).astype(np.float32)
    async with running(model) as server:
        counted = server.default.engine.stats
        breaks = (
            lambda: counted.frames_total >= 5 * 3,  # a STEPPED is lost,
            lambda: counted.resumed_streams_total >= 3,  # the RESUMED after it,
            lambda: counted.frames_total >= 20 * 3,  # and another STEPPED
        )
        async with Proxy(server.endpoint, *breaks) as proxy:
            status, said, complained = await feed(await start(script, proxy.endpoint, 3), x)
        assert (status, complained, proxy.breaks) == (0, "", [])
        assert (counted.frames_total, counted.resumed_streams_total) == (30 * 3, 3 * 3)
        assert server.default.engine.table.open_count == 0
    values = np.frombuffer(said, "<f4")
    y, states = values[: 30 * 3 * 8].reshape(30, 3, 8), values[30 * 3 * 8 :].reshape(3, 2, 8)
    for column in range(3):
        truth, final = whole(model, x[:, column])
        np.testing.assert_array_equal(y[:, column], truth)
        np.testing.assert_array_equal(states[column], final)


@pytest.mark.parametrize(
    ("is_known", "sentence"),
    [
        (False, "column 0, timestep 0: code 103, expected seq 0\n"),  # UNKNOWN_STREAM
        (True, "column 0, timestep 0: code 110, expected seq 0\n"),  # DATA_LOSS
    ],
)
async def test_the_complete_client_says_that_a_restarted_server_lost_its_streams(
    script: Path, is_known: bool, sentence: str
) -> None:
    x = np.zeros((8, 1, 3), np.float32)
    async with running(SEED) as server, running(SEED) as restarted, RawClient(restarted.endpoint) as former:
        if is_known:
            restarted.default.engine.table.last_epoch = 0
            await former.hello()
            await former.open("minimal-0")
        async with Proxy(server.endpoint, lambda: server.default.engine.stats.frames_total >= 5) as proxy:
            process = await start(script, proxy.endpoint, 1)
            while server.default.engine.table.open_count == 0:
                await asyncio.sleep(0.005)
            proxy.target = restarted.endpoint
            status, said, complained = await feed(process, x)
    assert (status, complained) == (1, sentence)
    assert len(said) == 4 * struct.calcsize("<4f")
