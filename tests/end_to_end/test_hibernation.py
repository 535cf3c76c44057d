"""Many more streams than fit into memory: opened, stepped, put to sleep and woken, and the server killed."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import numpy as np
import pytest

from instep.models.folder import write_model
from instep.models.network import PortableNetwork
from instep.recording.inspection import inspect
from instep_client import AsyncClient, AsyncStream, StreamEvicted
from tests.chaos.victim import Victim
from tests.support.models import SMALL, whole
from tests.support.served import WarmServer
from tests.support.traffic import assert_same_bits

F, H = 5, 8
FRAMES = (2, 1, 2)
"""Of each stream, in each life of the server."""


async def streams_asleep(client: AsyncClient, at_least: int) -> None:
    """Wait until so many hibernate."""
    while (await client.stats())["streams_hibernated"] < at_least:
        await asyncio.sleep(0.05)


@pytest.mark.heavy
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("streams", "slots"), [(2_000, 500), pytest.param(100_000, 10_000, marks=pytest.mark.long)])
async def test_streams_that_come_and_go_have_the_bits_of_whole_recordings(
    tmp_path: Path, streams: int, slots: int
) -> None:
    rng, at_once = np.random.default_rng(7), slots // 2
    x = rng.standard_normal((sum(FRAMES), streams, F)).astype(np.float32)
    y = np.full((sum(FRAMES), streams, H), np.nan, np.float32)
    names, epochs, began = [f"stream-{number}" for number in range(streams)], np.zeros(streams, np.uint64), 0
    limits = {"engine.max_streams": slots, "limits.park_s": 100_000, "limits.hibernate_after_s": 0.2}
    limits |= {"transport.heartbeat_s": 0.5}  # so often it looks for those that are gone
    arguments = [part for name, value in limits.items() for part in ("--set", f"{name}={value}")]
    with contextlib.closing(Victim(tmp_path, "commit", arguments)) as victim:
        for count in FRAMES:
            await victim.start()
            frames, order = slice(began, began + count), rng.permutation(streams)
            for some in np.array_split(order, streams // at_once):
                async with AsyncClient(victim.endpoint, timeout_s=60) as client:
                    while (await client.stats())["streams_open"] > slots - len(some):
                        await asyncio.sleep(0.01)
                    chosen = [names[stream] for stream in some.tolist()]
                    if began:
                        group = await client.resume_group(chosen, have=np.full(len(some), began), epochs=epochs[some])
                    else:
                        group = await client.open_group(chosen)
                    y[frames, some] = await group.step(x[frames, some])
                    epochs[some] = group.epochs
                    await client.close(park=True)
            async with AsyncClient(victim.endpoint) as client:
                await streams_asleep(client, streams)
                assert not (await client.stats())["streams_open"]
            victim.kill()
            began += count
    network = PortableNetwork(SMALL)
    initial = network.state.unpack(network.state.initial(x.shape[1]))
    expected, _ = network.definition().run(x, initial, np.full(len(x), x.shape[1]))
    assert_same_bits(y, expected, "outputs")
    assert inspect(victim.recording).frames == y[..., 0].size


async def test_an_idle_stream_of_a_connected_client_sleeps_and_its_next_frame_wakes_it(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    x = np.random.default_rng(3).standard_normal((8, F)).astype(np.float32)
    arguments = ["--record", str(tmp_path / "r.instep"), "--set", "limits.hibernate_after_s=0.3"]
    with WarmServer(tmp_path / "model", arguments) as server:
        async with AsyncClient(server.endpoint) as client:
            stream, served = await client.open("s"), []
            for at in range(0, 6, 2):
                served.append(await stream.step(x[at : at + 2]))
                await streams_asleep(client, 1)
            assert_same_bits(np.concatenate(served), whole(SMALL, x)[0][:6], "the stream")
            values = await client.stats()
            assert (values["hibernated_streams_total"], values["woken_streams_total"]) == (3, 2)
            resuming, waiting = client.resume("s", epoch=stream.epoch), stream.step(x[6])
            resumed, refused = await asyncio.gather(resuming, waiting, return_exceptions=True)
            assert isinstance(resumed, AsyncStream), "it belongs to who asked for it last"
            assert isinstance(refused, StreamEvicted)
            assert_same_bits(await resumed.step(x[6:]), whole(SMALL, x)[0][6:], "the resumed stream")
        async with AsyncClient(server.endpoint) as client:
            await client.open("s")  # the client that left has closed it
