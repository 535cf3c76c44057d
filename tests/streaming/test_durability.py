"""With a recording, nobody is told of anything that a crash could undo; and what is recorded is what happened."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.typing import F32, U64
from instep.recording.reader import RecordingReader
from instep.recording.schema import Durability
from instep.recording.writer import Statement
from instep_client.protocol.codes import Code
from tests.support.commits import held_commits
from tests.support.in_process import InProcessOrigin
from tests.support.states import rows_of
from tests.support.streaming import StreamingEngine, random_frames, step, streaming

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
    async with held_commits() as may_commit, streaming(inline=True) as kit:
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


class OtherNode:
    """A second place: transactions pass at once, and barriers once they may."""

    def __init__(self) -> None:
        self.is_used = True
        self.barriers = 0
        self.may_pass = threading.Semaphore(0)
        self.failure: Exception | None = None

    def commit(self, file: Path, statements: Sequence[Statement], here: Callable[[], object]) -> None:
        here()

    def barrier(self) -> None:
        self.barriers += 1
        assert self.may_pass.acquire(timeout=60)
        if self.failure is not None:
            raise self.failure

    def copy_wal(self, file: Path) -> None:
        pass


REFUSED: dict[str, Ask] = {
    "resume": lambda _, origin, handles, x: origin.resume(
        ["nobody"], np.ones(1, np.uint64), np.ones(1, np.uint64), take_over=True
    ),
    "open": lambda _, origin, handles, x: origin.open(["s"]),
    "open some": lambda _, origin, handles, x: origin.open(["s", "new"]),
    "read": lambda kit, origin, handles, x: kit.frontend.ask(lambda: kit.operations.read_states(["s"])),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("end", ["passes", "is not used", "another serves"])
async def test_what_is_said_without_a_commit_passes_the_second_place(tmp_path: Path, name: str, end: str) -> None:
    other = OtherNode()
    async with streaming(inline=True) as kit:
        kit.record(tmp_path / "r.instep", second_place=other)
        origin = kit.frontend.connect()
        handles = (await origin.open(["s"])).handles
        await kit.durable()
        other.is_used = end != "is not used"
        asked = asyncio.ensure_future(REFUSED[name](kit, origin, handles, ONES))
        if end == "is not used":
            await asked
            assert not other.barriers
            return
        while not other.barriers:
            await asyncio.sleep(0.001)
        await kit.settle()
        assert not asked.done()
        other.failure = RuntimeError("its term is over") if end == "another serves" else None
        other.may_pass.release()
        if end == "passes":
            await asked
            return
        while not kit.failures:
            await asyncio.sleep(0.001)
        await kit.settle()
        assert not asked.done()
        asked.cancel()


async def test_requests_share_the_barrier_that_begins_after_them(tmp_path: Path) -> None:
    other = OtherNode()
    async with streaming(inline=True) as kit:
        kit.record(tmp_path / "r.instep", second_place=other)
        origin = kit.frontend.connect()
        await origin.open(["s"])
        read = partial(kit.operations.read_states, ["s"])
        early = asyncio.ensure_future(kit.frontend.ask(read))
        while not other.barriers:
            await asyncio.sleep(0.001)
        late = [asyncio.ensure_future(kit.frontend.ask(read)) for _ in range(9)]
        await kit.settle()
        await kit.settle()
        other.may_pass.release()
        await early
        while other.barriers < 2:
            await asyncio.sleep(0.001)
        assert not any(each.done() for each in late), "the first barrier began before them"
        other.may_pass.release()
        await asyncio.gather(*late)
    assert other.barriers == 2


@pytest.mark.parametrize("asks", ["resume", "read"])
@pytest.mark.parametrize("end", ["expired", "closed"])
async def test_nobody_is_told_that_a_stream_ended_before_the_recording_has_its_end(
    tmp_path: Path, end: str, asks: str
) -> None:
    async with held_commits() as may_commit, streaming(inline=True) as kit:
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
            asked = asyncio.ensure_future(kit.frontend.ask(lambda: kit.operations.read_states(["s", "other"])))
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
    async with streaming(inline=True) as kit:
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


async def test_parking_resuming_and_ends_are_recorded(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    names = [f"s{number}" for number in range(10)]
    async with streaming(inline=True, reap_at_once=3) as kit:
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
