"""What keeps the server going, and what the end waits for; without the tick, which would hide what was forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import msgpack
import numpy as np
import pytest

from instep.core.typing import F32
from instep.models.model import Model
from instep.recording.writer import RecordingWriter
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
LATE_S = 10.0
"""By then a test fails that would wait for ever."""


@pytest.fixture(autouse=True)
def _no_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.server.server._TICK_S", 1e6)


@contextlib.asynccontextmanager
async def served(model: Model, **arguments: Any) -> AsyncIterator[tuple[Server, RawClient]]:
    async with running(model, **arguments) as server, RawClient(server.endpoint) as client:
        await client.hello()
        async with asyncio.timeout(LATE_S):
            yield server, client


async def other_work() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


def frame(first: float = 0.5) -> F32:
    x = np.full((1, 1, F), 0.5, np.float32)
    x[0, 0, 0] = first
    return x


async def test_each_batch_that_is_held_is_stepped_when_its_time_is_over() -> None:
    async with served(SMALL, engine={"max_queue_delay_us": 50_000}) as (_, client):
        handles = (await client.open("s", "silent")).handles()
        for seq in range(2):
            assert (await client.step(handles[:1], [seq], frame())).failures() == []


async def test_no_batch_is_held_while_the_server_drains(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 1, F)).astype(np.float32)
    held = {"max_queue_delay_us": 10_000_000}
    async with served(SMALL, engine=held, shutdown={"drain_timeout_s": 5}) as (server, client):
        handles = (await client.open("s", "silent")).handles()
        await client.send(*client.step_message(handles[:1], [0], x))
        while not len(server.engine.blocks):
            await asyncio.sleep(0)
        server.stop()
        reply, goodbye = [await client.receive() for _ in range(2)]
        assert (reply.kind, goodbye.kind) == (Kind.STEPPED, Kind.GOODBYE)
        np.testing.assert_array_equal(reply.floats().reshape(2, H), whole(SMALL, x[:, 0])[0])


async def test_what_arrives_during_a_step_shares_the_next_unless_that_is_full() -> None:
    gate = Gate()
    async with served(SMALL, stepper=gate.stepper) as (server, client):
        handles = (await client.open("first", "a", "b")).handles()
        for index, value in enumerate((GATE_VALUE, 0.5, 0.5)):
            await client.send(*client.step_message(handles[index : index + 1], [0], frame(value)))
            while server._verbs.taken_blocks + len(server.engine.blocks) <= index:
                await asyncio.sleep(0)
            await other_work()
        assert len(server.engine.blocks) == 1  # the others are admitted in one go
        gate.open()
        assert {(await client.receive()).kind for _ in range(3)} == {Kind.STEPPED}
        assert server.statistics.batches_total == 2


async def test_the_end_waits_for_what_is_not_even_admitted() -> None:
    gate = Gate()
    async with served(SMALL, stepper=gate.stepper, shutdown={"drain_timeout_s": 5}) as (server, client):
        handles = (await client.open("first", "a")).handles()
        for index, value in enumerate((GATE_VALUE, 0.5)):
            await client.send(*client.step_message(handles[index : index + 1], [0], frame(value)))
            while server._verbs.taken_blocks + len(server.engine.blocks) <= index:
                await asyncio.sleep(0)
        server.stop()
        gate.open()
        assert [(await client.receive()).kind for _ in range(3)] == [Kind.STEPPED, Kind.STEPPED, Kind.GOODBYE]


async def test_a_refusal_does_not_wait_for_a_step_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.server.server._TICK_S", 0.01)
    gate = Gate()
    async with served(SMALL, stepper=gate.stepper) as (_, client):
        handles = (await client.open("first", "a")).handles()
        await client.send(*client.step_message(handles[:1], [0], frame(GATE_VALUE)))
        await client.send(*client.step_message(handles[1:], [7], frame()))
        assert (await client.receive()).codes() == [Code.SEQ_GAP]
        gate.open()
        assert (await client.receive()).failures() == []


async def test_a_full_batch_goes_to_the_worker_during_a_step() -> None:
    gate = Gate()
    engine = {"max_batch_size": 4}
    async with served(SMALL, stepper=gate.stepper, engine=engine) as (server, client):
        handles = (await client.open("first", *"abcd")).handles()
        await client.send(*client.step_message(handles[:1], [0], frame(GATE_VALUE)))
        while server.engine.scheduler.ready_count or not len(server.engine.blocks):
            await asyncio.sleep(0)
        await client.send(*client.step_message(handles[1:], [0] * 4, np.zeros((1, 4, F), np.float32)))
        while server.engine.scheduler.ready_count or len(server.engine.blocks) < 2:
            await asyncio.sleep(0)
        gate.open()
        assert {(await client.receive()).kind for _ in range(2)} == {Kind.STEPPED}


@pytest.mark.parametrize(("verb", "answer"), [("load", Kind.OPENED), ("read", Kind.CLOSED)])
async def test_the_end_waits_for_openings_and_closings(verb: Literal["load", "read"], answer: Kind) -> None:
    gate = Gate(verb)
    async with served(SMALL, stepper=gate.stepper) as (server, client):
        if verb == "load":
            await client.send(*client.open_message("s"))
        else:
            handles = (await client.open("s")).handles()
            await client.send(*client.close_message(handles))
        while server.is_quiet:
            await asyncio.sleep(0)
        server.stop()
        await other_work()
        gate.open()
        assert [(await client.receive()).kind for _ in range(2)] == [answer, Kind.GOODBYE]


async def test_the_end_waits_until_a_late_reader_has_its_answers() -> None:
    async with served(SMALL, transport={"max_message_bytes": 65_536}) as (server, late):
        block = late.step_message(range(1000), [0] * 1000, np.zeros((1, 1000, F), np.float32))
        for _ in range(6):
            await late.send(*block)
        while server.statistics.blocks_total < 6:
            await asyncio.sleep(0)
        assert not server._postbox.is_empty
        server.stop()
        await other_work()
        assert [(await late.receive()).kind for _ in range(7)] == [*[Kind.STEPPED] * 6, Kind.GOODBYE]


async def test_a_recorder_that_has_room_again_sets_the_steps_going(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_commit = threading.Event()
    commit = RecordingWriter.commit

    def held(self: RecordingWriter) -> None:
        assert may_commit.wait(LATE_S)
        commit(self)

    monkeypatch.setattr(RecordingWriter, "commit", held)
    x = rng.standard_normal((30, 1, F)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep", "queue_batches": 2, "durability": "memory"}
    async with served(SMALL, recording=recording) as (server, client):
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], x))
        while server.statistics.batches_total < 2:
            await asyncio.sleep(0)
        await other_work()
        may_commit.set()
        reply = await client.receive()
        np.testing.assert_array_equal(reply.floats().reshape(30, H), whole(SMALL, x[:, 0])[0])


async def test_what_arrived_while_there_was_no_room_is_handled_when_a_job_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with served(SMALL) as (server, client):
        (owner,) = server._clients.all()
        with monkeypatch.context() as without_room:
            without_room.setattr(Server, "has_room", False)
            await client.send(msgpack.packb([Kind.PING, 9]))
            while not server._router.is_readable:
                await asyncio.sleep(0)
            await other_work()
        server.lifecycle.open(owner, ["s"], None, None, lambda *_: None)
        assert (await client.receive()).kind is Kind.PONG


async def test_an_arrival_does_not_keep_the_loop_busy_while_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = 0
    async with served(SMALL) as (server, client):
        (owner,) = server._clients.all()
        schedule = server.engine.schedule

        def counted() -> None:
            nonlocal rounds
            rounds += 1
            schedule()

        monkeypatch.setattr(server.engine, "schedule", counted)
        with monkeypatch.context() as without_room:
            without_room.setattr(Server, "has_room", False)
            await client.send(msgpack.packb([Kind.PING, 9]))
            while not rounds:
                await asyncio.sleep(0)
            await other_work()
            assert rounds < 20
        server.lifecycle.open(owner, ["s"], None, None, lambda *_: None)
        assert (await client.receive()).kind is Kind.PONG


async def test_a_handle_of_the_servers_former_life_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    different = itertools.count(1000, 1000)
    monkeypatch.setattr("secrets.randbelow", lambda _: next(different))
    async with served(SMALL) as (_, client):
        former = (await client.open("s")).handles()
    async with served(SMALL) as (_, client):
        assert (await client.open("s")).handles() != former
        assert (await client.step(former, [0], frame())).failures() == [(0, 0, Code.UNKNOWN_STREAM, 0)]
