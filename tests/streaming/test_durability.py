"""With a recording, nobody is told of anything that a crash could undo; and what is recorded is what happened."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.typing import F32, U64
from instep.recording.reader import RecordingReader
from instep.recording.schema import Durability
from instep_client.protocol.codes import Code
from tests.support.commits import held_commits
from tests.support.in_process import InProcessOrigin
from tests.support.models import SMALL, whole
from tests.support.states import floats_of, rows_of
from tests.support.streaming import InlineExecutor, StreamingEngine, failures, random_frames, step, streaming

H = 8
ONES: F32 = np.ones((1, 1, H), np.float32)

Ask = Callable[[StreamingEngine, InProcessOrigin, U64, F32], Awaitable[Any]]


def ask_to_write(kit: StreamingEngine, origin: InProcessOrigin, handles: U64, _: F32) -> Awaitable[Any]:
    codes = np.zeros(1, np.int32)
    return kit.frontend.ask(lambda: kit.operations.write_states(origin, handles, rows_of(ONES), codes))


def ask_to_fork(kit: StreamingEngine, origin: InProcessOrigin, handles: U64, _: F32) -> Awaitable[Any]:
    codes = np.zeros(1, np.int32)
    return kit.frontend.ask(lambda: kit.operations.fork(origin, handles, ["copy"], codes))


REQUESTS: dict[str, Ask] = {
    "step": lambda _, origin, handles, x: step(origin, handles, [1], x),
    "open": lambda _, origin, handles, x: origin.open(["t"]),
    "resume": lambda _, origin, handles, x: origin.resume(
        ["s"], np.ones(1, np.uint64), np.zeros(1, np.uint64), take_over=True
    ),
    "close": lambda _, origin, handles, x: origin.close(handles),
    "write": ask_to_write,
    "fork": ask_to_fork,
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("durability", ["commit", "fsync", "memory"])
async def test_nothing_is_answered_before_the_recording_has_it(
    tmp_path: Path, rng: np.random.Generator, name: str, durability: Durability
) -> None:
    x = random_frames(rng, 2)
    async with held_commits() as may_commit, streaming(InlineExecutor) as kit:
        kit.record(tmp_path / "r.instep", durability=durability)
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        await step(origin, handles, [0], x[:1])
        await kit.durable()
        may_commit.clear()
        asked = asyncio.ensure_future(REQUESTS[name](kit, origin, handles, x[1:]))
        await kit.settle()
        assert asked.done() == (durability == "memory")
        may_commit.set()
        await asked


async def test_a_state_is_told_when_the_frames_that_it_contains_are_recorded_and_refusals_at_once(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = random_frames(rng, 2)
    async with held_commits() as may_commit, streaming(InlineExecutor) as kit:
        kit.record(tmp_path / "r.instep")
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        may_commit.clear()
        stepped = asyncio.ensure_future(step(origin, handles, [0], x))
        by_handle = asyncio.ensure_future(origin.read_states(handles))
        by_name = asyncio.ensure_future(kit.frontend.ask(lambda: kit.operations.read_states(["s"])))
        await kit.settle()
        assert kit.stats.frames_total == 2
        assert not any(each.done() for each in (stepped, by_handle, by_name))
        assert failures(await step(origin, handles, [0], x)) == [(0, 0, Code.SEQ_REPEATED, 2)]
        assert failures(await step(origin, handles, [5], x)) == [(0, 0, Code.SEQ_GAP, 2)]
        may_commit.set()
        y, final = whole(SMALL, x[:, 0])
        np.testing.assert_array_equal((await stepped).y[:, 0], y)
        for read in (await by_handle, await by_name):
            assert read.next_seqs.tolist() == [2]
            np.testing.assert_array_equal(floats_of(read.states, 1, H)[0], final)


@pytest.mark.parametrize("asks", ["resume", "read", "read another too"])
@pytest.mark.parametrize("end", ["expired", "closed"])
async def test_nobody_is_told_that_a_stream_ended_before_the_recording_has_its_end(
    tmp_path: Path, end: str, asks: str
) -> None:
    async with held_commits() as may_commit, streaming(InlineExecutor) as kit:
        kit.record(tmp_path / "r.instep")
        owner, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await owner.open(["s", "other"])
        may_commit.clear()
        closing = None
        if end == "closed":
            closing = asyncio.ensure_future(owner.close(opened.handles[:1]))
        else:
            kit.operations.expire(kit.table.find(["s"]))
        await kit.settle()
        assert kit.table.open_count == 1
        if asks == "resume":
            claims = np.zeros(1, np.uint64), opened.epochs[:1]
            asked: asyncio.Future[Any] = asyncio.ensure_future(origin.resume(["s"], *claims))
        else:
            names = ["s"] if asks == "read" else ["s", "other"]
            asked = asyncio.ensure_future(kit.frontend.ask(lambda: kit.operations.read_states(names)))
        await kit.settle()
        assert not asked.done()
        assert not owner.events
        may_commit.set()
        assert (await asked).codes[0] == (Code.EXPIRED if end == "expired" else Code.UNKNOWN_STREAM)
        if closing is not None:
            await closing


async def test_after_the_recorder_failed_nothing_is_answered_any_more(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with streaming(InlineExecutor) as kit:
        kit.record(tmp_path / "r.instep")
        assert kit.recorder is not None
        origin = kit.frontend.connect()
        handles = (await origin.open(["s", "t"])).handles
        kit.recorder.stop()
        asked = [
            asyncio.ensure_future(each)
            for each in (
                step(origin, handles[:1], [0], random_frames(rng, 1)),
                origin.open(["u"]),
                origin.close(handles[1:]),
            )
        ]
        for _ in range(5):
            await kit.settle()
        assert not any(each.done() for each in asked)
        for each in asked:
            each.cancel()


# ── What is recorded ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_written_state_is_recorded_before_the_frames_behind_it(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x, path = random_frames(rng, 5), tmp_path / "r.instep"
    async with streaming(InlineExecutor) as kit:
        kit.record(path)
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        await step(origin, handles, [0], x[:2])
        _, behind = await asyncio.gather(ask_to_write(kit, origin, handles, x), step(origin, handles, [2], x[2:]))
    truth = whole(SMALL, x[2:, 0], ONES[0])[0]
    np.testing.assert_array_equal(behind.y[:, 0], truth)
    async with streaming(InlineExecutor) as kit:
        recovery = kit.record(path)
        assert recovery is not None
        assert (recovery.streams, recovery.frames) == (1, 5)
        read = await kit.frontend.ask(lambda: kit.operations.read_states(["s"]))
        np.testing.assert_array_equal(floats_of(read.states, 1, H)[0], whole(SMALL, x[2:, 0], ONES[0])[1])


async def test_parking_resuming_and_ends_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    names = [f"s{number}" for number in range(10)]
    async with streaming(InlineExecutor, reap_at_once=3) as kit:
        kit.record(path)
        gone, origin = kit.frontend.connect(), kit.frontend.connect()
        opened = await gone.open(names)
        kit.frontend.disconnect(gone)
        for _ in range(5):
            kit.reaper.tick(0)
        await origin.resume(names[:4], np.zeros(4, np.uint64), opened.epochs[:4])
        kit.operations.expire(kit.table.find(names[9:]))
        await kit.settle()
        await kit.durable()
    with RecordingReader(path) as reader:
        events = [(event.kind, event.stream) for event in reader.events()]
        assert sorted(stream or 0 for kind, stream in events if kind == "parked")[:10] == list(range(1, 11))
        assert [stream for kind, stream in events if kind == "owner"] == [1, 2, 3, 4]
        assert [info.reason for info in reader.streams()] == [None] * 9 + ["expired"]
