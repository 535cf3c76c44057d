"""The rows that measure the client library: many tasks over one connection, and many connections in one process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Final

import numpy as np

from benchmarks.load import Inputs, all_in_flight
from benchmarks.measurement import Bench, Row, compared, interleave
from benchmarks.reference import MAX_ROWS, BenchmarkModel, WrongOutput, measured, truth
from instep.core.typing import F32
from instep_client import AsyncClient, AsyncStream
from instep_client.states import state_rows

TASKS: Final = 256
CONNECTIONS: Final = 500
TIMESTEPS: Final = 128
"""Different inputs, which are repeated."""


def tasks_256(bench: Bench) -> list[Row]:
    """Tasks that each step a stream of their own over one connection, against a bare socket with blocks as wide."""
    tasks, blocks = "tasks, awaits/s of one process", "bare blocks of 256, frames/s"
    model = BenchmarkModel.of(bench, "tasks-256")
    x = model.inputs(TIMESTEPS, TASKS)
    with bench.serve(model.folder, []) as server:
        sides = {
            tasks: lambda: asyncio.run(_step_in_tasks(server.endpoint, model, x, 1, bench.seconds)),
            blocks: lambda: measured(server.endpoint, model, [Inputs.of(x)], all_in_flight(bench.seconds)),
        }
        samples = interleave(bench, sides)
    what = "256 tasks that await AsyncStream.step over a bare socket that sends their frames as one block"
    return [compared("tasks-256", what, model.description, samples, tasks, blocks, 0.3)]


def connections_500(bench: Bench) -> list[Row]:
    """Clients of one stream each, against one bare socket that sends the same messages."""
    count = bench.scaled(CONNECTIONS, 10)
    clients, bare = "connections, awaits/s of one process", "one bare socket, frames/s"
    model = BenchmarkModel.of(bench, "connections-500")
    x = model.inputs(TIMESTEPS, count)
    inputs = model.lone_inputs(TIMESTEPS, count)
    with bench.serve(model.folder, ["--set", f"engine.max_streams={2 * count}"]) as server:
        sides = {
            clients: lambda: asyncio.run(_step_in_tasks(server.endpoint, model, x, count, bench.seconds)),
            bare: lambda: measured(server.endpoint, model, inputs, all_in_flight(bench.seconds)),
        }
        samples = interleave(bench, sides)
    what = "500 connections of one process, a stream each, over one bare socket with the same messages"
    return [compared("connections-500", what, model.description, samples, clients, bare, None)]


async def _step_in_tasks(endpoint: str, model: BenchmarkModel, x: F32, connections: int, seconds: float) -> float:
    """Frames per second of a task for each stream of x; streams take turns among the connections.

    Raises:
        WrongOutput: when a final state or the newest output of a stream is not that of the network.
    """
    async with AsyncExitStack() as stack:
        clients = [AsyncClient(endpoint, timeout_s=60.0) for _ in range(connections)]
        for client in clients:
            await stack.enter_async_context(client)
        streams = [await clients[number % connections].open(f"task-{number}") for number in range(x.shape[1])]
        frames = [np.ascontiguousarray(x[:, number]) for number in range(len(streams))]
        began = time.perf_counter()
        deadline = began + seconds
        newest = await asyncio.gather(*map(_step_until, streams, frames, [deadline] * len(streams)))
        rate = sum(stream.next_seq for stream in streams) / (time.perf_counter() - began)
        await _check_and_close(streams, model, x, newest)
    return rate


async def _step_until(stream: AsyncStream, frames: F32, deadline: float) -> F32:
    """Step a stream until it is time, at least once; its newest output."""
    while True:
        for frame in frames:
            output = await stream.step(frame)
            if time.perf_counter() >= deadline:
                return output


async def _check_and_close(
    streams: Sequence[AsyncStream], model: BenchmarkModel, x: F32, newest: Sequence[F32]
) -> None:
    for first in range(0, len(streams), MAX_ROWS):
        part = slice(first, first + MAX_ROWS)
        counts = np.array([stream.next_seq for stream in streams[part]])
        outputs, states = truth(model.truth, x[:, part], counts)
        finals = [state_rows(await stream.close(), model.state, None) for stream in streams[part]]
        if not (np.array_equal(outputs[0], np.stack(newest[part])) and np.array_equal(states, np.concatenate(finals))):
            raise WrongOutput("streams of the client differ from the network, so no figure of this row counts")
