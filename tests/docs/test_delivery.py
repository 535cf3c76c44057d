"""What docs/protocol.md says of delivery, owners, parking and resuming, tried on a running server, code by code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self, get_args

import msgpack
import numpy as np
import pytest

from instep.config import RecordingConfig
from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, U64
from instep.models.folder import make_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep.server.server import Server
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind
from tests.docs.support.page import Page
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import whole
from tests.support.raw import RawClient, Reply
from tests.support.running import running

CODES = Page("protocol.md").table("Codes", "code")
WHERE = {Code[name]: kinds.split(", ") for name, kinds in zip(CODES.column("name"), CODES.column("in"), strict=True)}
F, H = 3, 4
MODEL = make_model(GruDescription(features=F, gru=GruLayers(hidden_size=H)), init="random", seed=3, name="small")
W = 4
LIMITS = {"window_frames": W}
NOBODY = 0x7FFF_0000_0001
"""A handle that no stream has."""


class Client(RawClient):
    """A connection that holds every refusal against the page: does it say that the code comes there?"""

    async def __aenter__(self) -> Self:
        return self

    async def receive(self) -> Reply:
        reply = await super().receive()
        said = [reply.header[3]] if reply.kind is Kind.EVICTED else []
        said += [reply.header[2]] if reply.kind is Kind.ERROR else []
        if reply.kind in (Kind.OPENED, Kind.RESUMED, Kind.STEPPED, Kind.CLOSED, Kind.STATE_READ, Kind.CHANGED):
            said += np.frombuffer(reply.frames[-1], wire.FAILURE)["code"].tolist()
        for code in said:
            assert reply.kind.name in WHERE[Code(code)], (reply.kind, Code(code))
        return reply

    async def say(self, kind: Kind, *fields: Any, frames: Sequence[bytes] = ()) -> Reply:
        return await self.ask(msgpack.packb([kind, self.next_request(), *fields]), *frames)

    async def send_block(self, handle: int, seq: int, x: F32, acked: int) -> Reply:
        return await self.ask(*self.step_message([handle], [seq], x, [acked]))

    async def claim(self, *claims: tuple[str, int, int], take_over: int = 0) -> Reply:
        held = np.array([claim[1:] for claim in claims], np.uint64)
        names = "\n".join(name for name, _, _ in claims).encode()
        return await self.say(Kind.RESUME, len(claims), take_over, frames=(names, held.tobytes()))

    async def about(self, kind: Kind, handles: U64, *rest: bytes) -> Reply:
        """CLOSE, READ_STATE, RESET (to zeros) or FORK."""
        fields = (len(handles), 0) if kind in (Kind.RESET, Kind.READ_STATE) else (len(handles),)
        if kind is Kind.CLOSE:
            handles = np.stack([handles, np.full_like(handles, wire.HAVE_ALL)], axis=1)
        return await self.say(kind, *fields, frames=(handles.tobytes(), *rest))

    async def everywhere(self, handle: int) -> set[Code]:
        """The codes that everything answers that takes a handle."""
        handles = np.array([handle], np.uint64)
        replies = [
            await self.send_block(handle, 0, frames(1), 0),
            await self.about(Kind.READ_STATE, handles),
            await self.about(Kind.RESET, handles, b""),
            await self.about(Kind.FORK, handles, b"copy"),
            await self.about(Kind.CLOSE, handles),
        ]
        return {Code(int(np.frombuffer(reply.frames[-1], wire.FAILURE)["code"][0])) for reply in replies}


def frames(count: int, seed: int = 1) -> F32:
    return np.random.default_rng(seed).standard_normal((count, 1, F)).astype(np.float32)


def refusal(reply: Reply) -> tuple[Code, int]:
    """Code and expected seq of the one failure."""
    ((_, _, code, expected),) = last_failures(reply)
    return code, expected


def last_failures(reply: Reply) -> list[tuple[int, int, Code, int]]:
    entries = np.frombuffer(reply.frames[-1], wire.FAILURE)
    return [(int(e["column"]), int(e["timestep"]), Code(int(e["code"])), int(e["expected_seq"])) for e in entries]


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


async def test_each_frame_is_applied_once_and_answered_with_the_same_bytes() -> None:
    x = frames(7)
    y = whole(MODEL, x[:, 0])[0].tobytes()
    size = 4 * H

    async with running(MODEL, limits=LIMITS) as server, Client(server.endpoint) as client:
        await client.hello()
        (handle,) = (await client.open("s")).handles().tolist()
        assert (await client.send_block(handle, 0, x[:2], 0)).frames[0] == y[: 2 * size]
        assert (await client.send_block(handle, 0, x[:2], 0)).frames[0] == y[: 2 * size]
        assert server.default.engine.stats.frames_total == 2

        other = x[:2].copy()
        other[1, 0, 0] += 1
        conflict = await client.send_block(handle, 0, other, 0)
        assert last_failures(conflict) == [(0, 1, Code.CONFLICT, 2)]
        assert conflict.frames[0][:size] == y[:size]

        assert (await client.send_block(handle, 1, x[1:4], 0)).frames[0] == y[size : 4 * size]  # old and new ones
        assert server.default.engine.stats.frames_total == 4
        assert refusal(await client.send_block(handle, 9, x[:1], 0)) == (Code.SEQ_GAP, 4)
        assert refusal(await client.send_block(handle, 4, x[4:5], 5)) == (Code.ACK_AHEAD, 4)
        assert refusal(await client.send_block(handle, 4, x[4:5], 0)) == (Code.WINDOW_FULL, 4)
        cut = await client.send_block(handle, 4, x[4:], 2)  # two of three frames lie within the window
        assert last_failures(cut) == [(0, 2, Code.WINDOW_FULL, 6)]
        assert cut.frames[0][: 2 * size] == y[4 * size : 6 * size]
        assert refusal(await client.send_block(handle, 1, x[1:2], 2)) == (Code.SEQ_REPEATED, 6)  # acknowledged
        assert (await client.send_block(handle, 2, x[2:6], 2)).frames[0] == y[2 * size : 6 * size]

        ill = x[6:].copy()
        ill[0, 0, 0] = np.nan
        assert refusal(await client.send_block(handle, 6, ill, 6)) == (Code.NOT_FINITE, 6)
        assert (await client.send_block(handle, 6, x[6:], 6)).frames[0] == y[6 * size :]


async def test_what_is_on_its_way_is_not_answered_twice_and_keeps_its_state() -> None:
    x = frames(1)
    x[0, 0, 0] = GATE_VALUE
    gate = Gate()
    async with running(MODEL, stepper=gate.stepper) as server, Client(server.endpoint) as client:
        try:
            await client.hello()
            handles = (await client.open("s")).handles()
            await client.send(*client.step_message(handles, [0], x))
            assert refusal(await client.step(handles, [0], x)) == (Code.SEQ_REPEATED, 1)
            assert refusal(await client.about(Kind.RESET, handles, b""))[0] is Code.FRAMES_PENDING
        finally:
            gate.open()
        assert (await client.receive()).kind is Kind.STEPPED


async def test_a_state_moves_by_read_open_fork_and_reset() -> None:
    x = frames(3)
    y, _ = whole(MODEL, x[:, 0])
    async with running(MODEL) as server, Client(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        await client.step(handles, [0], x[:2])
        read = await client.about(Kind.READ_STATE, handles)
        seq, state, _ = read.frames
        moved = await client.say(Kind.OPEN, 1, 1, 1, frames=(b"moved", state, seq))
        forked = await client.about(Kind.FORK, handles, b"forked")
        for opened in (moved, forked):
            (grant,) = opened.grants()
            assert grant["next_seq"] == 2
            reply = await client.send_block(int(grant["handle"]), 2, x[2:], 2)
            np.testing.assert_array_equal(reply.floats(), y[2])
        assert (await client.about(Kind.RESET, handles, b"")).frames == [b""]
        reply = await client.send_block(int(handles[0]), 2, x[:1], 2)
        np.testing.assert_array_equal(reply.floats(), y[0])
        bad = np.full(H, np.nan, "<f4").tobytes()
        failed = await client.say(Kind.RESET, 1, 1, frames=(handles.tobytes(), bad))
        assert refusal(failed) == (Code.NOT_FINITE, 0)
        assert refusal(await client.about(Kind.FORK, handles, b"")) == (Code.BAD_NAME, 0)


async def test_the_largest_first_seq_and_states_that_fit_no_message() -> None:
    most = Page("protocol.md").table("Messages", "rule").numbers("value")[-1]
    model = make_model(GruDescription(features=F, gru=GruLayers(hidden_size=8)), init="random", seed=3, name="wider")
    async with running(model, transport={"max_message_bytes": 4096}) as server, Client(server.endpoint) as client:
        await client.hello()
        for seq, kind in ((most, Kind.OPENED), (most + 1, Kind.ERROR)):
            reply = await client.say(Kind.OPEN, 1, 0, 1, frames=(b"s", b"", np.uint64(seq).tobytes()))
            assert reply.kind is kind
        assert reply.code is Code.MALFORMED
        many = np.arange(1, 4096 // (4 * 8) + 2, dtype=np.uint64)
        for kind, rest in ((Kind.READ_STATE, ()), (Kind.CLOSE, ()), (Kind.FORK, (b"",))):
            assert (await client.about(kind, many, *rest)).code is Code.TOO_LARGE
        names = "\n".join(map(str, many)).encode()
        assert (await client.say(Kind.READ_STATE, len(many), 1, frames=(names,))).code is Code.TOO_LARGE
        twice = np.ones(2, np.uint64)
        for kind, rest in ((Kind.READ_STATE, ()), (Kind.CLOSE, ()), (Kind.FORK, (b"\n",)), (Kind.RESET, (b"",))):
            await client.open("t")
            assert (
                await client.about(kind, twice * (await handle_of(server, "s")), *rest)
            ).code is Code.REPEATED_STREAM
        assert (await client.claim(("s", 0, 0), ("s", 0, 0))).code is Code.REPEATED_STREAM


async def handle_of(server: Server, name: str) -> np.uint64:
    handle: np.uint64 = server.default.engine.table.slots.handles(server.default.engine.table.find([name]))[0]
    return handle


async def test_one_owner_and_whoever_had_the_stream_before_is_fenced() -> None:
    x = frames(3)
    y = whole(MODEL, x[:, 0])[0]
    async with (
        running(MODEL) as server,
        Client(server.endpoint) as former,
        Client(server.endpoint) as owner,
    ):
        await former.hello()
        await owner.hello()
        (old,) = (await former.open("s")).grants()
        await former.send_block(int(old["handle"]), 0, x[:2], 0)
        assert await owner.everywhere(int(old["handle"])) == {Code.FOREIGN_STREAM}
        assert await owner.everywhere(NOBODY) == {Code.UNKNOWN_STREAM}

        assert refusal(await owner.claim(("s", 0, 0))) == (Code.FENCED, 2)
        (new,) = (await owner.claim(("s", 1, int(old["epoch"])))).grants()  # though the former one is there
        assert (new["next_seq"], new["epoch"] > old["epoch"]) == (2, True)
        told = await former.receive()
        assert (told.header[3], told.handles().tolist()) == (Code.FENCED, [old["handle"]])
        assert await former.everywhere(int(old["handle"])) == {Code.FENCED}
        np.testing.assert_array_equal((await owner.send_block(int(new["handle"]), 1, x[1:], 1)).floats(), y[1:].ravel())

        # The answer to that RESUME might have been lost: its epoch is an old one then.
        assert refusal(await former.claim(("s", 1, int(old["epoch"])))) == (Code.FENCED, 3)
        (last,) = (await former.claim(("s", wire.HAVE_ALL, 0), take_over=1)).grants()
        assert last["next_seq"] == 3


async def test_what_is_owed_and_held_decides_a_resume() -> None:
    x = frames(2 * W)
    async with running(MODEL, limits=LIMITS) as server, Client(server.endpoint) as client:
        await client.hello()
        (grant,) = (await client.open("s")).grants()
        for seq in range(0, 2 * W, 2):
            await client.send_block(int(grant["handle"]), seq, x[seq : seq + 2], max(0, seq - 1))
        epoch = int(grant["epoch"])
        assert refusal(await client.claim(("s", 2 * W + 1, epoch))) == (Code.DATA_LOSS, 2 * W)
        assert refusal(await client.claim(("s", 2 * W - 4, epoch))) == (Code.OUTPUTS_GONE, 2 * W)  # acknowledged
        (ahead,) = (await client.claim(("s", 2 * W + 1, epoch), take_over=1)).grants()
        assert ahead["next_seq"] == 2 * W
        (on,) = (await client.claim(("s", 2 * W, epoch), take_over=1)).grants()
        assert on["next_seq"] == 2 * W
        assert last_failures(await client.claim(("other", 0, 0))) == [(0, 0, Code.UNKNOWN_STREAM, 0)]


async def test_the_answer_of_a_resume_waits_for_what_is_pending() -> None:
    x = frames(1)
    x[0, 0, 0] = GATE_VALUE
    gate = Gate()
    async with (
        running(MODEL, stepper=gate.stepper) as server,
        Client(server.endpoint) as former,
        Client(server.endpoint) as client,
    ):
        try:
            await former.hello()
            await client.hello()
            (grant,) = (await former.open("s")).grants()
            await former.send(*former.step_message([int(grant["handle"])], [0], x))
            await until(lambda: server.default.engine.pending_frames)
            resuming = asyncio.create_task(client.claim(("s", 0, int(grant["epoch"]))))
            assert (await former.receive()).kind is Kind.EVICTED  # at once
            assert not resuming.done()
        finally:
            gate.open()
        (new,) = (await resuming).grants()
        assert new["next_seq"] == 1
        again = await client.send_block(int(new["handle"]), 0, x, 0)
        assert (again.header[4:7], last_failures(again)) == ([0, 0, 0], [])
        assert server.default.engine.stats.frames_total == 1


@pytest.mark.parametrize("park_s", [300.0, 0.0])
async def test_streams_without_a_connection_are_parked_for_a_while(park_s: float) -> None:
    async with (
        running(MODEL, transport={"heartbeat_s": 0.1}, limits={"park_s": park_s}) as server,
        Client(server.endpoint) as client,
    ):
        await client.hello()
        async with Client(server.endpoint) as gone:
            await gone.hello()
            (grant,) = (await gone.open("s")).grants()
        table = server.default.engine.table
        if not park_s:
            await until(lambda: not table.open_count)
            assert server.default.engine.stats.evicted_by_reason == {"client_gone": 1}
            assert WHERE[Code.CLIENT_GONE] == ["not on the wire"]
            assert refusal(await client.claim(("s", 0, int(grant["epoch"])))) == (Code.UNKNOWN_STREAM, 0)
            return
        await until(lambda: table.owned[table.parked])
        assert refusal(await client.open("s")) == (Code.NAME_IN_USE, 0)
        (new,) = (await client.claim(("s", 0, int(grant["epoch"])))).grants()
        slots = table.owned_by(int(table.owner[int(new["handle"]) & 0xFFFF_FFFF]))
        table.park(slots, 0)
        server.default.operations.expire(slots)
        await until(lambda: not table.open_count)
        assert refusal(await client.claim(("s", 0, int(new["epoch"])))) == (Code.EXPIRED, 0)


def parked_more_than(server: Server, count: int) -> bool:
    return server.default.engine.stats.parked_streams_total > count


async def test_the_longest_parked_goes_when_too_many_are() -> None:
    limits = {"max_parked_streams": 1}
    async with running(MODEL, transport={"heartbeat_s": 0.1}, limits=limits) as server, Client(server.endpoint) as here:
        for name in ("first", "second"):
            async with Client(server.endpoint) as gone:
                await gone.hello()
                await gone.open(name)
                parked_before = server.default.engine.stats.parked_streams_total
            await until(partial(parked_more_than, server, parked_before))
        await until(lambda: server.default.engine.table.open_count == 1)
        await here.hello()  # not before: it answers no PING while the test waits
        claims = await here.claim(("first", 0, 0), ("second", wire.HAVE_ALL, 0), take_over=1)
        assert last_failures(claims) == [(0, 0, Code.EXPIRED, 0)]


async def test_a_server_that_ends_takes_nothing_new() -> None:
    gate = Gate()
    x = frames(1)
    x[0, 0, 0] = GATE_VALUE
    async with running(MODEL, stepper=gate.stepper) as server, Client(server.endpoint) as client:
        try:
            await client.hello()
            one, other = (await client.open("s", "t")).handles().tolist()
            handles = np.array([other], np.uint64)
            await client.send(*client.step_message([one], [0], x))
            await until(lambda: server.default.engine.pending_frames)
            server.stop()
            for reply in (
                await client.open("u"),
                await client.send_block(other, 0, frames(1), 0),
                await client.claim(("s", 0, 0)),
                await client.about(Kind.RESET, handles, b""),
                await client.about(Kind.FORK, handles, b"copy"),
                await client.say(Kind.HELLO, wire.PROTOCOL_VERSION, "again", ""),
            ):
                assert reply.kind is Kind.WELCOME or reply.code is Code.SHUTTING_DOWN
        finally:
            gate.open()
        assert (await client.receive()).kind is Kind.STEPPED


async def test_a_fork_for_a_connection_that_went_away_opens_nothing() -> None:
    gate = Gate()
    x = frames(1)
    x[0, 0, 0] = GATE_VALUE
    async with running(MODEL, stepper=gate.stepper, transport={"heartbeat_s": 0.1}) as server:
        table = server.default.engine.table
        try:
            async with Client(server.endpoint) as gone:
                await gone.hello()
                handles = (await gone.open("s")).handles()
                await gone.send(*gone.step_message(handles, [0], x))
                await until(lambda: server.default.engine.is_running)
                await gone.send(msgpack.packb([Kind.FORK, gone.next_request(), 1]), handles.tobytes(), b"copy")
                await until(lambda: len(server.default.engine.waiters))
            await until(lambda: table.owned[table.parked])
        finally:
            gate.open()
        await until(lambda: server.default.engine.is_quiet)
        assert table.find(["copy"])[0] == SCRATCH_SLOT


def test_the_levels_of_durability() -> None:
    levels = get_args(RecordingConfig.model_fields["durability"].annotation)
    assert tuple(Page("protocol.md").table("Durability", "durability").column("durability")) == levels
