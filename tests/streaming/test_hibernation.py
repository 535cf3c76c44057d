"""Streams that leave memory for the recording and come back: same bits, owners and answers as if they had stayed."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32, U64
from instep.recording.errors import DamagedRecording
from instep.recording.inspection import inspect
from instep.recording.open_streams import OpenStream, load_open_streams
from instep.recording.reader import RecordingReader
from instep.runtime.executor import InlineExecutor
from instep.streaming.checkpoints import Checkpoints
from instep.streaming.idle import IdleLimits
from instep_client.protocol.codes import Code
from tests.support.commits import held_commits
from tests.support.faulty_states import FaultyStates
from tests.support.models import SMALL, whole
from tests.support.states import floats_of
from tests.support.streaming import StreamingEngine, failures, random_frames, step, streaming
from tests.support.traffic import assert_same_bits

SOON_NS = 10**9
"""After so long streams hibernate here."""
LATER_NS = 100 * SOON_NS
LIMITS = IdleLimits(
    max_idle_ns=LATER_NS, first_frame_ns=0, park_ns=LATER_NS, max_parked=1000, hibernate_after_ns=SOON_NS
)
ZERO = np.zeros(1, np.uint64)


async def tick(kit: StreamingEngine, after_ns: int = 2 * SOON_NS, count: int = 1) -> None:
    """What is due after such a time."""
    for _ in range(count):
        kit.reaper.tick(time.monotonic_ns() + after_ns)
        kit.hibernation.tick(time.monotonic_ns() + after_ns)
        await kit.settle()
        await kit.durable()
        while len(kit.tasks):
            await asyncio.sleep(0.001)


def have(*seqs: int) -> U64:
    return np.array(seqs, np.uint64)


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
        assert [(event.code, event.handles.tolist()) for event in origin.events] == (
            [] if is_parked else [(Code.HIBERNATED, opened.handles.tolist())]
        )
        assert failures(await step(origin, opened.handles, [5], x[5:])) == [(0, 0, Code.UNKNOWN_STREAM, 0)]
        resumed = await origin.resume(["s"], have(5), opened.epochs)
        assert (resumed.codes.tolist(), resumed.next_seqs.tolist()) == ([0], [5])
        after = await step(origin, resumed.handles, [5], x[5:])
        served = np.concatenate([before.y[:, 0], after.y[:, 0]])
        assert_same_bits(served, whole(SMALL, x[:, 0])[0], "the stream")
        assert (kit.stats.hibernated_streams_total, kit.stats.woken_streams_total) == (1, 1)
        events = [(event.kind, event.seq) for event in kit.engine.events.since(0, "s")]
        assert events == [
            ("opened", 0),
            *([("parked", 5)] if is_parked else []),
            ("hibernated", 5),
            ("woken", 5),
            ("resumed", 5),
        ]


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
    assert inspect(path, lambda _: None).frames == count * length


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
    assert inspect(path, lambda _: None).checkpoint_position == mark.position


async def test_a_name_stays_in_use_and_a_state_is_read_without_waking(tmp_path: Path, rng: np.random.Generator) -> None:
    x = random_frames(rng, 3, 1)
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
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


async def test_those_that_hibernate_for_too_long_expire_with_their_final_state(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x, path = random_frames(rng, 3, 2), tmp_path / "r.instep"
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
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


async def test_without_a_limit_a_connected_owner_keeps_its_streams_and_one_that_left_has_them_parked(
    tmp_path: Path,
) -> None:
    limits = replace(LIMITS, max_idle_ns=0)
    async with streaming(InlineExecutor, idle=limits) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        await origin.open(["s"])
        await tick(kit)
        await tick(kit, after_ns=50 * LATER_NS, count=4)
        assert len(kit.hibernation) == 1
        kit.frontend.disconnect(origin)
        await tick(kit, count=3)  # it is noticed
        await tick(kit, after_ns=2 * LATER_NS, count=3)
        assert len(kit.hibernation) == 0


async def test_beyond_the_most_those_that_slept_longest_expire(tmp_path: Path) -> None:
    names = [f"s{number}" for number in range(6)]
    async with streaming(InlineExecutor, idle=replace(LIMITS, max_hibernated=2)) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(names)
        for _ in range(3):
            await tick(kit)
        resumed = await origin.resume(names, np.zeros(6, np.uint64), opened.epochs)
        assert resumed.codes.tolist() == [Code.EXPIRED] * 4 + [0] * 2


async def test_parked_streams_make_room_for_others_and_where_there_is_none_a_sleeper_stays(tmp_path: Path) -> None:
    never = replace(LIMITS, hibernate_after_ns=0)
    async with streaming(InlineExecutor, idle=never, max_streams=3) as kit:
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


async def test_with_a_recording_no_parked_stream_ends_to_make_room(tmp_path: Path, rng: np.random.Generator) -> None:
    async with streaming(InlineExecutor, idle=LIMITS, max_streams=2, states=FaultyStates) as kit:
        kit.hibernation.limits = replace(kit.hibernation.limits, parked_make_room=True)
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        parked = await gone.open(["a", "b"])
        assert failures(await step(gone, parked.handles, [0, 0], random_frames(rng, 1, 2))) == []
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0)
        kit.faulty.is_broken = True  # their states cannot be read, so they cannot hibernate now
        assert (await origin.open(["c"])).codes.tolist() == [Code.TOO_MANY_STREAMS]
        kit.faulty.is_broken = False
        assert (await origin.resume(["a", "b"], np.zeros(2, np.uint64), parked.epochs)).codes.tolist() == [0, 0]


@pytest.mark.parametrize("fell_asleep", [2, 4, 9])
async def test_none_falls_asleep_while_the_others_of_a_request_wake(tmp_path: Path, fell_asleep: int) -> None:
    names = [f"s{number}" for number in range(9)]
    async with streaming(InlineExecutor, idle=LIMITS, wake_at_once=2) as kit:
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(names)
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0)
        for _ in range((fell_asleep + 1) // 2):
            kit.hibernation.tick(time.monotonic_ns() + 2 * SOON_NS)
        assert len(kit.hibernation) == fell_asleep
        resuming = asyncio.ensure_future(origin.resume(names, np.zeros(9, np.uint64), opened.epochs))
        while not resuming.done():
            kit.hibernation.tick(time.monotonic_ns() + 2 * SOON_NS)
            await asyncio.sleep(0)
        assert not (await resuming).codes.any()
        assert kit.stats.woken_streams_total >= fell_asleep


async def test_a_stream_that_was_asked_for_in_time_does_not_expire_while_the_others_of_its_request_wake(
    tmp_path: Path,
) -> None:
    may_read = threading.Event()

    def late(path: Path, streams: Sequence[int]) -> list[OpenStream]:
        if 2 in streams:
            may_read.wait()
        return load_open_streams(path, streams)

    async with streaming(InlineExecutor, idle=LIMITS, wake_at_once=1) as kit:
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(["a", "b"])
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0)
        await tick(kit, count=2)
        assert len(kit.hibernation) == 2
        kit.load = late
        resuming = asyncio.ensure_future(origin.resume(["a", "b"], have(0, 0), opened.epochs))
        while not kit.table.open_count:
            await asyncio.sleep(0.001)
        for _ in range(10):
            kit.reaper.tick(time.monotonic_ns() + 2 * LATER_NS)
        may_read.set()
        assert (await resuming).codes.tolist() == [0, 0]


async def test_making_room_for_many_goes_some_at_a_time(tmp_path: Path, rng: np.random.Generator) -> None:
    names = [f"s{number}" for number in range(12)]
    async with streaming(InlineExecutor, idle=replace(LIMITS, hibernate_after_ns=0), wake_at_once=5) as kit:
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(names)
        await step(gone, opened.handles, [0] * 12, random_frames(rng, 1, 12))
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0)
        opening = asyncio.ensure_future(origin.open([f"t{number}" for number in range(11)]))
        asleep = {0}
        while not opening.done():
            asleep.add(len(kit.hibernation))
            await asyncio.sleep(0)
        assert not (await opening).codes.any()
        assert asleep == {0, 5, 10, 11}


async def test_surplus_parked_streams_hibernate_rather_than_end(tmp_path: Path) -> None:
    async with streaming(InlineExecutor, idle=replace(LIMITS, hibernate_after_ns=0, max_parked=1)) as kit:
        kit.record(tmp_path / "r.instep")
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(["a", "b", "c"])
        kit.frontend.disconnect(gone)
        await tick(kit, after_ns=0, count=2)
        assert (kit.table.open_count, len(kit.hibernation)) == (1, 2)
        assert not (await origin.resume(["a", "b", "c"], have(0, 0, 0), opened.epochs)).codes.any()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (sqlite3.OperationalError("unable to open database file"), Code.STEP_FAILED),
        (RuntimeError("can't start new thread"), Code.STEP_FAILED),
        (DamagedRecording("r.instep is damaged", Path("r.instep")), Code.STATE_LOST),
    ],
)
async def test_a_stream_that_cannot_be_read_now_costs_no_other_and_can_be_later(
    tmp_path: Path, rng: np.random.Generator, error: Exception, code: Code
) -> None:
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
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
        assert refused.codes.tolist() == [code, 0]
        assert (await kit.operations.read_states(["a"])).codes.tolist() == [code]
        assert {str(each) for each in kit.failures} == {str(error)}
        await tick(kit, after_ns=2 * LATER_NS, count=4)
        assert "a" in kit.hibernation, "it does not expire without its final state"
        kit.load = load_open_streams
        assert (await kit.operations.read_states(["a"])).codes.tolist() == [0]
        assert not (await origin.resume(["a"], have(1), opened.epochs[:1])).codes.any()


async def test_a_state_that_cannot_be_put_back_leaves_the_stream_asleep(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = random_frames(rng, 3)
    async with streaming(InlineExecutor, idle=LIMITS, states=FaultyStates) as kit:
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


async def test_a_stream_that_wakes_and_ends_while_its_state_is_read_is_not_told_in_an_older_one(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    may_read, x = threading.Event(), random_frames(rng, 5)
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        await step(origin, opened.handles, [0], x)
        await tick(kit)

        def late(path: Path, streams: Sequence[int]) -> list[OpenStream]:
            may_read.wait()
            return load_open_streams(path, streams)

        kit.load = late
        reading = asyncio.ensure_future(kit.operations.read_states(["s"]))
        await kit.settle()
        kit.load = load_open_streams
        resumed = await origin.resume(["s"], have(5), opened.epochs)
        await origin.close(resumed.handles)
        await Checkpoints(kit.engine, kit.states, kit.tasks, 10**15).take()
        may_read.set()
        assert (await reading).codes.tolist() == [Code.UNKNOWN_STREAM]


async def test_a_state_is_read_again_where_its_stream_was_awake_meanwhile(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    may_read, x = threading.Event(), random_frames(rng, 5)
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["s"])
        await step(origin, opened.handles, [0], x[:3])
        await tick(kit)

        def late(path: Path, streams: Sequence[int]) -> list[OpenStream]:
            found = load_open_streams(path, streams)
            may_read.wait()
            return found

        kit.load = late
        reading = asyncio.ensure_future(kit.operations.read_states(["s"]))
        await kit.settle()
        kit.load = load_open_streams
        resumed = await origin.resume(["s"], have(3), opened.epochs)
        await step(origin, resumed.handles, [3], x[3:])
        await tick(kit)
        assert list(kit.hibernation) == ["s"]
        may_read.set()
        read = await reading
        assert (read.codes.tolist(), read.next_seqs.tolist()) == ([0], [5])
        np.testing.assert_array_equal(floats_of(read.states, 1, -1)[0], whole(SMALL, x[:, 0])[1])


async def test_streams_of_a_connection_that_has_just_gone_are_kept_from_then_on(tmp_path: Path) -> None:
    limits = replace(LIMITS, park_ns=SOON_NS)
    async with streaming(InlineExecutor, idle=limits, reap_at_once=1) as kit:
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


async def test_a_stream_that_waits_for_its_first_frame_stays_where_it_ends(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    async with streaming(InlineExecutor, idle=replace(LIMITS, first_frame_ns=10 * SOON_NS)) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        opened = await origin.open(["used", "unused"])
        await step(origin, opened.handles[:1], [0], random_frames(rng, 1))
        await tick(kit)
        assert ("used" in kit.hibernation, "unused" in kit.hibernation) == (True, False)
        await tick(kit, after_ns=20 * SOON_NS, count=10)
        assert [event.code for event in origin.events] == [Code.HIBERNATED, Code.NEVER_USED]


async def test_without_a_recording_nothing_hibernates() -> None:
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
        await kit.frontend.connect().open(["s"])
        kit.hibernation.tick(time.monotonic_ns() + 2 * SOON_NS)
        assert (kit.table.open_count, len(kit.hibernation)) == (1, 0)


async def test_an_owner_is_not_told_of_a_handle_that_it_has_not_been_given(tmp_path: Path) -> None:
    async with held_commits() as may_commit, streaming(InlineExecutor, idle=LIMITS) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        may_commit.clear()
        opening = asyncio.ensure_future(origin.open(["s"]))
        await kit.settle()
        kit.hibernation.tick(time.monotonic_ns() + 2 * SOON_NS)
        assert (kit.table.open_count, origin.events) == (1, [])
        may_commit.set()
        assert not (await opening).codes.any()


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
