"""Producers in the server's own process get what producers behind a socket get, to the bit."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from instep.core.typing import F32
from instep.models.model import Model
from instep_client import AsyncClient
from instep_client.protocol.codes import Code
from tests.support.models import SMALL, plain, whole, with_head
from tests.support.running import running
from tests.support.states import floats_of
from tests.support.streaming import InlineExecutor, failures, random_frames, step, streaming

STREAMS, FRAMES = 5, 40


@pytest.mark.parametrize("model", [SMALL, plain(3, 16, layers=2), with_head(5, 8, 3)])
async def test_its_outputs_and_states_are_those_of_the_zeromq_front_end(rng: np.random.Generator, model: Model) -> None:
    features = model.description.features
    x = random_frames(rng, FRAMES, STREAMS, features)
    names = [f"s{number}" for number in range(STREAMS)]
    over_sockets = np.zeros((FRAMES, STREAMS, model.description.outputs), np.float32)
    async with running(model) as server, AsyncClient(server.endpoint) as client:
        for column, name in enumerate(names):
            over_sockets[:, column] = await (await client.open(name)).step(x[:, column])
    in_process = np.zeros_like(over_sockets)
    async with streaming(InlineExecutor, model=model) as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(names)).handles
        for first in range(0, FRAMES, 8):
            reply = await step(origin, handles, [first] * STREAMS, x[first : first + 8], first)
            in_process[first : first + 8] = reply.y
        states = floats_of((await origin.close(handles)).states, -1)
    np.testing.assert_array_equal(in_process, over_sockets)
    if model.description.outputs == states.shape[-1]:  # no dense layers
        for column in range(STREAMS):
            y, final = whole(model, x[:, column])
            np.testing.assert_array_equal(in_process[:, column], y)
            np.testing.assert_array_equal(states[column], final.reshape(-1))


async def test_each_step_gets_its_own_columns_of_a_reply_that_answers_several(rng: np.random.Generator) -> None:
    x = random_frames(rng, 2, 4)
    x[1, 2] = np.inf
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(list("abcd"))).handles
        parts = [slice(0, 1), slice(1, 3), slice(3, 4)]
        replies = await kit.all_done(
            *(step(origin, handles[part], [0] * (part.stop - part.start), x[:, part]) for part in parts)
        )
    assert [failures(reply) for reply in replies] == [[], [(1, 1, Code.NOT_FINITE, 1)], []]
    y: F32 = np.concatenate([reply.y for reply in replies], axis=1)
    for column in (0, 1, 3):
        np.testing.assert_array_equal(y[:, column], whole(SMALL, x[:, column])[0])


async def test_a_caller_that_was_cancelled_disturbs_nobody(rng: np.random.Generator) -> None:
    x = random_frames(rng, 2)
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        asked = [
            asyncio.ensure_future(each)
            for each in (
                step(origin, handles, [0], x[:1]),
                origin.read_states(np.repeat(handles, 2)),  # refused
                origin.read_states(handles),
            )
        ]
        await asyncio.sleep(0)
        for each in asked:
            each.cancel()
        (second,) = await kit.all_done(step(origin, handles, [1], x[1:]))
        np.testing.assert_array_equal(second.y[:, 0], whole(SMALL, x[:, 0])[0][1:])
