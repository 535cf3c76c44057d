"""A server's life over its socket: what it waits for at its end, and what ends it early."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.frontends.zmq.router import Router
from instep.recording.records import OpenStream
from instep.recording.writer import RecordingWriter
from instep.server.preparation import CannotServe
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind
from tests.support.commits import held_commits
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.streaming import random_frames

F, H = 5, 8


async def taken(server: Server, messages: int = 1) -> None:
    """Wait until the server has taken this many messages that it has not answered."""
    while server.default.engine.unanswered_messages < messages:
        await asyncio.sleep(0.001)


def waiting(rng: np.random.Generator, timesteps: int = 1) -> np.ndarray:
    """Frames whose step waits for the gate."""
    x = random_frames(rng, timesteps)
    x[0, 0, 0] = GATE_VALUE
    return x


async def test_a_stream_whose_frames_wait_does_not_end_because_the_loop_was_held_up(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instep.streaming.operations._LOOK_EVERY", 1)
    receive, empty_looks = Router.receive, 0

    def late(router: Router, at_most: int) -> Iterator[tuple[bytes, list[bytes]]]:
        """ZeroMQ's own threads were held up as well."""
        nonlocal empty_looks
        empty_looks -= 1
        return receive(router, at_most) if empty_looks < 0 else iter(())

    monkeypatch.setattr(Router, "receive", late)
    async with running(SMALL, limits={"max_idle_s": 3}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], random_frames(rng, 1)))
        time.sleep(3.5)  # noqa: ASYNC251
        empty_looks = 10
        reply = await client.receive()
        assert (reply.kind, reply.failures()) == (Kind.STEPPED, [])


# ── The end ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_at_the_end_everything_that_was_taken_is_answered_and_everything_else_refused(
    rng: np.random.Generator,
) -> None:
    x, gate = waiting(rng, 32), Gate()
    async with running(SMALL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s", "t")).handles()
        await client.send(*client.step_message(handles[:1], [0], x))
        await taken(server)
        await client.send(*client.close_message(handles[:1]))
        await client.send(*client.step_message(handles[1:], [0], x[1:2]))
        await taken(server, 2)
        server.stop()
        assert (await client.step(handles[1:], [1], x[2:3])).code is Code.SHUTTING_DOWN
        gate.open()
        replies = [await client.receive() for _ in range(4)]
    assert [reply.kind for reply in replies[:3]].count(Kind.STEPPED) == 2
    by_size = {len(reply.floats()): reply for reply in replies[:3] if reply.kind is Kind.STEPPED}
    y, final = whole(SMALL, x[:, 0])
    np.testing.assert_array_equal(by_size[32 * H].floats().reshape(32, H), y)
    (closed,) = (reply for reply in replies if reply.kind is Kind.CLOSED)
    np.testing.assert_array_equal(closed.floats(), final.ravel())
    assert replies[-1].kind is Kind.GOODBYE
    assert server.unanswered_messages == 0


async def test_a_forced_end_leaves_messages_unanswered_and_counts_them(rng: np.random.Generator) -> None:
    gate = Gate()
    async with running(SMALL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], waiting(rng)))
        await taken(server)
        server.stop(drain=False)
        assert (await client.receive()).kind is Kind.GOODBYE
    gate.open()
    assert server.unanswered_messages == 1


@pytest.mark.parametrize("drained", [False, True])
async def test_a_forced_end_does_not_wait_for_a_recorder_that_is_stuck(tmp_path: Path, drained: bool) -> None:
    recording, told = {"file": tmp_path / "r.instep"}, list[dict[str, Any]]()
    async with held_commits() as may_commit:
        async with running(SMALL, recording=recording, told=told) as server, RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open("s")
            may_commit.clear()
            await client.send(*client.open_message("late"))
            while server.default.engine.table.open_count < 2:
                await asyncio.sleep(0.001)
            if drained:
                server.stop()
                await asyncio.sleep(0.05)
            server.stop(drain=False)
            assert (await client.receive()).kind is Kind.GOODBYE
        assert [entry["event"] for entry in told if entry["level"] == "warning"] == ["recording not closed"]
        may_commit.set()
        (thread,) = (thread for thread in threading.enumerate() if thread.name == "instep-recorder")
        await asyncio.to_thread(thread.join)
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        assert (await client.resume(["s"], [0], opened.epochs())).codes() == []


async def test_a_forced_end_leaves_no_thread_that_the_process_would_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read, is_reading = threading.Event(), asyncio.Event()
    loop, recording = asyncio.get_running_loop(), {"file": tmp_path / "r.instep"}

    def stuck(*_: object) -> list[OpenStream]:
        loop.call_soon_threadsafe(is_reading.set)
        may_read.wait()
        return []

    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        epochs = (await client.open("s")).epochs()
    monkeypatch.setattr("instep.server.services.load_open_streams", stuck)
    before = set(threading.enumerate())
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        await client.send(*client.resume_message(["s"], [0], epochs))
        await is_reading.wait()
        server.stop(drain=False)
    assert [thread.name for thread in set(threading.enumerate()) - before if not thread.daemon] == []
    may_read.set()


async def test_draining_ends_after_its_time_though_a_step_never_ends(rng: np.random.Generator) -> None:
    gate = Gate()
    shutdown = {"drain_timeout_s": 0.05}
    failure = "draining took longer than shutdown.drain_timeout_s = 0.05"
    async with running(SMALL, stepper=gate.stepper, shutdown=shutdown, failure=failure) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            await client.send(*client.step_message(handles, [0], waiting(rng)))
            await taken(server)
            server.stop()
            goodbye = await client.receive()
            assert (goodbye.kind, failure in goodbye.header[2]) == (Kind.GOODBYE, True)
    gate.open()
    assert server.unanswered_messages == 1


async def test_an_opening_that_waits_for_the_recording_is_answered_before_the_goodbye_and_there_after_a_restart(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    state = rng.standard_normal((1, 1, H)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep"}
    async with held_commits() as may_commit, running(SMALL, recording=recording) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            may_commit.clear()
            await client.send(*client.open_message("s", states=state))
            while not server.default.engine.table.open_count:
                await asyncio.sleep(0.001)
            server.stop()
            await asyncio.sleep(0.05)
            may_commit.set()
            opened = await client.receive()
            assert (opened.kind, opened.codes()) == (Kind.OPENED, [])
            assert (await client.receive()).kind is Kind.GOODBYE
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        resumed = await client.resume(["s"], [0], opened.epochs())
        assert resumed.codes() == []
        np.testing.assert_array_equal((await client.read_state(resumed.handles())).floats(), state.ravel())


# ── An early end ───────────────────────────────────────────────────────────────────────────────────────────────────


class DyingGate(Gate):
    """A step that ends its thread."""

    def wait(self) -> None:
        raise SystemExit("injected")


async def test_a_dead_executor_ends_the_server_with_a_reason(rng: np.random.Generator) -> None:
    failure = "the thread that steps has died: SystemExit('injected')"
    async with running(SMALL, stepper=DyingGate().stepper, failure=failure) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            goodbye = await client.step(handles, [0], waiting(rng))
            assert goodbye.kind is Kind.GOODBYE
            assert "has died" in goodbye.header[2]


async def test_a_bug_in_a_request_ends_the_server_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = "a bug in the server's loop: ZeroDivisionError('injected')"
    async with running(SMALL, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()

        async def buggy(*_: Any) -> None:
            raise ZeroDivisionError("injected")

        monkeypatch.setattr(server.default.operations, "open", buggy)
        assert (await client.open("s")).kind is Kind.GOODBYE


@pytest.mark.parametrize("verb", ["add_inputs", "commit"])
async def test_a_recording_that_fails_ends_the_server_with_a_reason_and_nothing_is_answered_any_more(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full, injected")

    recording = {"file": tmp_path / "r.instep"}
    failure = f"the recording {recording['file']} failed: disk full, injected"
    async with running(SMALL, recording=recording, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        monkeypatch.setattr(RecordingWriter, verb, full)
        reply = await client.step(handles, [0], random_frames(rng, 1))
        assert reply.kind is Kind.GOODBYE
        assert failure in reply.header[2]
    assert server.unanswered_messages == 1


async def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    async with running(SMALL, recording={"file": path}) as server:
        with pytest.raises(CannotServe, match=path.name):
            async with running(SMALL, recording={"file": path}):
                pass
        with pytest.raises(CannotServe, match="cannot bind"):
            async with running(SMALL, transport={"endpoint": server.endpoint}):
                pass
    async with running(SMALL, recording={"file": path}, transport={"endpoint": server.endpoint}):
        pass


# ── What a restart changes ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_handle_of_the_servers_former_life_is_unknown(rng: np.random.Generator) -> None:
    handles: list[int] = []
    for _ in range(3):
        async with running(SMALL) as server, RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open("s")
            for former in handles:
                reply = await client.step([former], [0], random_frames(rng, 1))
                assert reply.failures() == [(0, 0, Code.UNKNOWN_STREAM, 0)]
            handles.append(int(opened.handles()[0]))
    assert len(set(handles)) == 3
