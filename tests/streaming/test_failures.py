"""Steps that fail: the streams that they touch are told, the others never notice."""

from __future__ import annotations

import asyncio

import numpy as np

from instep.runtime.executor import StateLost
from instep_client.protocol.codes import Code
from tests.support.models import SMALL, whole
from tests.support.streaming import StreamingEngine, failures, random_frames, step, streaming

INJECTED = RuntimeError("injected")


async def test_a_failed_step_is_answered_and_its_streams_continue(rng: np.random.Generator) -> None:
    x = random_frames(rng, 6, 2)
    truth = whole(SMALL, x[:, 0])[0]
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["bad", "beside"])).handles
        asked = asyncio.ensure_future(step(origin, handles[1:], [0], x[:3, 1:]))
        await kit.settle()
        while kit.hand.begun:
            await kit.finish(step_ns=10)  # now runs of several steps begin
        beside = await asked
        failing = asyncio.ensure_future(step(origin, handles[:1], [0], x[:, :1]))
        await kit.settle()
        assert kit.hand.shapes[-1] == (6, 1)
        await kit.finish(error=INJECTED, after=3)
        reply = await failing
        assert failures(reply) == [(0, 3, Code.STEP_FAILED, 3)]
        np.testing.assert_array_equal(reply.y[:3, 0], truth[:3])
        assert np.isnan(reply.y[3:]).all()
        again, rest = await kit.all_done(
            step(origin, handles[:1], [3], x[3:, :1]), step(origin, handles[1:], [3], x[3:, 1:])
        )
        np.testing.assert_array_equal(again.y[:, 0], truth[3:])
        served = np.concatenate([beside.y[:, 0], rest.y[:, 0]])
        np.testing.assert_array_equal(served, whole(SMALL, x[:, 1])[0])
        assert (kit.stats.step_failures_total, kit.failures) == (1, [INJECTED])


async def lose(kit: StreamingEngine) -> None:
    slots, _ = kit.hand.begun[0]
    await kit.finish(error=StateLost("injected"))
    assert kit.table.open_count < 2 or not kit.table.lost[slots].any()


async def test_a_stream_whose_state_is_lost_is_closed_and_its_owner_told(rng: np.random.Generator) -> None:
    x = random_frames(rng, 3, 2)
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["lost", "kept"])).handles
        asked = asyncio.ensure_future(step(origin, handles[:1], [0], x[:1, :1]))
        behind = asyncio.ensure_future(step(origin, handles[:1], [1], x[1:, :1]))
        await kit.settle()
        await lose(kit)
        assert failures(await asked) == [(0, 0, Code.STATE_LOST, 0)]
        assert failures(await behind) == [(0, 0, Code.STATE_LOST, 0)]
        (event,) = origin.events
        assert (event.code, event.handles.tolist()) == (Code.STATE_LOST, handles[:1].tolist())
        assert kit.stats.evicted_by_reason == {"state_lost": 1}
        assert [event[2:] for event in kit.engine.events.since(0, "lost")[1:]] == [("lost", "lost", "state_lost", 0)]
        (kept,) = await kit.all_done(step(origin, handles[1:], [0], x[:, 1:]))
        np.testing.assert_array_equal(kept.y[:, 0], whole(SMALL, x[:, 1])[0])
        assert (await origin.open(["lost"])).codes.tolist() == [0]
