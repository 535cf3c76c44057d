"""docs/minimal_client.py against a running server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32
from instep.frontends.shards import Shard
from instep.models.model import Model
from instep.server.server import Server
from instep_client.protocol.wire import Code, ShardTable
from tests.docs.support.page import DOCS
from tests.docs.support.protocol_examples import SEED
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import plain, whole
from tests.support.raw import RawClient
from tests.support.relay import Link, Relay
from tests.support.running import running


class BreakingRelay(Relay):
    """A connection breaks when the server has sent something and the first of `breaks` is true: that is lost."""

    def __init__(self, target: str, *breaks: Callable[[], bool]) -> None:
        super().__init__(target)
        self.breaks = list(breaks)

    async def forward(self, chunk: bytes, sink: asyncio.StreamWriter, link: Link) -> None:
        if sink is link.near and self.breaks and self.breaks[0]():
            del self.breaks[0]
            link.cut()
        else:
            await super().forward(chunk, sink, link)


async def start(endpoint: str, count: int) -> Process:
    script = str(DOCS / "minimal_client.py")
    return await asyncio.create_subprocess_exec(
        sys.executable, script, endpoint, str(count), stdin=PIPE, stdout=PIPE, stderr=PIPE
    )


async def feed(process: Process, x: F32) -> tuple[int | None, bytes, str]:
    """Exit status, standard output and standard error."""
    said, complained = await process.communicate(x.tobytes())
    return process.returncode, said, complained.decode()


async def test_it_loses_and_doubles_nothing_when_its_connection_breaks(rng: np.random.Generator) -> None:
    model = plain(5, 8, layers=2)
    x = rng.standard_normal((30, 3, 5)).astype(np.float32)
    async with running(model) as server:
        counted = server.default.engine.stats
        breaks = (
            lambda: counted.frames_total >= 5 * 3,  # a STEPPED is lost,
            lambda: counted.resumed_streams_total >= 3,  # the RESUMED after it,
            lambda: counted.frames_total >= 20 * 3,  # and another STEPPED
        )
        async with BreakingRelay(server.endpoint, *breaks) as proxy:
            status, said, complained = await feed(await start(proxy.endpoint, 3), x)
        assert (status, complained, proxy.breaks) == (0, "", [])
        assert (counted.frames_total, counted.resumed_streams_total) == (30 * 3, 3 * 3)
        assert server.default.engine.table.open_count == 0
    check(said, model, x)


def check(said: bytes, model: Model, x: F32) -> None:
    """Outputs [T, N, 8] and states [N, 2, 8] are those of the network over each whole stream."""
    timesteps, streams, _ = x.shape
    values = np.frombuffer(said, "<f4")
    y, states = np.split(values, [timesteps * streams * 8])
    for column in range(streams):
        truth, final = whole(model, x[:, column])
        np.testing.assert_array_equal(y.reshape(timesteps, streams, 8)[:, column], truth)
        np.testing.assert_array_equal(states.reshape(streams, 2, 8)[column], final)


def know(server: Server, term: int, *servers: Server) -> None:
    """Tell a server of the shards 0, 1 and 2; shard 1 has this term, and the others 4."""
    endpoints = tuple(each.endpoint.replace("127.0.0.1", "*") for each in servers)
    server.models.shard.table = ShardTable(np.array([4, term, 4], np.uint64), endpoints)


async def test_it_follows_a_shard_to_another_server(rng: np.random.Generator, tmp_path: Path) -> None:
    model, recording = plain(5, 8, layers=2), {"path": tmp_path / "moving.instep"}
    x = rng.standard_normal((30, 6, 5)).astype(np.float32)
    async with running(model, shard=Shard(0, 3, 4)) as here, running(model, shard=Shard(2, 3, 4)) as idle:
        async with running(model, shard=Shard(1, 3, 4), recording=recording) as former:
            know(here, 4, here, former, idle)
            process = await start(here.endpoint, 6)
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(x[:10].tobytes())
            begun = await process.stdout.readexactly(10 * 6 * 8 * 4)
        async with running(model, shard=Shard(1, 3, 5), recording=recording) as latter:
            know(here, 5, here, latter, idle)
            status, rest, complained = await feed(process, x[10:])
        steps = [server.default.engine.stats.frames_total for server in (here, former, latter, idle)]
    assert (status, complained) == (0, "")
    assert steps == [30 * 2, 10 * 3, 20 * 3, 30]  # of `minimal-0` to `-5`, 2 and 4 belong to shard 0 and 1 to shard 2
    check(begun + rest, model, x)


async def test_it_waits_while_the_server_is_busy(rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 1, 3)).astype(np.float32)
    gate = Gate()
    limits = {"max_block_frames": 4, "credit_frames": 4, "max_pending_frames": 4}
    async with running(SEED, stepper=gate.stepper, limits=limits) as server, RawClient(server.endpoint) as other:
        await other.hello()
        handles = (await other.open("other")).handles()
        process = await start(server.endpoint, 1)
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


async def test_it_waits_for_the_next_server_while_one_drains(rng: np.random.Generator, tmp_path: Path) -> None:
    x, recording, gate = rng.standard_normal((5, 1, 3)).astype(np.float32), {"path": tmp_path / "seed.instep"}, Gate()
    async with contextlib.AsyncExitStack() as stack:
        async with running(SEED, stepper=gate.stepper, recording=recording) as server:
            relay = await stack.enter_async_context(Relay(server.endpoint))
            other = await stack.enter_async_context(RawClient(server.endpoint))
            await other.hello()
            handles = (await other.open("other")).handles()
            process = await start(relay.endpoint, 1)
            while server.default.engine.table.open_count < 2:
                await asyncio.sleep(0.005)
            await other.send(*other.step_message(handles, [0], np.full((1, 1, 3), GATE_VALUE, np.float32)))
            while server.default.engine.pending_frames < 1:
                await asyncio.sleep(0.005)
            server.stop()  # it drains until the gate opens
            fed = asyncio.create_task(feed(process, x))
            try:
                while Code.SHUTTING_DOWN not in server.default.engine.stats.refusals() and not fed.done():
                    await asyncio.sleep(0.005)
            finally:
                gate.open()
        async with running(SEED, recording=recording) as latter:
            relay.target = latter.endpoint
            status, said, complained = await fed
    assert (status, complained) == (0, "")
    truth, final = whole(SEED, x[:, 0])
    np.testing.assert_array_equal(np.frombuffer(said, "<f4"), np.concatenate([truth.ravel(), final.ravel()]))


@pytest.mark.parametrize(("is_known", "code"), [(False, 103), (True, 110)], ids=["UNKNOWN_STREAM", "DATA_LOSS"])
async def test_it_stops_when_a_restarted_server_lost_its_streams(is_known: bool, code: int) -> None:
    x = np.zeros((8, 1, 3), np.float32)
    async with running(SEED) as server, running(SEED) as restarted, RawClient(restarted.endpoint) as former:
        if is_known:
            restarted.default.engine.table.last_epoch = 0
            await former.hello()
            await former.open("minimal-0")
        async with BreakingRelay(server.endpoint, lambda: server.default.engine.stats.frames_total >= 5) as proxy:
            process = await start(proxy.endpoint, 1)
            while server.default.engine.table.open_count == 0:
                await asyncio.sleep(0.005)
            proxy.target = restarted.endpoint
            status, said, complained = await feed(process, x)
    assert (status, len(said)) == (1, 4 * 4 * 4)
    assert f"code {code}," in complained
