"""Which messages are answered together, and when."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from instep_client.protocol.codes import Code
from tests.support.models import SMALL, whole
from tests.support.streaming import InlineExecutor, Listener, StreamingEngine, failures, random_frames, step, streaming


async def opened(kit: StreamingEngine, origin: Listener, count: int) -> np.ndarray:
    """Handles of new streams."""
    names = [f"{origin.number}-{number}" for number in range(count)]
    return (await kit.operations.open(origin, names, None, None)).handles


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


async def test_frames_that_were_applied_before_are_answered_with_the_outputs_of_then(
    rng: np.random.Generator,
) -> None:
    """Later frames take the rows of the repeated ones before the message is complete."""
    x, window = random_frames(rng, 12), 4
    truth = whole(SMALL, x[:, 0])[0]
    async with streaming(window=window) as kit:
        one = kit.listen()
        handles = await opened(kit, one, 2)
        kit.submit(one, 0, handles[:1], [0], x[:3])
        kit.loop.turn()
        await kit.finish_all()
        both = np.repeat(x[:4], 2, axis=1)
        kit.submit(one, 1, handles, [0, 0], both)  # three of the first stream's frames are repeats
        kit.submit(one, 2, handles[:1], [4], x[4:7], acked=3)
        kit.loop.turn()
        await kit.finish_all()
        by_tag = {int(reply.messages[0, 0]): reply for reply in one.replies}
        for column in range(2):
            np.testing.assert_array_equal(by_tag[1].y[:, column], truth[:4])
        np.testing.assert_array_equal(by_tag[2].y[:, 0], truth[4:7])
        assert kit.stats.frames_total == 3 + 1 + 4 + 3


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
    async with streaming(InlineExecutor) as kit:
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
