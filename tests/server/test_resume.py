"""Streams whose connection has gone: parked, resumed where they were, taken over, and closed in the end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import msgpack
import numpy as np
import pytest

from instep.core.typing import F32, I64
from instep.runtime.stepper import Stepper
from instep.server.server import Server
from instep_client.protocol.wire import HAVE_ALL, Code, Kind
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient, Reply
from tests.support.running import running

F, H, W = 5, 8, 32


def frames(rng: np.random.Generator, timesteps: int, columns: int = 1) -> F32:
    return rng.standard_normal((timesteps, columns, F)).astype(np.float32)


def gated(rng: np.random.Generator, timesteps: int) -> F32:
    x = frames(rng, timesteps)
    x[0, 0, 0] = GATE_VALUE
    return x


@contextlib.asynccontextmanager
async def served(**arguments: Any) -> AsyncIterator[tuple[Server, RawClient]]:
    """A server that notices soon when a connection has gone, and a connection to it."""
    sections = {"transport": {"heartbeat_s": 0.05}, **arguments}
    async with running(SMALL, **sections) as server, RawClient(server.endpoint) as client:
        await client.hello()
        yield server, client


async def parked(server: Server, count: int = 1) -> None:
    """Wait until so many streams are parked."""
    table = server.engine.table
    while table.owned[table.parked] != count:
        await asyncio.sleep(0.005)


async def under_way(server: Server) -> None:
    """Wait until a block was admitted."""
    while not len(server.engine.blocks):
        await asyncio.sleep(0.005)


async def left_behind(server: Server, *names: str, x: F32 | None = None) -> Reply:
    """Open streams on a connection that vanishes, after it stepped them by `x` [T, N, features]; its OPENED."""
    async with RawClient(server.endpoint) as gone:
        await gone.hello()
        opened = await gone.open(*names)
        if x is not None:
            assert (await gone.step(opened.handles(), opened.seqs(), x)).failures() == []
    await parked(server, len(names))
    return opened


def refused(reply: Reply) -> tuple[list[tuple[int, int, Code, int]], list[int]]:
    assert reply.kind is Kind.RESUMED, reply.header
    return reply.failures(), np.flatnonzero(reply.handles() == 0).tolist()


# ── Where it was ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(rng: np.random.Generator) -> None:
    x = frames(rng, 20, 2)
    async with served() as (server, client):
        opened = await left_behind(server, "a", "b", x=x[:9])
        resumed = await client.resume(["b", "a"], [4, 9], opened.epochs()[::-1])
        assert (resumed.kind, resumed.failures(), resumed.seqs()) == (Kind.RESUMED, [], [9, 9])
        assert min(resumed.epochs()) > max(opened.epochs())
        assert not set(resumed.handles().tolist()) & set(opened.handles().tolist())
        b, a = resumed.handles()
        missed = await client.step([b], [4], x[4:9, 1:], acked=[4])
        y = (await client.step([a, b], [9, 9], x[9:], acked=[9, 9])).floats().reshape(11, 2, H)
        finals = (await client.close([a, b])).floats().reshape(2, H)
        assert server.statistics.frames_total == 40
    for column in range(2):
        truth, final = whole(SMALL, x[:, column])
        np.testing.assert_array_equal(y[:, column], truth[9:])
        np.testing.assert_array_equal(finals[column], final[0])
    np.testing.assert_array_equal(missed.floats().reshape(5, H), whole(SMALL, x[:, 1])[0][4:9])


@pytest.mark.parametrize("computed_when_resumed", [True, False])
async def test_frames_that_were_under_way_are_answered_once_and_computed_once(
    rng: np.random.Generator, computed_when_resumed: bool
) -> None:
    """The answers to them went to a connection that is no more; the same frames bring them back."""
    x = gated(rng, 20)
    gate = Gate()
    async with served(stepper=gate.stepper) as (server, client):
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            opened = await gone.open("s")
            await gone.send(*gone.step_message(opened.handles(), [0], x[:12]))
            await under_way(server)
        await parked(server)
        if computed_when_resumed:
            gate.open()
            while server.engine.blocks:
                await asyncio.sleep(0.005)
        await client.send(*client.resume_message(["s"], [0], opened.epochs()))
        if not computed_when_resumed:
            while server.lifecycle.waits.is_quiet:
                await asyncio.sleep(0.005)
            gate.open()
        resumed = await client.receive()
        assert (resumed.failures(), resumed.seqs()) == ([], [12])
        y = await client.step(resumed.handles(), [0], x)
        assert server.statistics.frames_total == 20
    np.testing.assert_array_equal(y.floats().reshape(20, H), whole(SMALL, x[:, 0])[0])


async def test_a_stream_may_change_hands_at_every_frame(rng: np.random.Generator) -> None:
    x = frames(rng, 12)
    served_frames = []
    async with served() as (server, client), RawClient(server.endpoint) as other:
        await other.hello()
        reply = await client.open("s")
        for seq in range(len(x)):
            owner = (client, other)[seq % 2]
            reply = await owner.resume(["s"], [seq], reply.epochs())
            while reply.kind is Kind.EVICTED:
                reply = await owner.receive()
            step = await owner.step(reply.handles(), [seq], x[seq : seq + 1], acked=[seq])
            served_frames.append(step.floats())
    np.testing.assert_array_equal(np.stack(served_frames), whole(SMALL, x[:, 0])[0])


# ── Whose it is ────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_who_resumes_by_the_present_epoch_fences_a_connection_that_still_looks_alive(
    rng: np.random.Generator,
) -> None:
    x = frames(rng, 4, 2)
    async with served() as (server, client), RawClient(server.endpoint) as old:
        await old.hello()
        opened = await old.open("moved", "stays")
        before = await old.step(opened.handles(), [0, 0], x[:2])
        resumed = await client.resume(["moved"], [2], opened.epochs()[:1])
        notice = await old.receive()
        assert (notice.kind, notice.header[3]) == (Kind.EVICTED, Code.FENCED)
        assert notice.handles().tolist() == opened.handles()[:1].tolist()
        late = await old.step(opened.handles(), [2, 2], x[2:])
        assert late.failures() == [(0, 0, Code.FENCED, 0)]
        for verb in (old.close, old.read_state, old.reset):
            assert (await verb(opened.handles()[:1])).codes() == [Code.FENCED]
        after = await client.step(resumed.handles(), [2], x[2:, :1])
    y = np.concatenate([before.floats().reshape(2, 2, H)[:, 0], after.floats().reshape(2, H)])
    np.testing.assert_array_equal(y, whole(SMALL, x[:, 0])[0])
    np.testing.assert_array_equal(late.floats().reshape(2, 2, H)[:, 1], whole(SMALL, x[:, 1])[0][2:])


async def test_an_older_epoch_gets_nothing_unless_it_takes_over(rng: np.random.Generator) -> None:
    x = frames(rng, 5)
    async with served() as (server, client):
        opened = await left_behind(server, "s", x=x[:3])
        for epoch in (0, opened.epochs()[0] - 1):
            assert refused(await client.resume(["s"], [3], [epoch])) == ([(0, 0, Code.FENCED, 3)], [0])
        taken = await client.resume(["s"], [HAVE_ALL], [0], take_over=True)
        assert (taken.failures(), taken.seqs()) == ([], [3])
        async with RawClient(server.endpoint) as former:
            await former.hello()
            assert refused(await former.resume(["s"], [3], opened.epochs())) == ([(0, 0, Code.FENCED, 3)], [0])
        y = await client.step(taken.handles(), [3], x[3:], acked=[3])
        np.testing.assert_array_equal(y.floats().reshape(2, H), whole(SMALL, x[:, 0])[0][3:])


async def test_who_resumes_its_own_stream_is_not_evicted_from_it() -> None:
    async with served() as (_, client):
        opened = await client.open("s")
        resumed = await client.resume(["s"], [0], opened.epochs())
        assert (resumed.kind, resumed.failures()) == (Kind.RESUMED, [])
        x = np.zeros((1, 1, F), np.float32)
        assert (await client.step(opened.handles(), [0], x)).codes() == [Code.FENCED]
        assert (await client.step(resumed.handles(), [0], x)).failures() == []


async def test_of_two_who_claim_a_stream_at_once_the_later_gets_it(rng: np.random.Generator) -> None:
    x = gated(rng, 3)
    gate = Gate()
    async with served(stepper=gate.stepper) as (server, first), RawClient(server.endpoint) as second:
        await second.hello()
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            opened = await gone.open("s")
            await gone.send(*gone.step_message(opened.handles(), [0], x[:2]))
            await under_way(server)
        await parked(server)
        await first.send(*first.resume_message(["s"], [0], opened.epochs()))
        while server.lifecycle.waits.is_quiet:
            await asyncio.sleep(0.005)
        await second.send(*second.resume_message(["s"], [0], [0], take_over=True))
        notice = await first.receive()
        assert (notice.kind, notice.header[3]) == (Kind.EVICTED, Code.FENCED)
        gate.open()
        assert refused(await first.receive())[0][0][2] is Code.FENCED
        resumed = await second.receive()
        assert (resumed.failures(), resumed.seqs()) == ([], [2])
        y = await second.step(resumed.handles(), [0], x)
        np.testing.assert_array_equal(y.floats().reshape(3, H), whole(SMALL, x[:, 0])[0])


async def test_a_stream_whose_new_owner_vanishes_before_it_was_told_is_parked_again(rng: np.random.Generator) -> None:
    x = gated(rng, 3)
    gate = Gate()
    async with served(stepper=gate.stepper) as (server, _):
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            opened = await gone.open("s")
            await gone.send(*gone.step_message(opened.handles(), [0], x[:2]))
            await under_way(server)
        await parked(server)
        async with RawClient(server.endpoint) as unlucky:
            await unlucky.hello()
            await unlucky.send(*unlucky.resume_message(["s"], [0], opened.epochs()))
            await parked(server, 0)
        await parked(server, 1)
        gate.open()
        async with RawClient(server.endpoint) as client:
            await client.hello()
            resumed = await client.resume(["s"], [0], opened.epochs())
            assert (resumed.failures(), resumed.seqs()) == ([], [2])  # the epoch it never learned of was never used
            y = await client.step(resumed.handles(), [0], x)
            np.testing.assert_array_equal(y.floats().reshape(3, H), whole(SMALL, x[:, 0])[0])


async def test_a_number_that_is_used_again_while_streams_of_it_are_parked_does_not_own_them(
    rng: np.random.Generator,
) -> None:
    x = frames(rng, 6)
    limits = {"max_connections": 2}
    async with served(limits=limits) as (server, client):
        opened = await left_behind(server, "parked", x=x[:3])
        (number,) = server._clients._free
        async with RawClient(server.endpoint) as following:
            await following.hello()
            assert server._clients.by_number(number) is not None
            assert (await following.step(opened.handles(), [3], x[3:4])).codes() == [Code.FOREIGN_STREAM]
            assert (await following.close(opened.handles())).codes() == [Code.FOREIGN_STREAM]
            await following.open("its own")
            resumed = await client.resume(["parked"], [3], opened.epochs())
        await parked(server, 1)
        assert server._clients._free == [number]
        y = await client.step(resumed.handles(), [3], x[3:])
        np.testing.assert_array_equal(y.floats().reshape(3, H), whole(SMALL, x[:, 0])[0][3:])


# ── What is lost ───────────────────────────────────────────────────────────────────────────────────────────────────


async def test_the_late_answer_of_a_resume_acknowledges_nothing_for_who_has_the_number_by_then(
    rng: np.random.Generator,
) -> None:
    x = frames(rng, 4)
    x[3, 0, 0] = GATE_VALUE
    gate = Gate()
    async with served(stepper=gate.stepper) as (server, client):
        opened = await client.open("s")
        await client.step(opened.handles(), [0], x[:3])
        await client.send(*client.step_message(opened.handles(), [3], x[3:]))
        await under_way(server)
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            await gone.send(*gone.resume_message(["s"], [3], opened.epochs()))
            assert (await client.receive()).header[3] == Code.FENCED
            server._postbox.give_up(server._clients.all()[1])
        while not server._clients._free:
            await asyncio.sleep(0.005)
        async with RawClient(server.endpoint) as heir:
            await heir.hello()
            await heir.send(*heir.resume_message(["s"], [0], [0], take_over=True))
            await parked(server, 0)
            gate.open()
            resumed = await heir.receive()
            assert (resumed.failures(), resumed.seqs()) == ([], [4])
            assert server.statistics.resumed_streams_total == 1
            y = await heir.step(resumed.handles(), [0], x)
            assert y.failures() == []
            np.testing.assert_array_equal(y.floats().reshape(4, H), whole(SMALL, x[:, 0])[0])


async def test_who_holds_more_than_the_server_is_told_and_may_go_on_from_there(rng: np.random.Generator) -> None:
    x = frames(rng, 5)
    async with served() as (server, client):
        opened = await left_behind(server, "s", x=x[:3])
        assert refused(await client.resume(["s"], [4], opened.epochs())) == ([(0, 0, Code.DATA_LOSS, 3)], [0])
        resumed = await client.resume(["s"], [4], opened.epochs(), take_over=True)
        assert (resumed.failures(), resumed.seqs()) == ([], [3])
        y = await client.step(resumed.handles(), [3], x[3:], acked=[3])
        np.testing.assert_array_equal(y.floats().reshape(2, H), whole(SMALL, x[:, 0])[0][3:])


async def test_outputs_that_were_acknowledged_or_pushed_out_cannot_be_had_again(rng: np.random.Generator) -> None:
    x = frames(rng, 6)
    async with served() as (server, client):
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            opened = await gone.open("s")
            await gone.step(opened.handles(), [0], x[:4])
            await gone.step(opened.handles(), [4], x[4:], acked=[4])
        await parked(server)
        assert refused(await client.resume(["s"], [3], opened.epochs())) == ([(0, 0, Code.OUTPUTS_GONE, 6)], [0])
        resumed = await client.resume(["s"], [4], opened.epochs())
        y = await client.step(resumed.handles(), [4], x[4:], acked=[4])
        np.testing.assert_array_equal(y.floats().reshape(2, H), whole(SMALL, x[:, 0])[0][4:])


async def test_each_stream_of_a_claim_is_judged_for_itself() -> None:
    async with served() as (server, client):
        opened = await left_behind(server, "good", "fenced", "lost")
        epochs = opened.epochs()
        names = ["never", "good", "fenced", "lost"]
        reply = await client.resume(names, [0, 0, 0, 1], [1, epochs[0], epochs[1] - 1, epochs[2]])
        assert reply.failures() == [
            (0, 0, Code.UNKNOWN_STREAM, 0),
            (2, 0, Code.FENCED, 0),
            (3, 0, Code.DATA_LOSS, 0),
        ]
        assert np.flatnonzero(reply.handles()).tolist() == [1]
        assert {code for code, _ in reply.header[4]} == {Code.UNKNOWN_STREAM, Code.FENCED, Code.DATA_LOSS}


class FailsBehindAGate(Stepper):
    """Waits at frames that begin with `GATE_VALUE`; their step fails if `fails`."""

    gate: Gate
    fails = True

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        if (inputs[rows, 0] == GATE_VALUE).any():
            self.gate.wait("step")
            if self.fails:
                raise RuntimeError("injected")
        super().step(slots, rows, inputs, outputs)


@pytest.mark.parametrize("have", [3, HAVE_ALL])
async def test_a_step_that_fails_while_its_connection_is_gone_is_as_if_its_frames_were_never_sent(
    rng: np.random.Generator, have: int
) -> None:
    x = frames(rng, 8)
    x[3, 0, 0] = GATE_VALUE
    steppers: list[FailsBehindAGate] = []

    def build(ready: Any, config: Any) -> Stepper:
        steppers.append(
            FailsBehindAGate(ready.network, ready.certification.buckets, config.engine.max_streams, ready.device)
        )
        steppers[0].gate = Gate()
        return steppers[0]

    async with served(stepper=build) as (server, client):
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            opened = await gone.open("s")
            await gone.step(opened.handles(), [0], x[:3])
            await gone.send(*gone.step_message(opened.handles(), [3], x[3:6], acked=[3]))
            await under_way(server)
        await parked(server)
        await client.send(*client.resume_message(["s"], [have], opened.epochs()))
        while server.lifecycle.waits.is_quiet:
            await asyncio.sleep(0.005)
        steppers[0].gate.open()
        resumed = await client.receive()
        assert (resumed.failures(), resumed.seqs()) == ([], [3])
        steppers[0].fails = False
        y = await client.step(resumed.handles(), [3], x[3:], acked=[3])
        again = await client.step(resumed.handles(), [3], x[3:], acked=[3])
        assert again.frames == y.frames
        np.testing.assert_array_equal(y.floats().reshape(5, H), whole(SMALL, x[:, 0])[0][3:])
        assert server.statistics.step_failures_total == 1


async def test_a_resume_that_comes_late_over_an_older_connection_takes_nothing_from_the_newer_one(
    rng: np.random.Generator,
) -> None:
    x = frames(rng, 2)
    async with served() as (server, older):
        opened = await left_behind(server, "s")
        async with RawClient(server.endpoint) as newer:
            await newer.hello()
            resumed = await newer.resume(["s"], [0], opened.epochs())
            assert refused(await older.resume(["s"], [0], opened.epochs())) == ([(0, 0, Code.FENCED, 0)], [0])
            y = await newer.step(resumed.handles(), [0], x)
            np.testing.assert_array_equal(y.floats().reshape(2, H), whole(SMALL, x[:, 0])[0])


# ── How long ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_that_is_parked_for_too_long_is_closed_and_remembered() -> None:
    async with served(limits={"park_s": 0.2}) as (server, client):
        opened = await left_behind(server, "s")
        assert (await client.open("s")).codes() == [Code.NAME_IN_USE]
        while server.engine.table.open_count:
            await asyncio.sleep(0.01)
        for take_over in (False, True):
            reply = await client.resume(["s", "t"], [0, 0], [opened.epochs()[0]] * 2, take_over=take_over)
            assert reply.codes() == [Code.EXPIRED, Code.UNKNOWN_STREAM]
        again = await client.open("s")
        assert again.failures() == []
        await client.close(again.handles())
        assert (await client.resume(["s"], [0], again.epochs())).codes() == [Code.UNKNOWN_STREAM]
        assert (await client.statistics())["evicted_expired_total"] == 1


async def test_a_resumed_stream_does_not_expire() -> None:
    async with served(limits={"park_s": 0.3}) as (server, client):
        opened = await left_behind(server, "s", "left")
        resumed = await client.resume(["s"], [0], opened.epochs()[:1])
        while server.engine.table.open_count > 1:
            await asyncio.sleep(0.01)
        assert (await client.step(resumed.handles(), [0], np.zeros((1, 1, F), np.float32))).failures() == []


async def test_streams_are_not_kept_where_nothing_is_parked() -> None:
    async with served(limits={"park_s": 0}) as (server, client):
        async with RawClient(server.endpoint) as gone:
            assert (await gone.hello()).header[-1] == 0
            opened = await gone.open("s")
        while server.engine.table.open_count:
            await asyncio.sleep(0.01)
        assert (await client.resume(["s"], [0], opened.epochs())).codes() == [Code.UNKNOWN_STREAM]
        statistics = await client.statistics()
        assert (statistics["evicted_client_gone_total"], statistics["parked_streams_total"]) == (1, 0)


async def test_beyond_the_most_parked_streams_the_longest_parked_go() -> None:
    async with served(limits={"max_parked_streams": 3}) as (server, client):
        epochs: dict[str, int] = {}
        for names in (["a", "b"], ["c", "d"], ["e"]):
            async with RawClient(server.endpoint) as gone:
                await gone.hello()
                opened = await gone.open(*names)
            epochs |= dict(zip(names, opened.epochs(), strict=True))
            while server.statistics.parked_streams_total < len(epochs):
                await asyncio.sleep(0.005)
        await parked(server, 3)
        reply = await client.resume(list(epochs), [0] * 5, list(epochs.values()))
        assert reply.failures() == [(0, 0, Code.EXPIRED, 0), (1, 0, Code.EXPIRED, 0)]
        assert (await client.statistics())["evicted_expired_total"] == 2


async def test_a_stream_that_closes_when_its_connection_goes_is_not_parked(rng: np.random.Generator) -> None:
    gate = Gate()
    async with served(stepper=gate.stepper) as (server, client):
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            opened = await gone.open("s")
            await gone.send(*gone.step_message(opened.handles(), [0], gated(rng, 2)))
            await gone.send(*gone.close_message(opened.handles()))
            while server.lifecycle.waits.is_quiet:
                await asyncio.sleep(0.005)
        while len(server._clients) > 1:
            await asyncio.sleep(0.005)
        await client.send(*client.resume_message(["s"], [0], opened.epochs()))
        pong = await client.ask(msgpack.packb([Kind.PING, 9]))
        assert pong.kind is Kind.PONG, "its end is not told before it has ended"
        gate.open()
        assert (await client.receive()).codes() == [Code.UNKNOWN_STREAM]
        assert server.engine.table.open_count == 0
        assert (await client.statistics())["parked_streams_total"] == 0


async def test_idle_streams_are_evicted_and_parked_ones_are_not() -> None:
    async with served(limits={"max_idle_s": 0.3}) as (server, client):
        await left_behind(server, "parked")
        opened = await client.open("idle")
        notice = await client.receive()
        assert (notice.kind, notice.header[3]) == (Kind.EVICTED, Code.IDLE)
        assert notice.handles().tolist() == opened.handles().tolist()
        await parked(server, 1)


async def test_a_stream_that_never_sends_its_first_frame_is_evicted_and_its_owner_told() -> None:
    async with served(limits={"first_frame_s": 0.3}) as (server, client):
        opened = await client.open("used", "unused")
        assert (await client.step(opened.handles()[:1], [0], np.zeros((1, 1, F), np.float32))).failures() == []
        notice = await client.receive()
        assert (notice.kind, notice.header[3]) == (Kind.EVICTED, Code.NEVER_USED)
        assert notice.handles().tolist() == opened.handles()[1:].tolist()
        assert server.engine.table.open_count == 1
        assert (await client.statistics())["evicted_never_used_total"] == 1


async def test_parked_and_resumed_streams_are_counted() -> None:
    async with served() as (server, client):
        opened = await left_behind(server, "a", "b", "c")
        before = await client.statistics()
        await client.resume(["a", "c", "never"], [0, 0, 0], [*opened.epochs()[::2], 1])
        after = await client.statistics()
        names = ("streams_open", "streams_parked", "parked_streams_total", "resumed_streams_total")
        assert [before[name] for name in names] == [3, 3, 3, 0]
        assert [after[name] for name in names] == [3, 1, 3, 2]
