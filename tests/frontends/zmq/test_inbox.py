"""STEPs that are read in compiled code: each is taken as it was sent, and everything else is handed over whole."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq

from instep.config import TransportConfig
from instep.frontends.zmq.inbox import MOST_MESSAGES, Inbox
from instep.frontends.zmq.router import Router
from instep.frontends.zmq.table import PeerTable
from instep_client.protocol.wire import Kind

FEATURES, MOST_FRAMES = 3, 40
PING = [msgpack.packb([Kind.PING, 7])]
_HEADER = struct.Struct("<BBHIIIQ")


def header(
    request: int = 9, timesteps: int = 2, width: int = 3, features: int = FEATURES, dtype: int = 1, reserved: int = 0
) -> bytes:
    return _HEADER.pack(3, dtype, reserved, timesteps, width, features, request)


def step(rng: np.random.Generator, request: int, timesteps: int = 1, width: int = 1) -> list[bytes]:
    return [
        header(request, timesteps, width) + rng.bytes(24 * width),
        rng.bytes(4 * FEATURES * timesteps * width),
    ]


class Rig:
    """A socket whose inbox knows two of the three peers that are connected to it."""

    def __init__(self, router: Router, peers: list[zmq.Socket[bytes]]) -> None:
        self.router, self.peers = router, peers
        self.table = PeerTable(10)
        self.inbox = Inbox(self.table)
        self.model = self.add_model(FEATURES, MOST_FRAMES)
        self.accept(True)
        self.routing_ids = [self.introduce(peer) for peer in peers]
        for number, routing_id in enumerate(self.routing_ids[:2]):
            origin: Any = SimpleNamespace(number=20 + number, arrival=30 + number)
            self.table.add_peer(routing_id, origin, self.model, 0)

    def add_model(self, features: int, most_frames: int) -> int:
        model = self.table.add_model(features, most_frames, 40)
        self.inbox.reserve()
        return model

    def accept(self, accepts: bool) -> None:
        self.table.models["accepts"][self.model] = accepts

    def introduce(self, peer: zmq.Socket[bytes]) -> bytes:
        peer.send_multipart(PING)
        routing_id, parts = self.receive()
        assert parts == PING
        return routing_id

    def receive(self) -> tuple[bytes, list[bytes]]:
        """The next message that is not taken."""
        while (message := self.router.receive(self.inbox, 5)) is None:
            assert not self.inbox.is_full
        return message

    def after(self, *messages: list[bytes], peer: int = 0) -> tuple[bytes, list[bytes]]:
        """Send messages and then one that is handed over, which is returned."""
        for message in [*messages, PING]:
            self.peers[peer].send_multipart(message)
        return self.receive()

    def taken(self) -> list[tuple[int, int, list[bytes]]]:
        """What was taken: origin, arrival and the message as it was sent."""
        frames, found = self.inbox.frames(self.model), []
        for message in frames.messages:
            tag, origin, arrival, timesteps, width, column, value, arrived_ns, _ = message.tolist()
            columns, x = frames.columns[column:][:width], frames.x[value:][: timesteps * width * FEATURES]
            found.append((origin, arrival, [header(tag, timesteps, width) + columns.tobytes(), x.tobytes()]))
            assert arrived_ns == 5
        return found


@pytest.fixture
def rig() -> Iterator[Rig]:
    with ExitStack() as stack:
        router = Router(TransportConfig(endpoint="tcp://127.0.0.1:*"))
        stack.callback(router.close)
        context = stack.enter_context(zmq.Context())
        peers = [stack.enter_context(connected(context, router.endpoint)) for _ in range(3)]
        yield Rig(router, peers)


@contextmanager
def connected(context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    with context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        yield socket


def test_steps_are_taken_as_they_were_sent_and_other_messages_come_in_their_place(
    rig: Rig, rng: np.random.Generator
) -> None:
    first, second = [step(rng, 1), step(rng, 2**63 - 1, 8, 5)], [step(rng, 3, 40, 1)]
    assert rig.after(*first) == (rig.routing_ids[0], PING)
    assert rig.taken() == [(20, 30, message) for message in first]
    assert rig.after(*second, peer=1) == (rig.routing_ids[1], PING)
    assert rig.taken() == [*((20, 30, message) for message in first), (21, 31, second[0])]
    assert rig.table.peers["last_heard_ns"][:2].tolist() == [5, 5]
    rig.inbox.leave_out(1)
    assert [arrival for _, arrival, _ in rig.taken()] == [30, -1, 31]
    rig.inbox.clear()
    assert rig.taken() == []


def test_messages_of_two_models_are_kept_apart(rig: Rig, rng: np.random.Generator) -> None:
    other = rig.add_model(1, 4)
    rig.table.models["accepts"][other] = True
    rig.table.peers["model"][1] = other
    mine, theirs = step(rng, 1), [header(2, 2, 1, 1) + bytes(24), rng.bytes(8)]
    rig.after(mine)
    rig.after(theirs, peer=1)
    rig.after(mine)
    assert [message for _, _, message in rig.taken()] == [mine, mine]
    frames = rig.inbox.frames(other)
    assert frames.messages["tag"].tolist() == [2]
    assert frames.x[frames.messages["value_at"][0] :][:2].tobytes() == theirs[1]


X = bytes(4 * FEATURES * 6)
COLUMNS = bytes(24 * 3)
OTHERS: list[list[bytes]] = [
    *([(header() + COLUMNS)[:size], X] for size in range(65)),
    *([bytes([kind]) + (header() + COLUMNS)[1:], X] for kind in range(256) if kind != 3),
    [header()],
    [header() + COLUMNS],
    [header() + COLUMNS, X, b""],
    [header() + COLUMNS, X, b"", b"", b""],
    [header() + COLUMNS[1:], X],
    [header() + COLUMNS + b"?", X],
    [header() + COLUMNS, X[1:]],
    [header() + COLUMNS, X + b"?"],
    [header() + COLUMNS, b""],
    [header(dtype=0) + COLUMNS, X],
    [header(dtype=2) + COLUMNS, X],
    [header(reserved=1) + COLUMNS, X],
    [header(reserved=2**15) + COLUMNS, X],
    [header(request=2**63) + COLUMNS, X],
    [header(request=2**64 - 1) + COLUMNS, X],
    [header(timesteps=0) + COLUMNS, b""],
    [header(width=0), b""],
    [header(features=0) + COLUMNS, b""],
    [header(features=FEATURES + 1) + COLUMNS, bytes(4 * (FEATURES + 1) * 6)],
    [header(timesteps=41, width=1) + bytes(24), bytes(4 * FEATURES * 41)],
    [header(timesteps=1, width=41) + bytes(24 * 41), bytes(4 * FEATURES * 41)],
    [header(timesteps=2**32 - 1) + COLUMNS, X],
    [header(timesteps=2**31, width=2) + bytes(48), X],  # 2^32 frames, which are 0 in 32 bits
    [header(width=2**32 - 1) + COLUMNS, X],
    [header(width=65_536, timesteps=1) + bytes(24 * 65_536), X],
    [header(features=2**32 - 1) + COLUMNS, X],
    [b"", b""],
    [b""],
    [bytes(2**20), bytes(2**20)],
]


def test_whatever_is_no_good_step_is_handed_over_whole(rig: Rig) -> None:
    for message in OTHERS:
        rig.peers[0].send_multipart(message)
        assert rig.receive() == (rig.routing_ids[0], message), message[0][:24]
    assert len(rig.inbox) == 0


def test_a_step_is_handed_over_where_the_peer_is_not_known_or_the_model_does_not_accept(
    rig: Rig, rng: np.random.Generator
) -> None:
    message = step(rng, 1)
    rig.peers[2].send_multipart(message)
    assert rig.receive() == (rig.routing_ids[2], message)
    rig.accept(False)
    rig.peers[0].send_multipart(message)
    assert rig.receive() == (rig.routing_ids[0], message)
    rig.accept(True)
    rig.table.remove_peer(0)
    rig.peers[0].send_multipart(message)
    assert rig.receive() == (rig.routing_ids[0], message)
    assert rig.after(message, peer=1) == (rig.routing_ids[1], PING)
    assert rig.taken() == [(21, 31, message)]


@pytest.mark.parametrize(("timesteps", "width", "most"), [(1, 1, MOST_MESSAGES), (20_000, 2, 2), (2, 20_000, 2)])
def test_a_full_inbox_takes_the_rest_in_the_next_turn(
    rig: Rig, rng: np.random.Generator, timesteps: int, width: int, most: int
) -> None:
    rig.model = rig.add_model(30, 50_000)
    rig.table.models["features"][rig.model] = FEATURES
    rig.table.peers["model"][0] = rig.model
    rig.accept(True)
    messages = [step(rng, number, timesteps, width) for number in range(most + 9)]
    for message in messages:
        rig.peers[0].send_multipart(message)
    found = list[list[bytes]]()
    while len(found) < len(messages):
        while not rig.inbox.is_full and len(found) + len(rig.inbox) < len(messages):
            assert rig.router.receive(rig.inbox, 5) is None
        assert len(rig.inbox) >= min(most, len(messages) - len(found))
        found += [message for _, _, message in rig.taken()]
        rig.inbox.clear()
    assert found == messages


def test_many_peers_are_told_apart_whatever_order_they_come_and_go_in(rng: np.random.Generator) -> None:
    table, known = PeerTable(500), dict[bytes, int]()
    model = table.add_model(1, 1, 2)
    table.models["accepts"][model] = True
    inbox = Inbox(table)
    message, arrival = [header(1, 1, 1, 1) + bytes(24), bytes(4)], 0
    for _ in range(2000):
        routing_id = b"\0" + int(rng.integers(2**32 - 400, 2**32)).to_bytes(4, "big")
        inbox.clear()
        assert inbox.take(routing_id, message, 0) == (routing_id in known)
        if routing_id in known:
            row = int(np.flatnonzero(table.peers["arrival"] == known.pop(routing_id))[0])
            assert inbox.frames(model).messages["arrival"].tolist() == [table.peers["arrival"][row]]
            table.remove_peer(row)
            table.peers["arrival"][row] = -1
        else:
            arrival += 1
            origin: Any = SimpleNamespace(number=1, arrival=arrival)
            known[routing_id] = arrival
            table.add_peer(routing_id, origin, model, 0)
