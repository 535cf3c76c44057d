"""Requests that users make: the questions about the server, and what requests about streams have in common.

A new kind of request is a verb of `Session` that asks a `Question`, or one that makes a class of its own, here or in
`openings.py` or `changes.py`. The class names its messages and their replies, and says what a reply, a refusal and a
lost connection mean to it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from instep_client import replies
from instep_client.arrays import Indices, good_names
from instep_client.calls import Request
from instep_client.connection import Connection
from instep_client.handles import StreamHandle, TurnRequest
from instep_client.pending import parts
from instep_client.protocol import wire
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import (
    ClientClosed,
    InstepError,
    StreamEvicted,
    StreamRefused,
)
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import U64, Frame, Header, Kind, Message
from instep_client.replies import ColumnError, ErrorReply
from instep_client.streams import ENDING

R = TypeVar("R")


class Question(Request[R]):
    """A request of one message that is about no streams; `decode` reads its reply, of kind `reply`."""

    def __init__(
        self,
        connection: Connection,
        kind: Kind,
        reply: Kind,
        decode: Callable[[Header, Sequence[Frame]], R],
        *fields: int | str,
        frames: Sequence[Frame] = (),
    ) -> None:
        self.connection = connection
        self.kind, self.reply = kind, reply
        self._decode = decode
        self._fields = fields
        self._frames = frames

    def ask(self) -> None:
        self.connection.pending.ask(self, *self._fields, frames=self._frames)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self.finish(self._decode(header, frames))


class PingCall(Request[float]):
    """One round trip; the result is its seconds."""

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, connection: Connection, now: float) -> None:
        self._connection = connection
        self._sent_at = now

    def ask(self) -> None:
        self._sent_at = max(self._sent_at, self._connection.now)  # what was lost with a connection does not count
        self._connection.pending.ask(self)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self.finish(self._connection.now - self._sent_at)


class StreamsRequest(Request[R]):
    """A request about streams: one message for each part of them. It ends when every part was answered.

    Args:
        connection: over which it is asked.
        names: of the streams it is about, or will open.
        handle: whose streams it is about, if it is about streams of this client.
    """

    def __init__(self, connection: Connection, names: Sequence[str], handle: StreamHandle | None = None) -> None:
        self.connection = connection
        self.names = good_names(names)
        self.handle = handle
        self.parts_left = 0
        self.refusal: ColumnError | None = None
        """The first refused stream; its column counts the request's streams."""
        self.asked_before = False
        """Whether it was asked over a connection that was lost, and may have been done then."""

    # What a subclass says of itself.

    @abstractmethod
    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        """The header's fields after N, and the frames, of a message about some of its streams."""

    @abstractmethod
    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        """Take what a reply gives for some of its streams; which of them were refused."""

    def _slept(self, which: Indices) -> None:
        """Ask again for streams that hibernated when the message came; a read names them then, and wakes nobody."""
        self._send(which)

    def _settled(self, part: Indices, refused: list[ColumnError]) -> None:
        """Streams were granted or refused for good."""

    @abstractmethod
    def _conclude(self) -> None:
        """Every part was answered: end it."""

    # What all of them do.

    def ask(self) -> None:
        ended = None if self.handle is None else self.connection.table.why_any_ended(self.handle.rows)
        if ended is not None:
            self._end(ended)
        else:
            self._begin()
            self._send(np.arange(len(self.names)))

    def _begin(self) -> None:
        """Forget what was answered over an earlier connection."""
        self.parts_left = 0
        self.refusal = None

    def _send(self, which: Indices) -> None:
        for piece in parts(len(which), self.connection.info):
            part = which[piece]
            fields, frames = self._encode(part)
            self.parts_left += 1
            self.connection.pending.ask(self, len(part), *fields, frames=frames, part=part)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        failures = self._decode(part, header, frames)
        refused = [failure._replace(column=int(part[failure.column])) for failure in failures]
        asleep = {each.column for each in refused if self._only_sleeps(each)}
        if asleep:
            refused = [each for each in refused if each.column not in asleep]
            again = np.array(sorted(asleep), np.int64)
            part = np.setdiff1d(part, again)
            self._slept(again)
        for each in refused:
            self._note(each)
        self._settled(part, refused)
        self._part_answered()

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        self._note(ColumnError(int(part[0]), 0, refusal.code, refusal.sentence, 0))
        self._part_answered()

    def lost(self) -> bool:
        self.asked_before = True
        return True

    def _names_of(self, part: Indices) -> bytes:
        return wire.pack_names([self.names[which] for which in part])

    def _handles_of(self, part: Indices) -> U64:
        assert self.handle is not None
        handles: U64 = self.connection.table.numbers[self.handle.rows[part]]
        return handles

    def _only_sleeps(self, refused: ColumnError) -> bool:
        """Whether a stream of its handle was refused only because it hibernated when the message came."""
        if self.handle is None or self.handle.closed or refused.code is not Code.UNKNOWN_STREAM:
            return False
        return bool(self.connection.table.asleep[self.handle.rows[refused.column]])

    def _note(self, refused: ColumnError) -> None:
        """A stream was refused for good; the first one is told."""
        if self.refusal is None or refused.column < self.refusal.column:
            self.refusal = refused

    def _why_refused(self) -> InstepError | None:
        """What it fails with, if a stream was refused."""
        return None if self.refusal is None else self._explain(self.refusal, self.names[self.refusal.column])

    def _explain(self, refused: ColumnError, name: str) -> InstepError:
        if self.handle is None or refused.code not in ENDING:
            return StreamRefused(refused.code, refused.sentence, name)
        rows = self.handle.rows[[refused.column]]
        known = None if self.handle.closed else self.connection.table.why_any_ended(rows)
        return known or StreamEvicted(refused.code, refused.sentence, name)

    def _end(self, error: InstepError | None = None) -> None:
        """It has ended, with a result unless an error is given."""
        if error is not None:
            self.fail(error)
        self.connection.pending.woken.append(self)

    def _part_answered(self) -> None:
        self.parts_left -= 1
        if self.parts_left == 0:
            self._conclude()


class TurnCall(StreamsRequest[R], TurnRequest):
    """A request about a handle's streams that waits for its turn."""

    handle: StreamHandle

    def _slept(self, which: Indices) -> None:
        """Ask for streams that hibernate as they wake: the server may not have room for all of them at once."""
        self.parts_left += len(which)
        if len(which):
            self.connection.sleepers.hold(self, which)

    def woke(self, which: Indices) -> None:
        self.parts_left -= len(which)
        self._send(which)

    def _end(self, error: InstepError | None = None) -> None:
        super()._end(error)
        self.connection.flow.release(self.handle)


class ReadStateCall(StreamsRequest[tuple[U64, U8]]):
    """A read of states: of a handle's streams, or of anybody's by name. It changes nothing, and wakes nobody.

    The result is the next seqs uint64 [N] and rows of states [N, row_bytes].
    """

    kind, reply = Kind.READ_STATE, Kind.STATE_READ

    def __init__(self, connection: Connection, names: Sequence[str], handle: StreamHandle | None = None) -> None:
        super().__init__(connection, names, handle)
        self._seqs: U64 = np.zeros(len(self.names), np.uint64)
        self._states = connection.info.state.missing(len(self.names))
        self._is_read = np.zeros(len(self.names), np.bool_)
        self._asked: U64 = np.zeros(len(self.names), np.uint64)
        """The server's handles for the streams when they were asked for; 0 of those that were named."""

    def ask(self) -> None:
        """Ask, unless the handle was closed before it was asked again: other streams may be in its rows."""
        if self.handle is not None and self.handle.closed:
            self._end(ClientClosed(f"stream {self.names[0]!r} was closed before its state was read"))
        else:
            super().ask()

    def _begin(self) -> None:
        super()._begin()
        self._is_read[:] = False

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        if self.handle is None or self.handle.has_sleepers:  # one that hibernates has no handle
            self._asked[part] = 0
            return (1,), [self._names_of(part)]
        self._asked[part] = self._handles_of(part)
        return (0,), [self._asked[part].tobytes()]

    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        state = self.connection.info.state
        if self._states.shape[1] != state.row_bytes:  # the model was swapped for one with another state
            self._states = state.missing(len(self.names))
            self._send(np.flatnonzero(self._is_read))
            self._is_read[:] = False
        self._is_read[part] = True
        self._seqs[part], self._states[part], failures = replies.state_read(header, frames, len(part), state.row_bytes)
        return failures

    def _only_sleeps(self, refused: ColumnError) -> bool:
        """Also if it is awake again by the time of the answer; a sleeper that was named and is unknown is no more."""
        asked, table = self._asked[refused.column], self.connection.table
        if self.handle is None or self.handle.closed or not asked or refused.code is not Code.UNKNOWN_STREAM:
            return False
        row = self.handle.rows[refused.column]
        return bool(table.asleep[row] or table.numbers[row] != asked)

    def _conclude(self) -> None:
        error = self._why_refused()
        if error is None:
            self.finish((self._seqs, self._states))
        self._end(error)
