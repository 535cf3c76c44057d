"""The ROUTER socket: safe options before bind, bounded receive, and sends that never block and never lie."""

from __future__ import annotations

import socket as socketlib
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Protocol

import zmq

from instep.config import TransportConfig
from instep_client.protocol import multipart
from instep_client.protocol.wire import Message


class Sent(Enum):
    """What became of a message."""

    HANDED_OVER = "handed over"
    """ZeroMQ has it; whether the peer ever reads it is not known."""
    FULL = "full"
    """The peer's queue is at its high-water mark: it reads too slowly, or not at all."""
    GONE = "gone"
    """The peer's connection no longer exists."""


class Sender(Protocol):
    """What can hand messages to connections."""

    def send(self, routing_id: bytes, message: Message) -> Sent:
        """Hand a message to ZeroMQ, or say why it could not be."""


class Router:
    """A bound ROUTER socket.

    Identities are the ones ZeroMQ makes up itself (they begin with a zero byte, which no peer can choose), so one
    connection can never take another's place.

    Args:
        config: the transport section of the configuration.

    Raises:
        zmq.ZMQError: when the endpoint cannot be bound.
    """

    def __init__(self, config: TransportConfig) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.IPV6, int("[" in config.endpoint))
        socket.setsockopt(zmq.LINGER, 1000)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, config.max_message_bytes)
        socket.setsockopt(zmq.SNDHWM, config.send_high_water_mark)
        socket.setsockopt(zmq.RCVHWM, config.send_high_water_mark)
        socket.setsockopt(zmq.HANDSHAKE_IVL, round(config.handshake_timeout_s * 1000))
        socket.setsockopt(zmq.HEARTBEAT_IVL, round(config.heartbeat_s * 1000))
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(config.heartbeat_s * 3000))
        socket.setsockopt(zmq.BACKLOG, 4096)
        try:
            _refuse_path_in_use(config.endpoint)
            socket.bind(config.endpoint)
        except zmq.ZMQError:
            socket.close(linger=0)
            self._context.term()
            raise
        self._socket = socket
        self.endpoint: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def signal_fd(self) -> int:
        """Becomes readable when something has arrived.

        It tells of each arrival once, and anything that is done with the socket may take the signal: whoever waits for
        it must `receive` until nothing is left, each time, and after each `send` too.
        """
        return self._socket.fileno()

    @property
    def is_readable(self) -> bool:
        """Whether a message is there now; where it is not, the next arrival will be signalled."""
        return bool(multipart.events(self._socket) & multipart.READABLE)

    def receive(self, at_most: int) -> Iterator[tuple[bytes, list[bytes]]]:
        """What has arrived, a burst at most: routing id, and [header, frames …] each."""
        return multipart.received_from(self._socket, at_most)

    def send(self, routing_id: bytes, message: Message) -> Sent:
        """Hand a message to ZeroMQ, or say why it could not be."""
        try:
            multipart.send_now(self._socket, [routing_id, *message])
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.HANDED_OVER

    def close(self) -> None:
        """Close the socket; what was handed over is given a second to leave."""
        self._socket.close()
        self._context.term()


def _refuse_path_in_use(endpoint: str) -> None:
    """ZeroMQ takes the path of an `ipc://` endpoint from whoever listens there; whoever is gone has left it."""
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc" or not Path(path).is_socket():
        return
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise zmq.ZMQError(zmq.EADDRINUSE)
