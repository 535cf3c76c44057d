"""Streams that change hands: resumed where they were, taken over, and what a former owner is told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from instep.streaming.api import Grants
from instep_client.protocol.codes import Code
from tests.support.in_process import InProcessOrigin
from tests.support.models import SMALL, whole
from tests.support.streaming import StreamingEngine, failures, random_frames, step, streaming


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


# ── Whose it is ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_resume_under_the_present_epoch_fences_an_owner_that_is_still_connected(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 4, 2)
    async with streaming(inline=True) as kit:
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
    async with streaming(inline=True) as kit:
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
