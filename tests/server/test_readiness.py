"""Whether a server says that it takes new work, and whether it then does."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgpack
import numpy as np
import pytest

from instep.recording.writer import RecordingWriter
from instep.server.loop import Shutdown
from instep.server.server import Server
from instep_client.protocol.wire import PROTOCOL_VERSION, SENTENCES, Code, Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8


async def assert_takes_nothing_new(server: Server, client: RawClient, handles: list[int], why: str) -> None:
    """Every verb that admits something is refused, with that reason; what tells the server's state is answered."""
    x = np.zeros((1, len(handles), F), np.float32)
    admitted = [
        server.default.engine.table.open_count,
        server.default.engine.pending_frames,
        server.default.engine.unanswered_messages,
    ]
    for message in (
        client.open_message("new"),
        client.step_message(handles, [0] * len(handles), x),
        client.resume_message(["a"], [0], [0], take_over=True),
        client.reset_message(handles),
        client.fork_message(handles, [f"copy-{index}" for index in range(len(handles))]),
    ):
        reply = await client.ask(*message)
        assert (reply.kind, reply.code, reply.header[3]) == (Kind.ERROR, Code.SHUTTING_DOWN, why)
    async with RawClient(server.endpoint) as late:
        hello = await late.ask(msgpack.packb([Kind.HELLO, late.next_request(), PROTOCOL_VERSION, "", ""]))
        assert (hello.kind, hello.code, hello.header[3]) == (Kind.ERROR, Code.SHUTTING_DOWN, why)
    assert (await client.ask(msgpack.packb([Kind.PING, client.next_request()]))).kind is Kind.PONG
    assert (await client.statistics())["ready"] == 0.0
    assert [
        server.default.engine.table.open_count,
        server.default.engine.pending_frames,
        server.default.engine.unanswered_messages,
    ] == admitted


async def test_it_is_ready_while_it_serves_and_not_while_it_drains(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 1, F)).astype(np.float32)
    x[0, 0, 0] = GATE_VALUE
    gate = Gate()
    async with running(SMALL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        try:
            await client.hello()
            handles = (await client.open("a", "b")).handles()
            assert (await client.statistics())["ready"] == 1.0
            await client.send(*client.step_message(handles[:1], [0], x))
            while not server.default.engine.unanswered_messages:
                await asyncio.sleep(0)
            server.stop()
            await assert_takes_nothing_new(server, client, handles[1:].tolist(), SENTENCES[Code.SHUTTING_DOWN])
        finally:
            gate.open()
        reply = await client.receive()
        np.testing.assert_array_equal(reply.floats().reshape(2, H), whole(SMALL, x[:, 0])[0])
        assert (await client.receive()).kind is Kind.GOODBYE


@pytest.mark.parametrize("durability", ["memory", "commit"])
async def test_between_the_recorders_failure_and_the_servers_end_nothing_new_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durability: str
) -> None:
    """The server hears of the failure through its event loop; here that word comes late."""

    def full(self: object, *args: object) -> None:
        raise OSError("disk full, injected")

    path = tmp_path / "r.instep"
    failure = f"the recording {path} failed: disk full, injected"
    recording = {"file": path, "durability": durability}
    async with running(SMALL, recording=recording, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("a", "b")).handles()
        await server.default.engine.journal.committed(
            server.default.engine.journal.newest
        )  # nothing may fail before the step
        with monkeypatch.context() as injected:
            told: list[tuple[Shutdown, str]] = []
            injected.setattr(Shutdown, "fail", lambda shutdown, reason: told.append((shutdown, reason)))
            injected.setattr(RecordingWriter, "commit", full)
            await client.send(*client.step_message(handles[:1], [0], np.zeros((1, 1, F), np.float32)))
            while not server.default.engine.journal.has_failed or server.default.engine.pending_frames:
                await asyncio.sleep(0.001)
            if durability == "memory":  # which waits for nothing, so this may be answered, before the failure or after
                assert (await client.receive()).kind is Kind.STEPPED
            why = f"{SENTENCES[Code.SHUTTING_DOWN]}: its recording has failed"
            await assert_takes_nothing_new(server, client, handles[1:].tolist(), why)
            while not told:
                await asyncio.sleep(0.001)
        ((shutdown, reason),) = told
        shutdown.fail(reason)
        assert (await client.receive()).kind is Kind.GOODBYE
