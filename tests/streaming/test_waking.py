"""Requests and frames for streams that hibernate: whom they concern, and what waits for room in memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.typing import U64
from instep.recording.reader import load_open_streams
from instep.recording.records import OpenStream
from instep.streaming.api import Refusal
from instep_client.protocol.codes import Code
from tests.support.hibernating import LIMITS, ZERO, tick
from tests.support.in_process import InProcessOrigin
from tests.support.streaming import StreamingEngine, failures, random_frames, step, streaming

BUSY = replace(LIMITS, quiet_ns=10**15)
"""Streams in memory count as busy, whatever the time."""


async def asleep(kit: StreamingEngine, path: Path, origin: InProcessOrigin, names: Sequence[str]) -> U64:
    """Handles of streams that hibernate; none goes to sleep from now on, unless it makes room."""
    kit.record(path)
    opened = await origin.open(names)
    await tick(kit)
    assert len(kit.hibernation) == len(names)
    kit.hibernation.limits = replace(kit.hibernation.limits, hibernate_after_ns=0)
    return opened.handles


async def ticking(kit: StreamingEngine, *asked: asyncio.Future[Any]) -> None:
    """Tick until all of these are done, and everything that frames began."""
    while len(kit.tasks) or not all(each.done() for each in asked):
        kit.hibernation.tick(time.monotonic_ns())
        await asyncio.sleep(0.001)


def reset(kit: StreamingEngine, origin: InProcessOrigin, handles: U64) -> asyncio.Future[Any]:
    count = len(handles)
    states = kit.states.spec.initial(count).copy()
    states.view(np.float32)[:] = 0.5
    codes = np.zeros(count, np.int32)
    return asyncio.ensure_future(kit.frontend.ask(lambda: kit.operations.write_states(origin, handles, states, codes)))


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_late_reset_changes_no_other_stream_of_that_name_or_owner_of_that_number(
    tmp_path: Path, rng: np.random.Generator, leaves: bool
) -> None:
    async with streaming(inline=True, idle=BUSY, max_streams=2) as kit:
        filler, origin = kit.frontend.connect(), kit.frontend.connect()
        handles = await asleep(kit, tmp_path / "r.instep", origin, ["s", "u"])
        other = await filler.open(["other"])  # one slot is left: s wakes, u waits for room
        late = reset(kit, origin, handles)
        while kit.table.open_count < 2:
            await asyncio.sleep(0.001)
        if leaves:
            kit.frontend.disconnect(origin)
            kit.reaper.tick(time.monotonic_ns())
            heir = kit.frontend.connect()
            assert heir.number == origin.number
            granted = await heir.resume(["s"], ZERO, ZERO, take_over=True)
        else:
            heir, renewed = origin, origin.events[-1].renewed
            assert renewed is not None
            await origin.close(renewed)
            granted = await origin.open(["s"])
        assert failures(await step(heir, granted.handles, [0], random_frames(rng, 3))) == []
        before = await heir.read_states(granted.handles)
        await filler.close(other.handles)
        await ticking(kit, late)
        if leaves:
            assert isinstance(late.exception(), Refusal)
        else:
            assert late.result().tolist() == [Code.UNKNOWN_STREAM, 0]
        after = await heir.read_states(granted.handles)
        assert after.states.tobytes() == before.states.tobytes()


@pytest.mark.parametrize("request_kind", ["read", "resume"])
async def test_no_stream_of_a_request_makes_room_for_another(tmp_path: Path, request_kind: str) -> None:
    limits = replace(LIMITS, quiet_ns=0, most_wait_ns=0)
    async with streaming(inline=True, idle=limits, max_streams=1) as kit:
        origin = kit.frontend.connect()
        handles = await asleep(kit, tmp_path / "r.instep", origin, ["a"])
        opened = await origin.open(["b"])
        if request_kind == "read":
            codes = (await origin.read_states(np.append(handles, opened.handles))).codes
        else:
            epochs = np.append(ZERO, opened.epochs)
            codes = (await origin.resume(["a", "b"], np.zeros(2, np.uint64), epochs, take_over=True)).codes
        assert codes.tolist() == [Code.TOO_MANY_STREAMS, 0]
        assert list(kit.hibernation) == ["a"]


async def test_one_task_wakes_for_frames_and_reads_as_many_streams_as_find_room(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    names, read = [f"s{at}" for at in range(8)], list[int]()

    def counted(path: Path, streams: Sequence[int]) -> list[OpenStream]:
        read.extend(streams)
        return load_open_streams(path, streams)

    async with streaming(inline=True, idle=BUSY, max_streams=8) as kit:
        filler, origin = kit.frontend.connect(), kit.frontend.connect()
        handles = await asleep(kit, tmp_path / "r.instep", origin, names)
        others = await filler.open([f"other {at}" for at in range(8)])
        kit.load = counted
        for _ in range(3):
            for at in range(8):
                await step(origin, handles[at : at + 1], [0], random_frames(rng, 1))
        assert len(kit.tasks) == 1
        for first, count in pairwise((0, 1, 3, 8)):
            await filler.close(others.handles[first:count])
            while len(kit.hibernation) > 8 - count:
                kit.hibernation.tick(time.monotonic_ns())
                await asyncio.sleep(0.001)
            assert (len(read), list(kit.hibernation)) == (count, names[count:]), "those that came first"
        await ticking(kit)


async def test_a_request_and_frames_that_wait_for_one_stream_both_get_it(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    async with streaming(inline=True, idle=replace(BUSY, most_wait_ns=10**15), max_streams=1) as kit:
        filler, origin = kit.frontend.connect(), kit.frontend.connect()
        handles = await asleep(kit, tmp_path / "r.instep", origin, ["s"])
        other = await filler.open(["other"])
        await step(origin, handles, [0], random_frames(rng, 1))
        reading = asyncio.ensure_future(origin.read_states(handles))
        await kit.settle()
        await filler.close(other.handles)
        await ticking(kit, reading)
        assert reading.result().codes.tolist() == [0]


async def test_a_stream_that_a_request_wakes_is_as_idle_as_before_and_one_that_frames_wake_is_not(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    async with streaming(inline=True, idle=BUSY) as kit:
        origin = kit.frontend.connect()
        handles = await asleep(kit, tmp_path / "r.instep", origin, ["read", "stepped"])
        slept_ns = time.monotonic_ns()
        await origin.read_states(handles[:1])
        assert kit.table.last_active_ns[kit.table.find(["read"])[0]] < slept_ns
        await step(origin, handles[1:], [0], random_frames(rng, 1))
        await ticking(kit)
        assert kit.table.last_active_ns[kit.table.find(["stepped"])[0]] >= slept_ns


async def test_the_owner_is_told_of_a_sleeper_before_it_gets_the_reply_that_others_of_its_message_delay(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    async with streaming(idle=BUSY) as kit:
        origin, stranger = kit.frontend.connect(), kit.frontend.connect()
        handles = await asleep(kit, tmp_path / "r.instep", origin, ["a"])
        opened = await origin.open(["b"])
        assert failures(await step(stranger, handles, [0], random_frames(rng, 1))) == [(0, 0, Code.UNKNOWN_STREAM, 0)]
        assert (stranger.events, origin.events) == ([], [])
        refusals = kit.stats.refusals()
        assert refusals == {Code.UNKNOWN_STREAM: 1}
        stepping = asyncio.ensure_future(
            step(origin, np.append(opened.handles, handles), [0, 0], random_frames(rng, 1, 2))
        )
        twice = np.concatenate([opened.handles, opened.handles, handles])
        whole = asyncio.ensure_future(step(origin, twice, [0] * 3, random_frames(rng, 1, 3)))
        await kit.settle()
        assert [(each.code, each.renewed) for each in origin.events[:1]] == [(Code.HIBERNATED, None)]
        assert not stepping.done()
        await ticking(kit)
        await kit.finish_all()
        assert failures(await stepping) == [(1, 0, Code.UNKNOWN_STREAM, 0)]
        assert isinstance(whole.exception(), Refusal)
        assert kit.stats.refusals() == refusals | {Code.REPEATED_STREAM: 1}, "it was woken, not refused"
