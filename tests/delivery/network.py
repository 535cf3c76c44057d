"""Connections that keep order each, and nothing else: messages get lost, come twice, or wait; connections break."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from instep.frontends.zmq.inbox import Inbox
from instep.frontends.zmq.router import Sent
from instep_client.protocol.wire import Message

FULL_AT = 6
"""Messages that a connection holds for a peer that cannot be reached."""


_numbers = itertools.count(1)


class Connection:
    """Two queues, and what either side knows of the other."""

    def __init__(self, owner: int) -> None:
        self.owner = owner
        """The client."""
        self.routing_id = b""
        self.to_server: deque[list[bytes]] = deque()
        self.to_client: deque[Message] = deque()
        self.is_cut = False
        """Nothing passes any more, and either side notices when it sends."""
        self.is_left = False
        """The client uses another one by now; what it sent may still arrive."""
        self.is_partitioned = False
        self.rename()

    def rename(self) -> None:
        """ZeroMQ connects again behind the client's back: the server sees a new connection."""
        self.routing_id = bytes([0, self.owner]) + next(_numbers).to_bytes(3, "big")
        self.to_server.clear()
        self.to_client.clear()

    def cut(self) -> None:
        self.is_cut = True
        self.to_server.clear()
        self.to_client.clear()


class Network:
    """All connections, whichever life of the server they lead to."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.on_sent: Callable[[Connection, Message], None] = lambda connection, message: None
        """Told of every message that leaves the server."""
        self.on_received: Callable[[Connection, list[bytes]], None] = lambda connection, message: None
        """Told of every message that the server takes, before it does."""

    def connect(self, owner: int) -> Connection:
        self.connections = [known for known in self.connections if not known.is_cut]
        connection = Connection(owner)
        self.connections.append(connection)
        return connection

    def find(self, routing_id: bytes) -> Connection | None:
        return next((known for known in self.connections if known.routing_id == routing_id), None)


class HandRouter:
    """In place of the ROUTER socket of one life of the server."""

    signal_fd = -1
    authenticator = address_of_socket = None
    address = ""

    def __init__(self, network: Network) -> None:
        self.arrived: deque[tuple[Connection, list[bytes]]] = deque()
        """Messages that the loop has not taken yet."""
        self._network = network
        self._is_closed = False

    @property
    def is_readable(self) -> bool:
        return bool(self.arrived)

    def receive(self, inbox: Inbox, now_ns: int) -> tuple[bytes, list[bytes]] | None:
        while self.arrived and not inbox.is_full:
            connection, message = self.arrived.popleft()
            self._network.on_received(connection, message)
            if not inbox.take(connection.routing_id, message, now_ns):
                return connection.routing_id, message
        return None

    def send(self, routing_id: bytes, message: Message) -> Sent:
        if self._is_closed:
            return Sent.HANDED_OVER  # and lost with the process
        connection = self._network.find(routing_id)
        if connection is None or connection.is_cut:
            return Sent.GONE
        if connection.is_partitioned and len(connection.to_client) >= FULL_AT:
            return Sent.FULL
        copy: Message = [bytes(frame) for frame in message]
        self._network.on_sent(connection, copy)
        connection.to_client.append(copy)
        return Sent.HANDED_OVER

    def close(self) -> None:
        self._is_closed = True
        self.arrived.clear()
