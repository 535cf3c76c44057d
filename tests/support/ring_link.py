"""A session and a ring server joined by connections that can be cut at any message, with a clock that a test turns."""

from __future__ import annotations

from collections import deque
from random import Random
from typing import Any, TypeVar

from instep_client.connection import Call, State
from instep_client.session import Session
from instep_client.streams import StreamHandle
from tests.support.fake_server import Message
from tests.support.ring_server import RingServer

R = TypeVar("R")
_PROBE: Message = [b""]
"""What ZeroMQ sends first on every connection that it makes."""


class RingLink:
    """Session here, server there; each socket of the session is a peer of its own at the server."""

    def __init__(
        self, server: RingServer | None = None, seed: int = 0, reconnect_s: float = 1000.0, name: str = "peer"
    ) -> None:
        self.server = server or RingServer()
        self.session = Session("tcp://somewhere:1", "test", 10.0, reconnect_s, Random(seed))
        self.now = 1000.0
        self.sockets = 0
        self._name = name
        self.peer = f"{name} 0".encode()
        """The present socket."""
        self.to_server: dict[bytes, deque[Message]] = {self.peer: deque([_PROBE])}
        """By peer; those of former sockets may still arrive."""
        self.to_client: deque[Message] = deque()
        self.run()

    def advance(self, seconds: float = 0.0) -> None:
        """Turn the clock and let the session act."""
        self.now += seconds
        self.session.advance(self.now)
        if self.session.take_reconnect():
            self.new_socket()
        for message in self.session.outbox.take_messages():
            self.to_server[self.peer].append([bytes(frame) for frame in message])

    def new_socket(self) -> None:
        """What is on its way to the client is lost; what is on its way to the server may arrive."""
        self.sockets += 1
        self.peer = f"{self._name} {self.sockets}".encode()
        self.to_server[self.peer] = deque([_PROBE])
        self.to_client.clear()

    def serve(self, peer: bytes | None = None) -> None:
        """The server reads one message."""
        source = self.peer if peer is None else peer
        self.send(self.server.handle(source, self.to_server[source].popleft()))

    def send(self, messages: list[tuple[bytes, Message]]) -> None:
        """The server sends; what is for former sockets is lost."""
        self.to_client.extend(message for peer, message in messages if peer == self.peer)

    def cut(self, noticed: bool = True) -> None:
        """The connection breaks: what is on its way is lost. ZeroMQ makes another, which the server does not know."""
        self.to_server[self.peer].clear()
        if noticed:
            self.server.drop(self.peer)
        self.new_socket()

    def deliver(self) -> None:
        """The session reads one message."""
        self.session.receive(self.to_client.popleft(), self.now)

    def run(self, *calls: Call[Any], at_most_s: float = 1000.0) -> None:
        """Nothing breaks, until nobody has anything to say; the clock turns while calls have not ended."""
        end = self.now + at_most_s
        while True:
            self.send(self.server.wake())
            self.advance()
            while self.to_server[self.peer] or self.to_client:
                if self.to_server[self.peer]:
                    self.serve()
                if self.to_client:
                    self.deliver()
                self.send(self.server.wake())
                self.advance()
            if all(call.done for call in calls) or self.now > end:
                return
            deadline = self.session.deadline()
            assert deadline is not None, "calls wait for nothing"
            self.now = max(self.now, deadline)

    def finish(self, call: Call[R]) -> R:
        """Run until the call has ended; its result."""
        self.run(call)
        assert call.done
        return call.result()

    def open(self, *names: str, initial: Any = None) -> StreamHandle:
        """A stream handle: a stream for one name, a group for more."""
        return self.finish(self.session.open(names, initial, len(names) == 1))


def lose(link: RingLink) -> None:
    """The server is restarted and says so at the next word."""
    link.server.restart()
    link.session.ping(link.now)
    link.advance()
    link.serve()
    link.deliver()
    assert link.session.state is State.RECONNECTING
