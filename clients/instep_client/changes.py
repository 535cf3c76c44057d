"""Requests that change streams: other states for them, and their end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from instep_client import arrays
from instep_client.outbox import MAX_REPLY_BYTES, Outbox, parts
from instep_client.protocol.errors import StreamEvicted, StreamRefused
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import CLOSING, HAVE_ALL, U64, Kind, ServerInfo, raw
from instep_client.replies import ColumnError
from instep_client.requests import CloseCall, ResetCall
from instep_client.sleepers import Sleepers, without_columns
from instep_client.streams import ENDING, HANDLE, OpenStreams, StreamHandle


class Changes:
    """The RESET and CLOSE requests of one session.

    Args:
        table: the streams.
        info: what the server takes.
        outbox: where requests go.
        sleepers: wakes streams that hibernate.
        answered: told of a stream handle for which a RESET or CLOSE was answered.
    """

    def __init__(
        self,
        table: OpenStreams,
        info: ServerInfo,
        outbox: Outbox,
        sleepers: Sleepers,
        answered: Callable[[StreamHandle], None],
    ) -> None:
        self._table = table
        self._sleepers = sleepers
        self._outbox = outbox
        self._answered = answered
        self._awake: dict[ResetCall | CloseCall, list[int]] = {}
        """Which streams of calls have woken since they were asked for."""
        self._state = info.state
        row_bytes = self._state.row_bytes
        self._most = min(info.max_message_bytes // max(CLOSING.itemsize, row_bytes), MAX_REPLY_BYTES // row_bytes)

    def ask(self, call: ResetCall | CloseCall) -> None:
        """Ask for what a call wants; again, when it was asked before over a connection that is lost."""
        handle = call.handle
        wanted = np.arange(len(handle.rows))
        if isinstance(call, CloseCall):  # those that the server has ended or closed need no closing
            wanted = np.flatnonzero(
                (self._table.ended[handle.rows] == 0) & (self._table.columns[handle.rows, HANDLE] != 0)
            )
        asleep = self._table.asleep[handle.rows[wanted]]
        pieces = [wanted[~asleep][part] for part in parts(int((~asleep).sum()), self._most)]
        call.begin(len(pieces))
        for part in pieces:
            self._ask(call, part)
        self._ask_when_awake(call, wanted[asleep])
        if not call.parts_left:
            self._end(call)

    def _ask_when_awake(self, call: ResetCall | CloseCall, wanted: arrays.Indices) -> None:
        """Ask for streams that hibernate as they wake: the server may not have room for all of them at once."""
        call.parts_left += len(wanted)
        for index in wanted.tolist():
            self._sleepers.wake(call.handle.rows[[index]], partial(self._woke, call, index), call)

    def _woke(self, call: ResetCall | CloseCall, index: int) -> None:
        self._awake.setdefault(call, []).append(index)

    def lost(self) -> list[ResetCall | CloseCall]:
        """The connection is lost: calls of which streams are awake and were not asked for, to be asked anew."""
        awake, self._awake = self._awake, {}
        return list(awake)

    def advance(self) -> None:
        """Ask for the streams that are awake now."""
        awake, self._awake = self._awake, {}
        for call, indices in awake.items():
            pieces = [np.array(indices, np.int64)[part] for part in parts(len(indices), self._most)]
            call.parts_left -= len(indices) - len(pieces)
            for part in pieces:
                self._ask(call, part)

    def _ask(self, call: ResetCall | CloseCall, part: arrays.Indices) -> None:
        handles = self._table.columns[call.handle.rows[part], HANDLE]
        if isinstance(call, ResetCall):
            states = b"" if call.states is None else raw(call.states[part])
            has_states = int(call.states is not None)
            self._outbox.ask(Kind.RESET, call, len(part), has_states, frames=[handles.tobytes(), states], part=part)
        else:
            self._outbox.ask(Kind.CLOSE, call, len(part), frames=[_closings(handles)], part=part)

    def close_all(self) -> None:
        """Close every stream that does not hibernate; nobody waits for the answer."""
        live = self._table.live_rows()
        self.close_handles(self._table.columns[live[~self._table.asleep[live]], HANDLE])

    def close_handles(self, handles: U64) -> None:
        """Close streams by their handles; nobody waits for the answer."""
        for part in parts(len(handles), self._most):
            self._outbox.ask(Kind.CLOSE, None, len(part), frames=[_closings(handles[part])])

    def changed(self, call: ResetCall, part: arrays.Indices, failures: list[ColumnError]) -> None:
        """CHANGED came for a part of a call."""
        if len(asleep := self._sleepers.are_asleep(call.handle.rows[part], failures)):
            part, failures = self._ask_again(call, part, failures, asleep)
        for column, _, code, sentence, _ in failures[:1]:
            call.note(int(part[column]), code, sentence)
        self.part_answered(call)

    def _ask_again(
        self, call: ResetCall | CloseCall, part: arrays.Indices, failures: list[ColumnError], asleep: arrays.Indices
    ) -> tuple[arrays.Indices, list[ColumnError]]:
        """Ask once more for the columns of streams that hibernated, when they are awake; the others of the part."""
        self._ask_when_awake(call, part[asleep])
        return without_columns(part, failures, asleep)

    def closed(self, call: CloseCall, part: arrays.Indices, finals: U8, failures: list[ColumnError]) -> None:
        """CLOSED came for a part of a call."""
        if len(asleep := self._sleepers.are_asleep(call.handle.rows[part], failures)):
            finals = np.delete(finals, asleep, axis=0)
            part, failures = self._ask_again(call, part, failures, asleep)
        call.finals[part] = finals
        is_closed = np.ones(len(part), np.bool_)
        for column, _, code, sentence, _ in failures:
            index = int(part[column])
            call.finals[index] = self._state.missing(1)
            is_closed[column] = code in ENDING
            if call.handle.single or code not in ENDING:
                call.note(index, code, sentence)
        self._table.columns[call.handle.rows[part[is_closed]], HANDLE] = 0
        self.part_answered(call)

    def part_answered(self, call: ResetCall | CloseCall) -> None:
        """A part of a call was answered, or refused."""
        if call.part_answered():
            self._end(call)

    def _end(self, call: ResetCall | CloseCall) -> None:
        handle = call.handle
        row = int(handle.rows[0])
        if isinstance(call, CloseCall) and handle.single and self._table.ended[row]:
            call.fail(self._table.why_ended(row))
        elif call.refusal is not None:
            index, code, sentence, _ = call.refusal
            has_ended = code in ENDING and not isinstance(call, CloseCall)
            call.fail((StreamEvicted if has_ended else StreamRefused)(code, sentence, handle.names[index]))
        elif isinstance(call, CloseCall):
            call.finish(call.finals)
        else:
            call.finish(None)
        if isinstance(call, CloseCall):
            self._close(handle, call.refusal is not None and call.refusal.code not in ENDING)
        self._answered(handle)
        self._outbox.wake(call)
        self._outbox.wake(handle)

    def _close(self, handle: StreamHandle, was_refused: bool) -> None:
        if was_refused:
            handle.closing = False  # the streams are as they were: the user may try again
        else:
            self._table.remove(handle)


def _closings(handles: U64) -> bytes:
    """Of streams of which everything that was sent is answered: other outputs are not wanted."""
    closings = np.zeros(len(handles), CLOSING)
    closings["handle"], closings["have"] = handles, HAVE_ALL
    return closings.tobytes()
