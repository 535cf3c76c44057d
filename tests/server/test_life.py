"""A server's life over its socket: its readiness, its end, failures, and the turns of its loop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import numpy as np
import psutil
import pytest

from instep.models.portable.compiler import Rows
from instep.recording.writer import RecordingWriter
from instep.server.loop import Loop, Stall
from instep.server.preparation import CannotServe
from instep.server.server import Server
from instep.streaming.tasks import Tasks
from instep_client.protocol.wire import PROTOCOL_VERSION, Code, Kind
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


@pytest.mark.parametrize("drained", [False, True])
async def test_a_forced_end_does_not_wait_for_a_recorder_that_is_stuck(tmp_path: Path, drained: bool) -> None:
    recording, told = {"path": tmp_path / "r.instep"}, list[dict[str, Any]]()
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


@pytest.mark.parametrize("verb", ["add_inputs", "commit", "commit at the last checkpoint"])
async def test_a_recording_that_fails_ends_the_server_with_a_reason_and_nothing_is_answered_any_more(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full, injected")

    recording = {"path": tmp_path / "r.instep"}
    failure = f"the recording {recording['path']} failed: disk full, injected"
    ends = verb.endswith("checkpoint")
    async with running(SMALL, recording=recording, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        if ends:
            assert (await client.step(handles, [0], random_frames(rng, 1))).kind is Kind.STEPPED
        monkeypatch.setattr(RecordingWriter, verb.partition(" ")[0], full)
        if ends:
            server.stop()
            async with asyncio.timeout(server.config.shutdown.drain_timeout_s / 2):
                reply = await client.receive()
        else:
            reply = await client.step(handles, [0], random_frames(rng, 1))
            assert failure in reply.header[2]
        assert reply.kind is Kind.GOODBYE
    assert server.unanswered_messages == (0 if ends else 1)


async def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    async with running(SMALL, recording={"path": path}) as server:
        with pytest.raises(CannotServe, match=path.name):
            async with running(SMALL, recording={"path": path}):
                pass
        with pytest.raises(CannotServe, match="cannot bind"):
            async with running(SMALL, transport={"endpoint": server.endpoint}):
                pass
    async with running(SMALL, recording={"path": path}, transport={"endpoint": server.endpoint}):
        pass


# ── What a restart changes ─────────────────────────────────────────────────────────────────────────────────────────


async def test_a_handle_of_the_servers_former_life_is_unknown(rng: np.random.Generator) -> None:
    handles: list[int] = []
    for _ in range(2):
        async with running(SMALL) as server, RawClient(server.endpoint) as client:
            await client.hello()
            handles += (await client.open("s")).handles().tolist()
            reply = await client.step(handles[:1], [0], random_frames(rng, 1))
            assert reply.codes() == ([Code.UNKNOWN_STREAM] if handles[1:] else [])


# ── Readiness ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
            x_new, why = np.zeros((1, 1, F), np.float32), Code.SHUTTING_DOWN.sentence
            for message in (
                client.open_message("new"),
                client.step_message(handles[1:], [0], x_new),
                client.resume_message(["a"], [0], [0], take_over=True),
                client.reset_message(handles[1:]),
                client.fork_message(handles[1:], ["copy"]),
            ):
                reply = await client.ask(*message)
                assert (reply.kind, reply.code, reply.header[3]) == (Kind.ERROR, Code.SHUTTING_DOWN, why)
            async with RawClient(server.endpoint) as late:
                hello = await late.ask(msgpack.packb([Kind.HELLO, late.next_request(), PROTOCOL_VERSION, "", ""]))
                assert (hello.kind, hello.code) == (Kind.ERROR, Code.SHUTTING_DOWN)
            assert (await client.ask(msgpack.packb([Kind.PING, client.next_request()]))).kind is Kind.PONG
            assert (await client.statistics())["ready"] == 0.0
            assert server.default.engine.table.open_count == 2
        finally:
            gate.open()
        reply = await client.receive()
        np.testing.assert_array_equal(reply.floats().reshape(2, H), whole(SMALL, x[:, 0])[0])
        assert (await client.receive()).kind is Kind.GOODBYE


# ── Steps in a process of their own ────────────────────────────────────────────────────────────────────────────────

DEATH = "the process that steps was killed by SIGKILL"


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children()}


async def test_the_death_of_the_process_ends_the_server() -> None:
    before = children()
    async with running(SMALL, apart=True, failure=DEATH) as server, RawClient(server.endpoint) as client:
        await client.hello()
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        goodbye = await client.receive()
        assert DEATH in str(goodbye.header[2])


@pytest.mark.parametrize("is_killed", [True, False])
async def test_a_step_that_never_ends_ends_with_the_server(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    monkeypatch.setattr(Rows, "run", lambda *_: time.sleep(600))  # the process is forked with it
    failure = DEATH if is_killed else "draining took longer than shutdown.drain_timeout_s = 0.05"
    before = children()
    async with (
        running(SMALL, apart=True, failure=failure, shutdown={"drain_timeout_s": 0.05}) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        handles = (await client.open("s")).handles()
        (pid,) = children() - before
        await client.send(*client.step_message(handles, [0], rng.standard_normal((1, 1, F)).astype(np.float32)))
        while not server.default.engine.is_running:
            await asyncio.sleep(0.001)
        if is_killed:
            os.kill(pid, signal.SIGKILL)
        else:
            server.stop()
        assert failure in str((await client.receive()).header[2])
    assert not psutil.pid_exists(pid)
    assert server.unanswered_messages == 1


class BusyFrontend:
    """A front end at which something has always arrived."""

    signal_fd = None
    is_readable = True
    received = 0

    def receive(self, budget_ns: int) -> bool:
        self.received += 1
        return True


def idle_engine() -> Any:
    return SimpleNamespace(
        collect=lambda: False,
        flush=lambda: None,
        admit=lambda: None,
        schedule=lambda: None,
        lost=[],
        wanted=set(),
        is_running=False,
        expected_ns=0,
        executor=SimpleNamespace(has_ended=False, signal_fd=None),
    )


def fail(error: BaseException) -> None:
    pytest.fail(repr(error))


async def test_turns_that_others_take_do_not_multiply_those_that_are_due() -> None:
    loop, frontend = Loop(0, fail), BusyFrontend()
    loop.frontends = [cast(Any, frontend)]
    loop.add(cast(Any, SimpleNamespace(engine=idle_engine(), tasks=Tasks(fail), steps_apart=True)))
    for _ in range(50):
        loop.turn()  # as when a signal arrives
        loop.wake()
    frontend.received, iterations = 0, 20
    for _ in range(iterations):
        await asyncio.sleep(0)
    loop.stop()
    assert 0 < frontend.received <= iterations


def test_a_loop_that_was_held_up_has_time_to_read_and_one_that_always_is_has_it_now_and_then() -> None:
    stall, began_ns = Stall(), time.monotonic_ns()

    def look(after_s: float) -> bool:
        return stall.look(began_ns + round(after_s * 1e9))

    assert [look(after_s) for after_s in (0.05, 0.9, 1.8)] == [False] * 3
    assert [look(after_s) for after_s in (9.8, 9.9, 10.7, 10.9)] == [True, True, True, False]
    assert [look(after_s) for after_s in range(20, 40, 2)] == [True, False] * 5
