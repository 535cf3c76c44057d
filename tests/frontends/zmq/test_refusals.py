"""Everything that a client can do wrong: a typed error and a sentence, no state changed, the connection usable."""

from __future__ import annotations

from collections.abc import AsyncIterator

import msgpack
import numpy as np
import pytest

from instep.frontends.zmq.decode import Decoder
from instep.server.server import Server
from instep_client.protocol.wire import PROTOCOL_VERSION, Code, Kind
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.step_messages import step_header
from tests.support.streaming import random_frames

F, H = 5, 8


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    limits = {"max_block_frames": 64, "credit_frames": 64, "max_pending_frames": 256, "window_frames": 192}
    async with running(SMALL, engine={"max_streams": 4}, limits=limits) as server:
        yield server


@pytest.fixture
async def client(server: Server) -> AsyncIterator[RawClient]:
    async with RawClient(server.endpoint) as client:
        await client.hello()
        yield client


def header(kind: Kind, *fields: object) -> bytes:
    return msgpack.packb([int(kind), 99, *fields])


COLUMN = np.zeros(3, "<u8").tobytes()

REFUSED: list[tuple[list[bytes], Code]] = [
    ([b""], Code.MALFORMED),
    ([b"\xc1"], Code.MALFORMED),
    ([msgpack.packb([99, 1])], Code.MALFORMED),
    ([msgpack.packb([Kind.PING, 1]), b""], Code.MALFORMED),
    ([step_header(99, 1, 1, F) + COLUMN, b"\0" * 19], Code.MALFORMED),
    ([step_header(99, 1, 1, F + 1) + COLUMN, b"\0" * 24], Code.WRONG_SHAPE),
    ([step_header(99, 1, 1, F, dtype=2) + COLUMN, b"\0" * 40], Code.WRONG_DTYPE),
    ([step_header(99, 65, 1, F) + COLUMN, b"\0" * 1300], Code.TOO_LARGE),
    ([header(Kind.OPEN, 1, 0, 0), b"\xff", b"", b""], Code.MALFORMED),
    ([header(Kind.OPEN, 1, 1, 0), b"a", b"\0" * 4, b""], Code.WRONG_SHAPE),
    ([header(Kind.RESUME, 2, 0), b"a\na", b"\0" * 32], Code.REPEATED_STREAM),
    ([header(Kind.HELLO, 1, "x", "")], Code.WRONG_VERSION),
    ([header(Kind.HELLO, PROTOCOL_VERSION, "x", "another")], Code.MALFORMED),
]


@pytest.mark.parametrize(("message", "code"), REFUSED)
async def test_a_bad_message_is_answered_and_the_connection_stays_usable(
    client: RawClient, rng: np.random.Generator, message: list[bytes], code: Code
) -> None:
    handles = (await client.open("s")).handles()
    x = random_frames(rng, 2)
    first = await client.step(handles, [0], x[:1])
    reply = await client.ask(*message)
    assert reply.code is code
    second = await client.step(handles, [1], x[1:])
    truth, _ = whole(SMALL, x[:, 0])
    np.testing.assert_array_equal(np.concatenate([first.floats(), second.floats()]), truth.ravel())


async def test_a_connection_that_did_not_say_hello_is_told_to(server: Server) -> None:
    async with RawClient(server.endpoint) as client:
        assert (await client.open("s")).code is Code.HELLO_FIRST
        assert (await client.ask(b"\xc1")).code is Code.MALFORMED
        step = await client.ask(step_header(2**40, 1, 1, F) + COLUMN, bytes(20))
        assert (step.code, step.request) == (Code.HELLO_FIRST, 2**40)


@pytest.mark.parametrize("identity", [b"alice", b"\0alice", b"\0abc"])
async def test_a_self_chosen_identity_is_refused(server: Server, identity: bytes) -> None:
    async with RawClient(server.endpoint, identity=identity) as client:
        reply = await client.ask(msgpack.packb([Kind.HELLO, 1, PROTOCOL_VERSION, "raw", ""]))
        assert reply.code is Code.MALFORMED


async def test_streams_beyond_the_capacity_are_refused_and_the_others_open(client: RawClient) -> None:
    reply = await client.open("a", "b", "a", "", "x" * 201, "tab\t", "c", "d", "e")
    assert [(column, code) for column, _, code, _ in reply.failures()] == [
        (2, Code.NAME_IN_USE),
        (3, Code.BAD_NAME),
        (4, Code.BAD_NAME),
        (5, Code.BAD_NAME),
        (8, Code.TOO_MANY_STREAMS),
    ]
    assert np.flatnonzero(reply.handles()).tolist() == [0, 1, 6, 7]
    assert dict(map(tuple, reply.header[4])).keys() == {Code.NAME_IN_USE, Code.BAD_NAME, Code.TOO_MANY_STREAMS}


async def test_an_oversized_message_costs_the_connection_and_nobody_elses(
    server: Server, client: RawClient, rng: np.random.Generator
) -> None:
    handles = (await client.open("a")).handles()
    async with RawClient(server.endpoint) as big:
        await big.hello()
        await big.send(msgpack.packb([Kind.PING, 1]), b"\0" * (17 << 20))
        reply = await client.step(handles, [0], random_frames(rng, 1))
        assert reply.failures() == []


async def test_no_more_connections_than_the_limit() -> None:
    async with running(SMALL, limits={"max_connections": 1}) as server:
        async with RawClient(server.endpoint) as first, RawClient(server.endpoint) as second:
            await first.hello()
            reply = await second.ask(msgpack.packb([Kind.HELLO, 1, PROTOCOL_VERSION, "raw", ""]))
            assert reply.code is Code.BUSY
            assert reply.header[4] == 1_000_000


async def test_a_bug_in_reading_a_message_is_the_error_of_that_message_alone(
    client: RawClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise ZeroDivisionError

    handles = (await client.open("s")).handles()
    message = client.step_message(handles, [0], np.zeros((1, 1, F), np.float32))
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "check_step", bug)
        patch.setattr(Decoder, "count", bug)
        assert (await client.ask(*message[:1], message[1] + b"?")).code is Code.INTERNAL
        assert (await client.ask(*client.open_message("t"))).code is Code.INTERNAL
    assert (await client.step(handles, [0], np.zeros((1, 1, F), np.float32))).kind is Kind.STEPPED
