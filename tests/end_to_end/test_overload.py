"""More than the server has room for: refused aloud and whole, and served as ever once there is room."""

from __future__ import annotations

import asyncio

import numpy as np

from instep_client.protocol.wire import Code, Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.traffic import assert_same_bits

F, H = 5, 8
LIMITS = {"window_frames": 40, "max_block_frames": 40, "credit_frames": 40, "max_pending_frames": 60}


async def test_a_block_that_the_whole_server_has_no_room_for_is_refused_whole(rng: np.random.Generator) -> None:
    """Both connections are within their credit; together they are beyond `max_pending_frames`."""
    x = rng.standard_normal((2, 40, 1, F)).astype(np.float32)
    x[0, 0, 0, 0] = GATE_VALUE
    gate = Gate()
    async with (
        running(SMALL, stepper=gate.stepper, limits=LIMITS) as server,
        RawClient(server.endpoint) as first,
        RawClient(server.endpoint) as second,
    ):
        try:
            handles = []
            for index, client in enumerate((first, second)):
                await client.hello()
                handles.append((await client.open(f"s{index}")).handles())
            await first.send(*first.step_message(handles[0], [0], x[0]))
            while not server.default.engine.pending_frames:
                await asyncio.sleep(0.01)
            refused = await second.step(handles[1], [0], x[1])
            assert refused.code is Code.BUSY
            assert refused.header[4] > 0
            await second.send(*second.step_message(handles[1], [0], x[1, :20]))  # for which there is room
        finally:
            gate.open()
        fits = await second.receive()
        rest = await second.step(handles[1], [20], x[1, 20:])
        answered = await first.receive()
        assert answered.kind is Kind.STEPPED
    assert_same_bits(answered.floats().reshape(40, H), whole(SMALL, x[0, :, 0])[0], "outputs of the first")
    served = np.concatenate([fits.floats(), rest.floats()]).reshape(40, H)
    assert_same_bits(served, whole(SMALL, x[1, :, 0])[0], "outputs of the second")
