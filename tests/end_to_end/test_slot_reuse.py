"""A slot, a handle or a connection's number that is used again: nothing of the former owner's reaches the next one."""

from __future__ import annotations

import asyncio
import threading

import msgpack
import numpy as np
import pytest

from instep.config import Config
from instep.core.typing import F32, I32, I64
from instep.runtime.stepper import Stepper
from instep.server.serve import Prepared
from instep_client.wire import Code, Kind
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.traffic import assert_same_bits

F, H = 5, 8
GATE_VALUE = 4321.5
"""A frame that begins with this is stepped when the gate opens."""


class GatedStepper(Stepper):
    gate = threading.Event()

    def step(self, slots: I64, rows: I32, inputs: F32, outputs: F32) -> None:
        if (inputs[rows, 0] == GATE_VALUE).any():
            assert self.gate.wait(60)
        super().step(slots, rows, inputs, outputs)


def gated(ready: Prepared, config: Config) -> Stepper:
    return GatedStepper(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device)


@pytest.mark.parametrize("old_first", [True, False])
async def test_an_old_handle_beside_its_slots_next_stream_does_not_touch_it(
    rng: np.random.Generator, old_first: bool
) -> None:
    x = rng.standard_normal((3, 2, F)).astype(np.float32)
    async with running(SMALL, engine={"max_streams": 1}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        old = (await client.open("old")).handles()
        await client.close(old)
        new = (await client.open("new")).handles()
        at = 1 if old_first else 0
        reply = await client.step(np.concatenate([old, new] if old_first else [new, old]), [0, 0], x)
        assert reply.failures() == [(1 - at, 0, Code.UNKNOWN_STREAM, 0)]
        closed = await client.close(new)
    y, final = whole(SMALL, x[:, at])
    assert_same_bits(reply.floats().reshape(3, 2, H)[:, at].copy(), y, "outputs")
    assert_same_bits(closed.floats().reshape(1, H), final, "final state")


async def test_a_late_answer_never_reaches_the_next_connection(rng: np.random.Generator) -> None:
    """A connection vanishes while its frame is being computed; another comes, and there is one number for both."""
    x = rng.standard_normal((2, 1, F)).astype(np.float32)
    late = x.copy()
    late[0, 0, 0] = GATE_VALUE
    transport, limits = {"heartbeat_s": 0.05}, {"max_connections": 2}
    GatedStepper.gate.clear()
    async with (
        running(SMALL, stepper=gated, transport=transport, limits=limits) as server,
        RawClient(server.endpoint) as watcher,
    ):
        try:
            await watcher.hello()
            async with RawClient(server.endpoint) as gone:
                await gone.hello()
                handles = (await gone.open("gone")).handles()
                await gone.send(*gone.step_message(handles, [0], late))
                while not len(server.engine.blocks):
                    await asyncio.sleep(0.01)
            while await connections(watcher) > 1:
                await asyncio.sleep(0.01)
            async with RawClient(server.endpoint) as following:
                hello = msgpack.packb([Kind.HELLO, 1, 1, "raw"])
                first = await following.ask(hello)
                GatedStepper.gate.set()
                while first.kind is not Kind.WELCOME:
                    assert first.code is Code.BUSY
                    first = await following.ask(hello)
                while server.engine.blocks:
                    await asyncio.sleep(0.01)
                handles = (await following.open("next")).handles()
                reply = await following.step(handles, [0], x)
                assert_same_bits(reply.floats().reshape(2, H), whole(SMALL, x[:, 0])[0], "outputs")
        finally:
            GatedStepper.gate.set()


async def connections(client: RawClient) -> float:
    reply = await client.ask(msgpack.packb([Kind.STATS, client.next_request()]))
    return float(dict(map(tuple, reply.header[2]))["connections"])
