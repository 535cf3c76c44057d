"""What strangers can do to the socket: claim routing ids, send very many parts, flood a server whose disk stalls."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq

from instep.frontends.zmq.peers import Peer
from instep.models.folder import write_model
from instep.server import recordings
from instep_client.protocol.wire import PROTOCOL_VERSION, Code, Kind
from tests.support.commits import held_commits
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.served import WarmServer
from tests.support.streaming import random_frames

F, H = 5, 8
CLAIMED, ORDINARY = 400, 100

FIRST_ROUTING_ID = """
import zmq
with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
    port = router.bind_to_random_port("tcp://127.0.0.1")
    dealer.connect(f"tcp://127.0.0.1:{port}")
    dealer.send(b"")
    print(int.from_bytes(router.recv()[1:], "big"))
"""


async def assert_serves(endpoint: str, rng: np.random.Generator, name: str) -> None:
    """A new connection opens a stream and gets the network's outputs."""
    x = random_frames(rng, 3)
    async with RawClient(endpoint) as client:
        await client.hello()
        handles = (await client.open(name)).handles()
        reply = await client.step(handles, [0], x)
        np.testing.assert_array_equal(reply.floats().reshape(3, H), whole(SMALL, x[:, 0])[0])


def test_routing_ids_that_strangers_claim_cost_no_ordinary_connection(tmp_path: Path, rng: np.random.Generator) -> None:
    """libzmq 4.3.5 ends the process when a peer has the id that it is about to give to another one."""
    write_model(tmp_path / "model", SMALL)
    unseeded = subprocess.run([sys.executable, "-c", FIRST_ROUTING_ID], capture_output=True, check=True)
    first = int(unseeded.stdout)
    with WarmServer(tmp_path / "model") as server, ExitStack() as open_sockets:
        context = open_sockets.enter_context(zmq.Context())
        for number in range(CLAIMED):
            claimant = open_sockets.enter_context(context.socket(zmq.DEALER))
            claimant.setsockopt(zmq.LINGER, 0)
            claimant.setsockopt(zmq.IDENTITY, b"\0" + (first + number).to_bytes(4, "big"))
            claimant.connect(server.endpoint)
            claimant.send(b"mine")
        for _ in range(ORDINARY):
            ordinary = open_sockets.enter_context(context.socket(zmq.DEALER))
            ordinary.setsockopt(zmq.LINGER, 0)
            ordinary.connect(server.endpoint)
            ordinary.send(msgpack.packb([Kind.HELLO, 1, PROTOCOL_VERSION, "ordinary", ""]))
            assert ordinary.poll(30_000), "no answer"
            assert msgpack.unpackb(ordinary.recv())[0] == Kind.WELCOME
        asyncio.run(assert_serves(server.endpoint, rng, "s"))


async def test_messages_into_a_server_whose_disk_stalls_and_a_hang_up_end_nothing(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ZeroMQ heartbeats, or unread messages behind which the peer hangs up, libzmq 4.3.5 ends the process."""
    x = random_frames(rng, 1)
    monkeypatch.setattr(recordings, "QUEUE_BATCHES", 2)
    recording = {"path": tmp_path / "r.instep"}
    transport = {"heartbeat_s": 0.5}
    async with held_commits() as may_commit, running(SMALL, recording=recording, transport=transport) as server:
        async with RawClient(server.endpoint) as other:
            await other.hello()
            async with RawClient(server.endpoint) as client:
                await client.hello()
                opened = await client.open("s")
                may_commit.clear()
                for seq in range(4000):
                    await client.send(*client.step_message(opened.handles(), [seq], x, [0]))
                await other.ask(msgpack.packb([Kind.PING, 1]))
            while len(server.default.engine.origins) > 1:
                assert (await other.ask(msgpack.packb([Kind.PING, 2]))).kind is Kind.PONG
                await asyncio.sleep(0.02)
            may_commit.set()
            await assert_serves(server.endpoint, rng, "t")
            resumed = await other.resume(["s"], [0], opened.epochs())
            assert resumed.failures() == []
            (seq,) = resumed.seqs()
            assert 0 < seq <= 32, "what was admitted is applied, and no more than the window"
            again = await other.step(resumed.handles(), [0], np.repeat(x, seq, axis=0))
            truth, _ = whole(SMALL, np.repeat(x[:, 0], seq, axis=0))
            np.testing.assert_array_equal(again.floats().reshape(seq, H), truth)


async def test_a_message_of_very_many_parts_is_refused_and_others_are_served_meanwhile(
    rng: np.random.Generator,
) -> None:
    x = random_frames(rng, 50)
    async with running(SMALL) as server:
        async with RawClient(server.endpoint) as stranger, RawClient(server.endpoint) as client:
            await stranger.hello()
            await client.hello()
            handles = (await client.open("s")).handles()
            await stranger.send(msgpack.packb([Kind.PING, 7]), *[b""] * 200_000)
            served = [await client.step(handles, [seq], x[seq : seq + 1], [seq]) for seq in range(len(x))]
            refused = await stranger.receive()
            assert (refused.code, refused.request) == (Code.MALFORMED, 0)
            assert (await stranger.ask(msgpack.packb([Kind.PING, 8]))).kind is Kind.PONG
    y = np.stack([reply.floats() for reply in served])
    np.testing.assert_array_equal(y, whole(SMALL, x[:, 0])[0])


async def test_parts_beyond_those_of_a_message_are_not_taken_for_messages_of_others(
    rng: np.random.Generator,
) -> None:
    """A routing id and a message of its owner's as further parts: read as a message it would close another's stream."""
    async with running(SMALL) as server:
        async with RawClient(server.endpoint) as stranger, RawClient(server.endpoint) as client:
            await stranger.hello()
            await client.hello()
            handles = (await client.open("s")).handles()
            peer = server.default.engine.origins[1]
            assert isinstance(peer, Peer)
            forged = [peer.routing_id, *client.close_message(handles)]
            for parts in range(3, 9):
                await stranger.send(msgpack.packb([Kind.PING, 7]), *[b""] * (parts - 1), *forged)
                assert (await stranger.receive()).code is Code.MALFORMED
            reply = await client.step(handles, [0], random_frames(rng, 1))
            assert reply.failures() == []
