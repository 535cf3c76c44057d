"""Connections that keep order each, and nothing else: messages get lost, come twice, or wait; connections break."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from instep.server.transport import Sent

from instep_client.protocol.wire import Message

FULL_AT = 6
"""Messages that a connection holds for a peer that cannot be reached."""


class Connection:
    """Two queues, and what either side knows of the other."""

    _numbers = itertools.count(1)

    def __init__(self, owner: int) -> None:
        self.owner = owner
        """The client."""
        self.routing_id = b""
        self.to_server: deque[list[bytes]] = deque()
        self.to_client: deque[Message] = deque()
        self.is_cut = False
        """Nothing passes any more, and who tries notices."""
        self.is_left = False
        """The client has gone on to another one; what it sent may still arrive."""
        self.is_partitioned = False
        self.rename()

    def rename(self) -> None:
        """ZeroMQ connects again behind the client's back: the server sees somebody new."""
        self.routing_id = b"\0" + next(Connection._numbers).to_bytes(4, "big")
        self.to_server.clear()
        self.to_client.clear()

    def cut(self) -> None:
        self.is_cut = True
        self.to_server.clear()
        self.to_client.clear()


class Network:
    """What the server's postbox sends through."""

    def __init__(self) -> None:
        self.connections: list[Connection] = []
        self.on_sent: Callable[[Connection, Message], None] = lambda connection, message: None
        """Told of every message that leaves the server."""

    def connect(self, owner: int) -> Connection:
        self.connections = [known for known in self.connections if not known.is_cut]
        connection = Connection(owner)
        self.connections.append(connection)
        return connection

    def send(self, routing_id: bytes, message: Message) -> Sent:
        for connection in self.connections:
            if connection.routing_id == routing_id and not connection.is_cut:
                if connection.is_partitioned and len(connection.to_client) >= FULL_AT:
                    return Sent.FULL
                message = [bytes(frame) for frame in message]
                self.on_sent(connection, message)
                connection.to_client.append(message)
                return Sent.HANDED_OVER
        return Sent.GONE
