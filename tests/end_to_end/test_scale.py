"""Many connections, and many streams on one: all served, with the bits of the definition and the values of `nn.GRU`."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from instep.core.typing import F32
from instep_client import AsyncClient, AsyncStream
from tests.support.models import SMALL, torch_gru
from tests.support.running import prepared, running
from tests.support.traffic import assert_same_bits

pytestmark = pytest.mark.long

F, H = 5, 8
CONNECTIONS = 2_000
STREAMS_ON_ONE = 20_000
FILES_PER_CONNECTION = 4
"""Both ends are in this process: two sockets, and what wakes the client's."""


@torch.inference_mode()
def check(x: F32, y: F32, finals: F32) -> None:
    """Compare with the definition, and with `nn.GRU` over whole recordings [T, N, F] → [T, N, H] and [N, 1, H]."""
    network = prepared(SMALL).network
    definition, initial = network.definition(), network.state.initial(x.shape[1])
    assert definition is not None
    truth, after = definition.run(x, network.state.unpack(initial), np.full(len(x), x.shape[1]))
    assert_same_bits(y, truth, "outputs")
    assert_same_bits(finals, after["h"], "final states")
    close, _ = torch_gru(SMALL)(torch.from_numpy(x))
    np.testing.assert_allclose(y, close.numpy(), rtol=0, atol=2e-5)


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 500 + FILES_PER_CONNECTION * CONNECTIONS
    if hard not in (resource.RLIM_INFINITY, -1) and hard < needed:
        pytest.skip(f"{CONNECTIONS} connections need {needed} open files, this machine allows {hard} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
async def test_two_thousand_connections_of_one_stream_each(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, CONNECTIONS, F)).astype(np.float32)

    async def produce(stream: AsyncStream, mine: F32) -> tuple[F32, F32]:
        frames = [await stream.step(frame) for frame in mine[:2]]
        rest = await stream.step(mine[2:])
        return np.concatenate([np.stack(frames), rest]), (await stream.close())["h"]

    async with running(SMALL, engine={"max_streams": CONNECTIONS}) as server:
        clients = [AsyncClient(server.endpoint, timeout_s=60) for _ in range(CONNECTIONS)]
        try:
            await asyncio.gather(*(client.connect() for client in clients))
            streams = await asyncio.gather(*(client.open(f"s{index}") for index, client in enumerate(clients)))
            assert server.default.engine.table.open_count == CONNECTIONS
            assert len(set(server.default.engine.table.owner[1:].tolist())) == CONNECTIONS
            served = await asyncio.gather(*(produce(each, x[:, at].copy()) for at, each in enumerate(streams)))
        finally:
            await asyncio.gather(*(client.close() for client in clients))
    check(x, np.stack([y for y, _ in served], axis=1), np.stack([final for _, final in served]))


async def test_twenty_thousand_streams_on_one_connection(rng: np.random.Generator) -> None:
    x = rng.standard_normal((8, STREAMS_ON_ONE, F)).astype(np.float32)
    y = np.full((8, STREAMS_ON_ONE, H), np.nan, np.float32)
    async with running(SMALL, engine={"max_streams": STREAMS_ON_ONE}) as server:
        async with AsyncClient(server.endpoint, timeout_s=60) as client:
            group = await client.open_group([f"s{index}" for index in range(STREAMS_ON_ONE)])
            assert server.default.engine.table.open_count == STREAMS_ON_ONE
            for timestep in range(3):
                y[timestep] = await group.step(x[timestep])
            y[3:6] = await group.step(x[3:6])
            for half in np.split(rng.permutation(STREAMS_ON_ONE), 2):
                y[6:, half] = await group.step(x[6:, half], rows=half)
            finals = await group.close()
        assert server.default.engine.table.open_count == 0
    check(x, y, finals["h"])
