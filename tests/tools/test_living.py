from __future__ import annotations

import numpy as np
import pytest

from instep_client.aio import AsyncClient
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import FramesRefused
from instep_client.protocol.wire import F32
from instep_tools.living import step_living
from tests.support.fake_server import FakeServer, reference

NAMES = ["a", "b", "c", "d"]


def blocks(rng: np.random.Generator, count: int) -> F32:
    return rng.integers(-3, 4, (count, 1, 4, 3)).astype(np.float32)


def truth(x: F32, stream: int) -> F32:
    return reference(x[:, 0, stream])[0]


async def test_while_all_live_it_is_a_step(rng: np.random.Generator) -> None:
    x = blocks(rng, 3)
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            group = await client.open_group(NAMES)
            y = np.stack([await step_living(group, block, np.arange(4), 2) for block in x])
    for stream in range(4):
        np.testing.assert_array_equal(y[:, 0, stream], truth(x, stream))


async def test_the_others_go_on_without_those_that_ended(rng: np.random.Generator) -> None:
    x = blocks(rng, 3)
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            group = await client.open_group(NAMES)
            y = [await step_living(group, x[0], np.arange(4), 2)]
            server.evict(["b", "d"], Code.STATE_LOST)
            await client.ping()
            for block in x[1:]:
                with pytest.raises(FramesRefused) as failure:
                    await step_living(group, block, np.arange(4), 2)
                refused = failure.value
                assert refused.code is Code.STATE_LOST
                assert [(entry.stream, entry.seq) for entry in refused.failures] == [("b", 1), ("d", 1)]
                assert np.isnan(refused.outputs[:, [1, 3]]).all()
                y.append(refused.outputs)
            with pytest.raises(FramesRefused) as failure:
                await step_living(group, x[0][:, [1, 3]], np.array([1, 3]), 2)
            assert np.isnan(failure.value.outputs).all()
    for stream in (0, 2):
        np.testing.assert_array_equal(np.stack(y)[:, 0, stream], truth(x, stream))


async def test_frames_refused_beside_streams_that_ended(rng: np.random.Generator) -> None:
    x = blocks(rng, 1)[0]
    x[0, 2, 0] = np.nan
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            group = await client.open_group(NAMES)
            server.evict(["a"])
            await client.ping()
            with pytest.raises(FramesRefused) as failure:
                await step_living(group, x, np.arange(4), 2)
    refused = failure.value
    assert [(entry.stream, entry.code) for entry in refused.failures] == [("a", Code.IDLE), ("c", Code.NOT_FINITE)]
    assert np.isnan(refused.outputs).all(axis=2).tolist() == [[True, False, True, False]]
    assert str(refused).endswith("(stream 'a', seq 0, expected 0, and 1 more streams)")
    assert str(refused).count("(stream") == 1


async def test_a_refused_frame_is_told_of_as_a_step_tells(rng: np.random.Generator) -> None:
    x = blocks(rng, 1)[0]
    x[0, 2, 0] = np.nan
    with FakeServer() as server:
        async with AsyncClient(server.endpoint) as client:
            group = await client.open_group(NAMES)
            with pytest.raises(FramesRefused) as living:
                await step_living(group, x, np.arange(4), 2)
            group = await client.open_group([f"{name}-again" for name in NAMES])
            with pytest.raises(FramesRefused) as step:
                await group.step(x)
    assert str(living.value) == str(step.value).replace("-again", "")
