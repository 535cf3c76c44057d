"""Streams from open to close: reading, changing and copying states, in the order of frames and requests."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from instep.core.typing import F32, U64
from instep.runtime.executor import StateLost
from instep.streaming.api import Grants, Refusal, StatesRead
from instep_client.protocol.codes import Code
from tests.support.in_process import InProcessOrigin
from tests.support.models import SMALL, plain, whole
from tests.support.states import floats_of, rows_of
from tests.support.streaming import (
    FaultyStates,
    StreamingEngine,
    failures,
    random_frames,
    step,
    streaming,
)

F, H, LAYERS = 5, 8, 2
ONES: F32 = np.ones((1, 1, H), np.float32)
MODEL = plain(F, H, layers=LAYERS)


async def write(
    kit: StreamingEngine, origin: InProcessOrigin, handles: U64, states: F32 | None, codes: list[int] | None = None
) -> list[int]:
    """Give streams other states; the code of each."""
    refused = np.zeros(len(handles), np.int32) if codes is None else np.array(codes, np.int32)
    rows = None if states is None else rows_of(states)
    return list((await kit.frontend.ask(lambda: kit.operations.write_states(origin, handles, rows, refused))).tolist())


async def fork(
    kit: StreamingEngine, origin: InProcessOrigin, handles: U64, names: list[str], codes: list[int] | None = None
) -> Grants:
    refused = np.zeros(len(handles), np.int32) if codes is None else np.array(codes, np.int32)
    return await kit.frontend.ask(lambda: kit.operations.fork(origin, handles, names, refused))


async def test_a_read_shows_seq_and_state_and_leaves_the_stream_as_it_was(rng: np.random.Generator) -> None:
    x = random_frames(rng, 7, 2)
    async with streaming(inline=True, model=MODEL) as kit:
        origin, other = kit.frontend.connect(), kit.frontend.connect()
        handles = (await origin.open(["a", "b"])).handles
        fresh = await origin.read_states(handles)
        assert fresh.next_seqs.tolist() == [0, 0]
        assert not floats_of(fresh.states, -1).any()
        await step(origin, handles, [0, 0], x[:4])
        by_name = await read_by_name(kit, ["none", "b", "a"])
        assert by_name.codes.tolist() == [Code.UNKNOWN_STREAM, 0, 0]
        assert np.isnan(floats_of(by_name.states, -1)[0]).all()
        for read, places in ((await origin.read_states(handles), (0, 1)), (by_name, (2, 1))):
            for column, place in enumerate(places):
                assert read.next_seqs[place] == 4
                np.testing.assert_array_equal(floats_of(read.states, LAYERS, H)[place], whole(MODEL, x[:4, column])[1])
        rest = await step(origin, handles, [4, 4], x[4:])
        assert not origin.events + other.events
    for column in range(2):
        np.testing.assert_array_equal(rest.y[:, column], whole(MODEL, x[:, column])[0][4:])


async def read_by_name(kit: StreamingEngine, names: list[str]) -> StatesRead:
    return await kit.frontend.ask(lambda: kit.operations.read_states(names))


async def test_a_read_by_name_of_streams_that_ended_says_why(rng: np.random.Generator) -> None:
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["closing", "closed", "expired"])).handles
        await origin.close(handles[1:2])
        pending = asyncio.ensure_future(step(origin, handles[:1], [0], random_frames(rng, 1)))
        closing = asyncio.ensure_future(origin.close(handles[:1]))
        await kit.settle()
        kit.operations.expire(kit.table.find(["expired"]))
        read = asyncio.ensure_future(read_by_name(kit, ["closing", "closed", "expired", "a\tb", ""]))
        await kit.settle()
        assert not read.done(), "the end of the first is not told before it has ended"
        await kit.finish_all()
        codes = [Code.UNKNOWN_STREAM] * 5
        codes[2] = Code.EXPIRED
        assert (await read).codes.tolist() == codes
        await asyncio.gather(pending, closing)
        with pytest.raises(Refusal):
            await read_by_name(kit, ["x", "x"])


async def test_only_own_streams_are_read_changed_and_copied(rng: np.random.Generator) -> None:
    x = random_frames(rng, 2)
    async with streaming(inline=True, model=MODEL) as kit:
        origin, other = kit.frontend.connect(), kit.frontend.connect()
        mine, theirs = (await origin.open(["mine"])).handles, (await other.open(["theirs"])).handles
        await step(other, theirs, [0], x)
        handles: U64 = np.concatenate([theirs, mine, np.array([12345], np.uint64)])
        refused = [Code.FOREIGN_STREAM, 0, Code.UNKNOWN_STREAM]
        read = await origin.read_states(handles)
        assert (read.codes.tolist(), read.next_seqs.tolist()) == (refused, [0, 0, 0])
        assert np.isnan(floats_of(read.states, -1)[[0, 2]]).all()
        assert not floats_of(read.states, -1)[1].any()
        assert await write(kit, origin, handles, np.ones((3, LAYERS, H), np.float32)) == refused
        forked = await fork(kit, origin, handles, ["a", "b", "c"])
        assert forked.codes.tolist() == refused
        assert np.flatnonzero(forked.handles).tolist() == [1]
        twice = np.concatenate([mine, mine])
        for asked in (origin.read_states(twice), write(kit, origin, twice, None), fork(kit, origin, twice, ["x", "y"])):
            with pytest.raises(Refusal) as repeated:
                await asked
            assert repeated.value.code is Code.REPEATED_STREAM
        np.testing.assert_array_equal(
            floats_of((await other.close(theirs)).states, LAYERS, H)[0], whole(MODEL, x[:, 0])[1]
        )


async def test_frames_for_a_stream_that_cannot_be_loaded_are_not_computed_on_what_its_slot_held_before(
    rng: np.random.Generator,
) -> None:
    """An origin that takes it over can send frames before the opener is told that it is open."""
    x, names = random_frames(rng, 2), [f"s{number}" for number in range(60)]
    async with streaming(inline=True, states=FaultyStates, copy_at_once=1, max_streams=60) as kit:
        opener, taker = kit.frontend.connect(), kit.frontend.connect()
        former = (await opener.open(["former"])).handles
        await step(opener, former, [0], x)
        await opener.close(former)  # its state is left in the slot
        kit.faulty.good_loads = 59
        opening = asyncio.ensure_future(opener.open(names))
        await asyncio.sleep(0)  # it is ahead of the resume
        none = np.zeros(1, np.uint64)
        taken = await taker.resume(["s0"], none, none, take_over=True)
        assert not opening.done()
        reply = await step(taker, taken.handles, [0], x)
        assert failures(reply) == [(0, 0, Code.STATE_LOST, 0)]
        assert np.isnan(reply.y).all()
        assert (await opening).codes.tolist() == [Code.STEP_FAILED] * 60
        await kit.settle()
        assert [(event.code, event.handles.tolist()) for event in taker.events] == [
            (Code.STATE_LOST, taken.handles.tolist())
        ]
        assert [event.code for event in opener.events] == [Code.FENCED]
        assert (kit.stats.frames_total, kit.engine.pending_frames, kit.table.open_count) == (2, 0, 0)
        kit.faulty.good_loads = 100
        again = (await taker.open(["s0"])).handles
        np.testing.assert_array_equal((await step(taker, again, [0], x)).y[:, 0], whole(SMALL, x[:, 0])[0])


async def test_states_that_cannot_be_read_or_written_are_refused_and_cost_nothing_else(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 3)
    async with streaming(inline=True, states=FaultyStates, max_streams=2) as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        await step(origin, handles, [0], x[:1])
        kit.faulty.is_broken = True
        read = await origin.read_states(handles)
        assert read.codes.tolist() == [Code.STATE_LOST]
        assert np.isnan(floats_of(read.states, -1)).all()
        assert (await fork(kit, origin, handles, ["copy"])).codes.tolist() == [Code.STATE_LOST]
        assert await write(kit, origin, handles, None) == [Code.STEP_FAILED]
        for _ in range(3):
            assert (await origin.open(["other"])).codes.tolist() == [Code.STEP_FAILED]
        assert {str(error) for error in kit.failures} == {"injected"}
        kit.faulty.is_broken = False
        reply = await step(origin, handles, [1], x[1:])
        np.testing.assert_array_equal(reply.y[:, 0], whole(SMALL, x[:, 0])[0][1:])
        assert (await origin.open(["other"])).codes.tolist() == [0]
        kit.faulty.is_broken = True
        closed = await origin.close(handles)
        assert closed.codes.tolist() == [Code.STATE_LOST]
        kit.faulty.is_broken = False
        assert (await origin.open(["s"])).codes.tolist() == [0]


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


async def test_a_write_finds_the_frames_before_it_pending_and_changes_the_state_for_those_behind_it(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 5)
    async with streaming() as kit:
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        before, refused = await kit.all_done(step(origin, handles, [0], x[:2]), write(kit, origin, handles, ONES))
        assert refused == [Code.FRAMES_PENDING]
        written, behind = await kit.all_done(write(kit, origin, handles, ONES), step(origin, handles, [2], x[2:]))
        assert written == [0]
    np.testing.assert_array_equal(before.y[:, 0], whole(SMALL, x[:2, 0])[0])
    np.testing.assert_array_equal(behind.y[:, 0], whole(SMALL, x[2:, 0], ONES[0])[0])


@pytest.mark.parametrize("copies", [False, True])
async def test_a_read_of_several_streams_shows_no_write_that_was_sent_behind_it(
    copies: bool, rng: np.random.Generator
) -> None:
    x = random_frames(rng, 1)
    async with streaming(copy_at_once=1) as kit:
        origin = kit.frontend.connect()
        busy, idle = (await origin.open(["busy", "idle"])).handles[:, None]
        both = np.concatenate([busy, idle])

        async def copy() -> StatesRead:
            await fork(kit, origin, both, ["a", "b"])
            return await read_by_name(kit, ["a", "b"])

        reading = copy() if copies else origin.read_states(both)
        _, read, written, after = await kit.all_done(
            step(origin, busy, [0], x), reading, write(kit, origin, idle, ONES), origin.read_states(idle)
        )
    assert written == [0]
    assert not floats_of(read.states[1:], 1, H).any()
    np.testing.assert_array_equal(floats_of(after.states, 1, H)[0], ONES[0])
