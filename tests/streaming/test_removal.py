"""Streams that an operator closes or parks, wherever they are."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instep.streaming.api import Refusal
from instep_client.protocol.codes import Code
from tests.support.hibernating import LIMITS, have, tick
from tests.support.models import SMALL, whole
from tests.support.streaming import failures, random_frames, step, streaming
from tests.support.traffic import assert_same_bits


@pytest.mark.parametrize("sleeps", [False, True])
async def test_one_that_was_parked_continues_with_the_same_bits_for_whoever_resumes_it(
    tmp_path: Path, rng: np.random.Generator, sleeps: bool
) -> None:
    x = random_frames(rng, 8, 1)
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        owner, other = kit.frontend.connect(), kit.frontend.connect()
        opened = await owner.open(["s"])
        before = await step(owner, opened.handles, [0], x[:5])
        if sleeps:
            await tick(kit)
            assert len(kit.hibernation) == 1
        codes = await kit.operations.remove(["s", "none"], park=True)
        assert codes.tolist() == [0, Code.UNKNOWN_STREAM]
        assert owner.events[-1].code is Code.BY_OPERATOR
        assert failures(await step(owner, owner.events[-1].handles, [5], x[5:]))[0][2] in (
            Code.FOREIGN_STREAM,
            Code.UNKNOWN_STREAM,
        )
        resumed = await other.resume(["s"], have(5), opened.epochs)
        assert (resumed.codes.tolist(), resumed.next_seqs.tolist()) == ([0], [5])
        after = await step(other, resumed.handles, [5], x[5:])
        served = np.concatenate([before.y[:, 0], after.y[:, 0]])
        assert_same_bits(served, whole(SMALL, x[:, 0])[0], "the stream")


async def test_one_that_was_closed_is_gone_and_its_owner_is_told(tmp_path: Path) -> None:
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        owner = kit.frontend.connect()
        opened = await owner.open(["a", "b", "c"])
        await tick(kit)
        assert (await kit.operations.remove(["a", "c"], park=False)).tolist() == [0, 0]
        assert (await kit.operations.remove(["a", "c"], park=False)).tolist() == [Code.UNKNOWN_STREAM] * 2
        told = [event for event in owner.events if event.code is Code.BY_OPERATOR]
        assert sum(len(event.handles) for event in told) == 2
        resumed = await owner.resume(["a", "b"], have(0, 0), opened.epochs[:2])
        assert resumed.codes.tolist() == [Code.UNKNOWN_STREAM, 0]
        with pytest.raises(Refusal) as caught:
            await kit.operations.remove(["b", "b"], park=False)
        assert caught.value.code is Code.REPEATED_STREAM
        assert len(kit.table.open_slots()) == 1


@pytest.mark.parametrize("park", [False, True])
async def test_more_than_memory_holds_are_done_without_waking_them(tmp_path: Path, park: bool) -> None:
    async with streaming(inline=True, idle=LIMITS, max_streams=4) as kit:
        kit.record(tmp_path / "r.instep")
        owner, names = kit.frontend.connect(), [f"s{number}" for number in range(12)]
        for first in range(0, 12, 4):
            await owner.open(names[first : first + 4])
            await tick(kit)
        assert (len(kit.hibernation), kit.table.open_count) == (12, 0)
        assert not (await asyncio.wait_for(kit.operations.remove(names, park=park), 30)).any()
        assert kit.table.open_count == 0
        told = [event for event in owner.events if event.code is Code.BY_OPERATOR]
        assert sum(len(event.handles) for event in told) == 12
        assert [each.owner for each in kit.hibernation.values()] == [None] * (12 * park)


async def test_the_owner_of_a_busy_one_is_told_before_its_frames_are_refused() -> None:
    async with streaming() as kit:
        owner = kit.frontend.connect()
        opened = await owner.open(["s"])
        kit.engine.hold(slots := kit.table.find(["s"]))
        removing = asyncio.ensure_future(kit.operations.remove(["s"], park=False))
        await asyncio.sleep(0)
        told, is_done = list(owner.events), removing.done()
        kit.engine.release(slots)
        kit.engine.waiters.check()
        assert (is_done, [event.code for event in told]) == (False, [Code.BY_OPERATOR])
        assert told[0].handles.tolist() == opened.handles.tolist()
        assert (await removing).tolist() == [0]


async def test_parking_is_refused_where_a_parked_stream_would_end_at_once() -> None:
    async with streaming(inline=True, idle=replace(LIMITS, park_ns=0)) as kit:
        await kit.frontend.connect().open(["s"])
        with pytest.raises(Refusal) as caught:
            await kit.operations.remove(["s"], park=True)
        assert caught.value.code is Code.NOT_ALLOWED
        assert len(kit.table.open_slots()) == 1
