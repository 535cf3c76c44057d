"""Checkpoints: what a restart has to replay, and that frames, requests and kills meanwhile change nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np

from instep.core.typing import U64
from instep.recording.recovery import Recovered
from instep.streaming.states import Checkpoints
from tests.support.commits import held_commits
from tests.support.in_process import InProcessOrigin
from tests.support.models import SMALL, whole
from tests.support.states import floats_of
from tests.support.streaming import InlineExecutor, StreamingEngine, random_frames, step, streaming

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
    return sum(len(portion.frames) for portion in recovered.portions())


async def test_a_restart_replays_nothing_that_a_checkpoint_holds(tmp_path: Path, rng: np.random.Generator) -> None:
    x, path = random_frames(rng, 4, COUNT), tmp_path / "r.instep"
    async with streaming(InlineExecutor) as kit:
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


async def test_streams_that_step_close_and_open_between_the_parts_are_recovered_to_the_bit(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x, path = random_frames(rng, 6, COUNT), tmp_path / "r.instep"
    async with held_commits() as may_commit, streaming(InlineExecutor) as kit:
        origin, handles = await recorded(kit, path, x[:2])
        may_commit.clear()
        taking = asyncio.ensure_future(checkpoints_of(kit, at_once=3).take())
        await kit.settle()
        asked = [
            asyncio.ensure_future(each)
            for each in (
                step(origin, handles[:8], [2] * 8, x[2:4, :8]),
                origin.close(handles[8:]),
                origin.open([NAMES[9], "new"]),
            )
        ]
        await kit.settle()
        assert not taking.done()
        may_commit.set()
        await taking
        for each in asked:
            await each
    async with streaming(InlineExecutor) as kit:
        recovery = kit.record(path)
        assert recovery is not None
        assert recovery.streams == 10
        read = await kit.frontend.ask(lambda: kit.operations.read_states([*NAMES, "new"]))
        assert read.next_seqs.tolist() == [4] * 8 + [0, 0, 0]
        for column in range(8):
            np.testing.assert_array_equal(floats_of(read.states, 1, -1)[column], whole(SMALL, x[:4, column])[1])
        assert not floats_of(read.states, -1)[9:].any()


async def test_the_one_after_a_checkpoint_that_was_cut_off_is_complete(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x, path = random_frames(rng, 3, COUNT), tmp_path / "r.instep"
    async with held_commits() as may_commit, streaming(InlineExecutor) as kit:
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
