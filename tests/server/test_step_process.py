"""Steps in a process of their own: what a client sees is the same."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import psutil
import pytest
import torch

from instep.config import Config
from instep.core.typing import I64
from instep.models.portable.network import Rows
from instep.server import services
from instep.server.preparation import CannotServe
from instep.server.services import steps_in_process
from instep_client.protocol.wire import Code
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import CPU, running

F, H = 5, 8
POISON = 1234.5
DEATH = "the process that steps was killed by SIGKILL"


async def test_frames_and_changes_of_states_keep_their_order(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, F)).astype(np.float32)
    async with running(SMALL, apart=True) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        first = (await client.step(handles, [0], x[:4, None])).floats().reshape(4, H)
        np.testing.assert_array_equal(first, whole(SMALL, x[:4])[0])
        state = (await client.read_state(handles)).floats()
        np.testing.assert_array_equal(state.reshape(1, H), whole(SMALL, x[:4])[1])
        await client.reset(handles)
        second = (await client.step(handles, [4], x[4:, None])).floats().reshape(5, H)
        np.testing.assert_array_equal(second, whole(SMALL, x[4:])[0])


async def test_short_runs_in_the_loop_and_long_ones_in_the_process_give_the_networks_bits(
    rng: np.random.Generator,
) -> None:
    """Alone, together, and again alone: each run finds the states that the other kind has left."""
    x = rng.standard_normal((30, 7, F)).astype(np.float32)
    async with running(SMALL, apart=True) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open(*"abcdefg")).handles()
        y = np.zeros((30, 7, H), np.float32)
        for seq in range(30):
            for part in [slice(0, 7)] if seq % 3 == 1 else [slice(0, 1), slice(1, 4), slice(4, 7)]:
                reply = await client.step(handles[part], [seq] * len(handles[part]), x[seq : seq + 1, part])
                y[seq, part] = reply.floats().reshape(-1, H)
    for stream in range(7):
        np.testing.assert_array_equal(y[:, stream], whole(SMALL, x[:, stream])[0])


async def test_a_server_that_polls_gives_the_same_outputs(rng: np.random.Generator) -> None:
    x = rng.standard_normal((60, F)).astype(np.float32)
    async with running(SMALL, apart=True) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        y = [(await client.step(handles, [seq], x[seq : seq + 1, None], [seq])).floats() for seq in range(30)]
        for seq in range(30, 60):
            await client.send(*client.step_message(handles, [seq], x[seq : seq + 1, None], [29]))
        y += [(await client.receive()).floats() for _ in range(30)]
    np.testing.assert_array_equal(np.stack(y), whole(SMALL, x)[0])


async def test_a_failed_step_is_answered_and_the_streams_go_on(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Rows.run

    def fails(self: Rows, slots: I64, rows: I64) -> None:
        if POISON in self._tables[0][rows, 0]:
            raise RuntimeError("injected")
        run(self, slots, rows)

    monkeypatch.setattr(Rows, "run", fails)  # the process is forked with it
    x = rng.standard_normal((6, 2, F)).astype(np.float32)
    bad = x.copy()
    bad[3, 0, 0] = POISON
    async with running(SMALL, apart=True) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("bad", "bystander")).handles()
        reply = await client.step(handles[:1], [0], bad[:, :1])
        assert reply.failures() == [(0, 3, Code.STEP_FAILED, 3)]
        again = await client.step(handles[:1], [3], x[3:, :1])
        np.testing.assert_array_equal(again.floats().reshape(3, H), whole(SMALL, x[:, 0])[0][3:])
        other = await client.step(handles[1:], [0], x[:, 1:])
        np.testing.assert_array_equal(other.floats().reshape(6, H), whole(SMALL, x[:, 1])[0])
        assert server.default.engine.stats.step_failures_total == 1


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


def test_a_process_is_taken_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "usable_cores", lambda: 2)
    assert steps_in_process(CPU)
    assert not steps_in_process(torch.device("cuda:0"))
    monkeypatch.setattr(services, "usable_cores", lambda: 1)
    assert not steps_in_process(CPU)


async def test_no_process_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(CannotServe, match="no process for the steps can be started"):
        async with running(SMALL, apart=True):
            pass


@pytest.mark.parametrize(
    ("cores", "records", "forks", "most"),
    [(2, False, True, 128), (3, False, True, 0), (2, True, True, 0), (2, False, False, 0)],
)
def test_single_frames_are_stepped_in_the_loop_where_a_process_would_share_its_cores(
    cores: int, records: bool, forks: bool, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services, "usable_cores", lambda: cores)
    for max_batch_size in (512, 64):
        engine = {"max_batch_size": max_batch_size}
        asked = Config.model_validate({"engine": engine, "recording": {"file": "r.instep"} if records else {}})
        assert services.max_light_batch(asked, forks) == min(most, max_batch_size)
