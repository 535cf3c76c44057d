"""The client's rules without sockets, clock or event loop: calls and messages in, messages and ended calls out.

A driver (`driver.py` is one) does five things and nothing else:

1. hands every message to `receive`, and lets users make calls (`open`, `step`, `close`, …), each giving a `Call`;
2. calls `advance(now)` after that, and when `deadline()` has come;
3. connects a new socket in place of the old one when `take_reconnect` says so;
4. sends what `pending.take_messages` gives, in order;
5. wakes what `pending.take_woken` gives: calls that ended or were sent, and stream handles whose outputs changed.

`now` is any monotonic clock in seconds. `connection.py` has the rules of messages, silence and lost connections,
`flow.py` and `in_flight.py` those of sending frames. Every other request is an object that knows how it is sent and
what its replies mean; its class is in `requests.py`, `openings.py` or `changes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy.typing as npt

from instep_client import arrays, replies
from instep_client.calls import Call, Request
from instep_client.changes import CloseCall, ResetCall
from instep_client.connection import Connection
from instep_client.farewell import Farewell
from instep_client.handles import StepCall, StreamHandle, TurnRequest
from instep_client.liveness import ENDED, OPEN, RECONNECTING
from instep_client.openings import ForkCall, OpenCall, Opening, ResumeCall
from instep_client.protocol.errors import ClientClosed, InvalidInput
from instep_client.protocol.wire import MAX_NAME_BYTES, Kind
from instep_client.replies import ListedStream, ServedModel
from instep_client.requests import PingCall, Question, ReadStateCall

P = ParamSpec("P")
Q = TypeVar("Q", bound=Request[Any])
T = TypeVar("T", bound=TurnRequest)


def asks(kind: Callable[Concatenate[Connection, P], Q]) -> Callable[Concatenate[Session, P], Q]:
    """The verb that asks a request of a kind; it takes what the request is made of."""

    def verb(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> Q:
        return session.ask(kind(session, *args, **kwargs))

    verb.__doc__ = kind.__doc__
    return verb


def queues(
    kind: Callable[Concatenate[Connection, StreamHandle, P], T],
) -> Callable[Concatenate[Session, StreamHandle, P], T]:
    """The verb that asks a request of a kind after everything that was sent through a handle."""

    def verb(session: Session, handle: StreamHandle, /, *args: P.args, **kwargs: P.kwargs) -> T:
        session.check_handle(handle)
        request = kind(session, handle, *args, **kwargs)
        session.flow.enqueue(request)
        return request

    verb.__doc__ = kind.__doc__
    return verb


class Session(Connection):
    """One client's side of the protocol: the verbs that users call, and what a driver does; see `Connection`.

    Each verb raises at once when a thing cannot be asked: InvalidInput for arguments, ClientClosed after the end of the
    client or handle, StreamEvicted when the server ended a stream. Nothing is sent before `advance`. What is asked
    while there is no connection waits for the next one.
    """

    # For the driver.

    def take_reconnect(self) -> bool:
        """Whether to close the socket, drop what was not sent through it, and connect a new one now."""
        wanted, self.wants_socket = self.wants_socket, False
        return wanted

    def leave(self, park: bool = False) -> Call[None] | None:
        """End the session: what waits fails, open streams are closed. The call ends when the server has read that.

        Streams that the server is about to open are closed once it has. With `park`, and without a connection, nothing
        is closed: the server parks the streams, and forgets them in time.
        """
        can_tell = self.state is OPEN and not park
        openings = self.pending.under_way(Kind.OPENED)
        granted = [
            request.grants["handle"][request.grants["handle"] != 0]
            for request in {*(asked.request for asked in openings.values()), *self.sleepers.held}
            if isinstance(request, Opening)
        ]
        self.fail(ClientClosed, "the client was closed")
        if not can_tell or not (openings or granted or len(self.table.live_rows())):
            return None
        farewell = Farewell(self, openings)
        for handles in granted:
            farewell.close(handles)
        farewell.ask()
        return farewell

    # Streams.

    open = asks(OpenCall)
    resume = asks(ResumeCall)
    fork = queues(ForkCall)
    reset = queues(ResetCall)

    def close(self, handle: StreamHandle) -> CloseCall:
        """Close a handle after everything sent through it was answered; the result is final states [N, row_bytes]."""
        self.check_open()
        _check_not_closed(handle)
        call = CloseCall(self, handle)
        self.flow.enqueue(call)
        if handle.single and handle.has_ended:
            self.table.check_not_ended(handle.rows)  # the call stays, to give the row back when nothing is unanswered
        return call

    def read_state(self, handle: StreamHandle) -> ReadStateCall:
        """Read the states of a handle's streams, without waiting for frames that were sent."""
        self.check_handle(handle)
        return self.ask(ReadStateCall(self, handle.names, handle))

    def read_state_by_name(self, names: Sequence[str]) -> ReadStateCall:
        """Read the states of streams, whoever owns them."""
        return self.ask(ReadStateCall(self, names))

    # Frames.

    def step(
        self, handle: StreamHandle, x: npt.ArrayLike, rows: npt.ArrayLike | None = None, keep: bool = False
    ) -> StepCall:
        """Send frames of a handle's streams; with `keep` the outputs wait to be taken with `take`.

        A handle of one stream takes [features] or [T, features]; a group [N, features] or [T, N, features], where N is
        the number of `rows`, or of all its streams.
        """
        info = self.check_open()
        if handle.finished or handle.closing:
            _check_not_closed(handle)
            raise ClientClosed(f"stream {handle.names[0]!r} was finished; nothing more can be sent through it")
        table_rows = handle.rows
        if rows is not None:
            table_rows = handle.rows[arrays.row_indices(rows, len(handle.rows))]
        if handle.single:
            frames, prefix = arrays.stream_frames(x, info.features)
        else:
            frames, prefix = arrays.group_frames(x, len(table_rows), info.features)
        if handle.has_ended:
            self.table.check_not_ended(table_rows)
        call = StepCall(
            self.flow.withdraw, handle, table_rows, frames, (*prefix, info.outputs), self.table.stamp(), keep
        )
        self.flow.submit(call)
        return call

    def finish(self, handle: StreamHandle) -> None:
        """Nothing more will be sent; the outputs end after those of what was sent with `keep`."""
        handle.finished = True
        self.pending.woken.append(handle)

    def take(self, handle: StreamHandle) -> StepCall | None:
        """The next kept call, if it is done. None means: wait until the handle is woken, and ask again."""
        return self.flow.take(handle)

    def outputs_end(self, handle: StreamHandle) -> bool:
        """Whether `take` will never give anything more.

        Raises:
            InstepError: when that is because the stream has ended or the session is over.
        """
        if handle.results:
            return False
        if handle.finished or handle.closed:
            return True
        if self.state is ENDED:
            raise self.failure()
        if handle.has_ended:
            self.table.check_not_ended(handle.rows)
        return False

    # The server.

    ping = asks(PingCall)

    def statistics(self) -> Question[dict[str, float]]:
        """Ask for the server's numbers."""
        return self.ask(Question(self, Kind.STATS, Kind.STATISTICS, replies.statistics))

    def models(self) -> Question[list[ServedModel]]:
        """Ask for the server's models."""
        return self.ask(Question(self, Kind.MODELS, Kind.SERVED, replies.served))

    def list_streams(self, cursor: int, most: int, place: int, prefix: str) -> Question[tuple[list[ListedStream], int]]:
        """Ask for a page of at most `most` streams; `place` is a `wire.Place` or 0, `cursor` 0 at first."""
        begins = prefix.encode()
        if len(begins) > MAX_NAME_BYTES:
            raise InvalidInput(f"names have at most {MAX_NAME_BYTES} bytes, and so has what they begin with")
        question = Question(self, Kind.LIST, Kind.LISTED, replies.listed, cursor, most, place, frames=[begins])
        return self.ask(question)

    def cancel(self, call: Call[Any]) -> None:
        """Nobody waits for a call any more. What was sent counts as sent, and its answer is dropped when it comes."""
        if self.state is OPEN or self.state is RECONNECTING:
            call.cancel()

    def check_handle(self, handle: StreamHandle) -> None:
        """Raise where nothing may be asked of a handle's streams."""
        self.check_open()
        _check_not_closed(handle)
        if handle.has_ended:
            self.table.check_not_ended(handle.rows)


def _check_not_closed(handle: StreamHandle) -> None:
    if handle.closing:
        raise ClientClosed(f"stream {handle.names[0]!r} was closed; open it again to send more")
