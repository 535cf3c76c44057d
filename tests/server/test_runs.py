"""Several steps in a row where nobody else waits: the same answers, fewer words with the worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from instep.runtime.runs import MOST_STEPS, Ended
from instep.runtime.worker import Job

from instep.server.server import Server
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
FOREVER_NS = 10**18


@pytest.fixture
def runs() -> Callable[[Server], list[tuple[int, ...]]]:
    """Notes of every run of a server how many steps of how many streams it has."""

    def noting(server: Server) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        submit = server._worker.submit

        def noted(job: Job) -> None:
            if job.step is not None:
                shapes.append(job.step[1].shape)
            submit(job)

        server._worker.submit = noted  # type: ignore[method-assign]
        return shapes

    return noting


async def test_a_chunk_is_stepped_in_runs(
    rng: np.random.Generator, runs: Callable[[Server], list[tuple[int, ...]]], tmp_path: Path
) -> None:
    x = rng.standard_normal((1 + 2 * MOST_STEPS + 3, 2, F)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep", "queue_batches": 100}
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        server.engine.longest_run_ns = FOREVER_NS
        await client.hello()
        handles = (await client.open("a", "b")).handles()
        shapes = runs(server)
        y = (await client.step(handles, [0, 0], x)).floats().reshape(len(x), 2, H)
        for column in range(2):
            np.testing.assert_array_equal(y[:, column], whole(SMALL, x[:, column])[0])
        assert shapes == [(1, 2), (MOST_STEPS, 2), (MOST_STEPS, 2), (3, 2)], "the first step tells how long they take"
        assert server.statistics.batches_total == len(x)
        assert server.statistics.frames_total == x.shape[0] * 2


async def test_a_run_is_no_longer_than_others_may_wait(
    rng: np.random.Generator, runs: Callable[[Server], list[tuple[int, ...]]]
) -> None:
    x = rng.standard_normal((5, 1, F)).astype(np.float32)
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        server.engine.longest_run_ns = 0
        await client.hello()
        handles = (await client.open("s")).handles()
        shapes = runs(server)
        await client.step(handles, [0], x)
        assert shapes == [(1, 1)] * 5


async def test_the_length_of_a_run_comes_from_steps_of_its_own_size(
    rng: np.random.Generator, runs: Callable[[Server], list[tuple[int, ...]]]
) -> None:
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        server.engine.longest_run_ns = 1000
        await client.hello()
        few = server.engine._stepper.buckets[0]
        many = few + 1
        handles = (await client.open(*(f"s{number}" for number in range(1 + many)))).handles()
        shapes = runs(server)
        submit = server._worker.submit

        def timed(job: Job) -> None:
            done, (_, streams) = job.done, shapes_of(job)

            def done_after(ended: Ended, error: Exception | None) -> None:
                step_ns = 10 if streams <= few else 1_000_000
                done(replace(ended, ended_ns=ended.began_ns + ended.steps * step_ns), error)

            job.done = done_after
            submit(job)

        server._worker.submit = timed  # type: ignore[method-assign]
        small, large = [1, MOST_STEPS], [1, 1, 1]
        for turn in range(2):
            x = rng.standard_normal((1 + MOST_STEPS, 1, F)).astype(np.float32)
            await client.step(handles[:1], [turn * len(x)], x)
            x = rng.standard_normal((3, many, F)).astype(np.float32)
            await client.step(handles[1:], [turn * 3] * many, x)
            assert shapes == [(steps, 1) for steps in small] + [(steps, many) for steps in large]
            shapes.clear()
            small.reverse()


def shapes_of(job: Job) -> tuple[int, ...]:
    assert job.step is not None
    return job.step[1].shape


async def test_there_are_no_runs_while_others_wait(
    rng: np.random.Generator, runs: Callable[[Server], list[tuple[int, ...]]]
) -> None:
    x = rng.standard_normal((6, 4, F)).astype(np.float32)
    async with running(SMALL, engine={"max_batch_size": 2}) as server, RawClient(server.endpoint) as client:
        server.engine.longest_run_ns = FOREVER_NS
        await client.hello()
        handles = (await client.open("a", "b", "c", "d")).handles()
        server.engine._step_ns = dict.fromkeys(server.engine._stepper.buckets, 1)  # a long run would take no time
        shapes = runs(server)
        y = (await client.step(handles, [0] * 4, x)).floats().reshape(6, 4, H)
        for column in range(4):
            np.testing.assert_array_equal(y[:, column], whole(SMALL, x[:, column], max_batch_size=2)[0])
        assert shapes[0] == (1, 2)
        assert sum(steps * streams for steps, streams in shapes) == 24


async def test_streams_with_fewer_frames_bound_a_run(
    rng: np.random.Generator, runs: Callable[[Server], list[tuple[int, ...]]]
) -> None:
    x = rng.standard_normal((7, 2, F)).astype(np.float32)
    gate = Gate()
    x[0, 0, 0] = GATE_VALUE
    async with (
        running(SMALL, stepper=gate.stepper) as server,
        RawClient(server.endpoint) as client,
        RawClient(server.endpoint) as other,
    ):
        server.engine.longest_run_ns = FOREVER_NS
        await client.hello()
        await other.hello()
        handles = (await client.open("first", "long")).handles()
        short = (await other.open("short")).handles()
        shapes = runs(server)
        await client.send(*client.step_message(handles[:1], [0], x[:1, :1]))  # holds the worker
        while not server.engine.rings.pending_count:
            await asyncio.sleep(0)
        await client.send(*client.step_message(handles[1:], [0], x[:, 1:]))
        await other.send(*other.step_message(short, [0], x[:3, 1:]))
        while server.engine.rings.pending_count < 11:
            await asyncio.sleep(0)
        gate.open()
        replies = {reply.request: reply for reply in [await client.receive() for _ in range(2)]}
        y = replies[max(replies)].floats().reshape(7, H)
        np.testing.assert_array_equal(y, whole(SMALL, x[:, 1])[0])
        np.testing.assert_array_equal((await other.receive()).floats().reshape(3, H), y[:3])
        assert shapes == [(1, 1), (3, 2), (4, 1)]
