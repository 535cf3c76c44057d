"""Steps in a process of their own: what a client sees is the same."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import psutil
import pytest

from instep.models.portable.compiler import Rows
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
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
