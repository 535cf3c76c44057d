"""Streams from open to close: initial and final states, order of closing, eviction, slots used again."""

from __future__ import annotations

import asyncio

import msgpack
import numpy as np
import pytest

from instep_client.protocol.wire import Code, Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, plain, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8


async def test_an_initial_state_is_used_and_the_final_one_returned(rng: np.random.Generator) -> None:
    model = plain(F, H, layers=2)
    states = rng.standard_normal((3, 2, H)).astype(np.float32)
    x = rng.standard_normal((6, 3, F)).astype(np.float32)
    async with running(model) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("a", "b", "c", states=states)).handles()
        y = (await client.step(handles, [0, 0, 0], x)).floats().reshape(6, 3, H)
        final = (await client.close(handles)).floats().reshape(3, 2, H)
    for column in range(3):
        truth, state = whole(model, x[:, column], states[column])
        np.testing.assert_array_equal(y[:, column], truth)
        np.testing.assert_array_equal(final[column], state)


async def test_the_next_stream_of_a_slot_starts_from_zeros(rng: np.random.Generator) -> None:
    x = rng.standard_normal((3, 1, F)).astype(np.float32)
    async with running(SMALL, engine={"max_streams": 1}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        for name in ("first", "second"):
            handles = (await client.open(name)).handles()
            reply = await client.step(handles, [0], x)
            np.testing.assert_array_equal(reply.floats().reshape(3, H), whole(SMALL, x[:, 0])[0])
            await client.close(handles)


async def test_close_waits_for_what_was_admitted_and_admits_nothing_after(rng: np.random.Generator) -> None:
    x = rng.standard_normal((30, 1, F)).astype(np.float32)
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], x))
        await client.send(*client.close_message(handles))
        await client.send(*client.step_message(handles, [30], x[:1]))
        late, stepped, closed = [await client.receive() for _ in range(3)]
        assert late.failures() == [(0, 0, Code.UNKNOWN_STREAM, 0)]
        truth, state = whole(SMALL, x[:, 0])
        np.testing.assert_array_equal(stepped.floats().reshape(30, H), truth)
        np.testing.assert_array_equal(closed.floats(), state.ravel())


async def test_closed_comes_after_the_answers_of_every_block_the_stream_was_in(rng: np.random.Generator) -> None:
    x = rng.standard_normal((30, 2, F)).astype(np.float32)
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("quick", "slow")).handles()
        await client.send(*client.step_message(handles[1:], [0], x[:, 1:]))
        await client.send(*client.step_message(handles, [0, 30], x[:1]))
        await client.send(*client.close_message(handles[:1]))
        kinds = [(await client.receive()).kind for _ in range(3)]
        assert kinds == [Kind.STEPPED, Kind.STEPPED, Kind.CLOSED]


@pytest.mark.parametrize("park_s", [0, 300])
async def test_a_gone_connections_number_is_free_also_when_a_stream_of_it_was_closing_before(park_s: float) -> None:
    limits = {"max_connections": 1, "park_s": park_s}
    async with running(SMALL, transport={"heartbeat_s": 0.05}, limits=limits) as server:
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            handles = (await gone.open("closing", "left")).handles()
            x = np.zeros((30, 1, F), np.float32)
            await gone.send(*gone.step_message(handles[:1], [0], x))
            await gone.send(*gone.close_message(handles[:1]))
            while not server.engine.table.closing.any():
                await asyncio.sleep(0)
        async with RawClient(server.endpoint) as client:
            while (await client.ask(*client.hello_message())).kind is not Kind.WELCOME:
                await asyncio.sleep(0.02)


async def test_an_idle_stream_is_evicted_and_its_owner_told() -> None:
    async with running(SMALL, limits={"max_idle_s": 0.2}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        notice = await client.receive()
        assert notice.kind is Kind.EVICTED
        assert notice.header[3] == Code.IDLE
        assert notice.handles().tolist() == handles.tolist()
        assert (await client.open("s")).failures() == []
        reply = await client.step(handles, [0], np.zeros((1, 1, F), np.float32))
        assert reply.failures() == [(0, 0, Code.UNKNOWN_STREAM, 0)]


async def test_a_vanished_clients_streams_are_closed_and_its_names_free() -> None:
    transport = {"heartbeat_s": 0.1}
    async with (
        running(SMALL, transport=transport, limits={"park_s": 0}) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            await gone.open("s")
        assert server.engine.table.open_count == 1
        while server.engine.table.open_count:
            await asyncio.sleep(0.02)
        assert (await client.open("s")).failures() == []


async def test_many_connections_come_and_go_through_few_numbers() -> None:
    async with running(SMALL, transport={"heartbeat_s": 0.05}, limits={"max_connections": 2}) as server:
        for index in range(6):
            async with RawClient(server.endpoint) as client:
                while True:
                    reply = await client.ask(*client.hello_message())
                    if reply.kind is Kind.WELCOME:
                        break
                    assert reply.code is Code.BUSY
                    await asyncio.sleep(0.02)
                assert (await client.open(f"s{index}")).failures() == []


async def test_shutdown_answers_what_was_admitted_then_says_goodbye(rng: np.random.Generator) -> None:
    x = rng.standard_normal((500, 1, F)).astype(np.float32)
    async with running(SMALL, limits={"window_frames": 500}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], x))
        while not len(server.engine.blocks):
            await asyncio.sleep(0)
        server.stop()
        await client.send(*client.step_message(handles, [500], x[:1]))
        replies = [await client.receive() for _ in range(3)]
        by_kind = {reply.kind: reply for reply in replies}
        assert by_kind[Kind.ERROR].code is Code.SHUTTING_DOWN
        np.testing.assert_array_equal(by_kind[Kind.STEPPED].floats().reshape(500, H), whole(SMALL, x[:, 0])[0])
        assert replies[-1].kind is Kind.GOODBYE


async def test_a_forced_end_leaves_blocks_unanswered_and_counts_them() -> None:
    gate = Gate()
    async with running(SMALL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], np.full((1, 1, F), GATE_VALUE, np.float32)))
        while not len(server.engine.blocks):
            await asyncio.sleep(0)
        server.stop(drain=False)
    gate.open()
    assert server.unanswered_blocks == 1


@pytest.mark.parametrize("delay_us", [0, 20_000])
async def test_holding_batches_changes_no_output(delay_us: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 2, F)).astype(np.float32)
    async with running(SMALL, engine={"max_queue_delay_us": delay_us}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("a", "b", "silent")).handles()
        y = (await client.step(handles[:2], [0, 0], x)).floats().reshape(5, 2, H)
    for column in range(2):
        np.testing.assert_array_equal(y[:, column], whole(SMALL, x[:, column])[0])


async def test_statistics_count_what_happened(rng: np.random.Generator) -> None:
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("a", "b")).handles()
        await client.step(handles, [0, 0], rng.standard_normal((3, 2, F)).astype(np.float32))
        reply = await client.ask(msgpack.packb([Kind.STATS, 9]))
        values = dict(map(tuple, reply.header[2]))
        assert (values["frames_total"], values["batches_total"], values["blocks_total"]) == (6, 3, 1)
        assert (values["streams_open"], values["connections"], values["frames_pending"]) == (2, 1, 0)
        assert values["batch_size_mean"] == 2


async def test_a_connection_that_never_says_it_reads_is_given_up_and_costs_bounded_memory() -> None:
    transport = {"max_message_bytes": 65_536}
    async with running(SMALL, transport=transport, limits={"unreachable_after_s": 0.2}) as server:
        async with RawClient(server.endpoint) as silent, RawClient(server.endpoint) as client:
            await silent.hello()
            await client.hello()
            block = silent.step_message(range(1000), [0] * 1000, np.zeros((1, 1000, F), np.float32))
            for _ in range(100):  # 100 answers of 32,000 bytes and 24 a failure
                await silent.send(*block)
            while len(server._clients) > 1:
                await asyncio.sleep(0.01)
            assert (await client.open("s")).failures() == []


async def test_a_connection_that_reads_late_gets_every_answer_in_order() -> None:
    transport = {"max_message_bytes": 65_536}
    async with running(SMALL, transport=transport) as server, RawClient(server.endpoint) as late:
        await late.hello()
        block = late.step_message(range(1000), [0] * 1000, np.zeros((1, 1000, F), np.float32))
        for _ in range(6):
            await late.send(*block)
        while server.statistics.blocks_total < 6:
            await asyncio.sleep(0.01)
        assert not server._postbox.is_empty
        for _ in range(6):
            assert len((await late.receive()).failures()) == 1000
        assert server._postbox.is_empty


async def test_a_connection_is_given_up_when_its_outbox_bursts() -> None:
    transport = {"max_message_bytes": 65_536}
    async with running(SMALL, transport=transport) as server, RawClient(server.endpoint) as silent:
        await silent.hello()
        block = silent.step_message(range(1000), [0] * 1000, np.zeros((1, 1000, F), np.float32))
        for _ in range(30):
            await silent.send(*block)
        while len(server._clients):
            await asyncio.sleep(0.01)
