"""States of streams that hibernate: they are read without waking, and one that cannot be read costs no other."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from instep.recording.errors import DamagedRecording
from instep.recording.reader import RecordingReader, load_open_streams
from instep.recording.records import OpenStream
from instep.recording.schema import LOST
from instep.replay.verifier import verify
from instep.streaming.states import Checkpoints
from instep_client.protocol.codes import Code
from tests.support.hibernating import LATER_NS, LIMITS, have, tick
from tests.support.models import SMALL, whole
from tests.support.states import floats_of
from tests.support.streaming import FaultyStates, InlineExecutor, random_frames, step, streaming
from tests.support.traffic import assert_same_bits
from tests.support.verifying import ignore_progress


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


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (sqlite3.OperationalError("unable to open database file"), Code.STEP_FAILED),
        (RuntimeError("can't start new thread"), Code.STEP_FAILED),
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


@pytest.mark.parametrize("met_by", ["frame", "resume", "close", "age"])
async def test_a_stream_whose_rows_are_damaged_ends_and_its_name_is_free(
    tmp_path: Path, rng: np.random.Generator, met_by: str
) -> None:
    path = tmp_path / "r.instep"
    async with streaming(InlineExecutor, idle=LIMITS) as kit:
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
