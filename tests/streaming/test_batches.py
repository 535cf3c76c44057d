"""Which frames are stepped together: batches, runs of several steps, and batches that are held."""

from __future__ import annotations

import numpy as np
import pytest

from instep.core.tables import MOST_STEPS
from instep.core.typing import U64
from tests.support.models import SMALL, whole
from tests.support.streaming import InlineExecutor, Listener, StreamingEngine, failures, random_frames, step, streaming

FOREVER_NS = 10**15
"""A delay of a batch that no test waits for."""


async def opened(kit: StreamingEngine, origin: Listener, count: int) -> U64:
    names = [f"{origin.number}-{number}" for number in range(count)]
    return (await kit.operations.open(origin, names, None, None)).handles


async def test_frames_that_arrive_during_a_step_share_the_next_one_unless_that_is_full(
    rng: np.random.Generator,
) -> None:
    async with streaming(max_batch_size=3) as kit:
        one = kit.listen()
        handles = await opened(kit, one, 6)
        for tag in range(3):
            kit.submit(one, tag, handles[tag : tag + 1], [0], random_frames(rng, 1))
            kit.loop.turn()
        assert kit.hand.shapes == [(1, 1)], "the executor has room, and the next batch is not full"
        for tag in range(3, 6):
            kit.submit(one, tag, handles[tag : tag + 1], [0], random_frames(rng, 1))
            kit.loop.turn()
        assert kit.hand.shapes == [(1, 1), (1, 3)], "a full batch is handed over during a step"
        await kit.finish_all()
        assert kit.hand.shapes == [(1, 1), (1, 3), (1, 2)]


async def test_frames_of_a_stream_that_wait_alone_are_stepped_in_one_run(rng: np.random.Generator) -> None:
    x = random_frames(rng, 1 + 2 * MOST_STEPS + 3, 2)
    async with streaming() as kit:
        one = kit.listen()
        kit.submit(one, 0, await opened(kit, one, 2), [0, 0], x)
        kit.loop.turn()
        while kit.hand.begun:
            await kit.finish(step_ns=10)
        assert kit.hand.shapes == [(1, 2), (MOST_STEPS, 2), (MOST_STEPS, 2), (3, 2)], "the first step tells the time"
        (reply,) = one.replies
        for column in range(2):
            np.testing.assert_array_equal(reply.y[:, column], whole(SMALL, x[:, column])[0])
        assert (kit.stats.batches_total, kit.stats.frames_total) == (len(x), 2 * len(x))


@pytest.mark.parametrize(("step_ns", "steps"), [(100_000, MOST_STEPS), (400_000, 2), (2_000_000, 1)])
async def test_a_run_takes_about_a_millisecond_at_most(rng: np.random.Generator, step_ns: int, steps: int) -> None:
    async with streaming() as kit:
        one = kit.listen()
        kit.submit(one, 0, await opened(kit, one, 1), [0], random_frames(rng, 20))
        kit.loop.turn()
        await kit.finish(step_ns=step_ns)
        assert kit.hand.shapes[1:] == [(steps, 1)]
        assert kit.engine.expected_ns == steps * step_ns
        await kit.finish_all()
        assert kit.engine.expected_ns == 0


async def test_a_batch_is_held_until_it_is_full_or_nothing_more_can_come(rng: np.random.Generator) -> None:
    async with streaming(max_batch_size=2, max_queue_delay_ns=FOREVER_NS) as kit:
        one = kit.listen()
        handles = await opened(kit, one, 3)
        kit.submit(one, 0, handles[:1], [0], random_frames(rng, 1))
        kit.loop.turn()
        kit.loop.turn()
        assert kit.hand.shapes == []
        kit.submit(one, 1, handles[1:2], [0], random_frames(rng, 1))
        kit.loop.turn()
        assert kit.hand.shapes == [(1, 2)], "it is full"
        await kit.finish()
        kit.submit(one, 2, handles[2:], [0], random_frames(rng, 1))
        kit.loop.turn()
        assert len(kit.hand.shapes) == 1
        kit.engine.draining = True
        kit.loop.turn()
        assert kit.hand.shapes == [(1, 2), (1, 1)], "the server drains"


async def test_a_held_batch_goes_when_its_time_is_up(rng: np.random.Generator) -> None:
    x = random_frames(rng, 3)
    async with streaming(InlineExecutor, max_queue_delay_ns=1_000_000) as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s", "silent"])).handles
        reply = await step(origin, handles[:1], [0], x)
        assert failures(reply) == []
        np.testing.assert_array_equal(reply.y[:, 0], whole(SMALL, x[:, 0])[0])
