"""Many more streams than the device holds: each goes on exactly where it was, through a crash too, and idle ones are
cheap."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from instep.core.typing import F32, I64, U64
from instep.models.folder import write_model
from instep.server.child import ChildServer
from tests.chaos.victim import Victim
from tests.support.models import SMALL, torch_gru
from tests.support.raw import RawClient, Reply
from tests.support.traffic import assert_same_bits

pytestmark = pytest.mark.long

F, H = 5, 8
STREAMS, DEVICE_STREAMS, HOST_STREAMS = 100_000, 1_000, 5_000
ENGINE = ("--max-streams", str(STREAMS), "--set", f"engine.device_streams={DEVICE_STREAMS}")
BLOCK, BLOCKS = 2_000, 120
MOST_FRAMES = 32
"""Of one stream; a stream that has sent so many is left alone."""
AT_ONCE = 2
"""Blocks that are on their way at once."""
PART = 50_000
"""Names or handles in one message."""

IDLE_STREAMS, WOKEN = 1_000_000, 4_096
MOST_BYTES_PER_IDLE_STREAM = 200
"""Names, handles, bookkeeping: all that a stream costs that has sent nothing."""


class Fleet:
    """All the streams, stepped in blocks of random ones, with everything that was sent and answered."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._names = [f"s{number}" for number in range(STREAMS)]
        self._x = rng.standard_normal((MOST_FRAMES, STREAMS, F), np.float32)
        self._y = np.full((MOST_FRAMES, STREAMS, H), np.nan, np.float32)
        self._handles: U64 = np.zeros(STREAMS, np.uint64)
        self._epochs: U64 = np.zeros(STREAMS, np.uint64)
        self._have: I64 = np.zeros(STREAMS, np.int64)
        self._is_idle = np.ones(STREAMS, np.bool_)
        self._on_their_way: dict[int, tuple[int, I64]] = {}
        """Timesteps and columns of blocks by request; a short block may overtake a long one."""

    @property
    def frames(self) -> int:
        """Frames answered."""
        return int(self._have.sum())

    async def open(self, client: RawClient) -> None:
        for first in range(0, STREAMS, PART):
            self._is_granted(await client.open(*self._names[first : first + PART]), first)

    async def resume(self, client: RawClient) -> None:
        """Claim all streams, and send what was on its way again: whether it was stepped is not known."""
        for first in range(0, STREAMS, PART):
            part = slice(first, first + PART)
            reply = await client.resume(self._names[part], self._have[part].tolist(), self._epochs[part].tolist())
            self._is_granted(reply, first)
            assert (reply.grants()["next_seq"] >= self._have[part]).all()
        blocks, self._on_their_way = self._on_their_way, {}
        for timesteps, columns in blocks.values():
            await self._send(client, timesteps, columns)

    def _is_granted(self, reply: Reply, first: int) -> None:
        assert reply.codes() == []
        grants = reply.grants()
        self._handles[first : first + PART] = grants["handle"]
        self._epochs[first : first + PART] = grants["epoch"]

    async def step(self, client: RawClient, blocks: int) -> None:
        """Send so many blocks, and leave the last few of them without their answers."""
        for _ in range(blocks):
            if len(self._on_their_way) == AT_ONCE:
                await self._answer(client)
            timesteps = int(self._rng.integers(1, 4))
            can = np.flatnonzero(self._is_idle & (self._have <= MOST_FRAMES - timesteps))
            await self._send(client, timesteps, self._rng.choice(can, BLOCK, replace=False))

    async def _send(self, client: RawClient, timesteps: int, columns: I64) -> None:
        seqs = self._have[columns]
        x = self._x[seqs + np.arange(timesteps)[:, None], columns]
        message = client.step_message(self._handles[columns], seqs.tolist(), x, seqs.tolist())
        self._on_their_way[msgpack.unpackb(message[0])[1]] = timesteps, columns
        self._is_idle[columns] = False
        await client.send(*message)

    async def visit(self, client: RawClient) -> None:
        """One frame of every stream, in blocks of random ones."""
        for columns in self._rng.permutation(STREAMS).reshape(-1, BLOCK):
            if len(self._on_their_way) == AT_ONCE:
                await self._answer(client)
            await self._send(client, 1, columns)
        await self.settle(client)

    async def settle(self, client: RawClient) -> None:
        """Wait for the answers."""
        while self._on_their_way:
            await self._answer(client)

    async def _answer(self, client: RawClient) -> None:
        reply = await client.receive()
        timesteps, columns = self._on_their_way.pop(reply.request)
        assert reply.codes() == []
        rows = self._have[columns] + np.arange(timesteps)[:, None]
        self._y[rows, columns] = reply.floats().reshape(timesteps, BLOCK, H)
        self._have[columns] += timesteps
        self._is_idle[columns] = True

    async def compare(self, client: RawClient) -> None:
        """Hold outputs and states, those of streams that were never stepped included, against `nn.GRU`."""
        truth = whole_of_all(self._x)
        answered = np.arange(MOST_FRAMES)[:, None] < self._have
        assert_same_bits(self._y[answered], truth[answered], "outputs")
        truth = np.concatenate([np.zeros((1, STREAMS, H), np.float32), truth])  # a GRU's output is its state
        for first in range(0, STREAMS, PART):
            part = slice(first, first + PART)
            reply = await client.close(self._handles[part])
            assert reply.codes() == []
            final = truth[self._have[part], np.arange(STREAMS)[part]]
            assert_same_bits(reply.floats().reshape(-1, H), final, "final states")


@torch.inference_mode()
def whole_of_all(x: F32) -> F32:
    """`nn.GRU` over the whole recordings of all streams: [T, N, F] → [T, N, H]."""
    y: F32 = torch_gru(SMALL)(torch.from_numpy(x))[0].numpy()
    return y


async def test_a_hundred_thousand_streams_over_a_thousand_rows(rng: np.random.Generator, tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    fleet = Fleet(rng)
    with ChildServer(tmp_path / "model", ENGINE) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            await fleet.open(client)
            await fleet.step(client, BLOCKS)
            await fleet.settle(client)
            counted = await client.statistics()
            await fleet.compare(client)
    assert counted["streams_hot"] == DEVICE_STREAMS
    assert counted["streams_warm"] == STREAMS - DEVICE_STREAMS
    assert counted["states_loaded_total"] == counted["states_spilled_total"] + DEVICE_STREAMS
    assert counted["states_spilled_total"] > fleet.frames / 4  # most frames had to fetch their stream's state


async def test_a_hundred_thousand_streams_go_on_after_a_kill(rng: np.random.Generator, tmp_path: Path) -> None:
    fleet = Fleet(rng)
    parked = f"limits.max_parked_streams={STREAMS}"
    with contextlib.closing(Victim(tmp_path, "commit", (*ENGINE, "--set", parked))) as victim:
        await victim.start()
        async with RawClient(victim.endpoint) as client:
            await client.hello()
            await fleet.open(client)
            await fleet.step(client, BLOCKS // 2)
            victim.kill()
        ready = await victim.start()
        assert ready["streams_recovered"] == STREAMS
        async with RawClient(victim.endpoint) as client:
            await client.hello()
            await fleet.resume(client)
            await fleet.step(client, BLOCKS // 2)
            await fleet.settle(client)
            await fleet.compare(client)
        victim.stop()


async def test_a_hundred_thousand_streams_of_which_memory_holds_a_few(rng: np.random.Generator, tmp_path: Path) -> None:
    fleet = Fleet(rng)
    host, parked = f"engine.host_streams={HOST_STREAMS}", f"limits.max_parked_streams={STREAMS}"
    with contextlib.closing(Victim(tmp_path, "commit", (*ENGINE, "--set", host, "--set", parked))) as victim:
        await victim.start()
        async with RawClient(victim.endpoint) as client:
            await client.hello()
            await fleet.open(client)
            await fleet.visit(client)
            counted = await client.statistics()
            victim.kill()
        assert counted["streams_hot"] == DEVICE_STREAMS
        assert counted["streams_cold"] >= STREAMS - DEVICE_STREAMS - HOST_STREAMS
        ready = await victim.start()
        assert ready["streams_recovered"] == STREAMS
        async with RawClient(victim.endpoint) as client:
            await client.hello()
            counted = await client.statistics()
            assert counted["streams_cold"] >= STREAMS - DEVICE_STREAMS - HOST_STREAMS, "no more was loaded than fits"
            await fleet.resume(client)
            await fleet.visit(client)
            counted = await client.statistics()
            assert counted["states_fetched_total"] >= STREAMS - DEVICE_STREAMS - HOST_STREAMS
            assert counted["step_failures_total"] == 0
            await fleet.compare(client)
        victim.stop()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux says how much memory a process has")
async def test_a_million_idle_streams(rng: np.random.Generator, tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    window = 4
    arguments = ("--set", f"engine.device_streams={DEVICE_STREAMS}", "--set", f"limits.window_frames={window}")
    with ChildServer(tmp_path / "model", (*arguments, "--max-streams", str(2 * DEVICE_STREAMS))) as server:
        before = resident_bytes(server.pid)
    with ChildServer(tmp_path / "model", (*arguments, "--max-streams", str(IDLE_STREAMS))) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = np.empty(IDLE_STREAMS, np.uint64)
            for first in range(0, IDLE_STREAMS, PART):
                names = [f"stream-{number}" for number in range(first, first + PART)]
                handles[first : first + PART] = (await client.open(*names)).handles()
            assert (await client.statistics())["streams_open"] == IDLE_STREAMS
            assert (resident_bytes(server.pid) - before) / IDLE_STREAMS <= MOST_BYTES_PER_IDLE_STREAM
            woken = rng.choice(handles, WOKEN, replace=False)
            x = rng.standard_normal((3 * window, WOKEN, F), np.float32)
            y = np.empty((3 * window, WOKEN, H), np.float32)
            for first in range(0, len(x), window):
                seqs = [first] * WOKEN
                reply = await client.step(woken, seqs, x[first : first + window], seqs)
                assert reply.codes() == []
                y[first : first + window] = reply.floats().reshape(window, WOKEN, H)
            finals = (await client.close(woken)).floats().reshape(WOKEN, H)
    truth = whole_of_all(x)
    assert_same_bits(y, truth, "outputs")
    assert_same_bits(finals, truth[-1], "final states")


def resident_bytes(pid: int) -> int:
    """Memory that a process has in use."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = next(line for line in lines if line.startswith("VmRSS"))
    return int(found.split()[1]) * 1024
