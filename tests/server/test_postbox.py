"""Delivery to connections that read slowly, never, or are gone: with a router that answers as told."""

from __future__ import annotations

import msgpack
from instep.server.clients import Client, ClientTable
from instep.server.postbox import Postbox
from instep.server.transport import Sent

from instep.server import replies
from instep_client.protocol.wire import Kind, Message

MESSAGE: Message = [b"x" * 744]
"""1,000 bytes, with the objects around it."""
UNREAD = 10_000


class FakeRouter:
    """A router whose peers are in the states the test puts them in."""

    def __init__(self) -> None:
        self.state: dict[bytes, Sent] = {}
        self.taken: list[tuple[bytes, Message]] = []

    def send(self, routing_id: bytes, message: Message) -> Sent:
        sent = self.state.get(routing_id, Sent.HANDED_OVER)
        if sent is Sent.HANDED_OVER:
            self.taken.append((routing_id, message))
        return sent


class Rig:
    """A postbox with two connections."""

    def __init__(self) -> None:
        self.router = FakeRouter()
        self.clients = ClientTable(4)
        self.gone: list[Client] = []
        self.postbox = Postbox(
            self.router,
            self.clients,
            max_unread_bytes=UNREAD,
            max_outbox_bytes=10_000,
            unreachable_after_ns=100,
            probe_after_ns=50,
            on_gone=self.gone.append,
        )
        self.slow = self.add(b"\0slow")
        self.fast = self.add(b"\0fast")

    def add(self, routing_id: bytes) -> Client:
        client = self.clients.add(routing_id, now_ns=0)
        assert client is not None
        return client


def test_what_is_taken_leaves_the_account_and_what_is_not_stays_on_it() -> None:
    rig = Rig()
    rig.slow.frames_unanswered = rig.fast.frames_unanswered = 7
    rig.router.state[b"\0slow"] = Sent.FULL
    rig.postbox.send(rig.slow, MESSAGE, now_ns=0, frames=5)
    rig.postbox.send(rig.fast, MESSAGE, now_ns=0, frames=5)
    assert (rig.slow.frames_unanswered, rig.fast.frames_unanswered) == (7, 2)
    assert not rig.postbox.is_empty
    del rig.router.state[b"\0slow"]
    rig.postbox.flush(now_ns=1)
    assert rig.slow.frames_unanswered == 2
    assert (rig.postbox.is_empty, rig.slow.outbox_bytes) == (True, 0)


def test_messages_of_a_connection_keep_their_order() -> None:
    rig = Rig()
    messages: list[Message] = [[bytes([number])] for number in range(4)]
    rig.router.state[b"\0slow"] = Sent.FULL
    rig.postbox.send(rig.slow, messages[0], now_ns=0)
    rig.postbox.send(rig.slow, messages[1], now_ns=0)
    del rig.router.state[b"\0slow"]
    rig.postbox.send(rig.slow, messages[2], now_ns=0)
    rig.postbox.flush(now_ns=0)
    rig.postbox.send(rig.slow, messages[3], now_ns=0)
    assert [message for _, message in rig.router.taken] == messages


def test_an_outbox_is_bounded_in_bytes_and_one_that_bursts_costs_only_its_connection() -> None:
    rig = Rig()
    rig.router.state[b"\0slow"] = Sent.FULL
    for _ in range(11):
        rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    assert rig.gone == [rig.slow]
    assert rig.postbox.is_empty
    assert rig.clients.by_routing_id(b"\0slow") is None
    rig.postbox.send(rig.fast, MESSAGE, now_ns=0)
    assert rig.router.taken == [(b"\0fast", MESSAGE)]


def test_an_outbox_that_stands_still_for_too_long_is_given_up() -> None:
    rig = Rig()
    rig.router.state[b"\0slow"] = Sent.FULL
    rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    rig.postbox.flush(now_ns=100)
    assert not rig.gone
    rig.postbox.flush(now_ns=101)
    assert rig.gone == [rig.slow]


def test_an_outbox_that_moves_is_not_given_up() -> None:
    rig = Rig()
    rig.router.state[b"\0slow"] = Sent.FULL
    for _ in range(2):
        rig.postbox.send(rig.slow, MESSAGE, now_ns=0)

    def takes_one(routing_id: bytes, message: Message) -> Sent:
        rig.router.send = takes_none  # type: ignore[method-assign]
        return Sent.HANDED_OVER

    def takes_none(routing_id: bytes, message: Message) -> Sent:
        return Sent.FULL

    rig.router.send = takes_one  # type: ignore[method-assign]
    rig.postbox.flush(now_ns=90)
    rig.postbox.flush(now_ns=150)
    assert not rig.gone


def test_a_connection_that_is_gone_is_given_up_when_something_is_sent_and_then_sent_nothing() -> None:
    rig = Rig()
    rig.router.state[b"\0slow"] = Sent.GONE
    rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    assert rig.gone == [rig.slow]


def test_a_connection_that_goes_while_it_is_stuck_is_given_up() -> None:
    rig = Rig()
    rig.router.state[b"\0slow"] = Sent.FULL
    rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    rig.router.state[b"\0slow"] = Sent.GONE
    rig.postbox.flush(now_ns=1)
    assert rig.gone == [rig.slow]


def test_silent_connections_are_probed_and_the_dead_among_them_found() -> None:
    rig = Rig()
    rig.fast.last_heard_ns = 60
    rig.router.state[b"\0slow"] = Sent.GONE
    rig.postbox.probe(now_ns=100)
    assert rig.gone == [rig.slow]
    assert rig.router.taken == []
    rig.postbox.probe(now_ns=111)
    rig.postbox.probe(now_ns=120)
    assert rig.router.taken == [(b"\0fast", replies.ping(0))]


def pings(rig: Rig, routing_id: bytes) -> list[int]:
    """Numbers of the PINGs that a connection was sent."""
    asked = [msgpack.unpackb(message[0]) for to, message in rig.router.taken if to == routing_id and message != MESSAGE]
    assert all(header[0] == Kind.PING for header in asked)
    return [header[1] for header in asked]


def test_a_connection_that_never_says_it_reads_is_handed_no_more_than_the_bound() -> None:
    rig = Rig()
    for _ in range(15):
        rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    assert sum(message == MESSAGE for _, message in rig.router.taken) == UNREAD // 1000 + 1
    assert pings(rig, b"\0slow") == [6000]
    assert len(rig.slow.outbox) == 4


def test_a_connection_that_says_it_reads_is_handed_everything_in_order() -> None:
    rig = Rig()
    messages: list[Message] = [[bytes([number]) * 744] for number in range(60)]
    for message in messages:
        rig.postbox.send(rig.slow, message, now_ns=0)
        asked = [header for header in map(_ping_number, rig.router.taken) if header is not None]
        if asked:
            rig.postbox.has_read(rig.slow, asked[-1], now_ns=0)
    sent = [message for _, message in rig.router.taken if _ping_number((b"", message)) is None]
    assert sent == messages
    assert rig.postbox.is_empty


def _ping_number(taken: tuple[bytes, Message]) -> int | None:
    _, message = taken
    return None if len(message[0]) == 744 else int(msgpack.unpackb(message[0])[1])


def test_the_outbox_moves_on_as_soon_as_the_connection_says_it_reads() -> None:
    rig = Rig()
    for _ in range(15):
        rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    (asked,) = pings(rig, b"\0slow")
    for lie in (asked + 1, 2**60, 0):
        rig.postbox.has_read(rig.slow, lie, now_ns=0)
        assert len(rig.slow.outbox) == 4
    rig.postbox.has_read(rig.slow, asked, now_ns=0)
    assert not rig.slow.outbox
    assert sum(message == MESSAGE for _, message in rig.router.taken) == 15


def test_a_question_that_found_no_room_is_asked_again() -> None:
    rig = Rig()

    def refuses_pings(routing_id: bytes, message: Message) -> Sent:
        return Sent.HANDED_OVER if message == MESSAGE else Sent.FULL

    takes_all = rig.router.send
    rig.router.send = refuses_pings  # type: ignore[method-assign]
    for _ in range(12):
        rig.postbox.send(rig.slow, MESSAGE, now_ns=0)
    rig.router.send = takes_all  # type: ignore[method-assign]
    rig.postbox.flush(now_ns=1)
    assert pings(rig, b"\0slow") == [11_000]


def test_unknown_connections_are_answered_and_nothing_kept() -> None:
    rig = Rig()
    rig.router.state[b"\0new"] = Sent.FULL
    rig.postbox.send_unknown(b"\0new", MESSAGE)
    assert rig.postbox.is_empty


def test_everybody_hears_a_broadcast() -> None:
    rig = Rig()
    rig.postbox.broadcast(MESSAGE, now_ns=0)
    assert {routing_id for routing_id, _ in rig.router.taken} == {b"\0slow", b"\0fast"}


def test_numbers_of_connections_are_used_again_only_when_freed() -> None:
    clients = ClientTable(1)
    first = clients.add(b"\0a", 0)
    assert first is not None
    assert clients.add(b"\0b", 0) is None
    clients.forget(first)
    assert clients.add(b"\0b", 0) is None
    clients.free_number(first.number)
    again = clients.add(b"\0b", 0)
    assert again is not None
    assert len(clients) == 1
