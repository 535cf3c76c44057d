"""Changes of states that wait for room in memory, and what happens to everybody else meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.keeping import Keeping
from instep.core.typing import F32, I64
from instep.recording import family
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from instep.runtime.stepper import Stepper
from instep.server.server import Server
from instep_client.protocol.wire import Kind
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
ENGINE = {"max_streams": 60, "device_streams": 8, "host_streams": 12, "max_batch_size": 8}


async def all_is_kept(server: Server) -> None:
    """Wait until everything is recorded, and no state has changed since the last snapshot."""
    while server._snapshots.is_under_way or server.engine.table.keeping.changed_count:
        server._snapshots.take_now()
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("are_given", [False, True])
async def test_a_rotation_finds_the_state_of_a_stream_that_opens_behind_a_change_that_waits(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, are_given: bool
) -> None:
    path = tmp_path / "r.instep"
    state = rng.standard_normal((1, 1, H)).astype(np.float32) if are_given else None
    async with running(SMALL, engine=ENGINE, recording={"file": path}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("x", "former")).handles()
            await client.step(handles, [0, 0], rng.standard_normal((1, 2, F)).astype(np.float32))
            former = server.engine.table.find("former")
            assert (await client.close(handles[1:])).floats().all()
            await all_is_kept(server)
            with monkeypatch.context() as patch:
                patch.setattr(Keeping, "has_room", lambda self, count: False)
                await client.send(*client.reset_message(handles[:1]))
                await client.send(*client.open_message("new", states=state))
                while (slot := server.engine.table.find("new")) is None:
                    await asyncio.sleep(0.001)
                assert slot == former, "the slot of the stream that was closed is used again"
                while server._snapshots.is_under_way:
                    await asyncio.sleep(0.001)
                server._rotation.begin(time.monotonic_ns())
                while not family.member_path(path, 2).exists() or server._snapshots.is_under_way:
                    await asyncio.sleep(0.001)
            server.lifecycle.waits.room_again()
            replies = {reply.kind: reply for reply in [await client.receive(), await client.receive()]}
            assert replies.keys() == {Kind.CHANGED, Kind.OPENED}
            x = rng.standard_normal((1, 1, F)).astype(np.float32)
            y = (await client.step(replies[Kind.OPENED].handles(), [0], x)).floats()
            truth, _ = whole(SMALL, x[:, 0], None if state is None else state[0])
            np.testing.assert_array_equal(y, truth[0])
    with RecordingReader(family.member_path(path, 2)) as reader:
        (carried,) = [info for info in reader.streams() if info.name == "new"]
    if state is None:
        assert carried.initial_state is None
    else:
        np.testing.assert_array_equal(carried.initial_state, state[0])


async def test_steps_and_changes_that_wait_for_room_take_turns(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_commit = threading.Event()
    may_commit.set()
    commit, step, load = RecordingWriter.commit, Stepper.step, Stepper.load
    turns: list[str] = []

    def held(self: RecordingWriter) -> None:
        assert may_commit.wait(60)
        commit(self)

    def stepping(self: Stepper, slots: I64, *rest: Any) -> None:
        turns.append("step")
        step(self, slots, *rest)

    def loading(self: Stepper, slots: I64, states: F32 | None) -> None:
        turns.append("load")
        load(self, slots, states)

    monkeypatch.setattr(RecordingWriter, "commit", held)
    recording = {"file": tmp_path / "r.instep", "durability": "memory"}
    async with running(SMALL, engine=ENGINE, recording=recording) as server:
        server.engine.longest_run_ns = 0  # a turn is a run
        async with RawClient(server.endpoint) as client, RawClient(server.endpoint) as other:
            await client.hello()
            await other.hello()
            handles = (await client.open(*(f"s{number}" for number in range(40)))).handles()
            stepped = (await other.open("t")).handles()
            monkeypatch.setattr(Stepper, "step", stepping)
            monkeypatch.setattr(Stepper, "load", loading)
            await all_is_kept(server)
            may_commit.clear()
            x = rng.standard_normal((5, 1, F)).astype(np.float32)
            assert (await other.step(stepped, [0], x[:1])).codes() == []
            for first in (0, 12, 24):
                await client.send(*client.reset_message(handles[first : first + 12]))
            while server.lifecycle.waits._jobs < 3:
                await asyncio.sleep(0.001)
            await other.send(*other.step_message(stepped, [1], x[1:]))
            while not server.engine.rings.pending_count:
                await asyncio.sleep(0.001)
            async with RawClient(server.endpoint) as third:
                await third.hello()
                for _ in range(20):
                    await third.statistics()
            assert turns == ["step"], "there would be room for it, but the change that was there before has none"
            may_commit.set()
            for _ in range(3):
                assert (await client.receive()).kind is Kind.CHANGED
            assert (await other.receive()).kind is Kind.STEPPED
    assert turns[:6] == ["step", "load", "step", "load", "step", "load"]


async def test_who_looks_at_a_stream_behind_its_opening_sees_the_state_it_opens_with(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_commit = threading.Event()
    commit = RecordingWriter.commit

    def held(self: RecordingWriter) -> None:
        assert may_commit.wait(60)
        commit(self)

    monkeypatch.setattr(RecordingWriter, "commit", held)
    states = rng.standard_normal((2, 12, 1, H)).astype(np.float32)
    x = rng.standard_normal((1, 1, F)).astype(np.float32)
    names = [f"s{number}" for number in range(12)]
    recording = {"file": tmp_path / "r.instep", "durability": "memory"}
    async with running(SMALL, engine=ENGINE, recording=recording) as server:
        async with RawClient(server.endpoint) as client, RawClient(server.endpoint) as other:
            await client.hello()
            await other.hello()
            await client.open(*(f"first{number}" for number in range(12)), states=states[0])
            await client.send(*client.open_message(*names, states=states[1]))
            await client.send(*client.read_named_message(names))
            while (await other.statistics())["streams_open"] < 24:
                pass
            for _ in range(20):
                await other.statistics()
            may_commit.set()
            replies = {reply.kind: reply for reply in [await client.receive(), await client.receive()]}
            assert replies.keys() == {Kind.OPENED, Kind.STATE_READ}
            assert replies[Kind.OPENED].codes() == replies[Kind.STATE_READ].codes() == []
            np.testing.assert_array_equal(replies[Kind.STATE_READ].floats(), states[1].ravel())
            y = (await client.step(replies[Kind.OPENED].handles()[3:4], [0], x)).floats()
            np.testing.assert_array_equal(y, whole(SMALL, x[:, 0], states[1, 3])[0][0])
