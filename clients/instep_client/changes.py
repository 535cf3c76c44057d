"""Requests that change a handle's streams: other states for them, and their end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from instep_client import replies
from instep_client.arrays import Indices
from instep_client.connection import Connection
from instep_client.farewell import closings
from instep_client.handles import StreamHandle
from instep_client.protocol.errors import InstepError, StreamEvicted
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import Frame, Header, Kind, Message, raw
from instep_client.replies import ColumnError
from instep_client.requests import TurnCall
from instep_client.states import State, state_rows
from instep_client.streams import ENDING


class ResetCall(TurnCall[None]):
    """Other states for a handle's streams, initial ones if None, after everything sent through it."""

    kind, reply = Kind.RESET, Kind.CHANGED

    def __init__(self, connection: Connection, handle: StreamHandle, states: State | None) -> None:
        super().__init__(connection, handle.names, handle)
        count = None if handle.single else len(handle.rows)
        self._states = None if states is None else state_rows(states, connection.info.state, count)

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        states = b"" if self._states is None else raw(self._states[part])
        return (int(self._states is not None),), [self._handles_of(part).tobytes(), states]

    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        return replies.changed(header, frames, len(part))

    def _conclude(self) -> None:
        error = self._why_refused()
        if error is None:
            self.finish(None)
        self._end(error)


class CloseCall(TurnCall[U8]):
    """The closing of a handle; the result is final states [N, row_bytes], `missing` where streams had ended."""

    kind, reply = Kind.CLOSE, Kind.CLOSED
    needs_all_awake = False  # it wakes its streams itself, some at a time: the server may not have room for all

    def __init__(self, connection: Connection, handle: StreamHandle) -> None:
        super().__init__(connection, handle.names, handle)
        handle.closing = True
        self._finals = connection.info.state.missing(len(handle.rows))

    def ask(self) -> None:
        """Ask for those streams that the server has not ended or closed, when they are awake."""
        self._begin()
        table, rows = self.connection.table, self.handle.rows
        wanted = np.flatnonzero((table.ended[rows] == 0) & (table.numbers[rows] != 0))
        asleep = table.asleep[rows[wanted]]
        self._send(wanted[~asleep])
        self._slept(wanted[asleep])
        if not self.parts_left:
            self._conclude()

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        return (), [closings(self._handles_of(part))]

    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        state = self.connection.info.state
        if self._finals.shape[1] != state.row_bytes:  # the model was swapped for one with another state
            self._finals = state.missing(len(self.handle.rows))
        self._finals[part], failures = replies.closed(header, frames, len(part), state.row_bytes)
        return failures

    def _settled(self, part: Indices, refused: list[ColumnError]) -> None:
        """Streams were closed, had ended, or could not be closed."""
        which = [each.column for each in refused]
        self._finals[which] = self.connection.info.state.missing(len(which))
        closed = np.setdiff1d(part, [each.column for each in refused if each.code not in ENDING])
        self.connection.table.numbers[self.handle.rows[closed]] = 0

    def _note(self, refused: ColumnError) -> None:
        """Of a group, streams that have ended have no final state, and are no reason to fail."""
        if self.handle.single or refused.code not in ENDING:
            super()._note(refused)

    def _conclude(self) -> None:
        ended = self.connection.table.why_any_ended(self.handle.rows) if self.handle.single else None
        error = ended or self._why_refused()
        if error is None:
            self.finish(self._finals)
        if self.refusal is not None and self.refusal.code not in ENDING:
            self.handle.closing = False  # the streams are as they were: the user may try again
        else:
            self.connection.table.remove(self.handle)
        self._end(error)
        self.connection.pending.woken.append(self.handle)

    def streams_ended(self, error: StreamEvicted) -> bool:
        """A single stream's close fails, and stays to give the row back when nothing is unanswered."""
        if self.handle.single:
            self.fail(error)
        return False


class Discard(CloseCall):
    """The closing of a handle that nobody holds."""

    def __init__(self, connection: Connection, handle: StreamHandle, then: Callable[[], None] | None = None) -> None:
        super().__init__(connection, handle)
        self._then = then
        """Called when it was done or has failed."""

    def finish(self, result: U8) -> None:
        super().finish(result)
        self._go_on()

    def fail(self, error: InstepError) -> None:
        super().fail(error)
        self._go_on()

    def _go_on(self) -> None:
        then, self._then = self._then, None
        if then is not None:
            then()
