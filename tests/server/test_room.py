"""Changes of states that wait for room in memory, and what happens to everybody else meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import numpy as np
import pytest

from instep.core.keeping import Keeping
from instep.recording import family
from instep.recording.reader import RecordingReader
from instep.server.server import Server
from instep_client.wire import Kind
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
