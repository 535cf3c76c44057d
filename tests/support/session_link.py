"""A session and a server's rules joined by two queues in memory, with a clock that a test turns."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from instep_client.connection import Call
from instep_client.frames import StepCall
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import FramesRefused, StreamEvicted
from instep_client.protocol.wire import COLUMN, Kind, ServerInfo
from instep_client.session import Session
from instep_client.streams import StreamHandle
from tests.support.fake_server import F32, INFO, FakeRules, Message, error
from tests.support.step_messages import parts

R = TypeVar("R")
PEER = b"peer"
X: F32 = np.arange(60, dtype=np.float32).reshape(20, 3)
"""Frames."""
BAD: F32 = np.array([np.nan, 0, 0], np.float32)


class Link:
    """Session here, rules there. Nothing moves unless a test says so; `settle` moves everything."""

    def __init__(self, info: ServerInfo = INFO, timeout_s: float = 10.0, greet: bool = True) -> None:
        self.session = Session("tcp://somewhere:1", "test", timeout_s, reconnect_s=0.0)
        self.rules = FakeRules(info)
        self.now = 1000.0
        self.to_server: deque[Message] = deque()
        self.to_client: deque[Message] = deque()
        if greet:
            self.settle()
            assert self.session.greeting.result() == info

    def advance(self, seconds: float = 0.0) -> list[Message]:
        """Turn the clock and let the session act; what it sent."""
        self.now += seconds
        self.session.advance(self.now)
        sent = [[bytes(frame) for frame in message] for message in self.session.outbox.take_messages()]
        self.to_server.extend(sent)
        return sent

    def serve(self, count: int | None = None) -> None:
        """The server reads messages, all or `count`."""
        for _ in range(len(self.to_server) if count is None else count):
            self.to_client.extend(answer for _, answer in self.rules.handle(PEER, self.to_server.popleft()))

    def deliver(self, *messages: Message) -> None:
        """The session receives messages; the next in the queue, if none are given."""
        for message in messages or [self.to_client.popleft()]:
            self.session.receive(message, self.now)

    def settle_client(self) -> None:
        """The session receives all that is on its way to it."""
        while self.to_client:
            self.deliver()

    def settle(self) -> None:
        """Until nobody has anything to say without the clock turning."""
        while self.advance() or self.to_server or self.to_client:
            self.serve()
            self.settle_client()

    def finish(self, call: Call[R]) -> R:
        """Settle, and the result of a call."""
        self.settle()
        assert call.done
        return call.result()

    def open(self, *names: str, initial: Any = None) -> StreamHandle:
        """A stream handle: a stream for one name, a group for more."""
        single = len(names) == 1
        return self.finish(self.session.open(names, initial, single))


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
