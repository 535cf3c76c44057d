"""The client's rules without sockets, clock or event loop: calls and messages in, messages and ended calls out.

A driver (`driver.py` is one) does five things and nothing else:

1. hands every message to `receive`, and lets users make calls (`open`, `step`, `close`, …), each giving a `Call`;
2. calls `advance(now)` after that, and when `deadline()` has come;
3. connects a new socket in place of the old one when `take_reconnect` says so;
4. sends what `take_messages` gives, in order;
5. wakes what `take_woken` gives: calls that ended or were sent, and stream handles whose outputs changed.

`now` is any monotonic clock in seconds. The rules of sending frames are in `flow.py` and `in_flight.py`, those of other
requests in `openings.py`, `changes.py` and `state_reads.py`, those of a lost connection in `connection.py` and
`reconnection.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy.typing as npt

from instep_client import arrays
from instep_client.calls import Call, ListCall, OutputsCall, PingCall, StatisticsCall
from instep_client.connection import State as State
from instep_client.listener import Listener
from instep_client.protocol import wire
from instep_client.protocol.errors import ClientClosed, InvalidInput
from instep_client.protocol.wire import U64
from instep_client.requests import CloseCall, ForkCall, OpenCall, ReadStateCall, ResetCall
from instep_client.states import State as StreamState
from instep_client.states import state_rows
from instep_client.steps import StepCall
from instep_client.streams import StreamHandle


class Session(Listener):
    """The verbs that users call.

    Each method raises at once when a thing cannot be asked, and nothing is sent before `advance`. What is asked while
    there is no connection waits for the next one.
    """

    def open(
        self,
        names: Sequence[str],
        initial_states: StreamState | None,
        single: bool,
        first_seqs: npt.ArrayLike | None = None,
    ) -> OpenCall:
        """Open streams: one, with a state, or a group, with states of N streams; the initial one where None.

        Raises:
            InvalidInput: for bad or repeated names, states of another shape, or bad seqs.
        """
        self._check_open()
        seqs = None if first_seqs is None else arrays.counts(first_seqs, len(names), "first seqs")
        call = self._openings.open(names, initial_states, single, seqs)
        self._ask(call)
        return call

    def resume(
        self,
        names: Sequence[str],
        have: npt.ArrayLike | None,
        epochs: npt.ArrayLike,
        take_over: bool,
        single: bool,
    ) -> OpenCall:
        """Resume streams of which the user has the outputs of seqs below `have`, all that there are where None.

        Raises:
            InvalidInput: for bad or repeated names, or bad numbers.
        """
        self._check_open()
        call = self._openings.resume(names, have, epochs, take_over, single)
        self._ask(call)
        return call

    def fork(self, handle: StreamHandle, names: Sequence[str]) -> ForkCall:
        """Copy a handle's streams, as they are after everything sent through it, to new ones.

        Raises:
            InvalidInput: for bad or repeated names, or another number of them.
            StreamEvicted: when the server ended one of the streams.
            ClientClosed: when the handle was closed.
        """
        self._check_handle(handle)
        call = self._openings.fork(handle, names)
        self._ask_in_turn(call)
        return call

    def step(
        self, handle: StreamHandle, x: npt.ArrayLike, rows: npt.ArrayLike | None = None, keep: bool = False
    ) -> StepCall:
        """Send frames of a handle's streams; with `keep` the outputs wait to be taken with `take`.

        A handle of one stream takes [features] or [T, features]; a group [N, features] or [T, N, features], where N is
        the number of `rows`, or of all its streams.

        Raises:
            InvalidInput: for another shape, or values that float32 cannot hold.
            StreamEvicted: when the server ended one of the streams.
            ClientClosed: when the handle was closed, or finished and `keep` is set.
        """
        self._check_open()
        info = self.info
        _check_not_closed(handle)
        if keep and handle.finished:
            raise ClientClosed(f"stream {handle.names[0]!r} was finished; nothing more can be sent through it")
        table_rows = handle.rows
        if rows is not None:
            table_rows = handle.rows[arrays.row_indices(rows, len(handle.rows))]
        if handle.single:
            frames, prefix = arrays.stream_frames(x, info.features)
        else:
            frames, prefix = arrays.group_frames(x, len(table_rows), info.features)
        if handle.has_ended:
            self._refuse_ended(table_rows)
        call = StepCall(handle, table_rows, frames, prefix, info.outputs, self._table.stamp(), keep)
        self._flow.submit(call)
        return call

    def finish(self, handle: StreamHandle) -> None:
        """Nothing more will be sent with `keep`; the outputs end after those of what was."""
        handle.finished = True
        self._outbox.wake(handle)

    def take(self, handle: StreamHandle) -> OutputsCall | None:
        """The next kept call, if it is done. None means: wait until the handle is woken, and ask again."""
        return self._flow.take(handle)

    def outputs_end(self, handle: StreamHandle) -> bool:
        """Whether `take` will never give anything more.

        Raises:
            InstepError: when that is because the stream has ended or the session is over.
        """
        if handle.results:
            return False
        if handle.finished or handle.closed:
            return True
        if self.state is State.ENDED:
            raise self._failure[0](self._failure[1])
        if handle.has_ended:
            self._refuse_ended(handle.rows)
        return False

    def read_state(self, handle: StreamHandle) -> ReadStateCall:
        """Read the states of a handle's streams, without waiting for frames that were sent.

        Raises:
            StreamEvicted: when the server ended one of the streams.
            ClientClosed: when the handle was closed.
        """
        self._check_handle(handle)
        call = self._state_reads.by_handle(handle)
        self._ask(call)
        return call

    def read_state_by_name(self, names: Sequence[str]) -> ReadStateCall:
        """Read the states of streams, whoever owns them.

        Raises:
            InvalidInput: for bad or repeated names.
        """
        self._check_open()
        call = self._state_reads.by_name(names)
        self._ask(call)
        return call

    def reset(self, handle: StreamHandle, states: npt.ArrayLike | None) -> ResetCall:
        """Give a handle's streams other states, [L, H] or [N, L, H], zeros if None, after everything sent through it.

        Raises:
            InvalidInput: for states of another shape.
            StreamEvicted: when the server ended one of the streams.
            ClientClosed: when the handle was closed.
        """
        self._check_handle(handle)
        given = None
        if states is not None:
            given = state_rows(states, self.info.state, None if handle.single else len(handle.rows))
        call = ResetCall(handle, given)
        self._ask_in_turn(call)
        return call

    def close(self, handle: StreamHandle) -> CloseCall:
        """Close a handle after everything sent through it was answered; the result is its final states [N, L × H].

        Raises:
            ClientClosed: when it was closed before.
            StreamEvicted: when it is one stream, and the server has ended it.
        """
        self._check_open()
        _check_not_closed(handle)
        handle.closing = True
        call = CloseCall(handle, self.info.state)
        self._ask_in_turn(call)
        if handle.single and handle.has_ended:
            self._refuse_ended(handle.rows)  # the call stays, to give the row back when nothing is unanswered
        return call

    def ping(self, now: float) -> PingCall:
        """Measure a round trip."""
        self._check_open()
        call = PingCall(now)
        self._ask(call)
        return call

    def statistics(self) -> StatisticsCall:
        """Ask for the server's numbers."""
        self._check_open()
        call = StatisticsCall()
        self._ask(call)
        return call

    def list_streams(self, cursor: int, most: int, place: int, prefix: str) -> ListCall:
        """Ask for a page of the server's streams.

        Args:
            cursor: 0 for the first page, else what the page before said.
            most: streams.
            place: a `wire.Place`, or 0 for any.
            prefix: what their names begin with.

        Raises:
            InvalidInput: for a prefix that no name can begin with.
        """
        self._check_open()
        if len(prefix.encode()) > wire.MAX_NAME_BYTES:
            raise InvalidInput(f"names have at most {wire.MAX_NAME_BYTES} bytes, and so has what they begin with")
        call = ListCall(cursor, most, place, prefix)
        self._ask(call)
        return call

    def cancel(self, call: Call[Any]) -> None:
        """Nobody waits for a call any more. What was sent counts as sent, and its answer is dropped when it comes."""
        if self.state in (State.OPEN, State.RECONNECTING):
            if isinstance(call, OpenCall):
                self._openings.cancel(call)
            elif isinstance(call, StepCall):
                self._flow.withdraw(call)

    def next_seqs(self, handle: StreamHandle) -> U64:
        """The seq that each stream of a handle sends next."""
        return self._table.next_seqs(handle)

    def epochs(self, handle: StreamHandle) -> U64:
        """The epoch under which each stream of a handle is held; they change with the connection."""
        return self._table.epochs(handle)

    def _check_handle(self, handle: StreamHandle) -> None:
        self._check_open()
        _check_not_closed(handle)
        if handle.has_ended:
            self._refuse_ended(handle.rows)

    def _refuse_ended(self, rows: arrays.Indices) -> None:
        for row in rows[self._table.ended[rows] != 0].tolist():
            raise self._table.why_ended(row)


def _check_not_closed(handle: StreamHandle) -> None:
    if handle.closing:
        raise ClientClosed(f"stream {handle.names[0]!r} was closed; open it again to send more")
