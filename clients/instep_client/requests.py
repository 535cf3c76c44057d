"""Requests to the server, except frames: one class for each kind.

A class gives the kinds of its messages and replies, and handles a reply, a refusal and a lost connection. A new kind of
request is such a class and a verb of `Session` that asks it, or a verb that asks a `Question`.

    Request
    ├── Greeting, Claim, Farewell  the session's own
    ├── Question, PingCall         about the server
    └── StreamsRequest             about streams, one message for each part of them
        ├── ReadStateCall
        ├── OpenCall, ResumeCall   streams that come to this client
        └── TurnCall               waits until everything sent through its handle was answered
            └── ForkCall, ResetCall, CloseCall

What was asked and not answered when the connection was lost is asked again. An OPEN or FORK that is then refused
because the name is in use, or a RESUME because the stream was taken over, may have been granted over the lost
connection, and fails with ConnectionFailed, which says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Final, TypeVar

import numpy as np
import numpy.typing as npt

from instep_client import arguments, replies
from instep_client.arguments import Indices, good_names
from instep_client.connection import Asked, Request, parts
from instep_client.protocol import wire
from instep_client.protocol.codes import HAVE_ALL, Code
from instep_client.protocol.errors import (
    ClientClosed,
    ConnectionFailed,
    InstepError,
    InvalidInput,
    StreamEvicted,
    StreamRefused,
    stream_ended,
)
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import (
    CLAIM,
    CLOSING,
    GRANT,
    U64,
    Frame,
    GrantArray,
    Header,
    Kind,
    Message,
    ServerInfo,
    raw,
)
from instep_client.replies import ColumnError, ErrorReply
from instep_client.states import GivenState, state_rows
from instep_client.streams import ENDING, SLEEPS_ON, StreamHandle

if TYPE_CHECKING:
    from instep_client.session import Session

R = TypeVar("R")

_FENCED: Final = (
    "the stream has another owner, or has had one since the epoch that was given: give the epoch that it was granted "
    "last (epoch=…), or take it over (take_over=True); a program that was started again and has no epoch continues its "
    'parked stream with open(name, if_exists="resume")'
)
_IN_USE: Final = (
    'a stream of this name is open or parked: continue it (if_exists="resume"), or close it and begin anew '
    '(if_exists="replace")'
)
_RESTARTED: Final = "the server was restarted and no longer has this stream, which was not recorded; open it again"
_SAID: Final = frozenset({Code.DATA_LOSS, Code.OUTPUTS_GONE})


class Greeting(Request[ServerInfo]):
    """HELLO at the beginning of every connection. The call ends with the first welcome."""

    kind, reply = Kind.HELLO, Kind.WELCOME

    def __init__(self, session: Session, name: str, model: str) -> None:
        self._session = session
        self._name = name
        self._model = model

    def ask(self) -> None:
        self._session.outbox.ask(self, wire.PROTOCOL_VERSION, self._name, self._model)

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        info = replies.welcome(header, frames)
        self._model = info.model  # a server that is started again may have another default
        self._session.welcomed(info)
        self.finish(info)

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        super().refused(part, refusal)
        self._session.turned_away(refusal)

    def lost(self) -> bool:
        return False  # each attempt sends its own


class Claim(Request[None]):
    """The claim of this client's streams over a new connection, in portions.

    The server wakes hibernating streams; portions are so small that it can make room for them. Streams that find no
    room are claimed again for as long as the client would try to reconnect; after that they have ended for this client.
    """

    kind, reply = Kind.RESUME, Kind.RESUMED

    def __init__(self, session: Session, rows: Indices) -> None:
        self._session = session
        self._left = rows
        self._asleep: dict[tuple[Code, str], list[int]] = {}
        """Rows of streams that could not be woken, by reason."""

    def ask(self) -> None:
        """Claim the next portion, or note that all were claimed."""
        session, table, info = self._session, self._session.table, self._session.info
        left = self._left[(table.numbers[self._left] != 0) & (table.ended[self._left] == 0)]
        if len(left):
            most = min(len(parts(len(left), info)[0]), max(1, info.max_streams // 4))
            part, self._left = left[:most], left[most:]
            frames = [wire.pack_names(table.names(part)), table.claims(part)]
            session.outbox.ask(self, len(part), 0, frames=frames, part=part)
            return
        asleep, self._asleep = self._asleep, {}
        if asleep and session.attempts.lost(session.now, ""):
            self._left = np.concatenate([np.array(rows) for rows in asleep.values()])  # the session asks after a delay
        else:
            session.queue.end(asleep)
            session.claimed()

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        """Process new handles of granted streams; others still hibernate, or have ended.

        A stream has lost data if the server expects a seq whose output has come already. The server cannot notice this
        for outputs that came out of order, because a claim names only the first missing one.
        """
        session, table = self._session, self._session.table
        grants, failures = replies.granted(header, frames, len(part))
        ended: dict[tuple[Code, str], list[int]] = {}
        for column, _, code, sentence, expected in failures:
            row = int(part[column])
            if code in SLEEPS_ON:
                self._asleep.setdefault((code, sentence), []).append(row)
                continue
            table.server_has[row] = expected
            if code is Code.UNKNOWN_STREAM and session.forgets:
                sentence = _RESTARTED
            ended.setdefault((code, sentence), []).append(row)
        is_granted = (grants["handle"] != 0) & (table.numbers[part] != 0)
        rows = part[is_granted]
        table.resumed(rows, grants[is_granted])
        for row, next_seq in zip(rows.tolist(), grants["next_seq"][is_granted].tolist(), strict=True):
            if next_seq < table.given(row):
                table.server_has[row] = next_seq
                ended.setdefault((Code.DATA_LOSS, Code.DATA_LOSS.sentence), []).append(row)
        session.queue.end(ended)
        self.ask()

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        self._session.turned_away(refusal)

    def lost(self) -> bool:
        return False  # the next connection has a claim of its own


class Question(Request[R]):
    """A request of one message. `decode` reads its reply, which is of kind `reply`."""

    def __init__(
        self,
        session: Session,
        kind: Kind,
        reply: Kind,
        decode: Callable[[Header, Sequence[Frame]], R],
        *fields: int | str,
        frames: Sequence[Frame] = (),
    ) -> None:
        self._session = session
        self.kind, self.reply = kind, reply
        self._decode = decode
        self._fields = fields
        self._frames = frames

    def ask(self) -> None:
        self._session.outbox.ask(self, *self._fields, frames=self._frames)

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self.finish(self._decode(header, frames))


class PingCall(Request[float]):
    """A round trip; the result is its time in seconds."""

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, session: Session, now: float) -> None:
        self._session = session
        self._sent_at = now

    def ask(self) -> None:
        self._sent_at = max(self._sent_at, self._session.now)  # what was lost with a connection does not count
        self._session.outbox.ask(self)

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self.finish(self._session.now - self._sent_at)


# ── About streams ──────────────────────────────────────────────────────────────────────────────────────────────────


class StreamsRequest(Request[R]):
    """A request about streams: one message for each part of them. It ends when every part was answered.

    Args:
        session: sends it.
        names: of its streams, which may be yet to open.
        handle: the handle of its streams, if they belong to this client.
    """

    def __init__(self, session: Session, names: Sequence[str], handle: StreamHandle | None = None) -> None:
        self.session = session
        self.names = good_names(names)
        self.handle = handle
        self.parts_left = 0
        self.refusal: ColumnError | None = None
        """The first refused stream; its column counts the request's streams."""
        self.asked_before = False
        """Whether it was asked over a connection that was lost, so it may have been carried out."""
        self._asked: U64 = np.zeros(len(self.names), np.uint64)
        """The server's handles under which the streams were asked for."""

    # What a subclass says of itself.

    @abstractmethod
    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        """The header's fields after N, and the frames, of a message about some of its streams."""

    @abstractmethod
    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        """Read a reply about some of its streams; return which were refused."""

    def _settled(self, part: Indices, refused: list[ColumnError]) -> None:
        """Note streams that were granted or finally refused."""

    @abstractmethod
    def _conclude(self) -> None:
        """End the request after every part was answered."""

    # What all of them do.

    def ask(self) -> None:
        ended = None if self.handle is None else self.session.table.why_any_ended(self.handle.rows)
        if ended is not None:
            self._end(ended)
        else:
            self._begin()
            self._send(np.arange(len(self.names)))

    def _begin(self) -> None:
        """Forget answers of an earlier connection."""
        self.parts_left = 0
        self.refusal = None

    def _send(self, which: Indices) -> None:
        for piece in parts(len(which), self.session.info):
            part = which[piece]
            fields, frames = self._encode(part)
            self.parts_left += 1
            self.session.outbox.ask(self, len(part), *fields, frames=frames, part=part)

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        failures = self._decode(part, header, frames)
        refused = [failure._replace(column=int(part[failure.column])) for failure in failures]
        again = [each.column for each in refused if self._is_renewed(each)]
        if again:
            refused = [each for each in refused if each.column not in again]
            part = np.setdiff1d(part, again)
            self._send(np.array(sorted(again), np.int64))
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
        self._asked[part] = self.session.table.numbers[self.handle.rows[part]]
        return self._asked[part]

    def _is_renewed(self, refused: ColumnError) -> bool:
        """Whether a stream that hibernated got its new handle after it was asked for under the old one."""
        if self.handle is None or self.handle.closed or refused.code is not Code.UNKNOWN_STREAM:
            return False
        number = self.session.table.numbers[self.handle.rows[refused.column]]
        return bool(number != 0 and number != self._asked[refused.column])

    def _note(self, refused: ColumnError) -> None:
        if self.refusal is None or refused.column < self.refusal.column:
            self.refusal = refused

    def _why_refused(self) -> InstepError | None:
        return None if self.refusal is None else self._explain(self.refusal, self.names[self.refusal.column])

    def _explain(self, refused: ColumnError, name: str) -> InstepError:
        if self.handle is None or refused.code not in ENDING:
            return StreamRefused(refused.code, refused.sentence, name)
        rows = self.handle.rows[[refused.column]]
        known = None if self.handle.closed else self.session.table.why_any_ended(rows)
        return known or StreamEvicted(refused.code, refused.sentence, name)

    def _end(self, error: InstepError | None = None) -> None:
        if error is not None:
            self.fail(error)
        self.session.outbox.woken.append(self)

    def _part_answered(self) -> None:
        self.parts_left -= 1
        if self.parts_left == 0:
            self._conclude()


class TurnCall(StreamsRequest[R]):
    """A request that is asked after all earlier frames of its handle were answered, and before later ones."""

    handle: StreamHandle
    stamp: int
    """The session's counter when it was queued."""

    def streams_ended(self, error: StreamEvicted) -> bool:
        """Whether it fails with that error, because streams of its handle ended before its turn came."""
        return True

    def _end(self, error: InstepError | None = None) -> None:
        super()._end(error)
        self.session.queue.release(self.handle)


class ReadStateCall(StreamsRequest[tuple[U64, U8]]):
    """A read of states: of a handle's streams, or of any streams by name.

    The result is the next seqs uint64 [N] and rows of states [N, row_bytes].
    """

    kind, reply = Kind.READ_STATE, Kind.STATE_READ

    def __init__(self, session: Session, names: Sequence[str], handle: StreamHandle | None = None) -> None:
        super().__init__(session, names, handle)
        self._seqs: U64 = np.zeros(len(self.names), np.uint64)
        self._states = session.info.state.missing(len(self.names))
        self._is_read = np.zeros(len(self.names), np.bool_)

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
        if self.handle is None:
            return (1,), [self._names_of(part)]
        return (0,), [self._handles_of(part).tobytes()]

    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        state = self.session.info.state
        if self._states.shape[1] != state.row_bytes:  # the model was swapped for one with another state
            self._states = state.missing(len(self.names))
            self._send(np.flatnonzero(self._is_read))
            self._is_read[:] = False
        self._is_read[part] = True
        self._seqs[part], self._states[part], failures = replies.state_read(header, frames, len(part), state.row_bytes)
        return failures

    def _conclude(self) -> None:
        error = self._why_refused()
        if error is None:
            self.finish((self._seqs, self._states))
        self._end(error)


# ── Streams that come to this client ───────────────────────────────────────────────────────────────────────────────


class Opening(StreamsRequest[StreamHandle]):
    """A request that gives streams to this client, all of them or none. The result is their stream handle."""

    begins_streams: ClassVar[bool] = True
    """Whether it creates the streams, which are closed again where it fails."""

    def __init__(
        self, session: Session, names: Sequence[str], single: bool, source: StreamHandle | None = None
    ) -> None:
        super().__init__(session, names, source)
        self.single = single
        self.grants: GrantArray = np.zeros(len(self.names), GRANT)
        self.abandoned = False
        """Whether nobody waits for the result any more."""
        self._until = 0.0
        """How long it is asked again where its shard moves to another server; 0 before it was refused for that."""

    def ask(self) -> None:
        """Ask for all streams, unless nobody waits for them any more."""
        if self.abandoned:
            self._end(InstepError("the call was cancelled"))
        else:
            super().ask()

    def _begin(self) -> None:
        super()._begin()
        self.grants[:] = 0

    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        self.grants[part], failures = replies.granted(header, frames, len(part))
        return failures

    def _is_asked_again(self) -> bool:
        session, is_moving = self.session, self.refusal is not None and self.refusal.code is Code.SHUTTING_DOWN
        if is_moving and session.info.term and not self.abandoned and not self.grants["handle"].any():
            self._until = self._until or session.now + session.attempts.reconnect_s
            return session.now < self._until
        return False

    def _conclude(self) -> None:
        if self._is_asked_again():
            self.session.ask_again(self)
            return
        error = InstepError("the call was cancelled") if self.abandoned else self._why_refused()
        if error is None:
            self.finish(self.session.table.add(self.names, self.grants, self.single))
            self._end()
        else:
            self._undo(error)

    def _undo(self, error: InstepError) -> None:
        is_open = self.grants["handle"] != 0
        if self.begins_streams and is_open.any():
            names = [name for name, is_mine in zip(self.names, is_open, strict=True) if is_mine]
            handle = self.session.table.add(names, self.grants[is_open], single=False)
            self.session.queue.enqueue(CloseCall(self.session, handle, then=lambda: self._end(error)))
        else:
            self._end(error)

    def cancel(self) -> None:
        self.abandoned = True
        if self.begins_streams and self.done and self.error is None:
            self.session.queue.enqueue(CloseCall(self.session, self.result()))

    def _explain(self, refused: ColumnError, name: str) -> InstepError:
        if self.asked_before and refused.code is Code.NAME_IN_USE:
            return self._doubt(name)
        return StreamRefused(refused.code, refused.sentence, name)

    def _doubt(self, name: str, done: str = "opened") -> ConnectionFailed:
        """Fail because the request may have been carried out over a lost connection."""
        return ConnectionFailed(
            f"the connection was lost while stream {name!r} was asked for, which may have been {done} over it; "
            "resume it with take_over=True"
        )


class OpenCall(Opening):
    """The opening of one stream, or of a group with states of N streams; None for initial states."""

    kind, reply = Kind.OPEN, Kind.OPENED

    def __init__(
        self,
        session: Session,
        names: Sequence[str],
        states: GivenState | None,
        single: bool,
        first_seqs: npt.ArrayLike | None = None,
    ) -> None:
        super().__init__(session, names, single)
        count = len(self.names)
        self._states = None if states is None else state_rows(states, session.info.state, None if single else count)
        self._first_seqs = None if first_seqs is None else arguments.counts(first_seqs, count, "first seqs")

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        states = b"" if self._states is None else raw(self._states[part])
        seqs = b"" if self._first_seqs is None else self._first_seqs[part].tobytes()
        has = (int(self._states is not None), int(self._first_seqs is not None))
        return has, [self._names_of(part), states, seqs]

    def _explain(self, refused: ColumnError, name: str) -> InstepError:
        if self.single and refused.code is Code.NAME_IN_USE:
            refused = refused._replace(sentence=_IN_USE)
        return super()._explain(refused, name)


class ForkCall(Opening, TurnCall[StreamHandle]):
    """The copying of a handle's streams to new ones, after everything sent through it."""

    kind, reply = Kind.FORK, Kind.OPENED

    def __init__(self, session: Session, source: StreamHandle, names: Sequence[str]) -> None:
        super().__init__(session, names, source.single, source)
        if len(self.names) != len(source.rows):
            raise InvalidInput(f"{len(source.rows)} streams are copied, there are names for {len(self.names)}")

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        return (), [self._handles_of(part).tobytes(), self._names_of(part)]


class ResumeCall(Opening):
    """The resuming of streams. The user has the outputs of seqs below `have`; of all seqs if it is None.

    The streams stay open when the request fails.
    """

    kind, reply = Kind.RESUME, Kind.RESUMED
    begins_streams = False

    def __init__(
        self,
        session: Session,
        names: Sequence[str],
        have: npt.ArrayLike | None,
        epochs: npt.ArrayLike,
        take_over: bool,
        single: bool,
    ) -> None:
        super().__init__(session, names, single)
        self._claims = np.zeros(len(self.names), CLAIM)
        self._claims["have"] = HAVE_ALL if have is None else arguments.counts(have, len(self.names), "have")
        self._claims["epoch"] = arguments.counts(epochs, len(self.names), "epochs")
        self._take_over = int(take_over)

    def _begin(self) -> None:
        held = self.grants["handle"] != 0  # over a connection that was lost
        self._claims["epoch"][held] = self.grants["epoch"][held]
        super()._begin()

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        return (self._take_over,), [self._names_of(part), self._claims[part].tobytes()]

    def _conclude(self) -> None:
        if self.refusal is None and not self.abandoned:
            self.grants["next_seq"] = np.minimum(self._claims["have"], self.grants["next_seq"])
            former = self.session.table.rows_named(self.names).tolist()
            if former:
                self.session.queue.end({(Code.FENCED, Code.FENCED.sentence): former})
        super()._conclude()

    def _explain(self, refused: ColumnError, name: str) -> InstepError:
        which, _, code, sentence, expected_seq = refused
        if code in _SAID:
            return stream_ended(code, sentence, name, int(self._claims["have"][which]), expected_seq)
        if code is Code.FENCED:
            return self._doubt(name, "resumed") if self.asked_before else StreamRefused(code, _FENCED, name)
        return StreamRefused(code, sentence, name)


# ── Other states for a handle's streams, and their end ─────────────────────────────────────────────────────────────


class ResetCall(TurnCall[None]):
    """The setting of states of a handle's streams, after everything sent through it; initial ones where None."""

    kind, reply = Kind.RESET, Kind.CHANGED

    def __init__(self, session: Session, handle: StreamHandle, states: GivenState | None) -> None:
        super().__init__(session, handle.names, handle)
        count = None if handle.single else len(handle.rows)
        self._states = None if states is None else state_rows(states, session.info.state, count)

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
    """The closing of a handle. The result is final states [N, row_bytes]; streams that had ended have missing ones.

    `then` is called when it has ended.
    """

    kind, reply = Kind.CLOSE, Kind.CLOSED

    def __init__(self, session: Session, handle: StreamHandle, then: Callable[[], None] | None = None) -> None:
        super().__init__(session, handle.names, handle)
        handle.closing = True
        self._then = then
        self._finals = session.info.state.missing(len(handle.rows))

    def ask(self) -> None:
        """Ask for those streams that the server has not ended or closed."""
        self._begin()
        table, rows = self.session.table, self.handle.rows
        self._send(np.flatnonzero((table.ended[rows] == 0) & (table.numbers[rows] != 0)))
        if not self.parts_left:
            self._conclude()

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

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        return (), [closings(self._handles_of(part))]

    def _decode(self, part: Indices, header: Header, frames: Sequence[Frame]) -> list[ColumnError]:
        state = self.session.info.state
        if self._finals.shape[1] != state.row_bytes:  # the model was swapped for one with another state
            self._finals = state.missing(len(self.handle.rows))
        self._finals[part], failures = replies.closed(header, frames, len(part), state.row_bytes)
        return failures

    def _settled(self, part: Indices, refused: list[ColumnError]) -> None:
        """Note streams that were closed, had ended, or could not be closed."""
        which = [each.column for each in refused]
        self._finals[which] = self.session.info.state.missing(len(which))
        closed = np.setdiff1d(part, [each.column for each in refused if each.code not in ENDING])
        self.session.table.numbers[self.handle.rows[closed]] = 0

    def _note(self, refused: ColumnError) -> None:
        """Note ended streams of a group, which have no final state and are not an error."""
        if self.handle.single or refused.code not in ENDING:
            super()._note(refused)

    def _conclude(self) -> None:
        ended = self.session.table.why_any_ended(self.handle.rows) if self.handle.single else None
        error = ended or self._why_refused()
        if error is None:
            self.finish(self._finals)
        if self.refusal is not None and self.refusal.code not in ENDING:
            self.handle.closing = False  # the streams are as they were: the user may try again
        else:
            self.session.table.remove(self.handle)
        self._end(error)
        self.session.outbox.woken.append(self.handle)

    def streams_ended(self, error: StreamEvicted) -> bool:
        """Fail for a single stream, but stay queued to give the row back when nothing is unanswered."""
        if self.handle.single:
            self.fail(error)
        return False


def closings(handles: U64) -> bytes:
    """Closings of streams whose frames are all answered; later outputs are given up."""
    records = np.zeros(len(handles), CLOSING)
    records["handle"], records["have"] = handles, HAVE_ALL
    return records.tobytes()


class Farewell(Request[None]):
    """The closing of every stream. It ends once the server has read the last message.

    Args:
        session: the ended session.
        openings: OPENs and FORKs that the server will answer, by number: what it grants is closed too.
    """

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, session: Session, openings: Mapping[int, Asked]) -> None:
        self._session = session
        for number, asked in openings.items():
            session.outbox.unanswered[number] = Asked(_LastOpening(self), asked.part)

    def close(self, handles: U64) -> None:
        """Close streams whose final states nobody waits for; send PING once no grant is outstanding."""
        outbox = self._session.outbox
        for part in parts(len(handles), self._session.info):
            frames = [closings(handles[part])]
            Question(self._session, Kind.CLOSE, Kind.CLOSED, lambda *_: None, len(part), frames=frames).ask()
        if not outbox.waits_for(Kind.OPENED):
            outbox.ask(self)

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self.finish(None)


class _LastOpening(Request[None]):
    kind, reply = Kind.OPEN, Kind.OPENED

    def __init__(self, farewell: Farewell) -> None:
        self._farewell = farewell

    def accept(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        grants, _ = replies.granted(header, frames, len(part))
        self._farewell.close(grants["handle"][grants["handle"] != 0])

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        self._farewell.close(np.zeros(0, np.uint64))
