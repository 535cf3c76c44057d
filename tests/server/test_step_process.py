"""Steps in a process of their own: what a client sees is the same."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from instep.config import EngineConfig
from instep.models.gru.step import GruStep
from instep.runtime.worker import Worker
from instep.server import assembly
from instep.server import server as server_module
from instep.server.assembly import steps_apart
from instep.server.preparation import CannotServe
from instep.server.server import Server
from instep_client.protocol.wire import Code
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import CPU, running

F, H = 5, 8
POISON = 1234.5
APART = {"steps_in": "process"}


async def test_frames_and_changes_of_states_keep_their_order(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, F)).astype(np.float32)
    async with running(SMALL, engine=APART) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        first = (await client.step(handles, [0], x[:4, None])).floats().reshape(4, H)
        np.testing.assert_array_equal(first, whole(SMALL, x[:4])[0])
        state = (await client.read_state(handles)).floats()
        np.testing.assert_array_equal(state.reshape(1, H), whole(SMALL, x[:4])[1])
        await client.reset(handles)
        second = (await client.step(handles, [4], x[4:, None])).floats().reshape(5, H)
        np.testing.assert_array_equal(second, whole(SMALL, x[4:])[0])
        assert server._worker.process is not None


@pytest.fixture
def _all_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a run of the smallest bucket takes, the next one counts as short."""
    monkeypatch.setattr("instep.server.engine._SHORT_NS", 10**15)


def begun(server: Server) -> list[int]:
    """Of how many streams the runs are that are handed to the process from now on."""
    process, sizes = server._worker.process, list[int]()
    assert process is not None
    begin = process.begin
    process.begin = lambda slots, rows: sizes.append(len(slots)) or begin(slots, rows)  # type: ignore[method-assign, func-returns-value]
    return sizes


@pytest.mark.usefixtures("_all_are_short")
async def test_short_runs_are_done_by_the_loop_bit_for_bit(rng: np.random.Generator) -> None:
    async with running(SMALL, engine=APART) as server, RawClient(server.endpoint) as client:
        await client.hello()
        small = server.engine._stepper.buckets[0]
        every = small + 3
        x = rng.standard_normal((30, every, F)).astype(np.float32)
        handles = (await client.open(*(f"s{number}" for number in range(every)))).handles()
        sizes, y = begun(server), np.zeros((30, every, H), np.float32)
        for seq in range(30):  # alone, together, and again alone: each finds the states that the other has left
            parts = [slice(0, every)] if seq % 3 == 1 else [slice(0, 1), slice(1, small), slice(small, every)]
            for part in parts:
                reply = await client.step(handles[part], [seq] * len(handles[part]), x[seq : seq + 1, part])
                y[seq, part] = reply.floats().reshape(-1, H)
    for stream in range(every):
        np.testing.assert_array_equal(y[:, stream], whole(SMALL, x[:, stream])[0])
    assert sizes == [1, *[every] * 10], "the first one, as nobody knew how long it takes, and those of a larger bucket"


@pytest.mark.usefixtures("_all_are_short")
async def test_frames_of_one_stream_that_wait_together_are_short_runs_one_after_the_other(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("instep.server.server._TICK_S", 1e6)  # it would hide what was forgotten
    x = rng.standard_normal((20, F)).astype(np.float32)
    async with running(SMALL, engine=APART) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s", "other")).handles()
        await client.step(handles[1:], [0], x[:1, None])
        sizes = begun(server)
        server.engine.longest_run_ns = 1  # each run is one step
        await client.send(*client.step_message(handles[:1], [0], x[:, None]))
        await client.send(*client.step_message(handles[1:], [1], x[1:2, None]))
        async with asyncio.timeout(30):
            answers = [(await client.receive()).floats() for _ in range(2)]
    by_size = {answer.size: answer.reshape(-1, H) for answer in answers}
    np.testing.assert_array_equal(by_size[20 * H], whole(SMALL, x)[0])
    np.testing.assert_array_equal(by_size[H], whole(SMALL, x[:2])[0][1:])
    assert sizes == []


@pytest.mark.usefixtures("_all_are_short")
async def test_beside_a_recorder_the_process_has_all_runs(tmp_path: Path) -> None:
    async with running(SMALL, engine=APART, recording={"file": tmp_path / "r.instep"}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            sizes = begun(server)
            for seq in range(5):
                assert (await client.step(handles, [seq], np.ones((1, 1, F), np.float32))).failures() == []
    assert sizes == [1] * 5


@pytest.mark.usefixtures("_all_are_short")
async def test_a_short_run_that_fails_is_answered_and_the_streams_go_on(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.standard_normal((4, F)).astype(np.float32)
    async with running(SMALL, engine=APART) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        first = (await client.step(handles, [0], x[:1, None])).floats()
        with monkeypatch.context() as patch:  # the process does not know of it
            patch.setattr(GruStep, "run", lambda _: 1 / 0)
            assert (await client.step(handles, [1], x[1:2, None])).codes() == [Code.STEP_FAILED]
        rest = (await client.step(handles, [1], x[1:, None])).floats()
    np.testing.assert_array_equal(np.concatenate([first, rest]).reshape(4, H), whole(SMALL, x)[0])


@pytest.mark.usefixtures("_all_are_short")
async def test_a_held_batch_that_is_short_is_answered_without_the_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.server.server._TICK_S", 1e6)
    engine = {**APART, "max_queue_delay_us": 20_000}
    async with running(SMALL, engine=engine) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s", "silent")).handles()
        sizes = begun(server)
        async with asyncio.timeout(30):
            for seq in range(3):
                assert (await client.step(handles[:1], [seq], np.ones((1, 1, F), np.float32))).failures() == []
    assert sizes == [1]


async def test_a_failed_step_is_answered_and_the_streams_go_on(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = GruStep.run

    def fails(self: GruStep) -> None:
        if bool((self.x[:, 0] == POISON).any()):
            raise RuntimeError("injected")
        run(self)

    monkeypatch.setattr(GruStep, "run", fails)  # the process is forked with it
    x = rng.standard_normal((6, 2, F)).astype(np.float32)
    bad = x.copy()
    bad[3, 0, 0] = POISON
    async with running(SMALL, engine=APART) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("bad", "bystander")).handles()
        reply = await client.step(handles[:1], [0], bad[:, :1])
        assert reply.failures() == [(0, 3, Code.STEP_FAILED, 3)]
        again = await client.step(handles[:1], [3], x[3:, :1])
        np.testing.assert_array_equal(again.floats().reshape(3, H), whole(SMALL, x[:, 0])[0][3:])
        other = await client.step(handles[1:], [0], x[:, 1:])
        np.testing.assert_array_equal(other.floats().reshape(6, H), whole(SMALL, x[:, 1])[0])
        assert server.statistics.step_failures_total == 1


async def test_the_death_of_the_process_ends_the_server() -> None:
    failure = "the step worker died: EOFError('the process that steps is gone')"
    async with running(SMALL, engine=APART, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()
        process = server._worker.process
        assert process is not None
        os.kill(process._pid, signal.SIGKILL)
        goodbye = await client.receive()
        assert "the step worker died" in str(goodbye.header)


@pytest.mark.parametrize("is_killed", [True, False])
async def test_a_step_that_never_ends_ends_with_the_server(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, is_killed: bool
) -> None:
    monkeypatch.setattr(GruStep, "run", lambda _: time.sleep(600))
    monkeypatch.setattr(server_module, "_FORCED_JOIN_S", 0.05)
    failure = "draining took longer than shutdown.drain_timeout_s = 0.05"
    if is_killed:
        failure = "the step worker died: EOFError('the process that steps is gone')"
    x = rng.standard_normal((1, 1, F)).astype(np.float32)
    shutdown = {"drain_timeout_s": 0.05}
    async with (
        running(SMALL, engine=APART, failure=failure, shutdown=shutdown) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        handles = (await client.open("s")).handles()
        process = server._worker.process
        assert process is not None
        pid = process._pid
        await client.send(*client.step_message(handles, [0], x))
        while not server.engine._runs_under_way:
            await asyncio.sleep(0.001)
        if is_killed:
            os.kill(pid, signal.SIGKILL)
        else:
            server.stop()
        assert failure in str((await client.receive()).header)
    assert not psutil.pid_exists(pid)
    assert server.unanswered_blocks == 1


async def test_without_a_thread_for_the_rest_there_is_no_server_and_nothing_stays_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(self: Worker) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Worker, "start", start)
    serving = running(SMALL, engine=APART)
    server = await serving.__aenter__()
    process = server._worker.process
    assert process is not None
    pid = process._pid
    with pytest.raises(RuntimeError, match="can't start new thread"):
        await serving.__aexit__(None, None, None)
    assert not psutil.pid_exists(pid)
    assert server._router._socket.closed


def test_a_process_is_taken_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assembly, "usable_cores", lambda: 2)
    assert steps_apart(EngineConfig(), CPU)
    assert not steps_apart(EngineConfig(steps_in="thread"), CPU)
    obstacles = [
        (EngineConfig(), torch.device("cuda:0"), "the device is cuda:0"),
        (EngineConfig(threads=2), CPU, "engine.threads is above 1"),
    ]
    for engine, device, why in obstacles:
        assert not steps_apart(engine, device)
        with pytest.raises(CannotServe, match=f"engine.steps_in is process, but {why}.*use auto or thread"):
            steps_apart(engine.model_copy(update={"steps_in": "process"}), device)
    monkeypatch.setattr(assembly, "usable_cores", lambda: 1)
    assert not steps_apart(EngineConfig(), CPU)
    assert steps_apart(EngineConfig(steps_in="process"), CPU)
    monkeypatch.delattr(os, "fork")
    with pytest.raises(CannotServe, match="this system has no fork"):
        steps_apart(EngineConfig(steps_in="process"), CPU)


async def test_no_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(CannotServe, match=r"no process for the steps can be started .*set engine.steps_in to thread"):
        async with running(SMALL, engine=APART):
            pass
