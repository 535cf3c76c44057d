"""What breaks inside the server: the streams it touches are told, the others never notice."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgpack
import numpy as np
import pytest
from instep.server.waits import MOST_JOBS

from instep.config import Config
from instep.core.typing import F32, I64
from instep.recording.errors import RecordingError
from instep.recording.recorder import Recorder
from instep.recording.writer import RecordingWriter
from instep.runtime.errors import StateLost
from instep.runtime.state_cache import StateCache
from instep.runtime.stepper import Stepper
from instep.server.preparation import Prepared
from instep_client.protocol.wire import Code, Kind
from tests.support.commits import held_commits
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
POISON = 1234.5
"""A frame that begins with this makes the step raise."""


class FaultyStepper(Stepper):
    """Raises what it is told to when the poisonous frame is in the batch."""

    fault: type[BaseException] = RuntimeError

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        if (inputs[rows, 0] == POISON).any():
            raise self.fault("injected")
        super().step(slots, rows, inputs, outputs)


class LosingStepper(FaultyStepper):
    fault = StateLost


class DyingStepper(FaultyStepper):
    fault = SystemExit


def make(kind: type[Stepper]) -> object:
    def build(ready: Prepared, config: Config) -> Stepper:
        return kind(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device)

    return build


def poisoned(x: F32, timestep: int, column: int) -> F32:
    bad = x.copy()
    bad[timestep, column, 0] = POISON
    return bad


async def test_a_failed_step_is_answered_and_the_streams_go_on(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 2, F)).astype(np.float32)
    async with running(SMALL, stepper=make(FaultyStepper)) as server, RawClient(server.endpoint) as client:  # type: ignore[arg-type]
        await client.hello()
        handles = (await client.open("bad", "bystander")).handles()
        bystander = [await client.step(handles[1:], [0], x[:3, 1:])]
        reply = await client.step(handles[:1], [0], poisoned(x[:, :1], 3, 0))
        assert reply.failures() == [(0, 3, Code.STEP_FAILED, 3)]
        truth, _ = whole(SMALL, x[:, 0])
        np.testing.assert_array_equal(reply.floats().reshape(6, H)[:3], truth[:3])
        assert np.isnan(reply.floats().reshape(6, H)[3:]).all()
        again = await client.step(handles[:1], [3], x[3:, :1])
        np.testing.assert_array_equal(again.floats().reshape(3, H), truth[3:])
        bystander.append(await client.step(handles[1:], [3], x[3:, 1:]))
        served = np.concatenate([part.floats().reshape(3, H) for part in bystander])
        np.testing.assert_array_equal(served, whole(SMALL, x[:, 1])[0])
        assert server.statistics.step_failures_total == 1


async def test_frames_pipelined_behind_a_failed_one_are_gaps(rng: np.random.Generator) -> None:
    x = rng.standard_normal((6, 1, F)).astype(np.float32)
    async with running(SMALL, stepper=make(FaultyStepper)) as server, RawClient(server.endpoint) as client:  # type: ignore[arg-type]
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], poisoned(x[:3], 0, 0)))
        await client.send(*client.step_message(handles, [3], x[3:]))
        replies = [await client.receive() for _ in range(2)]
        by_code = {reply.failures()[0][2]: reply.failures() for reply in replies}
        assert by_code[Code.STEP_FAILED] == [(0, 0, Code.STEP_FAILED, 0)]
        assert by_code[Code.SEQ_GAP] == [(0, 0, Code.SEQ_GAP, 0)]
        again = await client.step(handles, [0], x)
        np.testing.assert_array_equal(again.floats().reshape(6, H), whole(SMALL, x[:, 0])[0])
        assert server.engine.rings.pending_count == 0


async def test_a_stream_whose_state_is_lost_is_closed_and_told(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 2, F)).astype(np.float32)
    async with running(SMALL, stepper=make(LosingStepper)) as server, RawClient(server.endpoint) as client:  # type: ignore[arg-type]
        await client.hello()
        handles = (await client.open("lost", "kept")).handles()
        await client.send(*client.step_message(handles[:1], [0], poisoned(x[:1, :1], 0, 0)))
        reply, notice = [await client.receive() for _ in range(2)]
        assert (notice.kind, notice.header[3]) == (Kind.EVICTED, Code.STATE_LOST)
        assert reply.failures() == [(0, 0, Code.STATE_LOST, 0)]
        kept = await client.step(handles[1:], [0], x[:, 1:])
        np.testing.assert_array_equal(kept.floats().reshape(2, H), whole(SMALL, x[:, 1])[0])
        assert (await client.open("lost")).failures() == []


async def test_a_stream_that_closes_while_its_state_is_lost_gets_no_state(rng: np.random.Generator) -> None:
    may_fail = threading.Event()

    class WaitingStepper(LosingStepper):
        def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
            assert may_fail.wait(60)
            super().step(slots, rows, inputs, outputs)

    async with running(SMALL, stepper=make(WaitingStepper)) as server, RawClient(server.endpoint) as client:  # type: ignore[arg-type]
        await client.hello()
        handles = (await client.open("s")).handles()
        x = rng.standard_normal((1, 1, F)).astype(np.float32)
        await client.send(*client.step_message(handles, [0], poisoned(x, 0, 0)))
        await client.send(*client.close_message(handles))
        while not server.engine.table.closing.any():
            await asyncio.sleep(0.001)
        may_fail.set()
        stepped, closed = sorted([await client.receive() for _ in range(2)], key=lambda reply: reply.request)
        assert stepped.failures() == [(0, 0, Code.STATE_LOST, 0)]
        assert closed.failures() == [(0, 0, Code.STATE_LOST, 0)]
        assert np.isnan(closed.floats()).all()


async def test_a_dead_worker_ends_the_server_with_a_reason(rng: np.random.Generator) -> None:
    failure = "the step worker died: SystemExit('injected')"
    async with running(SMALL, stepper=make(DyingStepper), failure=failure) as server:  # type: ignore[arg-type]
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            x = rng.standard_normal((1, 1, F)).astype(np.float32)
            reply = await client.step(handles, [0], poisoned(x, 0, 0))
            assert reply.kind is Kind.GOODBYE
            assert "worker died" in reply.header[2]


@pytest.mark.parametrize("verb", ["add_inputs", "commit"])
async def test_a_recording_that_fails_ends_the_server_with_a_reason_and_nothing_is_answered_any_more(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    def full(self: object, *args: object) -> None:
        raise OSError("disk full, injected")

    recording = {"file": tmp_path / "r.instep"}
    failure = f"the recording {recording['file']} failed: disk full, injected"
    async with running(SMALL, recording=recording, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        monkeypatch.setattr(RecordingWriter, verb, full)
        x = rng.standard_normal((1, 1, F)).astype(np.float32)
        reply = await client.step(handles, [0], x)
        assert reply.kind is Kind.GOODBYE
        assert failure in reply.header[2]


async def test_a_bug_in_the_loop_ends_the_server_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    failure = "a bug in the server's loop: ZeroDivisionError('injected')"
    async with running(SMALL, failure=failure) as server, RawClient(server.endpoint) as client:
        await client.hello()

        def buggy() -> None:
            raise ZeroDivisionError("injected")

        monkeypatch.setattr(server.engine, "schedule", buggy)
        await client.send(msgpack.packb([Kind.PING, 9]))
        kinds = [(await client.receive()).kind for _ in range(2)]
        assert kinds == [Kind.PONG, Kind.GOODBYE]
        await asyncio.sleep(0)


@pytest.mark.parametrize("park_s", [0, 300])
async def test_streams_that_cannot_be_loaded_for_a_client_that_is_gone_are_released_once(park_s: float) -> None:
    def build(ready: Prepared, config: Config) -> Stepper:
        return MemorylessStepper(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device)

    async with running(SMALL, stepper=build, limits={"park_s": park_s}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        (owner,) = server._clients.all()
        server.lifecycle.open(owner, ["a"], None, None, lambda *_: None)
        server._postbox.give_up(owner)
        while server.engine.table.open_count:
            await asyncio.sleep(0.001)
        assert server._clients._free == [owner.number]


class MemorylessStepper(Stepper):
    """Can neither load nor read states."""

    broken = True

    def load(self, slots: I64, states: F32 | None) -> None:
        if self.broken:
            raise RuntimeError("injected")
        super().load(slots, states)

    def read(self, slots: I64) -> F32:
        raise RuntimeError("injected")


async def test_streams_that_cannot_be_loaded_are_refused_and_those_that_cannot_be_read_get_no_state() -> None:
    steppers: list[MemorylessStepper] = []

    def build(ready: Prepared, config: Config) -> Stepper:
        steppers.append(
            MemorylessStepper(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device)
        )
        return steppers[0]

    async with running(SMALL, stepper=build, engine={"max_streams": 2}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            for _ in range(3):
                assert (await client.open("a", "b")).failures() == [
                    (0, 0, Code.STEP_FAILED, 0),
                    (1, 0, Code.STEP_FAILED, 0),
                ]
            steppers[0].broken = False
            handles = (await client.open("a")).handles()
            closed = await client.close(handles)
            assert closed.failures() == [(0, 0, Code.STATE_LOST, 0)]
            assert np.isnan(closed.floats()).all()
            assert (await client.open("a")).failures() == []


async def test_frames_for_a_stream_that_cannot_be_loaded_are_not_computed_on_what_its_slot_held_before(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """Who takes it over can send frames before its opener is told that it is open."""
    gate, x = Gate("load"), rng.standard_normal((2, 1, F)).astype(np.float32)
    gate.open()
    async with running(SMALL, stepper=gate.stepper, engine={"max_streams": 2}) as server:
        table, rings = server.engine.table, server.engine.rings
        async with RawClient(server.endpoint) as opener, RawClient(server.endpoint) as taker:
            await opener.hello()
            await taker.hello()
            handles = (await opener.open("former", "beside")).handles()
            await opener.step(handles[:1], [0], x[:1])
            await opener.close(handles[:1])  # its state is left in the slot
            gate.close()
            with monkeypatch.context() as patch:
                patch.setattr(StateCache, "clear", broken)
                await opener.send(*opener.open_message("s"))
                while table.find("s") is None:
                    await asyncio.sleep(0)
                taken = await taker.resume(["s"], [0], [0], take_over=True)
                await taker.send(*taker.step_message(taken.handles(), [0], x))
                while not rings.pending_count:
                    await asyncio.sleep(0)
                gate.open()
                stepped, evicted = await taker.receive(), await taker.receive()
            assert stepped.failures() == [(0, 0, Code.STATE_LOST, 0)]
            assert np.isnan(stepped.floats()).all()
            assert (evicted.kind, evicted.header[3]) == (Kind.EVICTED, Code.STATE_LOST)
            assert evicted.handles().tolist() == taken.handles().tolist()
            while (reply := await opener.receive()).kind is not Kind.OPENED:
                assert reply.header[3] == Code.FENCED
            assert reply.failures() == [(0, 0, Code.STEP_FAILED, 0)]
            assert not rings.pending_count
            assert server.statistics.frames_total == 1
            y = await opener.step(handles[1:], [0], x)
            np.testing.assert_array_equal(y.floats().reshape(2, H), whole(SMALL, x[:, 0])[0])
            again = (await taker.open("s")).handles()
            y = await taker.step(again, [0], x)
            np.testing.assert_array_equal(y.floats().reshape(2, H), whole(SMALL, x[:, 0])[0])


async def test_a_slot_whose_stream_was_reset_while_it_could_not_be_loaded_steps_its_next_stream(
    rng: np.random.Generator,
) -> None:
    x = rng.standard_normal((2, 1, F)).astype(np.float32)
    gate = Gate("load")
    async with running(SMALL, stepper=gate.stepper, engine={"max_streams": 1}) as server:
        async with RawClient(server.endpoint) as opener, RawClient(server.endpoint) as taker:
            await opener.hello()
            await taker.hello()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(StateCache, "clear", broken)
                await opener.send(*opener.open_message("s"))
                while not server.engine.table.open_count:
                    await asyncio.sleep(0)
                taken = (await taker.resume(["s"], [0], [0], take_over=True)).handles()
                await taker.send(*taker.reset_message(taken))
                await taker.send(*taker.step_message(taken, [0], x))
                while not server.engine.rings.pending_count:
                    await asyncio.sleep(0)
                gate.open()
                replies = [await taker.receive() for _ in range(3)]
            assert {reply.kind for reply in replies} == {Kind.STEPPED, Kind.CHANGED, Kind.EVICTED}
            again = (await taker.open("s")).handles()
            stepped = await taker.step(again, [0], x)
            np.testing.assert_array_equal(stepped.floats().reshape(2, H), whole(SMALL, x[:, 0])[0])


def broken(*_: object) -> None:
    raise RuntimeError("injected")


async def test_a_recorder_that_is_behind_holds_steps_back_and_loses_nothing(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((30, 1, F)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep", "queue_batches": 2, "durability": "memory"}
    async with (
        running(SMALL, recording=recording) as server,
        RawClient(server.endpoint) as client,
        held_commits() as may_commit,
    ):
        await client.hello()
        may_commit.clear()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], x))
        while server.statistics.batches_total < 2:
            await asyncio.sleep(0.001)
        for _ in range(200):
            await asyncio.sleep(0)
        assert server.statistics.batches_total == 2
        may_commit.set()
        reply = await client.receive()
        np.testing.assert_array_equal(reply.floats().reshape(30, H), whole(SMALL, x[:, 0])[0])


@pytest.mark.parametrize("durability", ["memory", "commit"])
@pytest.mark.parametrize("is_poisoned", [False, True])
async def test_a_frame_is_not_answered_when_the_recorder_did_not_take_it(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, durability: str, is_poisoned: bool
) -> None:
    def failed(self: Recorder, *args: object) -> None:
        raise RecordingError("injected")

    recording = {"file": tmp_path / "r.instep", "durability": durability}
    async with running(SMALL, recording=recording, stepper=make(FaultyStepper)) as server:  # type: ignore[arg-type]
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s", "other")).handles()
            for verb in ("open_streams", "add_inputs", "add_outputs", "fail_batch", "close_streams", "stream_events"):
                monkeypatch.setattr(Recorder, verb, failed)
            x = rng.standard_normal((1, 1, F)).astype(np.float32)
            await client.send(*client.step_message(handles[:1], [0], poisoned(x, 0, 0) if is_poisoned else x))
            while not server.statistics.batches_total + server.statistics.step_failures_total:
                await asyncio.sleep(0.001)
            other = handles[1:]
            for message in (client.open_message("t"), client.reset_message(other), client.close_message(other)):
                await client.send(*message)
            assert (await client.ask(msgpack.packb([Kind.PING, 9]))).kind is Kind.PONG
            server.stop(drain=False)


@pytest.mark.parametrize("durability", ["commit", "fsync"])
async def test_nothing_is_answered_before_the_recording_has_it(
    tmp_path: Path, rng: np.random.Generator, durability: str
) -> None:
    recording = {"file": tmp_path / "r.instep", "durability": durability}
    x = rng.standard_normal((2, 1, F)).astype(np.float32)
    async with (
        running(SMALL, recording=recording) as server,
        RawClient(server.endpoint) as client,
        held_commits() as may_commit,
    ):
        assert (await client.hello()).header[-2] == durability
        handles = (await client.open("s")).handles()
        may_commit.clear()
        await client.send(*client.step_message(handles, [0], x))
        await client.send(*client.open_message("t"))
        while server.statistics.batches_total < 2 or server.engine.table.open_count < 2:
            await asyncio.sleep(0.001)
        await client.send(*client.read_state_message(handles))
        pong = await client.ask(msgpack.packb([Kind.PING, 9]))
        assert pong.kind is Kind.PONG
        repeated = await client.step(handles, [0], x)
        assert repeated.codes() == [Code.SEQ_REPEATED]
        may_commit.set()
        replies = {reply.kind: reply for reply in [await client.receive() for _ in range(3)]}
        assert replies[Kind.STATE_READ].seqs() == [2]
        np.testing.assert_array_equal(replies[Kind.STEPPED].floats().reshape(2, H), whole(SMALL, x[:, 0])[0])
        assert replies[Kind.OPENED].header[3] == durability


@pytest.mark.parametrize("verb", ["resume", "read by name", "read another too"])
@pytest.mark.parametrize("end", ["expired", "closed"])
async def test_nobody_is_told_that_a_stream_is_no_more_before_the_recording_has_its_end(
    tmp_path: Path, end: str, verb: str
) -> None:
    recording = {"file": tmp_path / "r.instep", "durability": "commit"}
    async with running(SMALL, recording=recording) as server, RawClient(server.endpoint) as client:
        await client.hello()
        async with RawClient(server.endpoint) as owner, held_commits() as may_commit:
            await owner.hello()
            opened = await owner.open("s", "other")
            may_commit.clear()
            table, lifecycle = server.engine.table, server.lifecycle
            if end == "closed":
                await owner.send(*owner.close_message(opened.handles()[:1]))
            elif end == "expired":
                gone = server._clients.all()[1]
                server._postbox.give_up(gone)
                lifecycle.expire(table.find_all(["s"]))
            while table.open_count > 1:
                await asyncio.sleep(0.001)
            if verb == "resume":
                await client.send(*client.resume_message(["s"], [0], opened.epochs()[:1]))
            else:
                await client.send(*client.read_named_message(["s", "other"][: 1 + (verb != "read by name")]))
            pong = await client.ask(msgpack.packb([Kind.PING, 9]))
            assert pong.kind is Kind.PONG
            may_commit.set()
            code = Code.EXPIRED if end == "expired" else Code.UNKNOWN_STREAM
            assert (await client.receive()).codes() == [code]


async def test_who_has_the_number_of_an_owner_that_is_gone_is_not_told_of_the_end_of_its_streams(
    tmp_path: Path,
) -> None:
    recording = {"file": tmp_path / "r.instep"}
    async with (
        held_commits() as may_commit,
        running(SMALL, recording=recording, limits={"max_connections": 1}) as server,
    ):
        async with RawClient(server.endpoint) as gone, RawClient(server.endpoint) as heir:
            await gone.hello()
            await gone.open("s", "t")
            (owner,) = server._clients.all()
            may_commit.clear()
            server.lifecycle.evict(server.engine.table.owned_by(owner.number), Code.IDLE)
            server._postbox.give_up(owner)
            while server.engine.table.open_count:
                await asyncio.sleep(0.001)
            await heir.hello()
            assert server._clients.all()[0].number == owner.number
            may_commit.set()
            assert (await heir.open("s")).kind is Kind.OPENED


@pytest.mark.parametrize("verb", ["read", "read by name", "read in vain", "resume in vain"])
async def test_while_a_commit_takes_long_only_so_many_answers_that_are_not_recorded_wait_for_it(
    tmp_path: Path, verb: str
) -> None:
    count = 3 * MOST_JOBS
    async with held_commits() as may_commit, running(SMALL, recording={"file": tmp_path / "r.instep"}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            opened = await client.open("s")
            may_commit.clear()
            await client.send(*client.open_message("t"))
            while not len(server._tap._waiting):
                await asyncio.sleep(0)
            for _ in range(count):
                match verb:
                    case "read":
                        message = client.read_state_message(opened.handles())
                    case "read by name":
                        message = client.read_named_message(["s"])
                    case "read in vain":
                        message = client.read_named_message(["nobody"])
                    case _:
                        message = client.resume_message(["nobody"], [0], [1])
                await client.send(*message)
            while server.has_room:
                await asyncio.sleep(0)
            while not server._router.is_readable:
                await asyncio.sleep(0)
            assert len(server._tap._waiting) <= 1 + MOST_JOBS
            may_commit.set()
            for _ in range(1 + count):
                assert (await client.receive()).kind in (Kind.OPENED, Kind.STATE_READ, Kind.RESUMED)
            assert server.has_room


async def test_more_blocks_than_can_wait_to_be_durable_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    """A block outlasts its frames: its answer waits for the recording."""
    x = rng.standard_normal((1, 1, F)).astype(np.float32)
    recording = {"file": tmp_path / "r.instep", "durability": "commit"}
    limits = {"max_pending_frames": 2, "max_block_frames": 1, "credit_frames": 2}
    async with running(SMALL, recording=recording, limits=limits) as server:
        async with (
            RawClient(server.endpoint) as client,
            RawClient(server.endpoint) as other,
            held_commits() as may_commit,
        ):
            await client.hello()
            await other.hello()
            mine, theirs = (await client.open("a", "b")).handles(), (await other.open("c")).handles()
            may_commit.clear()
            for count, handle in enumerate(mine, 1):  # one after the other, or both would be answered together
                await client.send(*client.step_message([handle], [0], x))
                while server.statistics.frames_total < count:
                    await asyncio.sleep(0.001)
            assert server.engine.rings.pending_count == 0
            assert (await other.step(theirs, [0], x)).code is Code.BUSY
            may_commit.set()
            for _ in mine:
                reply = await client.receive()
                np.testing.assert_array_equal(reply.floats().reshape(1, H), whole(SMALL, x[:, 0])[0])
            assert (await other.step(theirs, [0], x)).failures() == []


async def test_draining_ends_after_its_time_though_a_step_never_ends() -> None:
    gate = Gate()
    shutdown = {"drain_timeout_s": 0.05}
    failure = "draining took longer than shutdown.drain_timeout_s = 0.05"
    async with running(SMALL, stepper=gate.stepper, shutdown=shutdown, failure=failure) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            await client.send(*client.step_message(handles, [0], np.full((1, 1, F), GATE_VALUE, np.float32)))
            while not len(server.engine.blocks):
                await asyncio.sleep(0)
            server.stop()
            assert (await client.receive()).kind is Kind.GOODBYE
    gate.open()
    assert server.unanswered_blocks == 1
