from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import numpy as np
import pytest

from instep_client.aio import AsyncClient
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ConnectionFailed, FramesRefused
from instep_client.protocol.wire import F32
from instep_tools.pipeline import LivingGroup, pipeline
from tests.support.fake_server import FakeServer, reference

NAMES = ["a", "b", "c", "d"]


async def test_answers_are_taken_in_the_order_of_sending() -> None:
    taken: list[Any] = []
    first = asyncio.Event()

    async def slow() -> F32:
        await first.wait()
        return np.ones(1, np.float32)

    async def fast() -> F32:
        first.set()
        return np.full(1, 2, np.float32)

    async with pipeline(lambda key, y: taken.append((key, y))) as send:
        await send("slow", slow)
        await send("fast", fast)
    assert taken == [("slow", 1), ("fast", 2)]


async def test_calls_start_in_order_and_only_so_many_are_on_their_way() -> None:
    started: list[int] = []
    going_on = asyncio.Event()

    async def call(number: int) -> F32:
        started.append(number)
        await going_on.wait()
        return np.zeros(1, np.float32)

    async def send_all() -> None:
        async with pipeline(lambda key, result: None, depth=3) as send:
            for number in range(20):
                await send(number, partial(call, number))

    sending = asyncio.create_task(send_all())
    for _ in range(50):
        await asyncio.sleep(0)
    assert started == [0, 1, 2, 3, 4]  # three wait in line, one is being taken, one waits for its place
    going_on.set()
    await sending
    assert started == list(range(20))


async def test_a_lost_connection_ends_the_sending() -> None:
    async def call(number: int) -> F32:
        if number == 1:
            raise ConnectionFailed("gone")
        await asyncio.Event().wait()
        raise AssertionError

    async def send_all() -> None:
        async with pipeline(lambda key, result: None, depth=1) as send:
            for number in range(10):
                await send(number, partial(call, number))

    with pytest.raises(ConnectionFailed, match="gone"):
        await send_all()


async def test_the_others_go_on_without_those_that_ended(rng: np.random.Generator) -> None:
    x = rng.integers(-3, 4, (3, 1, 4, 3)).astype(np.float32)
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            group = LivingGroup(await client.open_group(NAMES), 2)
            y = [await group.step(x[0], np.arange(4))]
            server.evict(["b", "d"], Code.STATE_LOST)
            await client.ping()
            for block in x[1:]:
                with pytest.raises(FramesRefused) as failure:
                    await group.step(block, np.arange(4))
                refused = failure.value
                assert refused.code is Code.STATE_LOST
                assert [(entry.stream, entry.seq) for entry in refused.failures] == [("b", 1), ("d", 1)]
                assert np.isnan(refused.outputs[:, [1, 3]]).all()
                y.append(refused.outputs)
            with pytest.raises(FramesRefused) as failure:
                await group.step(x[0][:, [1, 3]], np.array([1, 3]))
            assert np.isnan(failure.value.outputs).all()
    for stream in (0, 2):
        np.testing.assert_array_equal(np.stack(y)[:, 0, stream], reference(x[:, 0, stream])[0])


async def test_frames_refused_beside_streams_that_ended() -> None:
    x = np.ones((1, 4, 3), np.float32)
    x[0, 2, 0] = np.nan
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            group = LivingGroup(await client.open_group(NAMES), 2)
            server.evict(["a"])
            await client.ping()
            with pytest.raises(FramesRefused) as failure:
                await group.step(x, np.arange(4))
    refused = failure.value
    assert [(entry.stream, entry.code) for entry in refused.failures] == [("a", Code.IDLE), ("c", Code.NOT_FINITE)]
    assert np.isnan(refused.outputs).all(axis=2).tolist() == [[True, False, True, False]]
