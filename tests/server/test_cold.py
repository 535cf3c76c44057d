"""States that are in the recording alone: every verb works on them, whatever fails, and to the bit."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.keeping import Keeping
from instep.core.typing import F32, I64, U64
from instep.recording.inspection import inspect
from instep.recording.stored_states import StoredStates
from instep.recording.writer import RecordingWriter
from instep.runtime.stepper import Stepper
from instep.runtime.worker import Job
from instep.server.preparation import CannotServe
from instep_client.protocol.wire import Code, Kind
from tests.support.commits import held_commits
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
STREAMS, HOT, WARM = 60, 8, 12
ENGINE = {"max_streams": 100, "device_streams": HOT, "host_streams": WARM, "max_batch_size": 8}


def recording(folder: Path, durability: str = "commit") -> dict[str, Any]:
    return {"file": folder / "r.instep", "durability": durability}


class Truth:
    """What every stream was sent since its state was last given, and what it answered."""

    def __init__(self, rng: np.random.Generator, count: int) -> None:
        self.rng = rng
        self.names = [f"s{number}" for number in range(count)]
        self.handles: U64 = np.zeros(count, np.uint64)
        self.epochs: U64 = np.zeros(count, np.uint64)
        self.seqs: I64 = np.zeros(count, np.int64)
        self.initial: F32 = np.zeros((count, 1, H), np.float32)
        self.sent: list[list[F32]] = [[] for _ in range(count)]
        self.got: list[list[F32]] = [[] for _ in range(count)]

    async def step(self, client: RawClient, chosen: list[int], timesteps: int = 1) -> None:
        x = self.rng.standard_normal((timesteps, len(chosen), F)).astype(np.float32)
        seqs = self.seqs[chosen].tolist()
        reply = await client.step(self.handles[chosen], seqs, x, seqs)
        assert reply.codes() == []
        y = reply.floats().reshape(timesteps, len(chosen), H)
        for column, stream in enumerate(chosen):
            self.sent[stream] += list(x[:, column])
            self.got[stream] += list(y[:, column])
        self.seqs[chosen] += timesteps

    def reset(self, chosen: list[int], states: F32 | None) -> None:
        self.initial[chosen] = 0 if states is None else states
        for stream in chosen:
            self.sent[stream], self.got[stream] = [], []

    def state(self, stream: int) -> F32:
        """The truth, and on the way all outputs are compared."""
        if not self.sent[stream]:
            initial: F32 = self.initial[stream]
            return initial
        y, final = whole(SMALL, np.array(self.sent[stream]), self.initial[stream])
        np.testing.assert_array_equal(np.array(self.got[stream]), y)
        return final

    def check(self, streams: list[int], floats: F32) -> None:
        states = floats.reshape(len(streams), 1, H)
        for at, stream in enumerate(streams):
            np.testing.assert_array_equal(states[at], self.state(stream))


async def opened(client: RawClient, rng: np.random.Generator, count: int = STREAMS, *, are_given: bool = True) -> Truth:
    """Streams of which every third began with a state, if any do."""
    truth = Truth(rng, count)
    given = list(range(0, count, 3)) if are_given else []
    zeros = [stream for stream in range(count) if stream not in given]
    truth.initial[given] = rng.standard_normal((len(given), 1, H)).astype(np.float32)
    parts = [zeros, *(given[first : first + WARM] for first in range(0, len(given), WARM))]
    for part in parts:
        states = None if part is zeros else truth.initial[part]
        reply = await client.open(*(truth.names[stream] for stream in part), states=states)
        assert reply.codes() == []
        truth.handles[part], truth.epochs[part] = reply.handles(), reply.epochs()
    return truth


@pytest.mark.parametrize("durability", ["memory", "commit"])
async def test_all_verbs_work_on_cold_streams(rng: np.random.Generator, tmp_path: Path, durability: str) -> None:
    everyone = list(range(STREAMS))
    async with running(SMALL, engine=ENGINE, recording=recording(tmp_path, durability)) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            truth = await opened(client, rng)
            assert (await client.statistics())["streams_cold"] == STREAMS - WARM
            for _ in range(3):
                await truth.step(client, rng.permutation(STREAMS).tolist(), 2)
            counted = await client.statistics()
            assert counted["streams_hot"] == HOT
            assert counted["streams_warm"] <= WARM
            assert counted["streams_cold"] == STREAMS - HOT - counted["streams_warm"]
            assert counted["states_fetched_total"] >= 2 * (STREAMS - HOT - WARM)
            assert counted["states_dropped_total"] >= 3 * (STREAMS - HOT - WARM)
            truth.check(everyone, (await client.read_state(truth.handles)).floats())

            copies = []
            for first in range(0, 30, 10):
                copied = everyone[first : first + 10]
                reply = await client.fork(truth.handles[copied], [f"copy{number}" for number in copied])
                assert reply.codes() == []
                copies += reply.handles().tolist()
            truth.check(everyone[:30], (await client.read_state(copies)).floats())

            zeroed, given = everyone[5:15], everyone[20:31]
            states = rng.standard_normal((len(given), 1, H)).astype(np.float32)
            for chosen, new in ((zeroed, None), (given, states)):
                assert (await client.reset(truth.handles[chosen], new)).codes() == []
                truth.reset(chosen, new)
            truth.check(everyone, (await client.read_state(truth.handles)).floats())
            await truth.step(client, rng.permutation(STREAMS).tolist(), 3)
            truth.check(everyone[40:], (await client.close(truth.handles[40:])).floats())
            reply = await client.open(*(f"again{number}" for number in range(20)))
            assert not (await client.read_state(reply.handles())).floats().any()
            await client.close(copies)
    inspect(tmp_path / "r.instep", lambda _: None)
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        rest = everyone[:40]
        reply = await client.resume(truth.names[:40], truth.seqs[:40].tolist(), truth.epochs[:40].tolist())
        assert reply.codes() == []
        truth.handles[:40] = reply.handles()
        assert (await client.statistics())["streams_cold"] == 60
        await truth.step(client, rest[::2], 4)
        truth.check(rest, (await client.close(truth.handles[rest])).floats())


async def visit(truth: Truth, client: RawClient, timesteps: int = 2) -> None:
    """Step all streams, a few at a time, in order."""
    for first in range(0, len(truth.names), 5):
        await truth.step(client, list(range(first, first + 5)), timesteps)


async def test_a_state_is_read_once_for_many_steps(rng: np.random.Generator, tmp_path: Path) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        truth = await opened(client, rng)
        await visit(truth, client)
        before = (await client.statistics())["states_fetched_total"]
        for _ in range(5):
            await truth.step(client, [1, 3])
        assert (await client.statistics())["states_fetched_total"] == before + 2
        truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())


async def test_zeros_are_not_read(rng: np.random.Generator, tmp_path: Path) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        reply = await client.open(*(f"s{number}" for number in range(40)))
        for first in range(0, 40, 5):
            await client.step(reply.handles()[first : first + 5], [0] * 5, np.ones((1, 5, F), np.float32))
        assert (await client.statistics())["states_fetched_total"] == 0


async def test_steps_wait_while_no_state_may_leave_memory(rng: np.random.Generator, tmp_path: Path) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path, "memory")) as server,
        held_commits() as may_commit,
    ):
        async with RawClient(server.endpoint) as client:
            await client.hello()
            truth = await opened(client, rng, are_given=False)
            may_commit.clear()
            step = asyncio.create_task(truth.step(client, list(range(STREAMS)), 2))
            async with RawClient(server.endpoint) as other:
                await other.hello()
                while server.statistics.frames_total < HOT:
                    assert (await other.statistics())["step_failures_total"] == 0
                for _ in range(50):
                    assert (await other.statistics())["step_failures_total"] == 0
            assert not step.done()
            assert server.engine.table.keeping.changed_count <= WARM
            may_commit.set()
            await step
            assert (await client.statistics())["step_failures_total"] == 0
            truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())


async def test_a_file_that_cannot_be_read_fails_the_batch_and_changes_nothing(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        truth = await opened(client, rng)
        await visit(truth, client)
        with monkeypatch.context() as patch:

            def failing(self: StoredStates, streams: I64, seqs: I64) -> None:
                raise sqlite3.OperationalError("disk I/O error")

            patch.setattr(StoredStates, "read", failing)
            seqs = truth.seqs[:5].tolist()
            reply = await client.step(truth.handles[:5], seqs, np.ones((1, 5, F), np.float32), seqs)
            assert reply.codes() == [Code.STEP_FAILED] * 5
            first = np.array([server.engine.table.find(f"s{stream}") for stream in range(5)])
            assert server.engine.table.keeping.is_kept(first).all(), "a snapshot need not write what has not changed"
            warm = list(range(STREAMS - 5, STREAMS))
            await truth.step(client, warm)
        for _ in range(2):
            await truth.step(client, rng.permutation(STREAMS).tolist(), 2)
        truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())
    inspect(tmp_path / "r.instep", lambda _: None)


DAMAGES = {
    "a changed state": "UPDATE states SET state = zeroblob(length(state)) WHERE stream = ?",
    "a row that is gone": "DELETE FROM states WHERE stream = ?",
    "a state of another frame": "UPDATE states SET seq = seq + 1 WHERE stream = ?",
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_state_is_lost_and_never_another(rng: np.random.Generator, tmp_path: Path, damage: str) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        truth = await opened(client, rng)
        await visit(truth, client)
        table = server.engine.table
        bad, looked_at = table.find("s1"), table.find("s7")
        assert bad is not None
        assert looked_at is not None
        database = sqlite3.connect(tmp_path / "r.instep", isolation_level=None)
        for slot in (bad, looked_at):
            database.execute(DAMAGES[damage], (int(table.recording_id[slot]),))
        database.close()
        seqs = truth.seqs[:5].tolist()
        await client.send(*client.step_message(truth.handles[:5], seqs, np.ones((1, 5, F), np.float32), seqs))
        replies = [await client.receive(), await client.receive()]
        stepped = next(reply for reply in replies if reply.kind is Kind.STEPPED)
        evicted = next(reply for reply in replies if reply.kind is Kind.EVICTED)
        assert stepped.codes() == [Code.STATE_LOST if column == 1 else Code.STEP_FAILED for column in range(5)]
        assert evicted.handles().tolist() == truth.handles[1:2].tolist()

        await client.send(*client.read_state_message(truth.handles[[6, 7, 8]]))
        replies = [await client.receive(), await client.receive()]
        read = next(reply for reply in replies if reply.kind is Kind.STATE_READ)
        assert [code for column, _, code, _ in read.failures() if column == 1] == [Code.STATE_LOST]
        found = read.floats().reshape(3, 1, H)
        truth.check([6, 8], found[[0, 2]])
        good = [stream for stream in range(STREAMS) if stream not in (1, 7)]
        await truth.step(client, good, 2)
        truth.check(good, (await client.close(truth.handles[good])).floats())


async def test_more_states_than_memory_holds_cannot_be_given_at_once(rng: np.random.Generator, tmp_path: Path) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        truth = await opened(client, rng)
        await truth.step(client, list(range(STREAMS)))
        some = truth.handles[: WARM + 1]
        names = [f"more{number}" for number in range(WARM + 1)]
        states = np.ones((WARM + 1, 1, H), np.float32)
        for reply in (
            await client.reset(some),
            await client.fork(some, names),
            await client.open(*names, states=states),
        ):
            assert reply.code is Code.TOO_LARGE
            assert "host_streams" in reply.sentence
        truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())


async def test_a_change_that_waits_for_room_keeps_its_place(rng: np.random.Generator, tmp_path: Path) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path, "memory")) as server,
        held_commits() as may_commit,
    ):
        async with RawClient(server.endpoint) as client, RawClient(server.endpoint) as other:
            await client.hello()
            await other.hello()
            truth = await opened(client, rng, are_given=False)
            await visit(truth, client)
            while server.engine.table.keeping.changed_count:
                server._snapshots.take_now()
                await asyncio.sleep(0.001)
            may_commit.clear()
            await truth.step(client, list(range(6)))
            given = list(range(10, 20))
            states = rng.standard_normal((10, 1, H)).astype(np.float32)
            await client.send(*client.reset_message(truth.handles[given], states))
            await client.send(*client.open_message("new", states=states[:1]))
            await client.send(*client.read_state_message(truth.handles[given]))
            while server.engine.table.find("new") is None:
                await asyncio.sleep(0.001)
            taken = await other.resume(["new"], [0], [0], take_over=True)
            assert taken.codes() == []
            x = rng.standard_normal((1, 1, F)).astype(np.float32)
            await other.send(*other.step_message(taken.handles(), [0], x))
            while not server.engine.rings.pending_count or server.lifecycle.waits._jobs < 3:
                await asyncio.sleep(0.001)
            may_commit.set()
            replies = {reply.kind: reply for reply in [await client.receive() for _ in range(4)]}
            assert replies.keys() == {Kind.CHANGED, Kind.OPENED, Kind.STATE_READ, Kind.EVICTED}
            truth.reset(given, states)
            truth.check(given, replies[Kind.STATE_READ].floats())
            np.testing.assert_array_equal((await other.receive()).floats(), whole(SMALL, x[:, 0], states[0])[0][0])
            truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())


async def test_states_that_are_given_stay_in_memory_until_the_recording_has_them(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_commit = threading.Event()
    commit = RecordingWriter.commit

    def held(self: RecordingWriter) -> None:
        assert may_commit.wait(60)
        commit(self)

    monkeypatch.setattr(RecordingWriter, "commit", held)
    states = rng.standard_normal((2, WARM, 1, H)).astype(np.float32)
    async with running(SMALL, engine=ENGINE, recording=recording(tmp_path, "memory")) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            first = await client.open(*(f"a{number}" for number in range(WARM)), states=states[0])
            await client.send(*client.open_message(*(f"b{number}" for number in range(WARM)), states=states[1]))
            for _ in range(3):
                assert (await client.statistics())["streams_open"] == 2 * WARM
            may_commit.set()
            second = await client.receive()
            assert second.kind is Kind.OPENED
            handles = np.concatenate([first.handles(), second.handles()])
            np.testing.assert_array_equal((await client.read_state(handles)).floats(), states.ravel())


async def test_until_there_is_room_states_that_are_given_are_in_the_recording(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = rng.standard_normal((2, 1, 1, H)).astype(np.float32)
    async with running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            await client.close((await client.open("a", states=a)).handles())
            with monkeypatch.context() as patch:
                patch.setattr(Keeping, "has_room", lambda self, count: False)
                await client.send(*client.open_message("b", states=b))
                while (slot := server.engine.table.find("b")) is None or server._tap._durable < server._tap.newest:
                    await asyncio.sleep(0.001)
                found: list[F32] = []
                read = Job(
                    lambda: server.engine._stepper.read(np.array([slot])), lambda states, _: found.append(states)
                )
                server._worker.submit(read)
                while not found:
                    await asyncio.sleep(0.001)
                np.testing.assert_array_equal(found[0], b)
            server.lifecycle.waits.room_again()
            assert (await client.receive()).kind is Kind.OPENED


def files_in(folder: Path) -> int:
    return len(list(folder.glob("*.instep")))


async def test_cold_states_are_found_in_the_file_that_a_rotation_began(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    rotating = {**recording(tmp_path), "max_bytes": 100_000}
    async with running(SMALL, engine=ENGINE, recording=rotating) as server, RawClient(server.endpoint) as client:
        await client.hello()
        truth = await opened(client, rng)
        while files_in(tmp_path) < 4:
            await visit(truth, client, 3)
        assert (await client.statistics())["step_failures_total"] == 0
        truth.check(list(range(STREAMS)), (await client.read_state(truth.handles)).floats())
    async with running(SMALL, engine=ENGINE, recording=rotating) as server, RawClient(server.endpoint) as client:
        await client.hello()
        reply = await client.resume(truth.names, truth.seqs.tolist(), truth.epochs.tolist())
        truth.handles[:] = reply.handles()
        await visit(truth, client)
        truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())


async def test_nothing_waits_for_snapshots_that_fail(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            truth = await opened(client, rng)
            with monkeypatch.context() as patch:

                def failing(self: Stepper, slots: I64) -> F32:
                    raise RuntimeError("injected")

                patch.setattr(Stepper, "read", failing)
                x = np.ones((1, STREAMS, F), np.float32)
                reply = await client.step(truth.handles, [0] * STREAMS, x)
                assert set(reply.codes()) == {Code.STEP_FAILED}
                failed = [column for column, *_ in reply.failures()]
                y = reply.floats().reshape(STREAMS, H)
            assert 0 < len(failed) <= STREAMS - WARM
            for stream in set(range(STREAMS)) - set(failed):
                truth.sent[stream].append(x[0, stream])
                truth.got[stream].append(y[stream])
                truth.seqs[stream] += 1
            await truth.step(client, list(range(STREAMS)), 2)
            truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())


async def test_a_restart_is_refused_when_more_has_changed_than_memory_would_hold(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    async with running(SMALL, recording={"file": tmp_path / "r.instep"}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            truth = await opened(client, rng, 30)
            await visit(truth, client)
            server.stop(drain=False)
    with pytest.raises(CannotServe, match=r"more than 12 states have changed .* raise engine\.host_streams"):
        async with running(SMALL, engine=ENGINE, recording=recording(tmp_path)):
            pass
    async with running(SMALL, engine={**ENGINE, "host_streams": 30}, recording=recording(tmp_path)) as server:
        assert server.recovery is not None
        assert server.recovery.frames == 60
        async with RawClient(server.endpoint) as client:
            await client.hello()
            reply = await client.resume(truth.names, truth.seqs.tolist(), truth.epochs.tolist())
            truth.check(list(range(30)), (await client.close(reply.handles())).floats())
