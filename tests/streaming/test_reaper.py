"""Streams without anyone at the other end: parked, idle, never used, or too many; some in each tick."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np

from instep.streaming.hibernation import IdleLimits
from instep_client.protocol.codes import Code
from tests.support.streaming import PARK_NS, StreamingEngine, failures, random_frames, step, streaming

COUNT, AT_ONCE = 10, 3
NAMES = [f"s{number}" for number in range(COUNT)]
KEEP = IdleLimits(max_idle_ns=0, park_ns=PARK_NS, max_parked=1000)
LATER_NS = 10**9
"""Long enough for what the tests below wait for."""


def parked(kit: StreamingEngine) -> int:
    return int(kit.table.owned[kit.table.parked])


async def ticks(kit: StreamingEngine, after_ns: int = 0, count: int = 12) -> list[int]:
    """How many streams are open after each of that many ticks."""
    open_counts = []
    for _ in range(count):
        kit.reaper.tick(time.monotonic_ns() + after_ns)
        await kit.settle()
        open_counts.append(kit.table.open_count)
    return open_counts


async def test_streams_of_an_origin_that_left_are_parked_some_at_a_time() -> None:
    async with streaming(inline=True, reap_at_once=AT_ONCE) as kit:
        gone = kit.frontend.connect()
        await gone.open(NAMES)
        kit.frontend.disconnect(gone)
        counts = []
        while kit.reaper.is_detaching:
            await ticks(kit, count=1)
            counts.append(parked(kit))
        assert counts == [3, 6, 9, 10]
        assert kit.stats.parked_streams_total == COUNT
        assert kit.frontend.connect().number == gone.number


async def test_parked_streams_expire_some_at_a_time_and_are_remembered() -> None:
    limits = replace(KEEP, park_ns=LATER_NS)
    async with streaming(inline=True, reap_at_once=AT_ONCE, idle=limits) as kit:
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(NAMES)
        assert (await origin.open(NAMES[:1])).codes.tolist() == [Code.NAME_IN_USE]
        kit.frontend.disconnect(gone)
        await ticks(kit, count=5)
        counts = await ticks(kit, after_ns=2 * LATER_NS, count=60)
        drops = [-difference for difference in np.diff([COUNT, *counts])]
        assert (max(drops), counts[-1]) == (AT_ONCE, 0)
        for take_over in (False, True):
            claims = np.zeros(2, np.uint64), np.repeat(opened.epochs[:1], 2)
            refused = await origin.resume([NAMES[0], "t"], *claims, take_over=take_over)
            assert refused.codes.tolist() == [Code.EXPIRED, Code.UNKNOWN_STREAM]
        again = await origin.open(NAMES[:1])
        await origin.close(again.handles)
        forgotten = await origin.resume(NAMES[:1], np.zeros(1, np.uint64), again.epochs)
        assert forgotten.codes.tolist() == [Code.UNKNOWN_STREAM]
        assert kit.stats.values()["evicted_expired_total"] == COUNT


async def test_beyond_the_most_parked_streams_those_parked_longest_go_some_at_a_time() -> None:
    async with streaming(inline=True, reap_at_once=AT_ONCE, idle=replace(KEEP, max_parked=2)) as kit:
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(NAMES)
        kit.frontend.disconnect(gone)
        counts = await ticks(kit)
        assert counts[-1] == 2
        assert max(-np.diff(counts)) <= AT_ONCE
        resumed = await origin.resume(NAMES, np.zeros(COUNT, np.uint64), opened.epochs)
        assert np.flatnonzero(resumed.codes == 0).tolist() == [8, 9], "those that were parked last"


async def test_idle_streams_are_evicted_some_at_a_time_and_their_owner_told(rng: np.random.Generator) -> None:
    async with streaming(inline=True, reap_at_once=AT_ONCE, idle=replace(KEEP, max_idle_ns=LATER_NS)) as kit:
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        await gone.open(["parked"])
        kit.frontend.disconnect(gone)
        await ticks(kit, count=2)
        opened = await origin.open(NAMES)
        counts = await ticks(kit, after_ns=2 * LATER_NS, count=60)
        drops = [-difference for difference in np.diff([COUNT + 1, *counts])]
        assert (max(drops), counts[-1]) == (AT_ONCE, 1), "the parked one stays"
        assert {event.code for event in origin.events} == {Code.IDLE}
        told = np.concatenate([event.handles for event in origin.events])
        assert sorted(told.tolist()) == sorted(opened.handles.tolist())
        reply = await step(origin, opened.handles[:1], [0], random_frames(rng, 1))
        assert failures(reply) == [(0, 0, Code.UNKNOWN_STREAM, 0)]
        assert (await origin.open(NAMES[:1])).codes.tolist() == [0]


async def test_streams_with_frames_under_way_are_not_idle(rng: np.random.Generator) -> None:
    async with streaming(idle=replace(KEEP, max_idle_ns=LATER_NS)) as kit:
        origin = kit.listen()
        handles = (await kit.operations.open(origin, ["s"], None, None)).handles
        kit.submit(origin, 0, handles, [0], random_frames(rng, 1))
        kit.loop.turn()
        assert (await ticks(kit, after_ns=2 * LATER_NS))[-1] == 1
        await kit.finish_all()
        assert (await ticks(kit, after_ns=2 * LATER_NS))[-1] == 0


async def test_an_origin_with_the_number_of_one_that_left_keeps_its_streams(rng: np.random.Generator) -> None:
    async with streaming(inline=True, reap_at_once=AT_ONCE) as kit:
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(NAMES)
        kit.frontend.disconnect(gone)
        await ticks(kit, count=1)
        have = np.zeros(COUNT, np.uint64)
        resumed = await origin.resume(NAMES, have, opened.epochs)
        await ticks(kit, count=1)
        heir = kit.frontend.connect()
        assert heir.number == gone.number
        taken = await heir.resume(NAMES, have, resumed.epochs)
        await ticks(kit)
        assert parked(kit) == 0
        reply = await step(heir, taken.handles, [0] * COUNT, random_frames(rng, 1, COUNT))
        assert failures(reply) == []


async def test_an_origin_that_left_before_its_request_began_gets_no_streams() -> None:
    async with streaming(inline=True) as kit:
        gone = kit.frontend.connect()
        opened = await gone.open(["kept"])
        asked = [
            asyncio.ensure_future(gone.open(["new"])),
            asyncio.ensure_future(gone.resume(["kept"], np.zeros(1, np.uint64), opened.epochs)),
        ]
        await asyncio.sleep(0)  # both are asked, and neither has begun
        kit.frontend.disconnect(gone)
        await asyncio.gather(*asked)
        await ticks(kit, count=1)
        assert (kit.table.open_count, parked(kit)) == (1, 1)
        assert kit.table.epoch[kit.table.find(["kept"])[0]] == opened.epochs[0]
