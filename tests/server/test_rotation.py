"""The recording goes on in another file while streams go on: no frame, state, name or owner is lost at the cut."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instep.core.rings import Rings
from instep.runtime.worker import Worker
from instep.server.gathering import Gathering
from instep.server.rotation import Rotation
from instep.server.snapshots import Extents, Snapshots
from instep.server.tap import Tap

from instep.core.streams import StreamTable
from instep.core.typing import F32, I64
from instep.recording import family
from instep.recording.family import Member
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.recording.states import StateRows
from instep.runtime.stepper import Stepper
from instep.server.server import Server
from instep_client.protocol.wire import Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import CPU, prepared, running

F, H = 5, 8
SECOND_NS = 10**9


def files(path: Path) -> list[Member]:
    return family.members(path)


def recording(path: Path, **changes: Any) -> dict[str, Any]:
    """One that goes on in another file whenever the server looks at it and something was added."""
    return {"file": path, "max_age_s": 1e-6, **changes}


async def followed(path: Path, number: int) -> None:
    """Wait until there are so many files."""
    while not family.member_path(path, number).exists():
        await asyncio.sleep(0.002)


def assert_follow_each_other(path: Path) -> None:
    """Every file is whole, and begins where the one before it ends."""
    expected = 1
    for member in files(path):
        inspect(member.path, lambda _: None)
        assert member.header.first_position == expected
        with RecordingReader(member.path) as reader:
            expected = reader.last_position + 1


async def test_streams_go_on_under_load_while_their_recording_is_cut_again_and_again(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "r.instep"
    names = [f"s{number}" for number in range(3)]
    xs: list[F32] = []
    ys: list[F32] = []
    settings = {"file": path, "max_bytes": 40_000}
    async with running(SMALL, recording=settings) as server, RawClient(server.endpoint) as client:
        await client.hello()
        states = rng.standard_normal((3, 1, H)).astype(np.float32)
        opened = await client.open(*names, states=states)
        while not family.member_path(path, 5).exists():
            x = rng.standard_normal((4, 3, F)).astype(np.float32)
            have = [4 * len(xs)] * 3
            reply = await client.step(opened.handles(), have, x, have)
            assert reply.failures() == []
            xs.append(x)
            ys.append(reply.floats().reshape(4, 3, H))
        closed = await client.close(opened.handles())
    x, y = np.concatenate(xs), np.concatenate(ys)
    for column in range(3):
        expected, final = whole(SMALL, x[:, column], states[column])
        np.testing.assert_array_equal(y[:, column], expected)
        np.testing.assert_array_equal(closed.floats().reshape(3, 1, H)[column], final)
    assert len(files(path)) >= 5
    assert_follow_each_other(path)
    served = np.zeros((0, H), np.float32)
    for member in files(path):
        with RecordingReader(member.path) as reader:
            for batch in reader.batches():
                at = np.flatnonzero(batch.streams == 1)
                assert batch.y is not None
                served = np.concatenate([served, batch.y[at]])
    np.testing.assert_array_equal(served, y[:, 0])


async def test_after_a_restart_on_the_newest_file_everything_of_a_stream_is_there(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "r.instep"
    x = rng.standard_normal((9, 1, F)).astype(np.float32)
    truth, _ = whole(SMALL, x[:, 0])
    async with running(SMALL, recording=recording(path)) as server, RawClient(server.endpoint) as client:
        await client.hello()
        opened = await client.open("s", "gone")
        first = await client.step(opened.handles()[:1], [0], x[:4], [0])
        await client.close(opened.handles()[1:])
        resumed = await client.resume(["s"], [2], opened.epochs()[:1])
        await followed(path, 2)
        assert (await client.read_state(resumed.handles())).seqs() == [4]
    np.testing.assert_array_equal(first.floats().reshape(4, H), truth[:4])
    for member in files(path)[:-1]:
        member.path.unlink()
    for _ in range(2):  # the second time, what the first one recorded has been followed, too
        async with running(SMALL, recording=recording(path)) as server, RawClient(server.endpoint) as client:
            await client.hello()
            # The reply to the last resume may have been lost, so the former epoch will do; outputs from 2 on are kept.
            again = await client.resume(["s"], [2], opened.epochs()[:1])
            assert (again.codes(), again.seqs()) == ([], [4])
            repeated = await client.step(again.handles(), [2], x[2:4], [2])
            assert repeated.failures() == []
            np.testing.assert_array_equal(repeated.floats().reshape(2, H), truth[2:4])
            newest = files(path)[-1].header.number
            other = await client.open(f"other-{newest}")
            await followed(path, newest + 1)
            await client.close(other.handles())
    async with running(SMALL, recording=recording(path)) as server, RawClient(server.endpoint) as client:
        await client.hello()
        last = await client.resume(["s"], [4], again.epochs())
        assert last.codes() == []
        reply = await client.step(last.handles(), [4], x[4:], [4])
        np.testing.assert_array_equal(reply.floats().reshape(5, H), truth[4:])
    with RecordingReader(files(path)[-1].path) as reader:
        numbers = [info.stream for info in reader.streams()]
    assert len(numbers) == len(set(numbers))
    assert "gone" not in [info.name for info in reader_streams(path)]


def reader_streams(path: Path) -> list[Any]:
    with RecordingReader(files(path)[-1].path) as reader:
        return reader.streams()


async def test_a_step_that_is_under_way_ends_in_the_old_file(tmp_path: Path) -> None:
    path, gate = tmp_path / "r.instep", Gate()
    x = np.full((1, 1, F), GATE_VALUE, np.float32)
    async with running(SMALL, stepper=gate.stepper, recording=recording(path)) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open("s")
            await followed(path, 2)
            begun = len(files(path))
            await client.send(*client.step_message(opened.handles(), [0], x, [0]))
            await rotation_begins(server)
            # A frame that comes while the cut is being made is not stepped before it.
            gate.open()
            assert (await client.receive()).kind is Kind.STEPPED
            assert (await client.step(opened.handles(), [1], x, [1])).failures() == []
            await followed(path, begun + 2)
    assert_follow_each_other(path)
    for member in files(path):
        with RecordingReader(member.path) as reader:
            assert all(batch.y is not None for batch in reader.batches())
    with RecordingReader(family.member_path(path, begun + 1)) as reader:
        assert [info.first_seq for info in reader.streams()] == [1]


async def rotation_begins(server: Server) -> None:
    while not server._tap.is_paused:
        await asyncio.sleep(0.002)


async def test_what_opens_and_is_reset_while_states_are_read_is_in_the_file_it_belongs_to(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    path, gate = tmp_path / "r.instep", Gate("read")
    states = rng.standard_normal((2, 1, H)).astype(np.float32)
    x = rng.standard_normal((1, 2, F)).astype(np.float32)
    async with running(SMALL, stepper=gate.stepper, recording=recording(path)) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open("a")
            await rotation_begins(server)
            slots = server.engine.table.find("a")
            # Nobody's message is handled meanwhile, but what was handled before may still be on its way.
            server.lifecycle.reset(np.array([slots]), states[:1], lambda done: None)
            late: list[np.ndarray] = []
            someone = server._clients.by_number(0)
            assert someone is not None
            server.lifecycle.open(someone, ["b"], states[1:], None, lambda grants, codes: late.append(grants))
            gate.open()
            await followed(path, 2)
            handles = [*opened.handles().tolist(), int(late[0]["handle"][0])]
            reply = await client.step(handles, [0, 0], x, [0, 0])
            assert reply.failures() == []
    y = reply.floats().reshape(2, H)
    for column in range(2):
        np.testing.assert_array_equal(y[column], whole(SMALL, x[:, column], states[column])[0][0])
    assert_follow_each_other(path)
    with RecordingReader(path) as reader:
        assert [info.name for info in reader.streams()] == ["a", "b"]
        assert len(list(reader.resets())) == 1
    with RecordingReader(family.member_path(path, 2)) as reader:
        for at, info in enumerate(reader.streams()):
            assert info.initial_state is not None
            np.testing.assert_array_equal(info.initial_state, states[at])


async def test_a_state_that_changes_behind_the_reading_is_not_kept_by_the_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, gate = tmp_path / "r.instep", Gate("load")
    gate.open()
    extents, are_done = Gathering.extents, list[bool]()
    async with running(SMALL, stepper=gate.stepper, recording={"file": path}) as server:

        def reset() -> None:
            server.lifecycle.reset(slots, np.ones((1, 1, H), np.float32), are_done.append)

        def extents_then_reset(gathering: Gathering, asked: I64) -> Extents:
            asyncio.get_running_loop().call_soon(reset)  # so that its job is behind the reading
            return extents(gathering, asked)

        async with RawClient(server.endpoint) as client:
            await client.hello()
            await client.open("a")
            while server._tap._durable < server._tap.newest:
                await asyncio.sleep(0.001)
            gate.close()
            slots = np.array([server.engine.table.find("a")])
            monkeypatch.setattr(Gathering, "extents", extents_then_reset)
            server._rotation.begin(SECOND_NS)
            await followed(path, 2)
            while server._snapshots.is_under_way:
                await asyncio.sleep(0.001)
            gate.open()
            while not are_done:
                await asyncio.sleep(0.001)
            assert are_done == [True]
            assert server.engine.table.keeping.take().tolist() == slots.tolist()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
async def test_states_that_cannot_be_read_leave_the_recording_as_it_is(tmp_path: Path, error: type[Exception]) -> None:
    path = tmp_path / "r.instep"
    fails = True

    class Failing(Stepper):
        def read(self, slots: I64) -> F32:
            if fails:
                raise error("no")
            return super().read(slots)

    def stepper(ready: Any, config: Any) -> Stepper:
        return Failing(ready.network, ready.certification.buckets, config.engine.max_streams, CPU)

    async with running(SMALL, stepper=stepper, recording=recording(path)) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open("s")
            await rotation_begins(server)
            assert (await client.step(opened.handles(), [0], np.ones((1, 1, F), np.float32), [0])).failures() == []
            assert len(files(path)) == 1
            fails = False
            await followed(path, 2)
    assert_follow_each_other(path)


def idle_rotation(tap: Any, *, max_bytes: int = 0, max_age_ns: int = 0) -> Rotation:
    """Of no streams; it began at 0."""
    ready = prepared(SMALL)
    table = StreamTable(4, 4)
    rings = Rings(table, 2, 4, F, H, 100)
    stepper = Stepper(ready.network, ready.certification.buckets, 4, CPU)
    worker = Worker(lambda finish: finish(), lambda error: None)
    worker.submit = lambda job: job.done(job.call(), None)  # type: ignore[method-assign]
    snapshots = Snapshots(table, rings, stepper, worker, tap, lambda error, count: None, 10**18)
    limits = (max_bytes, max_age_ns)
    return Rotation(table, rings, stepper, worker, tap, snapshots, lambda error, count: None, *limits, began_ns=0)


class FakeTap:
    def __init__(self) -> None:
        self.newest, self.grown_bytes, self.is_paused = 0, 0, False
        self.cuts = 0

    def when_committed(self, ticket: int, act: Any) -> None:
        assert ticket == self.newest
        act()

    def rotate(self, slots: I64, names: list[str], states: list[StateRows]) -> None:
        assert self.is_paused
        assert len(slots) == len(names) == len(states) == 0
        self.newest += 2
        self.cuts += 1


def test_by_age_a_file_is_due_when_it_is_so_old_and_something_was_added() -> None:
    tap = FakeTap()
    rotation = idle_rotation(tap, max_age_ns=10 * SECOND_NS)
    assert not rotation.is_due(20 * SECOND_NS), "nothing was recorded"
    tap.newest = 7
    assert not rotation.is_due(10 * SECOND_NS - 1)
    assert rotation.is_due(10 * SECOND_NS)
    rotation.begin(12 * SECOND_NS)
    assert (tap.cuts, tap.is_paused) == (1, False)
    assert not rotation.is_due(30 * SECOND_NS), "nothing was recorded in the new file"
    tap.newest += 1
    assert not rotation.is_due(22 * SECOND_NS - 1)
    assert rotation.is_due(22 * SECOND_NS)


def test_by_bytes_a_file_is_due_when_so_much_was_written_since_it_began() -> None:
    tap = FakeTap()
    rotation = idle_rotation(tap, max_bytes=1000)
    tap.newest, tap.grown_bytes = 7, 999
    assert not rotation.is_due(10**15)
    tap.grown_bytes = 1000
    assert rotation.is_due(0)


def test_without_limits_no_file_is_ever_due() -> None:
    tap = FakeTap()
    tap.newest, tap.grown_bytes = 7, 10**12
    assert not idle_rotation(tap).is_due(10**18)


def test_a_tap_that_is_paused_has_no_room() -> None:
    class Roomy:
        has_room, failed = True, None

    table = StreamTable(4, 4)
    tap = Tap(table, Rings(table, 2, 4, F, H, 100))
    tap.record(Roomy(), 0, 0, waits=True)  # type: ignore[arg-type]
    assert tap.has_room
    tap.is_paused = True
    assert not tap.has_room


async def test_the_oldest_files_beyond_what_is_kept_are_removed_and_that_is_said(
    tmp_path: Path,
) -> None:
    path = tmp_path / "r.instep"
    async with running(SMALL, recording=recording(path, keep_bytes=1)) as server, RawClient(server.endpoint) as client:
        await client.hello()
        opened = await client.open("s")
        for seq in range(1000):
            assert (await client.step(opened.handles(), [seq], np.ones((1, 1, F), np.float32), [seq])).failures() == []
            if family.member_path(path, 4).exists():
                break
    left = files(path)
    assert len(left) == 1
    assert left[0].header.number >= 4
    assert inspect(left[0].path, lambda _: None).open_streams == 1
