"""Connections that said HELLO: their numbers, their credit and their unsent replies."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from instep_client.protocol.wire import Message


@dataclass(slots=True)
class Client:
    """One connection."""

    number: int
    arrival: int
    """How many connections had said HELLO when it did, this one included."""
    routing_id: bytes
    last_heard_ns: int
    frames_unanswered: int = 0
    """Frames admitted whose answer ZeroMQ has not taken yet."""
    outbox: deque[tuple[Message, int]] = field(default_factory=deque)
    """Messages that did not fit into the connection's queue, with the frames each answers."""
    outbox_bytes: int = 0
    stuck_since_ns: int = 0
    """When the outbox last moved; counts only while it holds something."""
    last_probed_ns: int = 0
    sent_bytes: int = 0
    """Bytes handed to ZeroMQ so far."""
    asked_bytes: int = 0
    """`sent_bytes` when the connection was last asked whether it reads."""
    read_bytes: int = 0
    """`sent_bytes` up to which it said that it has read."""


class ClientTable:
    """Connections by routing id and by number.

    Args:
        capacity: the most connections at once; numbers run from 0 to this, exclusive.
    """

    def __init__(self, capacity: int) -> None:
        self._by_routing_id: dict[bytes, Client] = {}
        self._by_number: dict[int, Client] = {}
        self._capacity = capacity
        self._arrived = 0
        self._given_out = 0
        self._free: list[int] = []
        """Numbers below `_given_out` that may be used again."""

    def __len__(self) -> int:
        return len(self._by_number)

    def add(self, routing_id: bytes, now_ns: int) -> Client | None:
        """A new connection, or None when the table is full."""
        if self._free:
            number = self._free.pop()
        elif self._given_out < self._capacity:
            number = self._given_out
            self._given_out += 1
        else:
            return None
        self._arrived += 1
        client = Client(number, self._arrived, routing_id, now_ns)
        self._by_routing_id[routing_id] = client
        self._by_number[client.number] = client
        return client

    def by_routing_id(self, routing_id: bytes) -> Client | None:
        """The connection, if it said HELLO and is not gone."""
        return self._by_routing_id.get(routing_id)

    def by_number(self, number: int) -> Client | None:
        """The connection, if it is not gone."""
        return self._by_number.get(number)

    def all(self) -> list[Client]:
        """Every connection."""
        return list(self._by_number.values())

    def forget(self, client: Client) -> None:
        """The connection is gone; nothing is sent to it any more. Its number stays taken until `free_number`."""
        del self._by_routing_id[client.routing_id]
        del self._by_number[client.number]
        client.outbox.clear()

    def free_number(self, number: int) -> None:
        """The last stream of a forgotten connection is closed: its number may be used again."""
        self._free.append(number)
