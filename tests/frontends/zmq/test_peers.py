"""Delivery to peers that read slowly, never, or are gone: with a router that answers as told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import msgpack
import numpy as np

from instep.core.tables import make_tables
from instep.frontends.zmq.peers import Outbound, Peer
from instep.frontends.zmq.router import Sent
from instep.frontends.zmq.table import PeerTable
from instep.streaming.api import Refusal, Reply
from instep.streaming.origins import Origins
from instep_client.protocol.wire import Code, Kind, Message
from tests.support.running import log_into

MESSAGE: Message = [b"x" * 744]
"""1,000 bytes, with the objects around it."""
UNREAD = 100_000


class FakeRouter:
    """A router whose peers are in the states that the test puts them in."""

    address_of_socket = None

    def __init__(self) -> None:
        self.state: dict[bytes, Sent] = {}
        self.room: int | None = None
        """How many more messages are taken; None for any number."""
        self.takes_pings = True
        self.taken: list[tuple[bytes, list[bytes]]] = []

    def send(self, routing_id: bytes, message: Message) -> Sent:
        sent = self.state.get(routing_id, Sent.HANDED_OVER)
        if self.room == 0 or (len(message[0]) < 20 and not self.takes_pings):
            sent = Sent.FULL
        if sent is Sent.HANDED_OVER:
            self.room = None if self.room is None else self.room - 1
            self.taken.append((routing_id, [bytes(part) for part in message]))
        return sent


class Rig:
    """Replies on their way to two peers, and a clock that the test moves."""

    def __init__(self, max_outbox_bytes: int = 10_000, max_total_bytes: int = 10**9) -> None:
        self.router = FakeRouter()
        self.gone: list[Peer] = []
        self.now_ns = 0
        self.tables = make_tables(1, 40, 1, 1, 1, 1, 1, 1)
        engine = SimpleNamespace(origins=Origins(self.tables))
        self.served = SimpleNamespace(service=SimpleNamespace(engine=engine, log=log_into([]), is_former=False))
        table = PeerTable(10)
        table.add_model(1, 1, 41)
        self.outbound = Outbound(
            self.router,
            table,
            UNREAD,
            max_outbox_bytes,
            max_total_bytes,
            unreachable_after_ns=100,
            clock=lambda: self.now_ns,
            on_gone=self.gone.append,
        )
        self.slow, self.fast = self.add(b"\0slow"), self.add(b"\0fast")

    def add(self, routing_id: bytes) -> Peer:
        peer = Peer(self.outbound, routing_id, cast(Any, self.served), number=len(self.outbound))
        self.outbound.add(peer, 0, 0)
        return peer

    def tick(self, now_ns: int) -> None:
        """A tick at that time, after which peers silent for 50 ns are asked."""
        self.now_ns = now_ns
        self.outbound.tick(now_ns, 50)

    def backlog(self) -> list[int]:
        """Frames of the two peers whose replies wait here."""
        return list(self.tables.origins["backlog"][:2].tolist())

    def messages(self) -> list[list[bytes]]:
        """What was taken, without PINGs."""
        return [message for _, message in self.router.taken if ping_number(message) is None]

    def pings(self, routing_id: bytes) -> list[int]:
        """Numbers of the PINGs that a peer was sent."""
        found = [ping_number(message) for to, message in self.router.taken if to == routing_id]
        return [number for number in found if number is not None]


def ping_number(message: Sequence[bytes | memoryview]) -> int | None:
    if len(message[0]) > 20:
        return None
    header = msgpack.unpackb(message[0])
    return int(header[1]) if header[0] == Kind.PING else None


def test_those_who_may_not_have_read_everything_are_asked_and_those_who_have_gone_are_not_waited_for() -> None:
    rig = Rig()
    rig.outbound.ask_all()
    assert (rig.outbound.is_read, rig.router.taken) == (True, [])
    rig.outbound.send(rig.slow, MESSAGE)
    rig.outbound.send(rig.fast, MESSAGE)
    rig.outbound.ask_all()
    (slow,), (fast,) = rig.pings(b"\0slow"), rig.pings(b"\0fast")
    assert slow != fast
    assert not rig.outbound.is_read
    rig.outbound.acknowledge(rig.fast, fast)
    rig.outbound.send(rig.fast, MESSAGE)
    assert not rig.outbound.is_read
    rig.router.state[b"\0slow"] = Sent.GONE
    rig.outbound.ask_all()
    assert (rig.gone, rig.outbound.is_read) == ([], False)
    rig.outbound.acknowledge(rig.fast, rig.pings(b"\0fast")[-1])
    assert rig.outbound.is_read


def test_messages_of_a_peer_keep_their_order_and_their_bytes() -> None:
    rig = Rig()
    memory = [bytearray([number]) * 744 for number in range(4)]
    rig.router.state[b"\0slow"] = Sent.FULL
    for part in memory[:2]:
        rig.outbound.send(rig.slow, [memoryview(part)])
        part[:] = b"?" * 744  # as arrays are used again
    del rig.router.state[b"\0slow"]
    rig.outbound.send(rig.slow, [memoryview(memory[2])])
    rig.tick(0)
    rig.outbound.send(rig.slow, [memoryview(memory[3])])
    assert [message[0][:1] for message in rig.messages()] == [b"\0", b"\1", b"\2", b"\3"]


def test_an_outbox_is_bounded_in_bytes_and_one_that_exceeds_it_costs_only_its_peer() -> None:
    rig = Rig()
    rig.router.state[b"\0slow"] = Sent.FULL
    for _ in range(11):
        rig.outbound.send(rig.slow, MESSAGE, frames=1)
    assert rig.gone == [rig.slow]
    assert (rig.outbound.is_empty, rig.outbound.total_bytes, len(rig.outbound)) == (True, 0, 1)
    assert rig.outbound.find(b"\0slow") is None
    rig.outbound.send(rig.fast, MESSAGE)
    assert rig.router.taken == [(b"\0fast", MESSAGE)]


def test_all_outboxes_share_a_budget_and_beyond_it_the_largest_is_given_up() -> None:
    rig = Rig(max_outbox_bytes=100_000, max_total_bytes=40_000)
    modest = [rig.add(b"\0%d" % number) for number in range(5)]
    for peer in [rig.slow, *modest]:
        rig.router.state[peer.routing_id] = Sent.FULL
    for peer in modest:
        for _ in range(2):
            rig.outbound.send(peer, MESSAGE)
    for _ in range(10):
        rig.outbound.send(rig.slow, MESSAGE)
    assert not rig.gone
    assert rig.outbound.total_bytes == 20_000
    rig.outbound.send(modest[0], MESSAGE)
    assert rig.gone == [rig.slow]
    assert rig.outbound.total_bytes == 11_000


def test_all_peers_share_a_budget_of_unread_bytes_and_beyond_it_each_gets_one_reply_at_a_time() -> None:
    rig = Rig(max_outbox_bytes=10**9, max_total_bytes=320_000)
    late = [rig.add(b"\0lat%d" % number) for number in range(3)]
    for peer, count in ((rig.slow, 110), (rig.fast, 70), *((each, 5) for each in late)):
        for _ in range(count):
            rig.outbound.send(peer, MESSAGE)
    received = Counter(routing_id for routing_id, message in rig.router.taken if ping_number(message) is None)
    # Its own bound, the rest of the 160,000 bytes that all may leave unread, and one reply each.
    assert [received[peer.routing_id] for peer in (rig.slow, rig.fast, *late)] == [101, 59, 1, 1, 1]
    assert rig.outbound.unread_bytes == 163_000
    rig.outbound.acknowledge(rig.slow, rig.pings(b"\0slow")[-1])
    assert rig.outbound.unread_bytes == 62_000 + 9_000
    assert not rig.slow.outbox


def test_an_outbox_that_stands_still_for_too_long_is_given_up() -> None:
    rig = Rig()
    rig.router.state[b"\0slow"] = Sent.FULL
    rig.outbound.send(rig.slow, MESSAGE)
    rig.tick(100)
    assert not rig.gone
    rig.tick(101)
    assert rig.gone == [rig.slow]


def test_a_peer_is_asked_before_it_is_given_up_however_long_the_server_was_stopped() -> None:
    rig = Rig()
    rig.tick(1000)
    rig.tick(1050)
    assert rig.gone == []
    assert len(rig.pings(b"\0slow")) == len(rig.pings(b"\0fast")) == 1
    rig.fast.set("last_heard_ns", 1040)
    rig.tick(1051)
    assert rig.gone == [rig.slow]


def test_a_peer_that_says_that_it_reads_is_handed_everything_in_order() -> None:
    rig = Rig()
    sent: list[Message] = [[bytes([number % 251]) * 744] for number in range(600)]
    for message in sent:
        rig.outbound.send(rig.slow, message)
        for number in rig.pings(b"\0slow")[-1:]:
            rig.outbound.acknowledge(rig.slow, number)
    assert rig.messages() == sent
    assert rig.outbound.is_empty


def test_the_outbox_moves_as_soon_as_the_peer_says_that_it_reads_and_lies_move_nothing() -> None:
    rig = Rig(max_outbox_bytes=10**6)
    for _ in range(150):
        rig.outbound.send(rig.slow, MESSAGE)
    asked = rig.pings(b"\0slow")[-1]
    for lie in (rig.slow.get("sent_bytes"), rig.slow.get("asked_bytes"), asked + 1, 2**60, 0, -1):
        rig.outbound.acknowledge(rig.slow, lie)
        assert len(rig.slow.outbox) == 49
    rig.outbound.acknowledge(rig.slow, asked)
    assert not rig.slow.outbox
    assert len(rig.messages()) == 150


def headers(messages: Iterable[Sequence[bytes]]) -> list[list[object]]:
    return [msgpack.unpackb(message[0]) for message in messages]


def test_a_peer_is_an_origin_whose_replies_and_refusals_are_messages() -> None:
    rig = Rig()
    y = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    failures = np.array([[0, Code.SEQ_GAP, 0], [1, 0, 1], [1, 5, 1]], np.int64)
    messages = np.array([[7, 9], [1, 2]], np.int64)
    rig.fast.deliver(Reply(messages, y, failures, 2, 1000, 2000, 3000))
    rig.fast.refuse(8, Refusal(Code.BUSY, "later", 500))
    stepped, refused = (message for _, message in rig.router.taken)
    assert stepped == [
        bytes.fromhex(
            "43 00 0200 01000000 03000000 01000000 02000000 03000000 01000000 00000000"  # T 1, N 3, times, 1 failure
            "0700000000000000 0100000000000000 0900000000000000 0200000000000000"  # requests and their columns
            "01000000 00000000 65000000 00000000 0500000000000000"  # column 1, timestep 0, code 101, expected seq 5
        ),
        y.tobytes(),
    ]
    assert headers([refused])[0][:3] == [Kind.ERROR, 8, Code.BUSY]
