"""Who hibernates, who makes room for others, and who expires."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instep.recording.reader import RecordingReader
from instep_client.protocol.codes import Code
from tests.support.hibernating import LATER_NS, LIMITS, SOON_NS, ZERO, have, tick
from tests.support.models import SMALL, whole
from tests.support.streaming import random_frames, step, streaming
from tests.support.traffic import assert_same_bits


async def test_those_that_hibernate_for_too_long_expire_with_their_final_state(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x, path = random_frames(rng, 3, 2), tmp_path / "r.instep"
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(path)
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        parked = await gone.open(["parked"])
        owned = await origin.open(["owned"])
        await step(gone, parked.handles, [0], x[:, :1])
        await step(origin, owned.handles, [0], x[:, 1:])
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0)
        await tick(kit, count=3)
        assert len(kit.hibernation) == 2
        await tick(kit, after_ns=LATER_NS // 2, count=3)
        assert len(kit.hibernation) == 2
        await tick(kit, after_ns=2 * LATER_NS, count=3)
        assert len(kit.hibernation) == 0
        resumed = await origin.resume(["parked", "owned"], have(3, 3), np.append(parked.epochs, owned.epochs))
        assert resumed.codes.tolist() == [Code.EXPIRED] * 2
        assert not (await origin.open(["parked"])).codes.any(), "the name is free again"
        assert kit.stats.evicted_by_reason == {"expired": 2}
    with RecordingReader(path) as reader:
        ended = {info.name: info for info in reader.streams() if info.reason == "expired"}
    for column, name in enumerate(("parked", "owned")):
        final = ended[name].final_state
        assert final is not None
        expected = whole(SMALL, x[:, column])[1]
        assert_same_bits(final.view(np.float32).reshape(expected.shape), expected, name)
        assert ended[name].frames == 3


async def test_beyond_the_most_those_that_slept_longest_expire(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(6)]
    async with streaming(inline=True, idle=replace(LIMITS, max_hibernated=2)) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(names)
        for _ in range(3):
            await tick(kit)
        resumed = await origin.resume(names, np.zeros(6, np.uint64), opened.epochs)
        assert resumed.codes.tolist() == [Code.EXPIRED] * 4 + [0] * 2


async def test_parked_and_quiet_streams_make_room_for_others_and_where_there_is_none_a_sleeper_stays(
    tmp_path: Path,
) -> None:
    never = replace(LIMITS, hibernate_after_ns=0, most_wait_ns=0)
    async with streaming(inline=True, idle=never, max_streams=3) as kit:
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        parked = await gone.open(["a", "b", "c"])
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0)
        assert not (await origin.open(["d", "e"])).codes.any()
        assert "a" in kit.hibernation, "it was parked first"
        assert not (await origin.resume(["a"], ZERO, parked.epochs[:1])).codes.any()
        assert sorted(name for name in "abcde" if name in kit.hibernation) == ["b", "c"]
        refused = await origin.resume(["b"], ZERO, parked.epochs[1:2])
        assert refused.codes.tolist() == [Code.TOO_MANY_STREAMS]
        assert (await origin.open(["f"])).codes.tolist() == [Code.TOO_MANY_STREAMS]
        assert "b" in kit.hibernation
        kit.table.last_active_ns[kit.table.find(["d"])] -= 2 * 10**9
        assert not (await origin.resume(["b"], ZERO, parked.epochs[1:2])).codes.any()
        assert "d" in kit.hibernation, "it has done nothing for the longest time"


@pytest.mark.parametrize("has_room", [True, False])
async def test_a_frame_waits_for_room_and_not_for_long(
    tmp_path: Path, rng: np.random.Generator, has_room: bool
) -> None:
    limits = replace(LIMITS, quiet_ns=10**15, most_wait_ns=10**15 if has_room else 0)
    async with streaming(inline=True, idle=limits, max_streams=1) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        await tick(kit)
        other = await origin.open(["other"])
        await step(origin, opened.handles, [0], random_frames(rng, 1))
        await kit.settle()
        await kit.durable()
        assert origin.events[0].code == Code.HIBERNATED
        if has_room:
            assert len(origin.events) == 1
            await origin.close(other.handles)
        kit.table.last_active_ns[:] = time.monotonic_ns()
        while len(kit.tasks):
            kit.hibernation.tick(time.monotonic_ns())
            await asyncio.sleep(0.001)
        told = origin.events[-1]
        assert (told.code, told.renewed is not None) == (
            (Code.HIBERNATED, True) if has_room else (Code.TOO_MANY_STREAMS, False)
        )


async def test_streams_that_sleep_are_closed_without_waking(tmp_path: Path, rng: np.random.Generator) -> None:
    x = random_frames(rng, 3, 2)
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["a", "b", "c"])
        await step(origin, opened.handles[:2], [0, 0], x)
        await tick(kit)
        closed = await origin.close(opened.handles, have(3, 2, 0))
        assert closed.codes.tolist() == [0, Code.FRAMES_PENDING, 0]
        expected = whole(SMALL, x[:, 0])[1]
        assert_same_bits(closed.states[0].view(np.float32).reshape(expected.shape), expected, "the final state")
        assert (list(kit.hibernation), kit.stats.woken_streams_total) == (["b"], 0)


async def test_surplus_parked_streams_hibernate_rather_than_end(tmp_path: Path) -> None:
    async with streaming(inline=True, idle=replace(LIMITS, hibernate_after_ns=0, max_parked=1)) as kit:
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(["a", "b", "c"])
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0, count=2)
        assert (kit.table.open_count, len(kit.hibernation)) == (1, 2)
        assert not (await origin.resume(["a", "b", "c"], have(0, 0, 0), opened.epochs)).codes.any()


async def test_streams_of_a_connection_that_has_just_gone_are_kept_from_then_on(tmp_path: Path) -> None:
    limits = replace(LIMITS, park_ns=SOON_NS)
    async with streaming(inline=True, idle=limits, reap_at_once=1) as kit:
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(["a", "b", "c"])
        kit.table.last_active_ns[1:4] -= 2 * SOON_NS
        kit.frontend.disconnect(gone)
        kit.hibernation.tick(time.monotonic_ns())  # it has parked none of them yet
        for _ in range(4):
            kit.hibernation.tick(time.monotonic_ns())
            await kit.settle()
        assert not (await origin.resume(["a", "b", "c"], have(0, 0, 0), opened.epochs)).codes.any()
