"""What is sent: lanes, each of some streams that always go together, and the inputs that are ready for them."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import zmq

from instep.bench.connection import Buffer, Connection
from instep.core.typing import F32, U64
from instep_client.protocol import wire
from instep_client.protocol.wire import Kind

_COLUMN = struct.Struct("<3Q")
_SMALL_BYTES = 4096
"""Smaller frames wait as `bytes`, which ZeroMQ takes quicker than a view."""


@dataclass(frozen=True, slots=True)
class Feed:
    """The inputs of a lane, ready to be sent; several lanes may share one.

    Attributes:
        x: float32 [timesteps, N, features]; who sends longer begins again.
        steps: timesteps in one message.
        messages: `x` in messages of so many.
    """

    x: F32
    steps: int
    messages: list[Buffer]

    @classmethod
    def of(cls, x: F32, steps: int = 1) -> Feed:
        """Of inputs [timesteps, N, features], the timesteps a multiple of `steps`."""
        x = np.ascontiguousarray(x)
        views = [wire.raw(x[at : at + steps]) for at in range(0, len(x), steps)]
        small = views[0].nbytes < _SMALL_BYTES
        return cls(x, steps, [view.tobytes() for view in views] if small else list(views))


class Lane:
    """N streams that always go together: one message of theirs is on its way at most, but for `open_loop`'s.

    Args:
        number: from 0 on; answers name it.
        handles: uint64 [N].
        feed: what it sends.
        first: the message of the feed that it begins with.
        once: whether it sends its feed once; else it begins again and again.
    """

    def __init__(self, number: int, handles: U64, feed: Feed, first: int = 0, once: bool = False) -> None:
        self.number, self.handles, self.feed, self.first, self.once = number, handles, feed, first, once
        self.frames = feed.steps * len(handles)
        """Of one message."""
        self.sent = 0
        """Messages."""
        self.answered = 0
        self.last: bytes | zmq.Frame = b""
        """The outputs of the newest answer, float32 [steps, N, outputs]."""
        self._messages = feed.messages
        self._request = number + 1
        self._header = self._packed(self._request)
        columns: U64 = np.zeros((len(handles), 3), np.uint64)
        columns[:, 0] = handles
        self._columns = columns.reshape(-1).view("u1").data
        self._seqs_and_acked = columns[:, 1:]
        self._handle = int(handles[0]) if len(handles) == 1 else None

    def _packed(self, request: int) -> bytes:
        steps, (_, streams, features) = self.feed.steps, self.feed.x.shape
        return wire.pack_header(Kind.STEP, request, steps, streams, features, wire.F32_NAME)

    @property
    def is_done(self) -> bool:
        """Whether all was sent."""
        return self.once and self.sent == len(self._messages)

    def send(self, connection: Connection) -> None:
        """Send the next message, all before it being answered: they are acknowledged."""
        x = self._messages[(self.first + self.sent) % len(self._messages)]
        if self._handle is None:
            connection.send(self._header, self._columns, x)
            self._seqs_and_acked += self.feed.steps
        else:
            seq = self.sent * self.feed.steps
            connection.send(self._header, _COLUMN.pack(self._handle, seq, seq), x)
        self.sent += 1

    def send_also(self, connection: Connection, request: int) -> None:
        """Send the next message of a lane of one stream though some before it are not answered."""
        assert self._handle is not None
        steps, at = self.feed.steps, (self.first + self.sent) % len(self._messages)
        columns = _COLUMN.pack(self._handle, self.sent * steps, self.answered * steps)
        connection.send(self._packed(request), columns, self._messages[at])
        self.sent += 1

    def outputs(self, size: int) -> F32:
        """The newest answer's outputs [steps, N, size]."""
        buffer = self.last.buffer if isinstance(self.last, zmq.Frame) else self.last
        return wire.array_frame(memoryview(buffer), "<f4", (self.feed.steps, len(self.handles), size), "y")


def opened(
    connection: Connection, feeds: Sequence[Feed], name: str, *, lanes: int | None = None, once: bool = False
) -> list[Lane]:
    """Open as many streams as `lanes` lanes take (one lane a feed if not given); lanes of one feed begin apart in it.

    Args:
        connection: which has said HELLO.
        feeds: the lanes' in turn.
        name: what the streams' names begin with.
        lanes: how many.
        once: whether each sends its feed once.
    """
    return list(_opened(connection, feeds, name, len(feeds) if lanes is None else lanes, once))


def _opened(connection: Connection, feeds: Sequence[Feed], name: str, lanes: int, once: bool) -> Iterator[Lane]:
    for number in range(lanes):
        feed = feeds[number % len(feeds)]
        handles = connection.open([f"{name}-{number}-{stream}" for stream in range(feed.x.shape[1])])
        yield Lane(number, handles, feed, first=number // len(feeds), once=once)
