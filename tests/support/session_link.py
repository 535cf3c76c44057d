"""A session and a server's rules joined by queues in memory that can be cut, with a clock that a test turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Any, TypeVar

import numpy as np

from instep_client.connection import Call, State
from instep_client.frames import StepCall
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import FramesRefused, StreamEvicted
from instep_client.protocol.wire import COLUMN, Kind, ServerInfo
from instep_client.session import Session
from instep_client.streams import StreamHandle
from tests.support.fake_server import F32, INFO, RING_INFO, FakeRules, Message, error
from tests.support.step_messages import parts

R = TypeVar("R")
X: F32 = np.arange(60, dtype=np.float32).reshape(20, 3)
"""Frames."""
BAD: F32 = np.array([np.nan, 0, 0], np.float32)


class Link:
    """Session here, rules there; each socket of the session is a peer of its own. Nothing moves unless a test says so.

    Args:
        info: the server's limits; those of `rules`, if they are given.
        timeout_s: the session's.
        greet: whether to exchange the first messages.
        reconnect_s: how long the session tries to connect again; by default it ends with its connection.
        rules: a server that is there already.
        name: of the peer.
        seed: of the session's own dice.
    """

    def __init__(
        self,
        info: ServerInfo = INFO,
        timeout_s: float = 10.0,
        greet: bool = True,
        reconnect_s: float = 0.0,
        rules: FakeRules | None = None,
        name: str = "peer",
        seed: int = 0,
    ) -> None:
        self.rules = rules or FakeRules(info)
        self.session = Session("tcp://somewhere:1", "test", timeout_s, reconnect_s, Random(seed))
        self.now = 1000.0
        self.sockets = 0
        self._name = name
        self.queues: dict[bytes, deque[Message]] = {self.peer: deque()}
        """To the server, by peer; those of former sockets may still arrive."""
        self.to_client: deque[Message] = deque()
        if greet:
            self.run()
            assert self.session.greeting.done

    @property
    def peer(self) -> bytes:
        """The present socket."""
        return f"{self._name} {self.sockets}".encode()

    @property
    def to_server(self) -> deque[Message]:
        """What is on its way through the present socket."""
        return self.queues[self.peer]

    def advance(self, seconds: float = 0.0) -> list[Message]:
        """Turn the clock and let the session act; what it sent."""
        self.now += seconds
        self.session.advance(self.now)
        if self.session.take_reconnect():
            self.new_socket()
        sent = [[bytes(frame) for frame in message] for message in self.session.outbox.take_messages()]
        self.to_server.extend(sent)
        return sent

    def new_socket(self) -> None:
        """What is on its way to the client is lost; what is on its way to the server may arrive."""
        self.sockets += 1
        self.queues[self.peer] = deque([[b""]])  # what ZeroMQ sends first on every connection that it makes
        self.to_client.clear()

    def cut(self, noticed: bool = True) -> None:
        """The connection breaks: what is on its way is lost. ZeroMQ makes another, which the server does not know."""
        self.to_server.clear()
        if noticed:
            self.rules.drop(self.peer)
        self.new_socket()

    def serve(self, count: int | None = None, peer: bytes | None = None) -> None:
        """The server reads messages of a peer, by default of the present one, all or `count`."""
        source = self.peer if peer is None else peer
        for _ in range(len(self.queues[source]) if count is None else count):
            self.send(self.rules.handle(source, self.queues[source].popleft()))

    def send(self, messages: list[tuple[bytes, Message]]) -> None:
        """The server sends; what is for former sockets is lost."""
        self.to_client.extend(message for peer, message in messages if peer == self.peer)

    def deliver(self, *messages: Message) -> None:
        """The session receives messages; the next in the queue, if none are given."""
        for message in messages or [self.to_client.popleft()]:
            self.session.receive(message, self.now)

    def settle_client(self) -> None:
        """The session receives all that is on its way to it."""
        while self.to_client:
            self.deliver()

    def run(self, *calls: Call[Any], at_most_s: float = 1000.0) -> None:
        """Until nobody has anything to say; the clock turns while calls have not ended."""
        end = self.now + at_most_s
        while True:
            self.send(self.rules.wake())
            while self.advance() or self.to_server or self.to_client:
                self.serve(min(1, len(self.to_server)))
                if self.to_client:
                    self.deliver()
                self.send(self.rules.wake())
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


def lasting(info: ServerInfo = RING_INFO, reconnect_s: float = 1000.0, **options: Any) -> Link:
    """A link whose session connects again."""
    return Link(info, reconnect_s=reconnect_s, **options)


def lose(link: Link) -> None:
    """The server is restarted and says so at the next word."""
    link.rules.restart()
    link.session.ping(link.now)
    link.advance()
    link.serve(1)
    link.deliver()
    assert link.session.state is State.RECONNECTING


def headers(messages: Sequence[Message]) -> list[list[Any]]:
    """The headers of messages as `parts` reads them, with the kind as `Kind`."""
    read = [parts(message)[0] for message in messages]
    return [[Kind(header[0]), *header[1:]] for header in read]


def refuse(link: Link, code: Code, retry_after_us: int = 0) -> None:
    """The server refuses the next message in the queue."""
    request = parts(link.to_server.popleft())[0][1]
    link.to_client.append(error(request, code, retry_after_us))


def limited(credit: int = 16_384, block: int = 16_384) -> Link:
    """A link to a server with these limits."""
    return Link(replace(INFO, credit_frames=credit, max_block_frames=block))


def blocks(messages: list[Message]) -> list[tuple[list[tuple[int, int]], list[Any]]]:
    """The columns (handle, seq) and x of every STEP."""
    read = []
    for header, arrays in map(parts, messages):
        if header[0] == Kind.STEP:
            x = np.frombuffer(arrays[1], "<f4").reshape(header[2:5])
            read.append((np.frombuffer(arrays[0], COLUMN)[["handle", "seq"]].tolist(), x[:, :, 0].tolist()))
    return read


def sizes(messages: list[Message]) -> list[tuple[int, int]]:
    """(T, N) of every STEP."""
    return [(header[2], header[3]) for header in headers(messages) if header[0] is Kind.STEP]


def refusal(call: StepCall) -> FramesRefused:
    """What a call failed with."""
    assert isinstance(call.error, FramesRefused)
    return call.error


def ending(call: StepCall) -> tuple[StreamEvicted, F32]:
    """What a call failed with because a stream has ended, and the outputs of the others."""
    assert isinstance(call.error, StreamEvicted)
    assert call.error.outputs is not None
    return call.error, call.error.outputs
