"""Messages over a socket: order, connections, statistics, and peers that read late or not at all."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgpack
import numpy as np
import pytest

from instep.server import assembly
from instep.server.server import Server
from instep_client.protocol.wire import Code, Kind
from tests.support.commits import held_commits
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.step_messages import parts
from tests.support.streaming import random_frames

F, H = 5, 8
MANY = 400
"""More requests than may be under way."""


async def connections(server: Server, count: int) -> None:
    """Wait until this many origins are connected."""
    while len(server.default.engine.origins) != count:
        await asyncio.sleep(0.005)


async def test_messages_that_arrive_in_one_burst_keep_their_order(rng: np.random.Generator) -> None:
    x = random_frames(rng, 6)
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        messages = [
            client.step_message(handles, [0], x[:2]),
            client.reset_message(handles),  # refused: frames are pending
            client.step_message(handles, [2], x[2:4], [0]),
            client.close_message(handles),
            client.step_message(handles, [4], x[4:], [0]),
        ]
        for message in messages:
            await client.send(*message)
        replies = {reply.request: reply for reply in [await client.receive() for _ in messages]}
        first, reset, second, closed, late = (replies[parts(message)[0][1]] for message in messages)
    assert reset.codes() == [Code.FRAMES_PENDING]
    assert late.failures() == [(0, 0, Code.UNKNOWN_STREAM, 0)]
    y, final = whole(SMALL, x[:4, 0])
    np.testing.assert_array_equal(np.concatenate([first.floats(), second.floats()]), y.ravel())
    np.testing.assert_array_equal(closed.floats(), final.ravel())


async def test_a_stream_is_evicted_and_its_owner_told_over_the_socket() -> None:
    async with running(SMALL, limits={"max_idle_s": 0.2}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        handles = (await client.open("s")).handles()
        notice = await client.receive()
        assert (notice.kind, notice.header[3]) == (Kind.EVICTED, Code.IDLE)
        assert notice.handles().tolist() == handles.tolist()


async def test_a_vanished_connection_is_noticed_and_its_streams_are_parked_and_resumed(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 8)
    async with running(SMALL, transport={"heartbeat_s": 0.2}) as server, RawClient(server.endpoint) as client:
        await client.hello()
        async with RawClient(server.endpoint) as gone:
            await gone.hello()
            opened = await gone.open("s")
            await gone.step(opened.handles(), [0], x[:5])
        while not (await client.statistics())["streams_parked"]:
            await asyncio.sleep(0.01)
        resumed = await client.resume(["s"], [2], opened.epochs())
        assert (resumed.kind, resumed.failures(), resumed.seqs()) == (Kind.RESUMED, [], [5])
        reply = await client.step(resumed.handles(), [2], x[2:], [2])
        np.testing.assert_array_equal(reply.floats().reshape(6, H), whole(SMALL, x[:, 0])[0][2:])


# ── More than the server takes ─────────────────────────────────────────────────────────────────────────────────────


async def test_more_requests_than_may_be_under_way_are_refused_while_a_commit_takes_long(
    tmp_path: Path,
) -> None:
    recording = {"path": tmp_path / "r.instep", "durability": "commit"}
    async with held_commits() as may_commit, running(SMALL, recording=recording) as server:
        async with RawClient(server.endpoint) as client:
            await client.hello()
            handles = (await client.open("s")).handles()
            may_commit.clear()
            await client.send(*client.open_message("t"))
            for _ in range(MANY):
                await client.send(*client.read_state_message(handles))
            pong = await client.ask(msgpack.packb([Kind.PING, 9]))
            refused = 0
            while pong.kind is not Kind.PONG:
                assert pong.code is Code.BUSY
                assert pong.header[4] > 0
                refused += 1
                pong = await client.receive()
            assert 0 < refused < MANY
            may_commit.set()
            replies = [await client.receive() for _ in range(1 + MANY - refused)]
            assert {reply.kind for reply in replies} <= {Kind.OPENED, Kind.STATE_READ, Kind.RESUMED}
            assert (await client.open("u")).failures() == []


SILENT = {"max_message_bytes": 65_536}
"""With it, few replies of 1,000 failures each are more than a peer may leave unread."""


def block(client: RawClient) -> list[bytes]:
    """A STEP of unknown streams: its reply takes 32,000 bytes and 24 for each failure."""
    return client.step_message(range(1000), [0] * 1000, np.zeros((1, 1000, F), np.float32))


async def test_a_peer_that_reads_late_gets_every_reply_in_order() -> None:
    async with running(SMALL, transport=SILENT) as server, RawClient(server.endpoint) as late:
        await late.hello()
        requests = [block(late) for _ in range(6)]
        for message in requests:
            await late.send(*message)
        while server.default.engine.stats.messages_total < 6:
            await asyncio.sleep(0.01)
        replies = [await late.receive() for _ in requests]
        assert [len(reply.failures()) for reply in replies] == [1000] * 6
        assert [reply.request for reply in replies] == [parts(message)[0][1] for message in requests]


@pytest.mark.parametrize("is_slow", [True, False], ids=["in time", "in bytes"])
async def test_a_peer_that_never_says_that_it_reads_is_given_up_and_costs_nobody_else(
    is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_slow:
        monkeypatch.setattr(assembly, "UNREACHABLE_AFTER_S", 0.2)
    async with running(SMALL, transport=SILENT) as server:
        async with RawClient(server.endpoint) as silent, RawClient(server.endpoint) as client:
            await silent.hello()
            await client.hello()
            for _ in range(6 if is_slow else 40):
                await silent.send(*block(silent))
            await connections(server, 1)
            assert (await client.open("s")).failures() == []


async def test_connections_that_have_no_streams_are_counted_no_more_when_they_are_gone() -> None:
    async with running(SMALL, transport={"heartbeat_s": 100.0}) as server:
        async with RawClient(server.endpoint) as client, RawClient(server.endpoint) as idle:
            await client.hello()
            await idle.hello()
            await client.close((await client.open("s")).handles(), [0])
        await connections(server, 0)
