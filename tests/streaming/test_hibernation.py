"""Streams that leave memory for the recording and come back: same bits, owners and answers as if they had stayed."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32
from instep.recording.errors import DamagedRecording
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader, load_open_streams
from instep.recording.records import OpenStream
from instep.recording.schema import LOST
from instep.replay.verifier import verify
from instep.streaming.states import Checkpoints
from instep_client.protocol.codes import Code
from tests.support.hibernating import LATER_NS, LIMITS, SOON_NS, ZERO, have, tick
from tests.support.models import SMALL, whole
from tests.support.streaming import FaultyStates, failures, random_frames, step, streaming
from tests.support.traffic import assert_same_bits
from tests.support.verifying import ignore_progress


async def test_a_frame_wakes_its_stream_and_the_next_one_gets_the_same_bits(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = random_frames(rng, 8, 1)
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        before = await step(origin, opened.handles, [0], x[:5])
        await tick(kit)
        assert (kit.table.open_count, len(kit.hibernation), origin.events) == (0, 1, [])
        assert failures(await step(origin, opened.handles, [5], x[5:])) == [(0, 0, Code.UNKNOWN_STREAM, 0)]
        while len(kit.tasks):
            await asyncio.sleep(0.001)
        asleep, awake = origin.events
        assert (asleep.code, asleep.handles.tolist(), asleep.renewed) == (Code.HIBERNATED, [*opened.handles], None)
        assert awake.renewed is not None
        after = await step(origin, awake.renewed, [5], x[5:])
        served = np.concatenate([before.y[:, 0], after.y[:, 0]])
        assert_same_bits(served, whole(SMALL, x[:, 0])[0], "the stream")
        events = [(event.kind, event.seq) for event in kit.engine.events.since(0, "s")]
        assert events == [("opened", 0), ("hibernated", 5), ("woken", 5)]


async def test_an_owner_is_told_the_handles_that_it_had_to_the_last_digit(tmp_path: Path) -> None:
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["a", "b", "c"])
        assert len({int(handle) < 2**63 for handle in opened.handles}) == 2
        await tick(kit)
        await step(origin, opened.handles, [0, 0, 0], random_frames(np.random.default_rng(1), 1, 3))
        while len(kit.tasks):
            await asyncio.sleep(0.001)
        assert sorted(origin.events[-1].handles.tolist()) == sorted(opened.handles.tolist())


def copied(path: Path, folder: Path) -> Path:
    """What a kill would leave of a recording that is being written."""
    folder.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", folder / f"{path.name}{suffix}")
    return folder / path.name


async def test_more_streams_than_slots_come_and_go_in_any_order_and_a_kill_changes_nothing(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    count, length, slots = 60, 12, 8
    x, path = random_frames(rng, length, count), tmp_path / "r.instep"
    y: F32 = np.full((length, count, whole(SMALL, x[:, 0])[0].shape[-1]), np.nan, np.float32)
    names, seqs, epochs = [f"s{number}" for number in range(count)], np.zeros(count, np.int64), np.zeros(count, "<u8")
    for life in range(4):
        async with streaming(inline=True, idle=LIMITS, max_streams=slots) as kit:
            recovery = kit.record(path)
            assert recovery is None or recovery.streams == count
            origin = kit.frontend.connect()
            for _ in range(120):
                some = rng.choice(count, slots - int(rng.integers(0, 3)), replace=False)
                if life == 0:
                    some = np.flatnonzero(epochs == 0)[:slots] if (epochs == 0).any() else some
                is_new = epochs[some] == 0
                chosen = [names[column] for column in some.tolist()]
                if is_new.any():
                    chosen, some = [names[column] for column in some[is_new].tolist()], some[is_new]
                    grants = await origin.open(chosen)
                else:
                    grants = await origin.resume(chosen, seqs[some].astype(np.uint64), epochs[some])
                assert not grants.codes.any(), grants.codes
                epochs[some] = grants.epochs
                going = seqs[some] < length
                if going.any():
                    columns = some[going]
                    frames = x[seqs[columns], columns][None]
                    reply = await step(origin, grants.handles[going], seqs[columns].tolist(), frames)
                    assert failures(reply) == []
                    y[seqs[columns], columns] = reply.y[0]
                    seqs[columns] += 1
                if rng.random() < 0.1:
                    kit.tasks.start(Checkpoints(kit.engine, kit.states, kit.tasks, 10**15, 3).take())
                await tick(kit)
                assert kit.table.open_count <= slots
            await kit.durable()
            killed = copied(path, tmp_path / f"killed-{life}")
        path = killed
    assert (seqs == length).all(), "every stream came to its end"
    for column, name in enumerate(names):
        assert_same_bits(y[:, column], whole(SMALL, x[:, column])[0], name)
    assert inspect(path).frames == count * length


async def test_a_stream_stays_awake_until_its_owner_has_been_given_the_handle(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    async with streaming(idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        former, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await former.open(["s"])
        stepping = asyncio.ensure_future(step(former, opened.handles, [0], random_frames(rng, 1)))
        await kit.settle()

        async def tick_before_the_request_continues() -> None:
            await kit.engine.waiters.until(lambda: not kit.table.unanswered.any())
            kit.hibernation.tick(time.monotonic_ns() + 2 * SOON_NS)

        ticking = asyncio.ensure_future(tick_before_the_request_continues())
        resuming = asyncio.ensure_future(origin.resume(["s"], have(0), ZERO, take_over=True))
        await kit.settle()
        await kit.finish()
        await ticking
        assert (await resuming).codes.tolist() == [0]
        assert origin.events == []
        stepping.cancel()


async def test_a_name_stays_in_use_and_a_state_is_read_without_waking(tmp_path: Path, rng: np.random.Generator) -> None:
    x = random_frames(rng, 3, 1)
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s", "never stepped"])
        await step(origin, opened.handles[:1], [0], x)
        await tick(kit)
        assert (await origin.open(["s", "other"])).codes.tolist() == [Code.NAME_IN_USE, 0]
        read = await kit.operations.read_states(["never stepped", "nobody", "s"])
        assert (read.codes.tolist(), read.next_seqs.tolist()) == ([0, Code.UNKNOWN_STREAM, 0], [0, 0, 3])
        expected = whole(SMALL, x[:, 0])[1]
        assert_same_bits(read.states[2].view(np.float32).reshape(expected.shape), expected, "the state")
        assert not read.states[0].any()
        assert len(kit.hibernation) == 2
        assert kit.stats.woken_streams_total == 0


async def test_a_stream_that_cannot_be_read_now_costs_no_other_and_can_be_later(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    error = RuntimeError("can't start new thread")
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["a", "b"])
        await step(origin, opened.handles, [0, 0], random_frames(rng, 1, 2))
        await tick(kit)

        def failing(path: Path, streams: Sequence[int]) -> list[OpenStream]:
            if 1 in streams:
                raise error
            return load_open_streams(path, streams)

        kit.load = failing
        refused = await origin.resume(["a", "b"], have(1, 1), opened.epochs)
        assert refused.codes.tolist() == [Code.STEP_FAILED, 0]
        assert (await kit.operations.read_states(["a"])).codes.tolist() == [Code.STEP_FAILED]
        assert {str(each) for each in kit.failures} == {str(error)}
        await tick(kit, after_ns=2 * LATER_NS, count=4)
        assert "a" in kit.hibernation, "it does not expire without its final state"
        kit.load = load_open_streams
        assert (await kit.operations.read_states(["a"])).codes.tolist() == [0]
        assert not (await origin.resume(["a"], have(1), opened.epochs[:1])).codes.any()


@pytest.mark.parametrize("met_by", ["frame", "resume", "close", "age"])
async def test_a_stream_whose_rows_are_damaged_ends_and_its_name_is_free(
    tmp_path: Path, rng: np.random.Generator, met_by: str
) -> None:
    path = tmp_path / "r.instep"
    async with streaming(inline=True, idle=LIMITS) as kit:
        kit.record(path)
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        await step(origin, opened.handles, [0], random_frames(rng, 3))
        await tick(kit)

        def damaged(path: Path, streams: Sequence[int]) -> list[OpenStream]:
            raise DamagedRecording("damaged", path)

        kit.load = damaged
        if met_by == "frame":
            await step(origin, opened.handles, [3], random_frames(rng, 1))
        elif met_by == "resume":
            assert (await origin.resume(["s"], have(3), opened.epochs)).codes.tolist() == [Code.STATE_LOST]
        elif met_by == "close":
            assert (await origin.close(opened.handles)).codes.tolist() == [Code.STATE_LOST]
        else:
            await tick(kit, after_ns=2 * LATER_NS, count=3)
        while len(kit.tasks):
            await asyncio.sleep(0.001)
        assert (origin.events[-1].code, origin.events[-1].handles.tolist()) == (Code.STATE_LOST, [*opened.handles])
        assert not (await origin.open(["s"])).codes.any()
        await kit.durable()
    with RecordingReader(path) as reader:
        assert [(each.name, each.reason, each.frames) for each in reader.streams()] == [
            ("s", LOST, None),
            ("s", None, None),
        ]
        report = verify(reader, SMALL, (), ignore_progress)
    assert (report.verified, report.frames) == (True, 3)


async def test_a_state_that_cannot_be_put_back_leaves_the_stream_asleep(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = random_frames(rng, 3)
    async with streaming(inline=True, idle=LIMITS, states=FaultyStates) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        await step(origin, opened.handles, [0], x[:2])
        await tick(kit)
        kit.faulty.good_loads = 0
        assert (await origin.resume(["s"], have(2), opened.epochs)).codes.tolist() == [Code.STEP_FAILED]
        assert (kit.table.open_count, len(kit.hibernation)) == (0, 1)
        kit.faulty.good_loads = 1
        resumed = await origin.resume(["s"], have(2), opened.epochs)
        after = await step(origin, resumed.handles, [2], x[2:])
        assert_same_bits(after.y[:, 0], whole(SMALL, x[:, 0])[0][2:], "the stream")
