"""The ROUTER socket: safe options before bind, bounded receive, and sends that never block and never lie."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Protocol

import zmq
import zmq.asyncio

from instep.config import TransportConfig
from instep_client.wire import Message


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
        self._context = zmq.asyncio.Context()
        self._async = self._context.socket(zmq.ROUTER)
        sync: zmq.Socket[bytes] = zmq.Socket.shadow(self._async.underlying)
        sync.setsockopt(zmq.IPV6, int("[" in config.endpoint))
        sync.setsockopt(zmq.LINGER, 1000)
        sync.setsockopt(zmq.ROUTER_MANDATORY, 1)
        sync.setsockopt(zmq.MAXMSGSIZE, config.max_message_bytes)
        sync.setsockopt(zmq.SNDHWM, config.send_high_water_mark)
        sync.setsockopt(zmq.RCVHWM, config.send_high_water_mark)
        sync.setsockopt(zmq.HANDSHAKE_IVL, round(config.handshake_timeout_s * 1000))
        sync.setsockopt(zmq.HEARTBEAT_IVL, round(config.heartbeat_s * 1000))
        sync.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(config.heartbeat_s * 3000))
        sync.setsockopt(zmq.BACKLOG, 4096)
        try:
            sync.bind(config.endpoint)
        except zmq.ZMQError:
            self._async.close(linger=0)
            self._context.term()
            raise
        self._sync = sync
        self.endpoint: str = sync.getsockopt_string(zmq.LAST_ENDPOINT)

    async def readable(self) -> None:
        """Wait until something may be there to receive."""
        await self._async.poll(1000)

    def receive(self, at_most: int) -> Iterator[list[bytes]]:
        """What has arrived, a burst at most: [routing id, header, frames …] each."""
        for _ in range(at_most):
            try:
                yield self._sync.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return

    def send(self, routing_id: bytes, message: Message) -> Sent:
        """Hand a message to ZeroMQ, or say why it could not be."""
        try:
            self._sync.send_multipart([routing_id, *message], zmq.NOBLOCK)
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.HANDED_OVER

    def close(self) -> None:
        """Close the socket; what was handed over is given a second to leave."""
        self._async.close()
        self._context.term()
