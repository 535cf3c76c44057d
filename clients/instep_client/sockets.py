"""Shared by the clients of one event loop: a ZeroMQ context, which costs two threads, and one turn for all of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, Protocol
from weakref import WeakKeyDictionary

import zmq

from instep_client.connection import MAX_REPLY_BYTES
from instep_client.endpoint import EXAMPLES
from instep_client.protocol import multipart
from instep_client.protocol.errors import ConnectionFailed
from instep_client.protocol.wire import Message

OPTIONS: Final = {
    zmq.LINGER: 0,  # closing waits for the server's PONG instead, so that nothing ever blocks the event loop
    zmq.IPV6: 1,
    zmq.PROBE_ROUTER: 1,  # ZeroMQ reconnects in silence; the server answers its first message with HELLO_FIRST
    zmq.IMMEDIATE: 1,  # without it only the first connection begins with that message
    zmq.RECONNECT_IVL: 50,  # milliseconds, and up to as many again, drawn at random
    zmq.MAXMSGSIZE: MAX_REPLY_BYTES,
    zmq.RCVHWM: 65_536,  # replies: never more than the requests that the server's credit allows
    zmq.HEARTBEAT_IVL: 5_000,
    zmq.HEARTBEAT_TIMEOUT: 15_000,  # we give a silent server up after this
    zmq.HEARTBEAT_TTL: 15_000,  # and it us, even if it sends no heartbeats of its own
}


_RECEIVE_BURST: Final = 256
"""Messages of one socket taken before other tasks get their turn."""


class SocketUser(Protocol):
    """A client's driver, as the turns see it."""

    socket: zmq.Socket[bytes] | None
    backlog: deque[Message]
    """Messages that wait until the socket takes them."""

    def receive(self, at_most: int, /) -> None:
        """Take in messages."""

    def act(self) -> None:
        """Do the work that is due, and send."""

    def wake(self) -> None:
        """Act in the next turn of the loop."""


class Sockets:
    """The sockets of one event loop's clients. It does not hold the loop, with which it is forgotten."""

    def __init__(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, int(self._context.get(zmq.SOCKET_LIMIT)))
        self._open = 0
        self._due: list[SocketUser] = []
        self._after_tasks: list[SocketUser] = []

    @staticmethod
    def of(loop: asyncio.AbstractEventLoop) -> Sockets:
        """Those of a loop. Who has none open yet connects one before anything else happens in the loop."""
        sockets = shared.get(loop)
        if sockets is None:
            sockets = shared[loop] = Sockets()
        return sockets

    def connect(self, loop: asyncio.AbstractEventLoop, endpoint: str) -> zmq.Socket[bytes]:
        """A new socket, to be closed with `close`.

        Raises:
            ConnectionFailed: if the endpoint is invalid, or no socket can be made.
        """
        self._open += 1
        try:
            socket = self._context.socket(zmq.DEALER)
        except zmq.ZMQError as error:
            self._end_unless_used(loop)
            raise ConnectionFailed(f"this process cannot make a socket: {error}") from None
        for option, value in OPTIONS.items():
            socket.set(option, value)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close(loop, socket)
            raise ConnectionFailed(
                f"{endpoint!r} is no endpoint that can be reached ({error}): write {EXAMPLES}"
            ) from None
        return socket

    def close(self, loop: asyncio.AbstractEventLoop, socket: zmq.Socket[bytes]) -> None:
        """Close a socket."""
        socket.close()
        self._end_unless_used(loop)

    def act_in_next_turn(self, loop: asyncio.AbstractEventLoop, user: SocketUser) -> None:
        """Have a client act in the next turn of the loop, together with all others that asked for it."""
        self._due.append(user)
        if len(self._due) == 1:
            loop.call_soon(self._take_turn, loop)

    def act_after_tasks(self, loop: asyncio.AbstractEventLoop, user: SocketUser) -> None:
        """Have a client act in the turn of the loop after that of the tasks that are being woken now."""
        self._after_tasks.append(user)
        if len(self._after_tasks) == 1:
            loop.call_soon(self._pass_on, loop)

    def look(self, loop: asyncio.AbstractEventLoop, users: Sequence[SocketUser]) -> None:
        """Look which sockets are ready after their clients acted: a socket signals once, which acting may use up."""
        by_socket: dict[Any, SocketUser] = {user.socket: user for user in users if user.socket is not None}
        wanted = [
            (socket, multipart.READABLE_OR_WRITABLE if user.backlog else multipart.READABLE)
            for socket, user in by_socket.items()
        ]
        readable = []
        for socket, events in zmq.zmq_poll(wanted, 0):
            if events & multipart.READABLE:
                readable.append(by_socket[socket])
            else:
                by_socket[socket].wake()
        if readable:
            loop.call_soon(_receive, readable)

    def _pass_on(self, loop: asyncio.AbstractEventLoop) -> None:
        after_tasks, self._after_tasks = self._after_tasks, []
        if not self._due:
            loop.call_soon(self._take_turn, loop)
        self._due += after_tasks

    def _take_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        due, self._due = self._due, []
        for user in due:
            user.act()
        self.look(loop, due)

    def _end_unless_used(self, loop: asyncio.AbstractEventLoop) -> None:
        """Forget a socket; with the last one the context and its threads end."""
        self._open -= 1
        if self._open == 0:
            del shared[loop]
            self._context.term()


def _receive(users: Sequence[SocketUser]) -> None:
    for user in users:
        user.receive(_RECEIVE_BURST)


shared: Final[WeakKeyDictionary[asyncio.AbstractEventLoop, Sockets]] = WeakKeyDictionary()
"""`Sockets` by loop, while any client of the loop has a socket."""
