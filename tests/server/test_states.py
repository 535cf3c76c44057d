"""Verbs on states: read them, change them, copy them, begin with them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from instep.config import Config
from instep.core.typing import F32, I64, U64
from instep.recording.inspection import inspect
from instep.recording.recovery import read_recovery
from instep.runtime.stepper import Stepper
from instep.server.preparation import Prepared
from instep_client.protocol.wire import Code, Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, plain, whole
from tests.support.raw import RawClient
from tests.support.running import running

F, H = 5, 8
LAYERS = 2
MODEL = plain(F, H, layers=LAYERS)
NOBODY = 12345


def frames(rng: np.random.Generator, timesteps: int, columns: int = 1) -> F32:
    return rng.standard_normal((timesteps, columns, F)).astype(np.float32)


async def test_a_read_shows_seq_and_state_and_leaves_the_stream_as_it_was(rng: np.random.Generator) -> None:
    x = frames(rng, 7, 2)
    async with running(MODEL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("a", "b")).handles()
        fresh = await client.read_state(handles)
        assert fresh.seqs() == [0, 0]
        assert not fresh.floats().any()
        await client.step(handles, [0, 0], x[:4])
        for _ in range(2):
            read = await client.read_state(handles)
            assert (read.seqs(), read.failures()) == ([4, 4], [])
            for column in range(2):
                truth = whole(MODEL, x[:4, column])[1]
                np.testing.assert_array_equal(read.floats().reshape(2, LAYERS, H)[column], truth)
        rest = (await client.step(handles, [4, 4], x[4:])).floats().reshape(3, 2, H)
    for column in range(2):
        np.testing.assert_array_equal(rest[:, column], whole(MODEL, x[:, column])[0][4:])


async def test_a_read_during_a_step_shows_the_state_after_the_frame_before_its_seq(rng: np.random.Generator) -> None:
    x = frames(rng, 3)
    x[0, 0, 0] = GATE_VALUE
    gate = Gate()
    async with running(MODEL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        server.engine.longest_run_ns = 0
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.send(*client.step_message(handles, [0], x))
        while not len(server.engine.blocks):
            await asyncio.sleep(0)
        await client.send(msgpack.packb([Kind.READ_STATE, client.next_request(), 1, 0]), handles.tobytes())
        while server.lifecycle.waits.is_quiet:
            await asyncio.sleep(0)
        gate.open()
        replies = {reply.kind: reply for reply in [await client.receive() for _ in range(2)]}
    read = replies[Kind.STATE_READ]
    assert read.seqs() == [1]
    np.testing.assert_array_equal(read.floats().reshape(LAYERS, H), whole(MODEL, x[:1, 0])[1])
    np.testing.assert_array_equal(replies[Kind.STEPPED].floats().reshape(3, H), whole(MODEL, x[:, 0])[0])


async def test_only_ones_own_streams_are_seen_changed_or_copied(rng: np.random.Generator) -> None:
    async with running(MODEL) as server, RawClient(server.endpoint) as client, RawClient(server.endpoint) as other:
        await client.hello()
        await other.hello()
        mine = (await client.open("mine")).handles()
        theirs = (await other.open("theirs")).handles()
        await other.step(theirs, [0], x := frames(rng, 2))
        handles: U64 = np.concatenate([theirs, mine, np.array([NOBODY], np.uint64)])
        refused = [(0, 0, Code.FOREIGN_STREAM, 0), (2, 0, Code.UNKNOWN_STREAM, 0)]
        read = await client.read_state(handles)
        assert (read.failures(), read.seqs()) == (refused, [0, 0, 0])
        states = read.floats().reshape(3, LAYERS, H)
        assert np.isnan(states[[0, 2]]).all()
        assert not states[1].any()
        assert (await client.reset(handles, np.ones((3, LAYERS, H), np.float32))).failures() == refused
        forked = await client.fork(handles, ["a", "b", "c"])
        assert forked.failures() == refused
        assert np.flatnonzero(forked.handles()).tolist() == [1]
        for verb in (client.read_state, client.reset):
            assert (await verb(theirs)).codes() == [Code.FOREIGN_STREAM]
            assert (await verb(np.concatenate([mine, mine]))).code is Code.REPEATED_STREAM
        assert (await client.fork(theirs, ["d"])).codes() == [Code.FOREIGN_STREAM]
        np.testing.assert_array_equal((await other.close(theirs)).floats(), whole(MODEL, x[:, 0])[1].ravel())


async def test_a_look_shows_anybodys_state_and_nobody_notices(rng: np.random.Generator) -> None:
    x = frames(rng, 7)
    y, _ = whole(MODEL, x[:, 0])
    async with running(MODEL) as server, RawClient(server.endpoint) as other:
        await other.hello()
        async with RawClient(server.endpoint) as owner:
            await owner.hello()
            opened = await owner.open("theirs", "fresh")
            theirs = opened.handles()[:1]
            before = (await owner.step(theirs, [0], x[:4])).floats().reshape(4, H)
            read = await other.read_named(["fresh", "none", "theirs"])
            assert (read.kind, read.seqs()) == (Kind.STATE_READ, [0, 0, 4])
            assert read.failures() == [(1, 0, Code.UNKNOWN_STREAM, 0)]
            states = read.floats().reshape(3, LAYERS, H)
            assert not states[0].any()
            assert np.isnan(states[1]).all()
            np.testing.assert_array_equal(states[2], whole(MODEL, x[:4, 0])[1])
            after = await owner.step(theirs, [4], x[4:6])
            assert after.failures() == []  # with the handle that it had
            np.testing.assert_array_equal(np.concatenate([before, after.floats().reshape(2, H)]), y[:6])
            server._postbox.give_up(*server._clients.all()[1:])
        while server.engine.table.owned[server.engine.table.parked] != 2:
            await asyncio.sleep(0.005)
        assert (await other.read_named(["theirs"])).seqs() == [6]
        epoch = int(opened.grants()["epoch"][0])
        resumed = await other.resume(["theirs"], [6], [epoch])  # the owner's epoch is still the present one
        assert resumed.failures() == []
        rest = await other.step(resumed.handles(), [6], x[6:])
        np.testing.assert_array_equal(rest.floats().reshape(1, H), y[6:])


async def test_a_look_at_streams_that_are_not_there_any_more_says_why(rng: np.random.Generator) -> None:
    gate = Gate()
    x = frames(rng, 1)
    x[0, 0, 0] = GATE_VALUE
    async with running(MODEL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        try:
            await client.hello()
            handles = (await client.open("closing", "closed", "expired")).handles()
            await client.close(handles[1:2])
            await client.send(*client.step_message(handles[:1], [0], x))
            await client.send(*client.close_message(handles[:1]))
            while not server.engine.table.closing.any():
                await asyncio.sleep(0)
            server.lifecycle.expire(server.engine.table.find_all(["expired"]))
            await client.send(*client.read_named_message(["closing", "closed", "expired", "a\tb", ""]))
            assert (await client.read_named(["x", "x"])).code is Code.REPEATED_STREAM
            pong = await client.ask(msgpack.packb([Kind.PING, 9]))
            assert pong.kind is Kind.PONG, "the end of the first is not told before it has ended"
        finally:
            gate.open()
        replies = {reply.kind: reply for reply in [await client.receive() for _ in range(4)]}  # and EVICTED
        read = replies[Kind.STATE_READ]
        assert read.codes() == [
            *(Code.UNKNOWN_STREAM, Code.UNKNOWN_STREAM, Code.EXPIRED, Code.UNKNOWN_STREAM, Code.UNKNOWN_STREAM)
        ]
        assert np.isnan(read.floats()).all()


@pytest.mark.parametrize("to_zeros", [True, False])
async def test_a_reset_stream_goes_on_from_the_new_state_and_from_its_seq(
    rng: np.random.Generator, to_zeros: bool
) -> None:
    x = frames(rng, 7, 2)
    state = None if to_zeros else rng.standard_normal((1, LAYERS, H)).astype(np.float32)
    async with running(MODEL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("reset", "beside")).handles()
        first = await client.step(handles, [0, 0], x[:4])
        changed = await client.reset(handles[:1], state)
        assert (changed.kind, changed.failures()) == (Kind.CHANGED, [])
        again = await client.step(handles, [0, 0], x[:4])
        assert again.frames == first.frames  # what was answered before the reset stays what it was
        rest = (await client.step(handles, [4, 4], x[4:])).floats().reshape(3, 2, H)
    np.testing.assert_array_equal(rest[:, 0], whole(MODEL, x[4:, 0], None if state is None else state[0])[0])
    np.testing.assert_array_equal(rest[:, 1], whole(MODEL, x[:, 1])[0][4:])


async def test_a_reset_is_refused_while_frames_are_pending_and_with_a_state_that_is_not_finite(
    rng: np.random.Generator,
) -> None:
    x = frames(rng, 1)
    x[0, 0, 0] = GATE_VALUE
    states = np.zeros((3, LAYERS, H), np.float32)
    states[1, 1, 3] = np.inf
    gate = Gate()
    async with running(MODEL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("pending", "infinite", "good")).handles()
        await client.send(*client.step_message(handles[:1], [0], x))
        await client.send(*client.reset_message(handles, states))
        await client.send(*client.reset_message(handles[:1]))
        while server.lifecycle.waits.is_quiet:
            await asyncio.sleep(0)
        gate.open()
        replies = [await client.receive() for _ in range(3)]
        refused = [reply.failures() for reply in replies if reply.kind is Kind.CHANGED]
        assert sorted(refused, key=len) == [
            [(0, 0, Code.FRAMES_PENDING, 0)],
            [(0, 0, Code.FRAMES_PENDING, 0), (1, 0, Code.NOT_FINITE, 0)],
        ]
        np.testing.assert_array_equal((await client.close(handles[:1])).floats(), whole(MODEL, x[:, 0])[1].ravel())


async def test_a_fork_goes_on_like_its_source_and_neither_disturbs_the_other(rng: np.random.Generator) -> None:
    x = frames(rng, 9, 2)
    async with running(MODEL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        source = (await client.open("source")).handles()
        await client.step(source, [0], x[:5, :1])
        forked = await client.fork(source, ["copy"])
        assert (forked.kind, forked.seqs(), forked.failures()) == (Kind.OPENED, [5], [])
        both = np.concatenate([source, forked.handles()])
        y = (await client.step(both, [5, 5], x[5:], acked=[5, 5])).floats().reshape(4, 2, H)
        assert (await client.step(forked.handles(), [4], x[4:5, :1])).codes() == [Code.SEQ_REPEATED]
    truth = whole(MODEL, x[:, 0])[0]
    np.testing.assert_array_equal(y[:, 0], truth[5:])
    np.testing.assert_array_equal(y[:, 1], whole(MODEL, np.concatenate([x[:5, 0], x[5:, 1]]))[0][5:])


async def test_a_fork_is_refused_as_an_opening_is(rng: np.random.Generator) -> None:
    async with running(MODEL, engine={"max_streams": 6}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open(*"abcd")).handles()
        forked = await client.fork(handles, ["a", "bad\t", "new", "new"])
        assert forked.failures() == [
            (0, 0, Code.NAME_IN_USE, 0),
            (1, 0, Code.BAD_NAME, 0),
            (3, 0, Code.NAME_IN_USE, 0),
        ]
        assert (await client.fork(handles[:1], [""])).codes() == [Code.BAD_NAME]
        assert (await client.fork(handles[:2], ["e", "f"])).failures() == [(1, 0, Code.TOO_MANY_STREAMS, 0)]


async def test_a_fork_whose_connection_has_gone_leaves_no_stream_behind() -> None:
    gate = Gate("read")
    async with running(MODEL, stepper=gate.stepper, limits={"max_connections": 1}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("source")).handles()
            await client.send(*client.fork_message(handles, ["copy"]))
            while server.lifecycle.waits.is_quiet:
                await asyncio.sleep(0)
            (owner,) = server._clients.all()
            server._postbox.give_up(owner)
        while not server._clients._free:
            await asyncio.sleep(0.005)
        async with RawClient(server.endpoint) as following:
            await following.hello()
            gate.open()
            while not server.lifecycle.waits.is_quiet:
                await asyncio.sleep(0)
            assert (await following.open("copy")).failures() == []


async def test_a_stream_may_be_opened_where_another_one_was(rng: np.random.Generator) -> None:
    x = frames(rng, 9)
    first = 2**62 - 1
    async with running(MODEL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("before")).handles()
        await client.step(handles, [0], x[:5])
        read = await client.read_state(handles)
        state = read.floats().reshape(1, LAYERS, H)
        opened = await client.open("after", "other", states=np.repeat(state, 2, 0), first_seqs=[first, 3])
        assert (opened.seqs(), opened.failures()) == ([first, 3], [])
        handles = opened.handles()[:1]
        assert (await client.step(handles, [0], x[:1])).failures() == [(0, 0, Code.SEQ_REPEATED, first)]
        y = await client.step(handles, [first], x[5:], acked=[first])
        assert (await client.read_state(handles)).seqs() == [first + 4]
    np.testing.assert_array_equal(y.floats().reshape(4, H), whole(MODEL, x[:, 0])[0][5:])


class Amnesiac(Stepper):
    """Can no longer read or load states once told so."""

    is_broken = False

    def read(self, slots: I64) -> F32:
        self._fail()
        return super().read(slots)

    def load(self, slots: I64, states: F32 | None) -> None:
        self._fail()
        super().load(slots, states)

    def _fail(self) -> None:
        if self.is_broken:
            raise RuntimeError("injected")


async def test_states_that_cannot_be_read_or_written_are_refused_one_by_one() -> None:
    steppers: list[Amnesiac] = []

    def build(ready: Prepared, config: Config) -> Stepper:
        steppers.append(Amnesiac(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device))
        return steppers[0]

    async with running(MODEL, stepper=build) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        steppers[0].is_broken = True
        read = await client.read_state(handles)
        assert read.codes() == [Code.STATE_LOST]
        assert np.isnan(read.floats()).all()
        assert (await client.fork(handles, ["copy"])).codes() == [Code.STATE_LOST]
        assert (await client.reset(handles)).codes() == [Code.STEP_FAILED]
        steppers[0].is_broken = False
        assert (await client.read_state(handles)).failures() == []
        assert (await client.open("copy")).failures() == []


@pytest.mark.parametrize("verb", ["read", "fork", "close"])
async def test_more_states_than_fit_into_a_message_are_refused_whole(verb: str) -> None:
    transport: dict[str, Any] = {"max_message_bytes": 4096}
    async with running(SMALL, transport=transport) as server, RawClient(server.endpoint) as client:
        await client.hello()
        count = 4096 // (4 * H) + 1
        handles = list(range(count))
        if verb == "fork":
            reply = await client.fork(handles, ["n"] * count)
        else:
            reply = await (client.read_state if verb == "read" else client.close)(handles)
        assert reply.code is Code.TOO_LARGE


async def test_nothing_is_changed_any_more_while_the_server_drains() -> None:
    gate = Gate()
    async with running(SMALL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s", "pending")).handles()
        await client.send(*client.step_message(handles[1:], [0], np.full((1, 1, F), GATE_VALUE, np.float32)))
        while not len(server.engine.blocks):
            await asyncio.sleep(0)
        server.stop()
        assert (await client.reset(handles[:1])).code is Code.SHUTTING_DOWN
        assert (await client.fork(handles[:1], ["t"])).code is Code.SHUTTING_DOWN
        assert (await client.resume(["s"], [0], [0])).code is Code.SHUTTING_DOWN
        assert (await client.open("t")).code is Code.SHUTTING_DOWN
        gate.open()


async def test_frames_that_come_before_a_reset_is_done_are_applied_and_recorded_behind_it(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    x = frames(rng, 5)
    gate = Gate(before="load")
    gate.open()
    file = tmp_path / "r.instep"
    async with running(MODEL, stepper=gate.stepper, recording={"file": file}) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            await client.step(handles, [0], x[:2])
            gate.close()
            await client.send(*client.reset_message(handles))
            await client.send(*client.step_message(handles, [2], x[2:]))
            while not server.engine.rings.pending_count:
                await asyncio.sleep(0.001)
            assert not server.engine.scheduler.ready_count
            gate.open()
            changed, stepped = await client.receive(), await client.receive()
            assert (changed.kind, changed.frames[0]) == (Kind.CHANGED, b"")
            np.testing.assert_array_equal(stepped.floats().reshape(3, H), whole(MODEL, x[2:, 0])[0])
    inspect(file, lambda _: None)
    with read_recovery(file, lambda _: None) as recovered:
        assert [stream.seq for stream in recovered.streams] == [5]
        assert list(recovered.replay()) == []


async def test_frames_between_two_resets_under_way_are_stepped_once(rng: np.random.Generator) -> None:
    x = frames(rng, 4)
    gate = Gate(before="load")
    gate.open()
    async with running(MODEL, stepper=gate.stepper) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        gate.close()
        await client.send(*client.reset_message(handles, np.ones((1, LAYERS, H), np.float32)))
        await client.send(*client.reset_message(handles))
        await client.send(*client.step_message(handles, [0], x))
        while not server.engine.rings.pending_count:
            await asyncio.sleep(0.001)
        gate.open()
        replies = [await client.receive() for _ in range(3)]
        assert [reply.kind for reply in replies] == [Kind.CHANGED, Kind.CHANGED, Kind.STEPPED]
        np.testing.assert_array_equal(replies[2].floats().reshape(4, H), whole(MODEL, x[:, 0])[0])
