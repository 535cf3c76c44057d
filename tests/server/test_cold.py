"""States that are in the recording alone: every verb works on them, whatever fails, and to the bit."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep.core.typing import F32, I64, U64
from instep.recording.inspection import inspect
from instep.recording.stored_states import StoredStates
from instep.recording.writer import RecordingWriter
from instep_client.wire import Code, Kind
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


async def opened(client: RawClient, rng: np.random.Generator, count: int = STREAMS) -> Truth:
    """Streams of which every third began with a state."""
    truth = Truth(rng, count)
    zeros = [stream for stream in range(count) if stream % 3]
    given = [stream for stream in range(count) if not stream % 3]
    truth.initial[given] = rng.standard_normal((len(given), 1, H)).astype(np.float32)
    for part, states in ((zeros, None), (given, truth.initial[given])):
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
            assert (await client.statistics())["streams_cold"] == STREAMS
            for _ in range(3):
                await truth.step(client, rng.permutation(STREAMS).tolist(), 2)
            counted = await client.statistics()
            assert counted["streams_hot"] == HOT
            assert counted["streams_warm"] <= WARM
            assert counted["streams_cold"] == STREAMS - HOT - counted["streams_warm"]
            assert counted["states_fetched_total"] >= 2 * (STREAMS - HOT - WARM)
            assert counted["states_dropped_total"] >= 3 * (STREAMS - HOT - WARM)
            truth.check(everyone, (await client.peek(truth.handles)).floats())

            reply = await client.fork(truth.handles[:30], [f"copy{number}" for number in range(30)])
            assert reply.codes() == []
            truth.check(everyone[:30], (await client.peek(reply.handles())).floats())
            copies = reply.handles()

            zeroed, given = everyone[5:15], everyone[20:31]
            states = rng.standard_normal((len(given), 1, H)).astype(np.float32)
            for chosen, new in ((zeroed, None), (given, states)):
                assert (await client.reset(truth.handles[chosen], new)).codes() == []
                truth.reset(chosen, new)
            truth.check(everyone, (await client.peek(truth.handles)).floats())
            await truth.step(client, rng.permutation(STREAMS).tolist(), 3)
            truth.check(everyone[40:], (await client.close(truth.handles[40:])).floats())
            reply = await client.open(*(f"again{number}" for number in range(20)))
            assert not (await client.peek(reply.handles())).floats().any()
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


async def test_a_state_is_read_once_for_many_steps_and_only_from_the_second_life_on(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        truth = await opened(client, rng, 30)
        zeros = [1, 2, 4, 5, 7, 8]
        for _ in range(5):
            await truth.step(client, zeros)
        assert (await client.statistics())["states_fetched_total"] == 0
        for _ in range(5):
            await truth.step(client, [0, 3])
        assert (await client.statistics())["states_fetched_total"] == 2
        truth.check(list(range(30)), (await client.close(truth.handles)).floats())


async def test_steps_wait_while_no_state_may_leave_memory(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_commit = threading.Event()
    may_commit.set()
    commit = RecordingWriter.commit

    def held(self: RecordingWriter) -> None:
        assert may_commit.wait(60)
        commit(self)

    monkeypatch.setattr(RecordingWriter, "commit", held)
    async with running(SMALL, engine=ENGINE, recording=recording(tmp_path, "memory")) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            truth = await opened(client, rng)
            may_commit.clear()
            step = asyncio.create_task(truth.step(client, list(range(STREAMS)), 2))
            async with RawClient(server.endpoint) as other:
                await other.hello()
                while server.statistics.frames_total < WARM - HOT + 1:
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
        for first in range(0, STREAMS, 5):
            await truth.step(client, list(range(first, first + 5)), 2)
        with monkeypatch.context() as patch:

            def failing(self: StoredStates, streams: I64, seqs: I64) -> None:
                raise sqlite3.OperationalError("disk I/O error")

            patch.setattr(StoredStates, "read", failing)
            seqs = truth.seqs[:5].tolist()
            reply = await client.step(truth.handles[:5], seqs, np.ones((1, 5, F), np.float32), seqs)
            assert reply.codes() == [Code.STEP_FAILED] * 5
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
        for first in range(0, STREAMS, 5):
            await truth.step(client, list(range(first, first + 5)), 2)
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

        await client.send(*client.peek_message(truth.handles[[6, 7, 8]]))
        replies = [await client.receive(), await client.receive()]
        peeked = next(reply for reply in replies if reply.kind is Kind.PEEKED)
        assert [code for column, _, code, _ in peeked.failures() if column == 1] == [Code.STATE_LOST]
        found = peeked.floats().reshape(3, 1, H)
        truth.check([6, 8], found[[0, 2]])
        good = [stream for stream in range(STREAMS) if stream not in (1, 7)]
        await truth.step(client, good, 2)
        truth.check(good, (await client.close(truth.handles[good])).floats())


async def test_more_streams_than_memory_holds_cannot_be_reset_at_once(rng: np.random.Generator, tmp_path: Path) -> None:
    async with (
        running(SMALL, engine=ENGINE, recording=recording(tmp_path)) as server,
        RawClient(server.endpoint) as client,
    ):
        await client.hello()
        truth = await opened(client, rng)
        await truth.step(client, list(range(STREAMS)))
        reply = await client.reset(truth.handles[: WARM + 1])
        assert [code for *_, code, _ in reply.failures()] == [Code.STEP_FAILED] * (WARM + 1)
        truth.check(list(range(STREAMS)), (await client.close(truth.handles)).floats())
