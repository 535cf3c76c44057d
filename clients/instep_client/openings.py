"""How streams come to this client: opened, resumed or forked, in as many messages as it takes, all of a call or none.

What was asked and not answered when the connection was lost is asked again. An OPEN or FORK that is then refused
because the name is in use, or a RESUME because the stream was taken over, may have been granted over the lost
connection, and fails with ConnectionFailed, which says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from instep_client import arrays
from instep_client.outbox import Outbox, parts
from instep_client.protocol import wire
from instep_client.protocol.errors import ConnectionFailed, InstepError, InvalidInput, StreamRefused, stream_ended
from instep_client.protocol.wire import CLAIM, HAVE_ALL, U64, Code, GrantArray, Kind, Message, ServerInfo, raw
from instep_client.replies import ColumnError
from instep_client.requests import ForkCall, OpenCall, ResumeCall
from instep_client.sleepers import Sleepers, without_columns
from instep_client.states import State, state_rows
from instep_client.streams import HANDLE, OpenStreams, StreamHandle

_IN_DOUBT: Final = {Code.NAME_IN_USE: "opened", Code.FENCED: "resumed"}
"""What may have been done over a lost connection when asking again is refused with these codes."""
_FENCED: Final = (
    "the stream has another owner, or has had one since the epoch that was given: give the epoch that it was granted "
    "last (epoch=…), or take it over (take_over=True)"
)
_IN_USE: Final = (
    'a stream of this name is open or parked: go on with it (if_exists="resume"), or close it and begin anew '
    '(if_exists="replace")'
)
_SAID: Final = frozenset({Code.DATA_LOSS, Code.OUTPUTS_GONE, Code.NUMERICS_CHANGED})


class Openings:
    """The OPEN, RESUME and FORK requests of one session.

    Args:
        table: where the streams are put.
        info: what the server takes.
        outbox: where requests go.
        sleepers: wakes streams that hibernate.
        discard: closes a stream handle that nobody holds, and calls what it is given when that has ended.
        answered: told of a stream handle for which a FORK was answered.
        fenced: told of the former rows of streams that this client has resumed once more.
    """

    def __init__(
        self,
        table: OpenStreams,
        info: ServerInfo,
        outbox: Outbox,
        sleepers: Sleepers,
        discard: Callable[[StreamHandle, Callable[[], None] | None], None],
        answered: Callable[[StreamHandle], None],
        fenced: Callable[[arrays.Indices], None],
    ) -> None:
        self._table = table
        self._outbox = outbox
        self._sleepers = sleepers
        self._discard = discard
        self._answered = answered
        self._fenced = fenced
        self._state = info.state
        name_bytes = wire.MAX_NAME_BYTES + 1
        self._most_opened = info.max_message_bytes // max(name_bytes, self._state.row_bytes)
        self._most_resumed = info.max_message_bytes // max(name_bytes, wire.GRANT.itemsize)

    def open(
        self, names: Sequence[str], initial_states: State | None, single: bool, first_seqs: U64 | None = None
    ) -> OpenCall:
        """A call that opens streams; see `Session.open`."""
        names = good_names(names)
        initial = None
        if initial_states is not None:
            initial = state_rows(initial_states, self._state, None if single else len(names))
        return OpenCall(names, single, initial, first_seqs)

    def resume(
        self,
        names: Sequence[str],
        have: npt.ArrayLike | None,
        epochs: npt.ArrayLike,
        take_over: bool,
        single: bool,
    ) -> ResumeCall:
        """A call that resumes streams; see `Session.resume`."""
        names = good_names(names)
        claims = np.zeros(len(names), CLAIM)
        claims["have"] = HAVE_ALL if have is None else arrays.counts(have, len(names), "have")
        claims["epoch"] = arrays.counts(epochs, len(names), "epochs")
        return ResumeCall(names, single, claims, take_over)

    def fork(self, handle: StreamHandle, names: Sequence[str]) -> ForkCall:
        """A call that copies a handle's streams; see `Session.fork`."""
        names = good_names(names)
        if len(names) != len(handle.rows):
            raise InvalidInput(f"{len(handle.rows)} streams are copied, there are names for {len(names)}")
        return ForkCall(names, handle)

    def ask(self, call: OpenCall) -> None:
        """Ask for the streams of a call; again, when it was asked before over a connection that is lost."""
        if call.abandoned:
            self._end(call, InstepError("the call was cancelled"))
            return
        kind, most = Kind.OPEN, self._most_opened
        if isinstance(call, ResumeCall):
            kind, most = Kind.RESUME, self._most_resumed
            held = call.grants["handle"] != 0  # over a connection that is lost
            call.claims["epoch"][held] = call.grants["epoch"][held]
        elif isinstance(call, ForkCall):
            kind = Kind.FORK
        call.grants[:] = 0
        pieces = parts(len(call.names), most)
        call.begin(len(pieces))
        for part in pieces:
            self._ask(kind, call, part)

    def _ask(self, kind: Kind, call: OpenCall, part: arrays.Indices) -> None:
        names = wire.pack_names([call.names[index] for index in part])
        self._outbox.ask(kind, call, len(part), *self._fields(call), frames=self._frames(call, names, part), part=part)

    def _fields(self, call: OpenCall) -> tuple[int, ...]:
        if isinstance(call, ResumeCall):
            return (int(call.take_over),)
        if isinstance(call, ForkCall):
            return ()
        return int(call.initial is not None), int(call.first_seqs is not None)

    def _frames(self, call: OpenCall, names: bytes, part: arrays.Indices) -> Message:
        if isinstance(call, ResumeCall):
            return [names, call.claims[part].tobytes()]
        if isinstance(call, ForkCall):
            return [self._table.columns[call.handle.rows[part], HANDLE].tobytes(), names]
        states = b"" if call.initial is None else raw(call.initial[part])
        return [names, states, b"" if call.first_seqs is None else call.first_seqs[part].tobytes()]

    def opened(self, call: OpenCall, part: arrays.Indices, grants: GrantArray, failures: list[ColumnError]) -> None:
        """OPENED or RESUMED came for a part of a call."""
        call.grants[part] = grants
        if isinstance(call, ForkCall) and len(
            asleep := self._sleepers.are_asleep(call.handle.rows[part], failures)
        ):  # ask for the copies of those once more when they are awake
            call.parts_left += 1
            again = part[asleep]
            self._sleepers.wake(call.handle.rows[again], lambda: self._ask(Kind.FORK, call, again), call)
            part, failures = without_columns(part, failures, asleep)
        for failure in failures[:1]:
            call.note(int(part[failure.column]), failure.code, failure.sentence, failure.expected_seq)
        self.part_answered(call)

    def part_answered(self, call: OpenCall) -> None:
        """A part of a call was answered, or refused."""
        if not call.part_answered():
            return
        opened = call.grants["handle"] != 0
        if call.refusal is None and not call.abandoned:
            call.finish(self._add(call))
            self._end(call)
            return
        error = InstepError("the call was cancelled") if call.refusal is None else _error(call)
        if np.any(opened) and not isinstance(call, ResumeCall):  # a stream that was there before stays
            names = [name for name, is_open in zip(call.names, opened, strict=True) if is_open]
            handle = self._table.add(names, call.grants[opened], single=False)
            self._discard(handle, lambda: self._end(call, error))  # the user may ask for the same names then
        else:
            self._end(call, error)

    def _end(self, call: OpenCall, error: InstepError | None = None) -> None:
        if error is not None:
            call.fail(error)
        self._outbox.wake(call)
        if isinstance(call, ForkCall):
            self._answered(call.handle)

    def cancel(self, call: OpenCall) -> None:
        """Nobody wants the streams any more."""
        call.abandoned = True
        if call.done and call.error is None and not isinstance(call, ResumeCall):
            self._discard(call.result(), None)

    def lost(self, call: OpenCall) -> bool:
        """The connection is lost; whether the call may be asked again. Its parts that were opened cannot be told."""
        call.again = True
        if isinstance(call, ResumeCall) or not np.any(call.grants["handle"] != 0):
            return True
        self._end(call, _in_doubt(call.names[0], "opened"))
        return False

    def _add(self, call: OpenCall) -> StreamHandle:
        grants = call.grants
        if isinstance(call, ResumeCall):  # what comes next is what the user has not
            grants["next_seq"] = np.minimum(call.claims["have"], grants["next_seq"])
            if len(rows := self._table.rows_named(call.names)):
                self._fenced(rows)
        return self._table.add(call.names, grants, call.single)


def good_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of distinct streams.

    Raises:
        InvalidInput: when there are none, or bad or repeated ones.
    """
    if isinstance(names, str):
        raise InvalidInput("a group's names must be a sequence of strings, not one string")
    names = tuple(names)
    if not names or not all(isinstance(name, str) and wire.name_is_good(name) for name in names):
        raise InvalidInput(
            f"there must be at least one name, and each a string of 1 to {wire.MAX_NAME_BYTES} bytes of printable UTF-8"
        )
    if len(set(names)) != len(names):
        raise InvalidInput("two streams of a group may not have the same name")
    return names


def _error(call: OpenCall) -> InstepError:
    """Why a call failed."""
    assert call.refusal is not None
    index, code, sentence, expected_seq = call.refusal
    name = call.names[index]
    if call.again and code in _IN_DOUBT:
        return _in_doubt(name, _IN_DOUBT[code])
    if isinstance(call, ResumeCall) and code in _SAID:
        return stream_ended(code, sentence, name, int(call.claims["have"][index]), expected_seq)
    if isinstance(call, ResumeCall) and code is Code.FENCED:
        sentence = _FENCED
    elif call.single and not isinstance(call, ForkCall) and code is Code.NAME_IN_USE:
        sentence = _IN_USE
    return StreamRefused(code, sentence, name)


def _in_doubt(name: str, done: str) -> ConnectionFailed:
    return ConnectionFailed(
        f"the connection was lost while stream {name!r} was asked for, which may have been {done} over it; "
        "resume it with take_over=True"
    )
