"""Streams that leave memory for the recording and come back: same bits, owners and answers as if they had stayed."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.streaming.states import Checkpoints
from instep_client.protocol.codes import Code
from tests.support.commits import held_commits
from tests.support.hibernating import LIMITS, SOON_NS, ZERO, have, tick
from tests.support.models import SMALL, whole
from tests.support.streaming import InlineExecutor, failures, random_frames, step, streaming
from tests.support.traffic import assert_same_bits


@pytest.mark.parametrize("is_parked", [True, False])
async def test_a_stream_comes_back_with_the_same_bits(
    tmp_path: Path, rng: np.random.Generator, is_parked: bool
) -> None:
    x = random_frames(rng, 8, 1)
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        before = await step(origin, opened.handles, [0], x[:5])
        if is_parked:
            kit.frontend.disconnect(origin)
            kit.reaper.tick(time.monotonic_ns())
            origin = kit.frontend.connect()
        await tick(kit)
        assert (kit.table.open_count, len(kit.hibernation)) == (0, 1)
        assert origin.events == []
        assert failures(await step(origin, opened.handles, [5], x[5:])) == [(0, 0, Code.UNKNOWN_STREAM, 0)]
        if is_parked:
            resumed = await origin.resume(["s"], have(5), opened.epochs)
            assert (resumed.codes.tolist(), resumed.next_seqs.tolist()) == ([0], [5])
            handles = resumed.handles
        else:
            while len(kit.tasks):
                await asyncio.sleep(0.001)
            asleep, awake = origin.events
            assert (asleep.code, asleep.handles.tolist(), asleep.renewed) == (Code.HIBERNATED, [*opened.handles], None)
            assert awake.handles.tolist() == opened.handles.tolist()
            assert awake.renewed is not None
            handles = awake.renewed
        after = await step(origin, handles, [5], x[5:])
        served = np.concatenate([before.y[:, 0], after.y[:, 0]])
        assert_same_bits(served, whole(SMALL, x[:, 0])[0], "the stream")
        assert (kit.stats.hibernated_streams_total, kit.stats.woken_streams_total) == (1, 1)
        events = [(event.kind, event.seq) for event in kit.engine.events.since(0, "s")]
        assert events == [
            ("opened", 0),
            *([("parked", 5)] if is_parked else []),
            ("hibernated", 5),
            ("woken", 5),
            *([("resumed", 5)] if is_parked else []),
        ]


async def test_an_owner_is_told_the_handles_that_it_had_to_the_last_digit(tmp_path: Path) -> None:
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["a", "b", "c"])
        assert len({int(handle) < 2**63 for handle in opened.handles}) == 2
        await tick(kit)
        await step(origin, opened.handles, [0, 0, 0], random_frames(np.random.default_rng(1), 1, 3))
        while len(kit.tasks):
            await asyncio.sleep(0.001)
        assert sorted(origin.events[-1].handles.tolist()) == sorted(opened.handles.tolist())


async def test_unacknowledged_frames_are_answered_again_and_an_older_owner_is_fenced(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = random_frames(rng, 4, 1)
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        first = await step(origin, opened.handles, [0], x)
        taken = await origin.resume(["s"], have(1), ZERO, take_over=True)
        assert failures(await step(origin, taken.handles, [4], random_frames(rng, 1, 1), [1])) == []
        await tick(kit)
        frames = kit.stats.frames_total
        fenced = await origin.resume(["s"], have(4), opened.epochs)
        assert fenced.codes.tolist() == [Code.FENCED]
        gone = await origin.resume(["s"], have(0), taken.epochs)
        assert gone.codes.tolist() == [Code.OUTPUTS_GONE]
        resumed = await origin.resume(["s"], have(1), taken.epochs)
        again = await step(origin, resumed.handles, [1], x[1:])
        assert failures(again) == []
        assert again.y.tobytes() == first.y[1:].tobytes()
        other = await step(origin, resumed.handles, [2], x[:1])
        assert failures(other) == [(0, 0, Code.CONFLICT, 5)]
        assert kit.stats.frames_total == frames, "nothing was computed twice"


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
        async with streaming(InlineExecutor, idle=LIMITS, max_streams=slots) as kit:
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


async def test_streams_may_hibernate_while_a_checkpoint_is_taken(tmp_path: Path, rng: np.random.Generator) -> None:
    x, path, names = random_frames(rng, 6, 8), tmp_path / "r.instep", list("abcdefgh")
    async with held_commits() as may_commit, streaming(InlineExecutor, idle=LIMITS) as kit:
        kit.record(path, durability="memory")
        origin = kit.frontend.connect()
        opened = await origin.open(names)
        await step(origin, opened.handles, [0] * 8, x[:3])
        kit.frontend.disconnect(origin)
        kit.reaper.tick(time.monotonic_ns())
        may_commit.clear()
        taking = asyncio.ensure_future(Checkpoints(kit.engine, kit.states, kit.tasks, 10**15, at_once=2).take())
        await kit.settle()
        kit.hibernation.tick(time.monotonic_ns() + 2 * SOON_NS)
        assert len(kit.hibernation) == 8
        may_commit.set()
        await taking
        origin = kit.frontend.connect()
        resumed = await origin.resume(names, have(*[3] * 8), opened.epochs)
        after = await step(origin, resumed.handles, [3] * 8, x[3:])
        for column in range(8):
            assert_same_bits(after.y[:, column], whole(SMALL, x[:, column])[0][3:], names[column])
    with RecordingReader(path) as reader:
        mark, newest = reader.checkpoint(), {}
        for state in reader.states():
            if state.position <= mark.position:
                newest[state.stream] = state
        assert len(newest) == 8, "the checkpoint has all of them"
        for stream, state in newest.items():
            expected = whole(SMALL, x[: state.seq, stream - 1])[1]
            assert_same_bits(state.state.view(np.float32).reshape(expected.shape), expected, f"stream {stream}")
    assert inspect(path).checkpoint_position == mark.position


@pytest.mark.parametrize("waits_for", ["commit", "step"])
async def test_a_stream_stays_awake_until_its_owner_has_been_given_the_handle(
    tmp_path: Path, rng: np.random.Generator, waits_for: str
) -> None:
    async with held_commits() as may_commit, streaming(idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        former, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await former.open(["s"])
        stepping = asyncio.ensure_future(step(former, opened.handles, [0], random_frames(rng, 1)))
        await kit.settle()
        if waits_for == "commit":
            await kit.finish()
            await stepping
            may_commit.clear()

        async def tick_before_the_request_continues() -> None:
            if waits_for == "commit":
                await kit.durable()
            else:
                await kit.engine.waiters.until(lambda: not kit.table.unanswered.any())
            kit.hibernation.tick(time.monotonic_ns() + 2 * SOON_NS)

        if waits_for == "commit":
            resuming = asyncio.ensure_future(origin.resume(["s"], have(0), ZERO, take_over=True))
            await kit.settle()
            ticking = asyncio.ensure_future(tick_before_the_request_continues())
            await kit.settle()
            may_commit.set()
        else:
            ticking = asyncio.ensure_future(tick_before_the_request_continues())
            resuming = asyncio.ensure_future(origin.resume(["s"], have(0), ZERO, take_over=True))
            await kit.settle()
            await kit.finish()
        await ticking
        assert (await resuming).codes.tolist() == [0]
        assert origin.events == []
