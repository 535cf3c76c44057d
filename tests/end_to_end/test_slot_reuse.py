"""A slot, a handle or a connection's number that is used again: nothing of the former owner's reaches the next one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from instep_client import AsyncClient, StreamRefused
from instep_client.protocol.wire import Code, Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient, Reply
from tests.support.running import running
from tests.support.traffic import assert_same_bits

F, H = 5, 8


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


async def test_a_slot_is_not_given_on_while_frames_of_its_stream_are_pending(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 1, F)).astype(np.float32)
    x[0, 0, 0] = GATE_VALUE
    gate = Gate()
    async with (
        running(SMALL, stepper=gate.stepper, engine={"max_streams": 1}) as server,
        RawClient(server.endpoint) as client,
    ):
        try:
            await client.hello()
            handles = (await client.open("first")).handles()
            await client.send(*client.step_message(handles, [0], x))
            await client.send(*client.close_message(handles))
            await client.send(*client.open_message("next"))
            while not server.default.engine.table.closing.any():
                await asyncio.sleep(0.01)
        finally:
            gate.open()
        replies: dict[Kind, Reply] = {}
        while replies.keys() != {Kind.STEPPED, Kind.CLOSED, Kind.OPENED}:
            reply = await client.receive()
            assert reply.kind is not Kind.GOODBYE, reply.header
            replies[reply.kind] = reply
    assert replies[Kind.OPENED].failures() == [(0, 0, Code.TOO_MANY_STREAMS, 0)]
    y, final = whole(SMALL, x[:, 0])
    assert_same_bits(replies[Kind.STEPPED].floats().reshape(2, H), y, "outputs")
    assert_same_bits(replies[Kind.CLOSED].floats().reshape(1, H), final, "final state")


@pytest.mark.parametrize("park_s", [0, 300])
async def test_a_late_answer_never_reaches_the_next_connection(rng: np.random.Generator, park_s: float) -> None:
    """A connection vanishes while its frame is being computed; another comes, and there is one number for both."""
    x = rng.standard_normal((2, 1, F)).astype(np.float32)
    late = x.copy()
    late[0, 0, 0] = GATE_VALUE
    transport, limits = {"heartbeat_s": 0.05}, {"max_connections": 2, "park_s": park_s}
    gate = Gate()
    async with (
        running(SMALL, stepper=gate.stepper, transport=transport, limits=limits) as server,
        RawClient(server.endpoint) as watcher,
    ):
        try:
            await watcher.hello()
            async with RawClient(server.endpoint) as gone:
                await gone.hello()
                handles = (await gone.open("gone")).handles()
                await gone.send(*gone.step_message(handles, [0], late))
                while not server.default.engine.pending_frames:
                    await asyncio.sleep(0.01)
            while await connections(watcher) > 1:
                await asyncio.sleep(0.01)
            async with RawClient(server.endpoint) as following:
                hello = following.hello_message()
                first = await following.ask(*hello)
                # The end of a stream waits for its frame; one that is parked instead owns no number.
                assert park_s or first.kind is Kind.ERROR
                gate.open()
                while first.kind is not Kind.WELCOME:
                    assert first.code is Code.BUSY
                    first = await following.ask(*hello)
                while not server.default.engine.is_quiet:
                    await asyncio.sleep(0.01)
                handles = (await following.open("next")).handles()
                reply = await following.step(handles, [0], x)
                assert_same_bits(reply.floats().reshape(2, H), whole(SMALL, x[:, 0])[0], "outputs")
        finally:
            gate.open()


async def connections(client: RawClient) -> float:
    return (await client.statistics())["connections"]


async def test_names_and_slots_of_a_group_that_was_refused_in_part_are_free_at_once() -> None:
    async with running(SMALL, engine={"max_streams": 3}) as server, AsyncClient(server.endpoint) as client:
        await client.open("taken")
        for _ in range(3):
            with pytest.raises(StreamRefused, match=r"NAME_IN_USE.*'taken'"):
                await client.open_group(["a", "b", "taken"])
            assert server.default.engine.table.open_count == 1
        assert len(await client.open_group(["a", "b"])) == 2
