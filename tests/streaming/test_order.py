"""Frames and requests on their streams keep the order in which they were sent, within one turn of the loop too."""

from __future__ import annotations

import numpy as np
import pytest

from instep.core.typing import F32
from instep.streaming.api import StatesRead
from instep_client.protocol.codes import Code
from tests.support.models import SMALL, whole
from tests.support.states import floats_of, rows_of
from tests.support.streaming import failures, random_frames, step, streaming

H = 8
ONES: F32 = np.ones((1, 1, H), np.float32)


async def test_a_write_finds_the_frames_before_it_pending_and_changes_the_state_for_those_behind_it(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 5)
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        none = np.zeros(1, np.int32)

        async def write() -> list[int]:
            request = kit.operations.write_states(origin, handles, rows_of(ONES), none)
            return list((await kit.frontend.ask(lambda: request)).tolist())

        before, refused = await kit.all_done(step(origin, handles, [0], x[:2]), write())
        assert refused == [Code.FRAMES_PENDING]
        written, behind = await kit.all_done(write(), step(origin, handles, [2], x[2:]))
        assert written == [0]
    np.testing.assert_array_equal(before.y[:, 0], whole(SMALL, x[:2, 0])[0])
    np.testing.assert_array_equal(behind.y[:, 0], whole(SMALL, x[2:, 0], ONES[0])[0])


async def test_a_close_answers_the_frames_before_it_and_the_stream_takes_none_behind_it(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 5)
    y, final = whole(SMALL, x[:3, 0])
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        before, closed, behind = await kit.all_done(
            step(origin, handles, [0], x[:3]), origin.close(handles), step(origin, handles, [3], x[3:])
        )
    np.testing.assert_array_equal(before.y[:, 0], y)
    np.testing.assert_array_equal(floats_of(closed.states, 1, H)[0], final)
    assert failures(behind) == [(0, 0, Code.UNKNOWN_STREAM, 0)]


async def test_a_close_that_could_lose_outputs_is_refused_until_they_have_come(rng: np.random.Generator) -> None:
    x = random_frames(rng, 3)
    y, final = whole(SMALL, x[:, 0])
    async with streaming() as kit:
        owner = kit.frontend.connect()
        opened = await owner.open(["early", "late"])
        both = np.repeat(x, 2, axis=1)
        none = np.zeros(2, np.uint64)
        answered, closed = await kit.all_done(
            step(owner, opened.handles, [0, 0], both), owner.close(opened.handles, none)
        )
        assert closed.codes.tolist() == [Code.FRAMES_PENDING] * 2
        np.testing.assert_array_equal(answered.y[:, 0], y)
        [closed] = await kit.all_done(owner.close(opened.handles[:1], np.array([3], np.uint64)))
        np.testing.assert_array_equal(floats_of(closed.states, 1, H)[0], final)
        kit.frontend.disconnect(owner)  # the replies were lost on the way, say
        heir = kit.frontend.connect()
        resumed = await heir.resume(["late"], none[:1], opened.epochs[1:])
        assert resumed.next_seqs.tolist() == [3]
        [again] = await kit.all_done(step(heir, resumed.handles, [0], x))
        np.testing.assert_array_equal(again.y[:, 0], y)


async def test_a_resume_fences_the_frames_behind_it_and_waits_for_those_before_it(rng: np.random.Generator) -> None:
    x = random_frames(rng, 5)
    async with streaming() as kit:
        origin, heir = kit.frontend.connect(), kit.frontend.connect()
        opened = await origin.open(["s"])
        none = np.zeros(1, np.uint64)
        before, resumed, behind = await kit.all_done(
            step(origin, opened.handles, [0], x[:3]),
            heir.resume(["s"], none, opened.epochs),
            step(origin, opened.handles, [3], x[3:]),
        )
        assert failures(before) == []
        assert resumed.next_seqs.tolist() == [3]
        assert failures(behind) == [(0, 0, Code.FENCED, 0)]


async def test_a_read_shows_the_state_before_the_frame_of_its_seq_whatever_is_pending(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 6)
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        stepped, read, _ = await kit.all_done(
            step(origin, handles, [0], x[:4]), origin.read_states(handles), step(origin, handles, [4], x[4:])
        )
        assert failures(stepped) == []
        (seq,) = read.next_seqs.tolist()
        assert 0 <= seq <= 4
    np.testing.assert_array_equal(floats_of(read.states, 1, H)[0], whole(SMALL, x[:seq, 0])[1])


@pytest.mark.parametrize("copies", [False, True])
async def test_a_read_of_several_streams_shows_no_write_that_was_sent_behind_it(
    copies: bool, rng: np.random.Generator
) -> None:
    x = random_frames(rng, 1)
    async with streaming(copy_at_once=1) as kit:
        origin = kit.frontend.connect()
        busy, idle = (await origin.open(["busy", "idle"])).handles[:, None]
        both, none = np.concatenate([busy, idle]), np.zeros(1, np.int32)

        async def copy() -> StatesRead:
            await kit.frontend.ask(lambda: kit.operations.fork(origin, both, ["a", "b"], np.zeros(2, np.int32)))
            return await kit.frontend.ask(lambda: kit.operations.read_states(["a", "b"]))

        async def write() -> list[int]:
            request = kit.operations.write_states(origin, idle, rows_of(ONES), none)
            return list((await kit.frontend.ask(lambda: request)).tolist())

        reading = copy() if copies else origin.read_states(both)
        _, read, written, after = await kit.all_done(
            step(origin, busy, [0], x), reading, write(), origin.read_states(idle)
        )
    assert written == [0]
    assert not floats_of(read.states[1:], 1, H).any()
    np.testing.assert_array_equal(floats_of(after.states, 1, H)[0], ONES[0])
