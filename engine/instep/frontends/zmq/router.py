"""The ROUTER socket: safe options before bind, bounded receive, and sends that never block."""

from __future__ import annotations

import ctypes
import secrets
import socket as socketlib
from enum import Enum
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import zmq

from instep.config import TransportConfig
from instep.core.typing import U8
from instep.frontends import CannotListen
from instep.frontends.zmq import native
from instep.frontends.zmq.inbox import Inbox, receive
from instep.frontends.zmq.table import PeerTable
from instep.security.authenticator import Authenticator
from instep.security.keys import ServerKeys
from instep_client.protocol import wire
from instep_client.protocol.wire import Kind, Message

MOST_PARTS: Final = max(kind.frames for kind in Kind)
"""The number of parts of the protocol's longest message."""


_SKIP_AT_ONCE: Final = 2000
"""The parts of an overlong message that are discarded in one turn of the loop."""
HIGH_WATER_MARK: Final = 1000
"""The messages that ZeroMQ queues for one connection in each direction."""


class Sent(Enum):
    """The outcome of sending a message."""

    HANDED_OVER = "handed over"
    """ZeroMQ has accepted it; whether the peer ever reads it is unknown."""
    FULL = "full"
    """The peer's queue is at its high-water mark."""
    GONE = "gone"
    """The peer's connection no longer exists."""


class Sender(Protocol):
    """Hands messages to connections."""

    @property
    def address_of_socket(self) -> int | None:
        """For compiled code; None if there is no socket of ZeroMQ's."""

    def send(self, routing_id: bytes, message: Message) -> Sent:
        """Hand a message to ZeroMQ, and return the outcome."""


class Router:
    """A bound ROUTER socket.

    Routing ids are those that ZeroMQ generates (they begin with a zero byte), so no connection can take another's
    place. libzmq 4.3.5 aborts the process when a peer claims the next generated id as its own. Ids count up from libc's
    `rand()`, which begins with the same value in every process, so it is seeded with a secret.

    No ZeroMQ heartbeats are sent, because libzmq 4.3.5 asserts when one is due for a peer that hung up behind a full
    queue (libzmq #3937). The protocol's PING finds dead peers instead.

    With keys every connection is encrypted (CURVE), and its key is known.

    Raises:
        CannotListen: when the endpoint cannot be bound.
    """

    def __init__(self, config: TransportConfig, keys: ServerKeys | None = None) -> None:
        ctypes.CDLL(None).srand(secrets.randbits(32))
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.IPV6, int("[" in config.endpoint))
        socket.setsockopt(zmq.LINGER, 1000)  # so that GOODBYE and the last replies leave
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, config.max_message_bytes)  # of each part; MOST_PARTS bounds their number
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.HANDSHAKE_IVL, round(config.handshake_timeout_s * 1000))
        socket.setsockopt(zmq.BACKLOG, 4096)  # after a restart all clients connect at once
        self._is_skipping = False
        """Whether a message with too many parts is being discarded."""
        self.address_of_socket: int = socket.underlying
        """For compiled code."""
        self._newest: U8 = np.stack([native.new_message() for _ in range(3)])
        """The routing id and the first parts of the newest message that was received."""
        receive(
            Inbox(PeerTable(0)).packed, self.address_of_socket, self._newest, 0
        )  # compiled before a client waits for it
        self.authenticator: Authenticator | None = None
        if keys is not None:
            self.authenticator = Authenticator(socket, keys.secret, keys.principals, config.handshake_timeout_s)
        try:
            _refuse_path_in_use(config.endpoint)
            socket.bind(config.endpoint)
        except zmq.ZMQError as error:
            if self.authenticator is not None:
                self.authenticator.close()
            socket.close(linger=0)
            self._context.term()
            raise CannotListen(f"cannot bind {config.endpoint}: {error}; is another server using it?") from None
        self._socket = socket
        self.endpoint: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        if self.authenticator is not None:
            self.authenticator.start(self.endpoint)

    @property
    def signal_fd(self) -> int:
        """A file that becomes readable when something has arrived.

        ZeroMQ signals each arrival once, and any call on the socket may consume the signal: check `is_readable` again
        after each `receive` and `send`.
        """
        return self._socket.fileno()

    @property
    def is_readable(self) -> bool:
        """Whether a message has arrived; if not, the next arrival will be signalled."""
        return wire.ready(self._socket)

    def receive(self, inbox: Inbox, now_ns: int = 0) -> tuple[bytes, list[bytes]] | None:
        """Take STEPs into the inbox until another message comes, and return that as routing id and parts.

        A message with too many parts is truncated after the first surplus part; the rest is read in portions and
        discarded.

        Returns:
            None if nothing else has arrived, or the inbox is full.
        """
        if self._is_skipping and not self._skip_rest():
            return None
        count = receive(inbox.packed, self.address_of_socket, self._newest, now_ns)
        if not count:
            return None
        newest = self._newest[:count]
        routing_id, *parts = map(native.bytes_of, newest)
        has_more = not native.is_last(newest[-1])
        while has_more and len(parts) <= MOST_PARTS:
            frame = self._socket.recv(wire.NOW, False)
            parts.append(frame.bytes)
            has_more = frame.more
        self._is_skipping = has_more
        return routing_id, parts

    @property
    def key(self) -> str:
        """The public key of the client from which the newest message came; only with keys."""
        return native.property_of(self._newest[1], "User-Id")

    @property
    def descriptor(self) -> int:
        """The descriptor of the connection from which the newest message came."""
        return native.descriptor_of(self._newest[1])

    @property
    def address(self) -> str:
        """The address from which the newest message came."""
        return native.property_of(self._newest[1], "Peer-Address")

    def _skip_rest(self) -> bool:
        """Discard a portion of an overlong message; return whether all of it is gone."""
        self._is_skipping = not wire.skip_parts(self._socket, _SKIP_AT_ONCE)
        return not self._is_skipping

    def send(self, routing_id: bytes, message: Message) -> Sent:
        """Hand a message to ZeroMQ, and return the outcome."""
        try:
            wire.send_now(self._socket, [routing_id, *message])
        except zmq.Again:
            return Sent.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.GONE
            raise
        return Sent.HANDED_OVER

    def close(self) -> None:
        """Close the socket; accepted messages get a second to leave."""
        for part in self._newest:
            native.free_message(part)
        self._socket.close()
        self._context.term()


def _refuse_path_in_use(endpoint: str) -> None:
    """Refuse an `ipc://` path on which a process listens, because ZeroMQ would silently take it over."""
    scheme, _, path = endpoint.partition("://")
    if scheme != "ipc" or not Path(path).is_socket():
        return
    with socketlib.socket(socketlib.AF_UNIX) as probe:
        if probe.connect_ex(path) == 0:
            raise zmq.ZMQError(zmq.EADDRINUSE)
