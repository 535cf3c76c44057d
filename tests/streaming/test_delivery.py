"""Frames that are sent again, ahead of their turn or beyond the window: every frame is computed once."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from instep.core.typing import U64
from instep.streaming.api import Refusal
from instep_client.protocol.codes import Code
from tests.support.in_process import InProcessOrigin
from tests.support.models import SMALL, whole
from tests.support.states import floats_of
from tests.support.streaming import InlineExecutor, StreamingEngine, failures, random_frames, step, streaming

H, W = 8, 8


@pytest.fixture
async def kit() -> AsyncIterator[StreamingEngine]:
    async with streaming(InlineExecutor, window=W, credit=64, max_pending=96) as kit:
        yield kit


@pytest.fixture
def origin(kit: StreamingEngine) -> InProcessOrigin:
    return kit.frontend.connect()


async def opened(origin: InProcessOrigin, *names: str) -> U64:
    return (await origin.open(names)).handles


async def test_frames_sent_again_are_answered_with_the_same_bytes_and_not_computed_again(
    kit: StreamingEngine, origin: InProcessOrigin, rng: np.random.Generator
) -> None:
    handles = await opened(origin, "a", "b")
    x = random_frames(rng, W, 2)
    first = await step(origin, handles, [0, 0], x)
    for _ in range(3):
        again = await step(origin, handles, [0, 0], x)
        assert failures(again) == []
        assert again.y.tobytes() == first.y.tobytes()
    part = await step(origin, handles[1:], [3], x[3:6, 1:])
    assert part.y.tobytes() == first.y[3:6, 1:].tobytes()
    assert (kit.stats.frames_total, kit.engine.pending_frames) == (2 * W, 0)
    read = await origin.read_states(handles)
    for column in range(2):
        np.testing.assert_array_equal(floats_of(read.states, 1, H)[column], whole(SMALL, x[:, column])[1])


async def test_a_message_may_mix_what_was_applied_and_what_is_new_within_and_across_columns(
    kit: StreamingEngine, origin: InProcessOrigin, rng: np.random.Generator
) -> None:
    handles = await opened(origin, "ahead", "behind", "new")
    x = random_frames(rng, 6, 3)
    await step(origin, handles[:1], [0], x[:, :1])
    await step(origin, handles[1:2], [0], x[:2, 1:2])
    reply = await step(origin, handles, [0, 0, 0], x)
    assert failures(reply) == []
    for column in range(3):
        np.testing.assert_array_equal(reply.y[:, column], whole(SMALL, x[:, column])[0])
    assert kit.stats.frames_total == 3 * 6


async def test_many_windows_later_every_output_is_still_the_networks(
    origin: InProcessOrigin, rng: np.random.Generator
) -> None:
    handles = await opened(origin, "a")
    x = random_frames(rng, 20 * W)
    served, seq, acked = np.full((20 * W, H), np.nan, np.float32), 0, 0
    while seq < len(x):
        start = int(rng.integers(acked, seq + 1))  # some of them again
        stop = min(len(x), start + int(rng.integers(1, W + 1)), acked + W)
        if stop <= start:
            acked = start
            continue
        reply = await step(origin, handles, [start], x[start:stop], acked)
        assert failures(reply) == []
        served[start:stop] = reply.y[:, 0]
        seq = max(seq, stop)
        acked = int(rng.integers(acked, seq + 1))
    np.testing.assert_array_equal(served, whole(SMALL, x[:, 0])[0])


async def test_more_frames_than_the_credit_are_refused_as_a_whole_and_fit_once_others_are_answered(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 12)
    async with streaming(credit=8, max_pending=12) as kit:
        origin, other = kit.frontend.connect(), kit.frontend.connect()
        handles, others = await opened(origin, "a"), await opened(other, "b")
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
