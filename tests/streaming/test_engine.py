"""Batches and replies: which frames are stepped together, and which messages are answered together."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from instep.core.tables import MOST_STEPS
from instep.core.typing import U64
from instep.streaming.api import Refusal
from instep_client.protocol.codes import Code
from tests.support.models import SMALL, whole
from tests.support.streaming import Listener, StreamingEngine, failures, random_frames, step, streaming

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
    async with streaming(inline=True, max_queue_delay_ns=1_000_000) as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s", "silent"])).handles
        reply = await step(origin, handles[:1], [0], x)
        assert failures(reply) == []
        np.testing.assert_array_equal(reply.y[:, 0], whole(SMALL, x[:, 0])[0])


async def test_messages_of_one_origin_that_end_with_the_same_step_share_a_reply(rng: np.random.Generator) -> None:
    x = random_frames(rng, 1, 6)
    x[0, 3] = np.nan
    async with streaming() as kit:
        one, other = kit.listen(), kit.listen()
        of_one, of_other = await opened(kit, one, 4), await opened(kit, other, 2)
        kit.submit(one, 10, of_one[:1], [0], x[:, :1])
        kit.submit(other, 20, of_other, [0, 0], x[:, 4:])
        kit.submit(one, 11, of_one[1:], [0, 0, 0], x[:, 1:4])
        kit.loop.turn()
        assert kit.hand.shapes == [(1, 5)], "one batch for both"
        await kit.finish()
        assert (one.tags(), other.tags()) == ([[10, 11]], [[20]])
        (reply,) = one.replies
        assert (reply.messages[1].tolist(), reply.frames) == ([1, 3], 3)
        assert failures(reply) == [(3, 0, Code.NOT_FINITE, 0)]
        for column in range(3):
            np.testing.assert_array_equal(reply.y[:, column], whole(SMALL, x[:, column])[0])
        assert np.isnan(reply.y[0, 3]).all()
        np.testing.assert_array_equal(other.replies[0].y[:, 1], whole(SMALL, x[:, 5])[0])


@pytest.mark.parametrize(("most_frames", "shared"), [(64, [[0, 1, 2]]), (2, [[0, 1], [2]]), (1, [[0], [1], [2]])])
async def test_a_reply_to_several_messages_has_a_bounded_number_of_frames(
    rng: np.random.Generator, most_frames: int, shared: list[list[int]]
) -> None:
    async with streaming(max_reply_frames=most_frames) as kit:
        one = kit.listen()
        handles = await opened(kit, one, 3)
        for tag in range(3):
            kit.submit(one, tag, handles[tag : tag + 1], [0], random_frames(rng, 1))
        kit.loop.turn()
        await kit.finish()
        assert one.tags() == shared


async def test_an_origin_that_left_gets_no_replies_and_neither_does_the_next_one_with_its_number(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 1)
    async with streaming() as kit:
        gone = kit.listen()
        handles = await opened(kit, gone, 1)
        kit.submit(gone, 0, handles, [0], x)
        kit.loop.turn()
        kit.reaper.detach(gone)
        kit.reaper.tick(0)
        heir = kit.listen()
        assert heir.number != gone.number, "frames of the other one are still pending"
        await kit.finish()
        assert not gone.replies + heir.replies
        assert kit.listen().number == gone.number


async def test_frames_of_an_origin_that_left_before_they_were_admitted_are_nobodys(rng: np.random.Generator) -> None:
    async with streaming(inline=True) as kit:
        gone = kit.frontend.connect()
        asking = asyncio.ensure_future(step(gone, np.array([1], np.uint64), [0], random_frames(rng, 1)))
        await asyncio.sleep(0)
        kit.frontend.receive(1)  # submitted, and not yet admitted
        kit.frontend.disconnect(gone)
        heir = kit.frontend.connect()
        assert heir.number == gone.number
        await kit.settle()
        assert not asking.done()
        assert kit.engine.is_quiet
        asking.cancel()


async def test_more_frames_than_the_credit_are_refused_as_a_whole_and_fit_once_others_are_answered(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 12)
    async with streaming(credit=8, max_pending=12) as kit:
        origin, other = kit.frontend.connect(), kit.frontend.connect()
        handles, others = (await origin.open(["a"])).handles, (await other.open(["b"])).handles
        sent = [(origin, handles, 0, 6), (origin, handles, 6, 9), (other, others, 0, 7), (other, others, 0, 6)]
        replies = await kit.all_done(*(step(to, of, [first], x[first:last]) for to, of, first, last in sent))
        for refused in replies[1:3]:
            assert isinstance(refused, Refusal)
            assert refused.code is Code.BUSY
            assert refused.retry_after_us > 0
        assert kit.stats.busy_total == 2
        np.testing.assert_array_equal(replies[0].y[:, 0], whole(SMALL, x[:6, 0])[0])
        np.testing.assert_array_equal(replies[3].y, replies[0].y)
        (rest,) = await kit.all_done(step(origin, handles, [6], x[6:]))
        np.testing.assert_array_equal(rest.y[:, 0], whole(SMALL, x[:, 0])[0][6:])
