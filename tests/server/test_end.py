"""The end of a server: what was answered stays answered, however little time there is."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import numpy as np
import pytest
from instep.runtime.worker import Worker
from instep.server.postbox import Postbox
from instep.server.transport import Router

from instep.recording.recorder import Recorder
from instep.recording.writer import RecordingWriter
from instep_client.protocol.wire import Kind
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8


async def test_a_snapshot_that_is_not_ready_when_time_is_up_does_not_count(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_commit = threading.Event()
    may_commit.set()
    commit, stop = RecordingWriter.commit, Worker.stop

    def held(self: RecordingWriter) -> None:
        assert may_commit.wait(60)
        commit(self)

    def release_and_stop(self: Worker, timeout_s: float | None = None) -> None:
        may_commit.set()
        stop(self, timeout_s)

    monkeypatch.setattr(RecordingWriter, "commit", held)
    monkeypatch.setattr(Worker, "stop", release_and_stop)
    x = rng.standard_normal((3, 3, F)).astype(np.float32)
    names = ["a", "b", "c"]
    recording = {"file": tmp_path / "r.instep", "durability": "memory"}
    async with running(SMALL, recording=recording, shutdown={"drain_timeout_s": 0.0}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open(*names)
            await client.step(opened.handles(), [0] * 3, x[:1])
            while server._tap._durable < server._tap.newest:
                await asyncio.sleep(0.001)
            may_commit.clear()
            server._snapshots._at_once = 1
            server._snapshots.take()
            await client.step(opened.handles()[:1], [1], x[1:2, :1], [1])
            while not (server.is_quiet and server._postbox.is_empty):
                await asyncio.sleep(0.001)
            assert server._snapshots.is_under_way
            server.stop()
            assert (await client.receive()).kind is Kind.GOODBYE
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        resumed = await client.resume(names, [2, 1, 1], opened.epochs())
        assert (resumed.codes(), resumed.seqs()) == ([], [2, 1, 1])
        for column, seq in enumerate([2, 1, 1]):
            y = await client.step(resumed.handles()[column : column + 1], [seq], x[seq : seq + 1, column : column + 1])
            truth, _ = whole(SMALL, x[: seq + 1, column])
            np.testing.assert_array_equal(y.floats(), truth[seq])


CLOSINGS: list[tuple[type, str]] = [
    (Postbox, "broadcast"),
    (Worker, "stop"),
    (Recorder, "stop"),
    (Router, "close"),
]


@pytest.mark.parametrize("failing", range(len(CLOSINGS)))
async def test_what_cannot_be_closed_leaves_nothing_else_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    closed: list[str] = []

    def note(kind: type, verb: str, is_failing: bool) -> None:
        close = getattr(kind, verb)

        def noted(*arguments: object) -> None:
            close(*arguments)
            closed.append(f"{kind.__name__}.{verb}")
            if is_failing:
                raise RuntimeError("injected")

        monkeypatch.setattr(kind, verb, noted)

    failure = "a bug in the server's loop: RuntimeError('injected')"
    async with running(SMALL, recording={"file": tmp_path / "r.instep"}, failure=failure):
        for number, (kind, verb) in enumerate(CLOSINGS):
            note(kind, verb, number == failing)
    assert closed == [f"{kind.__name__}.{verb}" for kind, verb in CLOSINGS]


async def test_a_snapshot_is_not_taken_while_one_is_under_way(tmp_path: Path) -> None:
    async with running(SMALL, recording={"file": tmp_path / "r.instep"}) as server:
        server._snapshots.is_under_way = True
        with pytest.raises(AssertionError, match="second snapshot"):
            server._snapshots.take()
        server._snapshots.is_under_way = False


async def test_an_opening_that_waits_for_the_recording_is_answered_before_the_goodbye(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_commit = threading.Event()
    commit = RecordingWriter.commit

    def held(self: RecordingWriter) -> None:
        assert may_commit.wait(60)
        commit(self)

    state = rng.standard_normal((1, 1, H)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep"}
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        with monkeypatch.context() as patch:
            patch.setattr(RecordingWriter, "commit", held)
            await client.send(*client.open_message("s", states=state))
            while server.engine.table.find("s") is None:
                await asyncio.sleep(0.001)
            server.stop()
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert not server.is_quiet
            may_commit.set()
            opened = await client.receive()
            assert (opened.kind, opened.codes()) == (Kind.OPENED, [])
            assert (await client.receive()).kind is Kind.GOODBYE
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        resumed = await client.resume(["s"], [0], opened.epochs())
        assert resumed.codes() == []
        np.testing.assert_array_equal((await client.read_state(resumed.handles())).floats(), state.ravel())
