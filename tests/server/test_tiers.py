from __future__ import annotations

import msgpack
import numpy as np

from instep_client.protocol.wire import Kind
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
ENGINE = {"max_streams": 50, "device_streams": 8, "max_batch_size": 8}


async def states(client: RawClient) -> list[float]:
    reply = await client.ask(msgpack.packb([Kind.STATS, 9]))
    values = dict(map(tuple, reply.header[2]))
    names = ("streams_open", "streams_hot", "streams_warm", "states_loaded_total", "states_spilled_total")
    return [values[name] for name in names]


async def test_fifty_streams_over_eight_rows_are_served_exactly_and_counted(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 50, F)).astype(np.float32)
    initial = rng.standard_normal((50, 1, H)).astype(np.float32)
    async with running(SMALL, engine=ENGINE) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open(*(f"s{number}" for number in range(50)), states=initial)).handles()
        assert await states(client) == [50, 0, 50, 0, 0]
        first = (await client.step(handles, [0] * 50, x[:3])).floats().reshape(3, 50, H)
        assert (await states(client))[:3] == [50, 8, 42]
        second = (await client.step(handles, [3] * 50, x[3:])).floats().reshape(3, 50, H)
        finals = (await client.close(handles[10:])).floats().reshape(40, 1, H)
        _, hot, warm, loaded, spilled = await states(client)
        assert hot + warm == 10
        assert hot <= 8
        assert loaded == spilled + 8
        assert spilled >= 42
        await client.close(handles[:10])
        assert (await states(client))[:3] == [0, 0, 0]
        handles = (await client.open(*(f"again{number}" for number in range(50)))).handles()
        again = (await client.step(handles, [0] * 50, x[:1])).floats().reshape(50, H)
    for stream in range(50):
        y, final = whole(SMALL, x[:, stream], initial[stream])
        np.testing.assert_array_equal(np.concatenate([first, second])[:, stream], y)
        if stream >= 10:
            np.testing.assert_array_equal(finals[stream - 10], final)
        np.testing.assert_array_equal(again[stream], whole(SMALL, x[:1, stream])[0][0])


async def test_all_streams_are_hot_where_the_device_holds_all(rng: np.random.Generator) -> None:
    async with running(SMALL, engine={"max_streams": 50}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("a", "b")).handles()
        await client.step(handles, [0, 0], rng.standard_normal((1, 2, F)).astype(np.float32))
        assert await states(client) == [2, 2, 0, 0, 0]
