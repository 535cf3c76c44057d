"""Streams that change hands: resumed where they were, taken over, and what a former owner is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from instep.streaming.api import Grants
from instep_client.protocol.codes import Code
from tests.support.in_process import InProcessOrigin
from tests.support.models import SMALL, whole
from tests.support.states import floats_of
from tests.support.streaming import InlineExecutor, StreamingEngine, failures, random_frames, step, streaming


async def resume(
    origin: InProcessOrigin,
    names: Sequence[str],
    have: Sequence[int],
    epochs: Sequence[int],
    *,
    take_over: bool = False,
) -> Grants:
    claims = np.array(have, np.uint64), np.array(epochs, np.uint64)
    return await origin.resume(names, *claims, take_over=take_over)


def refused(grants: Grants) -> list[tuple[Code, int]]:
    """Code and expected seq of each refused stream."""
    assert not grants.handles[grants.codes != 0].any()
    pairs = zip(grants.codes.tolist(), grants.expected_seqs.tolist(), strict=True)
    return [(Code(code), seq) for code, seq in pairs if code]


async def left_behind(kit: StreamingEngine, *names: str, x: np.ndarray | None = None) -> Grants:
    """Streams whose origin opened them, stepped them by `x`, and left; they are parked."""
    gone = kit.frontend.connect()
    opened = await gone.open(names)
    if x is not None:
        (reply,) = await kit.all_done(step(gone, opened.handles, [0] * len(names), x))
        assert failures(reply) == []
    leave(kit, gone)
    return opened


def leave(kit: StreamingEngine, origin: InProcessOrigin) -> None:
    kit.frontend.disconnect(origin)
    kit.reaper.tick(0)


# ── Where it was ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_resumed_stream_continues_as_if_nothing_had_happened(rng: np.random.Generator) -> None:
    x = random_frames(rng, 20, 2)
    async with streaming(InlineExecutor) as kit:
        opened = await left_behind(kit, "a", "b", x=x[:9])
        origin = kit.frontend.connect()
        resumed = await resume(origin, ["b", "a"], [4, 9], opened.epochs[::-1].tolist())
        assert (refused(resumed), resumed.next_seqs.tolist()) == ([], [9, 9])
        assert resumed.epochs.min() > opened.epochs.max()
        assert not set(resumed.handles.tolist()) & set(opened.handles.tolist())
        b, a = resumed.handles[:1], resumed.handles[1:]
        missed = await step(origin, b, [4], x[4:9, 1:], 4)
        rest = await step(origin, np.concatenate([a, b]), [9, 9], x[9:], 9)
        finals = floats_of((await origin.close(np.concatenate([a, b]))).states, -1)
        assert kit.stats.frames_total == 40
    for column in range(2):
        truth, final = whole(SMALL, x[:, column])
        np.testing.assert_array_equal(rest.y[:, column], truth[9:])
        np.testing.assert_array_equal(finals[column], final.reshape(-1))
    np.testing.assert_array_equal(missed.y[:, 0], whole(SMALL, x[:, 1])[0][4:9])


@pytest.mark.parametrize("computed_when_resumed", [True, False])
async def test_frames_that_were_under_way_are_answered_and_computed_once(
    rng: np.random.Generator, computed_when_resumed: bool
) -> None:
    """The reply to them went to an origin that is gone; the same frames bring it back."""
    x = random_frames(rng, 20)
    async with streaming() as kit:
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(["s"])
        lost = asyncio.ensure_future(step(gone, opened.handles, [0], x[:12]))
        await kit.settle()
        leave(kit, gone)
        if computed_when_resumed:
            await kit.finish_all()
        (resumed,) = await kit.all_done(resume(origin, ["s"], [0], opened.epochs.tolist()))
        assert (refused(resumed), resumed.next_seqs.tolist()) == ([], [12])
        (reply,) = await kit.all_done(step(origin, resumed.handles, [0], x))
        assert kit.stats.frames_total == 20
        assert not lost.done()
        lost.cancel()
    np.testing.assert_array_equal(reply.y[:, 0], whole(SMALL, x[:, 0])[0])


# ── Whose it is ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_resume_under_the_present_epoch_fences_an_owner_that_is_still_connected(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 4, 2)
    async with streaming(InlineExecutor) as kit:
        old, new = kit.frontend.connect(), kit.frontend.connect()
        opened = await old.open(["moved", "stays"])
        before = await step(old, opened.handles, [0, 0], x[:2])
        resumed = await resume(new, ["moved"], [2], opened.epochs[:1].tolist())
        (event,) = old.events
        assert (event.code, event.handles.tolist()) == (Code.FENCED, opened.handles[:1].tolist())
        late = await step(old, opened.handles, [2, 2], x[2:])
        assert failures(late) == [(0, 0, Code.FENCED, 0)]
        for asked in (old.close, old.read_states):
            assert (await asked(opened.handles[:1])).codes.tolist() == [Code.FENCED]
        after = await step(new, resumed.handles, [2], x[2:, :1])
    y = np.concatenate([before.y[:, 0], after.y[:, 0]])
    np.testing.assert_array_equal(y, whole(SMALL, x[:, 0])[0])
    np.testing.assert_array_equal(late.y[:, 1], whole(SMALL, x[:, 1])[0][2:])


async def test_a_stream_whose_new_owner_leaves_before_it_was_told_is_parked_and_resumed_under_the_old_epoch(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 3)
    async with streaming() as kit:
        gone, unlucky, origin = (kit.frontend.connect() for _ in range(3))
        opened = await gone.open(["s"])
        lost = asyncio.ensure_future(step(gone, opened.handles, [0], x[:2]))
        await kit.settle()
        leave(kit, gone)
        claimed = asyncio.ensure_future(resume(unlucky, ["s"], [0], opened.epochs.tolist()))
        await kit.settle()
        assert kit.table.owned[kit.table.parked] == 0
        leave(kit, unlucky)
        assert kit.table.owned[kit.table.parked] == 1
        (resumed,) = await kit.all_done(resume(origin, ["s"], [0], opened.epochs.tolist()))
        assert (refused(resumed), resumed.next_seqs.tolist()) == ([], [2])
        (reply,) = await kit.all_done(step(origin, resumed.handles, [0], x))
        np.testing.assert_array_equal(reply.y[:, 0], whole(SMALL, x[:, 0])[0])
        assert not (await claimed).handles.any()
        lost.cancel()


async def test_a_resume_that_ends_after_its_origin_left_acknowledges_nothing_for_the_next_origin_of_its_number(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 4)
    async with streaming() as kit:
        owner, gone = kit.frontend.connect(), kit.frontend.connect()
        opened = await owner.open(["s"])
        await kit.all_done(step(owner, opened.handles, [0], x[:3]))
        pending = asyncio.ensure_future(step(owner, opened.handles, [3], x[3:]))
        late = asyncio.ensure_future(resume(gone, ["s"], [3], opened.epochs.tolist()))
        await kit.settle()
        leave(kit, gone)
        heir = kit.frontend.connect()
        assert heir.number == gone.number
        (resumed,) = await kit.all_done(resume(heir, ["s"], [0], [0], take_over=True))
        assert (refused(resumed), resumed.next_seqs.tolist()) == ([], [4])
        assert kit.stats.resumed_streams_total == 1
        (reply,) = await kit.all_done(step(heir, resumed.handles, [0], x))
        assert failures(reply) == []
        np.testing.assert_array_equal(reply.y[:, 0], whole(SMALL, x[:, 0])[0])
        await late
        assert failures(await pending) == []


# ── What is lost ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_on_a_stream_that_is_closing_waits_for_its_end(rng: np.random.Generator) -> None:
    async with streaming() as kit:
        owner, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await owner.open(["s"])
        pending = asyncio.ensure_future(step(owner, opened.handles, [0], random_frames(rng, 2)))
        closing = asyncio.ensure_future(owner.close(opened.handles))
        claimed = asyncio.ensure_future(resume(origin, ["s"], [0], opened.epochs.tolist()))
        await kit.settle()
        leave(kit, owner)
        assert [closing.done(), claimed.done()] == [False] * 2, "its end is not told before it has ended"
        await kit.finish_all()
        assert refused(await claimed) == [(Code.UNKNOWN_STREAM, 0)]
        assert (kit.table.open_count, kit.stats.parked_streams_total) == (0, 0)
        pending.cancel()


async def test_a_number_that_is_used_again_while_streams_of_it_are_parked_does_not_own_them(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 6)
    async with streaming(InlineExecutor) as kit:
        opened = await left_behind(kit, "parked", x=x[:3])
        heir = kit.frontend.connect()
        assert heir.number == 0
        assert failures(await step(heir, opened.handles, [3], x[3:4])) == [(0, 0, Code.FOREIGN_STREAM, 0)]
        assert (await heir.close(opened.handles)).codes.tolist() == [Code.FOREIGN_STREAM]
        await heir.open(["its own"])
        origin = kit.frontend.connect()
        resumed = await resume(origin, ["parked"], [3], opened.epochs.tolist())
        leave(kit, heir)
        assert kit.frontend.connect().number == 0
        reply = await step(origin, resumed.handles, [3], x[3:])
        np.testing.assert_array_equal(reply.y[:, 0], whole(SMALL, x[:, 0])[0][3:])
