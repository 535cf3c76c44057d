"""Replies that compiled code sends on a real socket, and those that it leaves: none of them overtakes another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import numpy as np
import pytest
import zmq

from instep.config import TransportConfig
from instep.core.tables import make_tables
from instep.frontends.zmq.inbox import Inbox
from instep.frontends.zmq.peers import Outbound, Peer
from instep.frontends.zmq.router import Router
from instep.frontends.zmq.table import PeerTable
from instep.security.principals import LOCAL
from instep.security.quotas import Usage
from instep.streaming.origins import Origins
from instep_client.protocol.wire import Kind
from tests.support.running import log_into

BYTES = 256 + 32 + 16 + 8
"""What a reply to one message with two outputs counts."""
UNREAD = 10 * BYTES
USAGE = 1


class Rig:
    """Two connections, the second of a principal whose usage is counted, and replies to them."""

    def __init__(self, router: Router, sockets: Sequence[zmq.Socket[bytes]], max_unread_bytes: int) -> None:
        self.sockets = sockets
        self.tables = make_tables(1, 4, 1, 1, 2, 2000, 1, 2000)
        self.origins = Origins(self.tables)
        engine = SimpleNamespace(origins=self.origins)
        served: Any = SimpleNamespace(service=SimpleNamespace(engine=engine, log=log_into([]), is_former=False))
        table, self.gone = PeerTable(4), list[Peer]()
        self.outbound = Outbound(router, table, max_unread_bytes, 10**6, 10**10, 10**9, lambda: 0, self.gone.append)
        self.model = table.add_model(1, 1, len(self.tables.origins))
        self.peers = []
        for number, socket in enumerate(sockets):
            socket.send(b"hello")
            while (message := router.receive(Inbox(table))) is None:
                pass
            peer = Peer(self.outbound, message[0], served, LOCAL, Usage(LOCAL, number * USAGE))
            assert self.origins.connect(peer)
            self.outbound.add(peer, self.model, 0)
            self.peers.append(peer)

    def answer(self, *replies: tuple[int, int], failed: Sequence[int] = ()) -> list[int]:
        """Replies of origin and tag, with two outputs each; the tags of those that are left."""
        for place, (origin, tag) in enumerate(replies):
            self.tables.groups[place] = [origin, 1, 1, 1, place, place, 2 * place, tag in failed, 1, 5_000_000]
            self.tables.reply_messages[:2, place] = tag, 1
            self.tables.reply_y[2 * place :][:2] = tag, -tag
        left = self.outbound.answer(self.model, self.tables, len(replies), (9_000_000, 2_000_000, 10**13))
        return [replies[place][1] for place in left]

    def received(self, origin: int) -> list[int]:
        """The tags of what has arrived, and -1 for a PING; every message is checked."""
        tags = []
        while self.sockets[origin].poll(200):
            first, *rest = self.sockets[origin].recv_multipart()
            if not rest:
                assert msgpack.unpackb(first)[0] == Kind.PING
                tags.append(-1)
                continue
            tag = int.from_bytes(first[32:40], "little")
            assert first == bytes.fromhex(
                f"43000100 01000000 01000000 a00f0000 d0070000 ffffffff 00000000 00000000 {tag:02x}"
                + "00" * 7
                + "01"
                + "00" * 7
            )
            assert rest == [np.array([tag, -tag], np.float32).tobytes()]
            tags.append(tag)
        return tags


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    with ExitStack() as stack:
        router = Router(TransportConfig(endpoint="tcp://127.0.0.1:*"))
        stack.callback(router.close)
        context = stack.enter_context(zmq.Context())
        sockets = [stack.enter_context(context.socket(zmq.DEALER)) for _ in range(2)]
        for socket in sockets:
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 1)
            socket.connect(router.endpoint)
        yield Rig(router, sockets, getattr(request, "param", UNREAD))


def test_replies_are_sent_as_the_protocol_says_and_their_bytes_are_counted(rig: Rig) -> None:
    assert rig.answer((0, 1), (1, 2), (0, 3)) == []
    assert (rig.received(0), rig.received(1)) == ([1, 3], [2])
    assert [peer.get("sent_bytes") for peer in rig.peers] == [2 * BYTES, BYTES]
    assert rig.outbound.unread_bytes == 3 * BYTES
    assert rig.peers[1].usage.kept_bytes == BYTES


def test_a_reply_with_failures_is_left_and_so_are_those_of_its_peer_behind_it(rig: Rig) -> None:
    assert rig.answer((0, 1), (0, 2), (1, 3), (0, 4), failed=[2]) == [2, 4]
    rig.outbound.send(rig.peers[0], [b"2"])
    rig.outbound.send(rig.peers[0], [b"4"])
    assert rig.answer((0, 5)) == [], "nothing waits any more"


def test_a_peer_that_does_not_read_is_asked_and_left_and_the_other_is_not_concerned(rig: Rig) -> None:
    tags = [(0, tag) for tag in range(1, 15)]
    assert rig.answer(*tags, (1, 99)) == [12, 13, 14]
    assert rig.received(1) == [99]
    for tag in (12, 13, 14):
        rig.outbound.send(rig.peers[0], [bytes([tag])])
    assert rig.answer((0, 15)) == [15], "it would overtake what waits"
    *tags_of_slow, ping = rig.received(0)
    assert (tags_of_slow[:5], ping) == ([1, 2, 3, 4, 5], -1)
    rig.outbound.acknowledge(rig.peers[0], next(reversed(rig.peers[0].asked)))
    assert not rig.peers[0].outbox
    assert rig.answer((0, 16)) == []


@pytest.mark.parametrize("rig", [10**9], indirect=True)
def test_nothing_is_lost_where_zeromq_has_no_room(rig: Rig) -> None:
    sent, left = 0, list[int]()
    while not left:
        left = rig.answer(*((0, 1 + tag % 100) for tag in range(sent, sent + 100)))
        sent += 100 - len(left)
        assert sent < 10**6
    assert len(rig.received(0)) == sent > 100


def test_who_is_gone_or_no_connection_of_this_socket_is_left(rig: Rig) -> None:
    rig.sockets[0].close()
    while not rig.answer((0, 1)):
        pass
    rig.outbound.drop(rig.peers[0])
    assert rig.answer((0, 3), (1, 4), (2, 5)) == [3, 5]
    heir = cast(Any, SimpleNamespace(number=0, arrival=9))
    other = rig.outbound.table.add_model(1, 1, len(rig.tables.origins))
    rig.outbound.table.add_peer(b"\0heir", heir, other, 0)
    assert rig.answer((0, 6)) == [6], "the row has a peer of another model by now"
