"""Checkpoints and restarts: what is stepped again, what that costs, and what makes a restart impossible."""

from __future__ import annotations

import asyncio
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import U64
from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.writer import RecordingWriter
from instep.server.recordings import recording_header
from instep.streaming.states import Checkpoints
from tests.support.commits import held_commits
from tests.support.in_process import InProcessOrigin
from tests.support.models import SMALL, whole
from tests.support.rows import open_stream
from tests.support.running import config, prepared
from tests.support.streaming import StreamingEngine, random_frames, step, streaming

COUNT = 10
NAMES = [f"s{number}" for number in range(COUNT)]


def checkpoints_of(kit: StreamingEngine, at_once: int = 1024, target_ns: int = 10**15) -> Checkpoints:
    return Checkpoints(kit.engine, kit.states, kit.tasks, target_ns, at_once)


async def recorded(kit: StreamingEngine, path: Path, x: np.ndarray) -> tuple[InProcessOrigin, U64]:
    """An origin with streams that were stepped by x [T, COUNT, features], all of it recorded."""
    kit.record(path)
    origin = kit.frontend.connect()
    handles = (await origin.open(NAMES)).handles
    await step(origin, handles, [0] * COUNT, x)
    return origin, handles


def replayed(recovered: Recovered) -> int:
    """Frames that a restart steps again."""
    return sum(len(segment.frames) for segment in recovered.segments())


async def test_a_restart_replays_nothing_that_a_checkpoint_holds(tmp_path: Path, rng: np.random.Generator) -> None:
    x, path = random_frames(rng, 4, COUNT), tmp_path / "r.instep"
    async with streaming(inline=True) as kit:
        origin, handles = await recorded(kit, path, x[:3])
        checkpoints = checkpoints_of(kit)
        await checkpoints.take()
        assert not checkpoints.is_under_way
        await step(origin, handles[:2], [3, 3], x[3:, :2])
    with Recovered(path) as recovered:
        assert [stream.seq for stream in recovered.load(recovered.names)] == [3] * COUNT
        for column, stream in enumerate(recovered.load(recovered.names)):
            assert stream.state is not None
            np.testing.assert_array_equal(stream.state.view("<f4")[None], whole(SMALL, x[:3, column])[1])
        assert replayed(recovered) == 2


async def test_one_is_due_when_the_steps_since_the_last_one_took_as_long_as_a_restart_may(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    async with streaming() as kit:
        kit.record(tmp_path / "r.instep", durability="memory")
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        checkpoints, taken = checkpoints_of(kit, target_ns=1_000_000), list[bool]()
        for seq in range(5):
            asked = asyncio.ensure_future(step(origin, handles, [seq], random_frames(rng, 1), [seq]))
            await kit.settle()
            await kit.finish(step_ns=600_000)
            await asked
            newest = kit.engine.journal.newest
            checkpoints.take_if_due()
            await kit.settle()
            taken.append(kit.engine.journal.newest > newest)
            await kit.durable()
        assert taken == [False, True, False, True, False]


async def test_the_one_after_a_checkpoint_that_was_cut_off_is_complete(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x, path = random_frames(rng, 3, COUNT), tmp_path / "r.instep"
    async with held_commits() as may_commit, streaming(inline=True) as kit:
        origin, handles = await recorded(kit, path, x[:2])
        checkpoints = checkpoints_of(kit, at_once=3)
        may_commit.clear()
        taking = asyncio.ensure_future(checkpoints.take())
        await kit.settle()
        taking.cancel()
        may_commit.set()
        await step(origin, handles[:1], [2], x[2:, :1])
        await checkpoints.take()
    with Recovered(path) as recovered:
        assert replayed(recovered) == 0
        for column, stream in enumerate(recovered.load(recovered.names)):
            assert stream.state is not None, stream.name
            frames = x[:3, column] if column == 0 else x[:2, column]
            np.testing.assert_array_equal(stream.state.view("<f4")[None], whole(SMALL, frames)[1])


MANY = 20_000_000
"""Streams that were opened in the life of a recording, of which three are left."""
NUMBERS = [MANY, 7, MANY - 5]


async def test_memory_is_for_the_streams_that_are_open_and_not_for_all_that_ever_were(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    writer = RecordingWriter.create(path, recording_header(prepared(SMALL), config(recording={"path": path})))
    for number in NUMBERS:
        open_stream(writer, number, f"s{number}", 1000, 0, 1, None)
    for seq, streams in enumerate(([7, MANY - 5, MANY], [MANY, 7])):
        count = len(streams)
        x = np.full((count, 5), seq + 1, np.float32)
        writer.add_inputs(1, np.array(streams, np.uint32), np.full(count, seq, np.uint64), x)
    writer.commit()
    writer.abandon()
    async with streaming(inline=True) as kit:
        tracemalloc.start()
        recovery = kit.record(path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < MANY, "a byte for each"
        assert recovery is not None
        assert (recovery.streams, recovery.frames, recovery.last_stream) == (3, 5, MANY)
        read = await kit.frontend.ask(lambda: kit.operations.read_states([f"s{number}" for number in NUMBERS]))
        assert read.next_seqs.tolist() == [2, 2, 1]


async def test_more_streams_than_fit_are_refused_with_what_to_do(tmp_path: Path, rng: np.random.Generator) -> None:
    path = tmp_path / "r.instep"
    async with streaming(inline=True) as kit:
        kit.record(path)
        origin = kit.frontend.connect()
        handles = (await origin.open(list("abcd"))).handles
        await step(origin, handles, [0] * 4, random_frames(rng, 1, 4))
    async with streaming(inline=True, max_streams=3) as kit:
        with pytest.raises(RecordingError, match=r"engine\.max_streams = 3"):
            kit.record(path)
    async with streaming(inline=True) as kit:
        recovery = kit.record(path)
        assert recovery is not None, "the attempt has left it as it was"
        assert recovery.streams == 4


async def test_outputs_must_have_the_recorded_bits_only_where_every_engine_promises_them(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    promised = recording_header(prepared(SMALL), config(recording={"path": path}))
    writer = RecordingWriter.create(path, replace(promised, arithmetic="torch 1.9 on cuda:0"))
    open_stream(writer, 1, "s", 1000, 0, 1, None)
    numbers, seqs, x = np.array([1], np.uint32), np.array([0], np.uint64), np.ones((1, 5), np.float32)
    position = writer.add_inputs(1, numbers, seqs, x)
    writer.add_outputs(1, position, np.full((1, 8), 0.25, np.float32))
    writer.commit()
    writer.abandon()
    epochs = np.array([1000], np.uint64)
    for _ in range(2):  # the second time after an engine that promised them, and ended before it had a checkpoint
        async with streaming(inline=True) as kit:
            recovery = kit.record(path)
            assert recovery is not None
            assert recovery.frames == 1
            origin = kit.frontend.connect()
            resumed = await origin.resume(["s"], np.array([0], np.uint64), epochs)
            epochs = resumed.epochs
            again = await step(origin, resumed.handles, [0], x[None])
            assert again.y.tolist() == [[[0.25] * 8]], "a frame that is repeated gets what was answered"
            assert kit.stats.frames_total == 0
    with RecordingReader(path) as reader:
        assert [engine.header.arithmetic for engine in reader.engines] == ["torch 1.9 on cuda:0", "portable-1"]
