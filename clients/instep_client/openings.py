"""How streams come to this client: opened, resumed or forked, in as many messages as it takes, all of a call or none.

What was asked and not answered when the connection was lost is asked again. An OPEN or FORK that is then refused
because the name is in use, or a RESUME because the stream was taken over, may have been granted over the lost
connection, and fails with ConnectionFailed, which says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Final

import numpy as np
import numpy.typing as npt

from instep_client import arrays, replies
from instep_client.arrays import Indices
from instep_client.changes import Discard
from instep_client.connection import Connection
from instep_client.handles import StreamHandle
from instep_client.protocol.codes import HAVE_ALL, SENTENCES, Code
from instep_client.protocol.errors import ConnectionFailed, InstepError, InvalidInput, StreamRefused, stream_ended
from instep_client.protocol.wire import CLAIM, GRANT, Frame, GrantArray, Header, Kind, Message, raw
from instep_client.replies import ColumnError
from instep_client.requests import StreamsRequest, TurnCall
from instep_client.states import State, state_rows

_FENCED: Final = (
    "the stream has another owner, or has had one since the epoch that was given: give the epoch that it was granted "
    "last (epoch=…), or take it over (take_over=True); a program that was started again and has no epoch continues its "
    'parked stream with open(name, if_exists="resume")'
)
_IN_USE: Final = (
    'a stream of this name is open or parked: continue it (if_exists="resume"), or close it and begin anew '
    '(if_exists="replace")'
)
_SAID: Final = frozenset({Code.DATA_LOSS, Code.OUTPUTS_GONE})


class Opening(StreamsRequest[StreamHandle]):
    """Streams that come to this client: the result is their stream handle. All of them come, or none."""

    begins_streams: ClassVar[bool] = True
    """Whether the streams begin with it, and are closed again when nobody gets them."""

    def __init__(
        self, connection: Connection, names: Sequence[str], single: bool, source: StreamHandle | None = None
    ) -> None:
        super().__init__(connection, names, source)
        self.single = single
        self.grants: GrantArray = np.zeros(len(self.names), GRANT)
        self.abandoned = False
        """Whether nobody waits any more."""

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

    def _conclude(self) -> None:
        error = InstepError("the call was cancelled") if self.abandoned else self._why_refused()
        if error is None:
            self.finish(self.connection.table.add(self.names, self.grants, self.single))
            self._end()
        else:
            self._undo(error)

    def _undo(self, error: InstepError) -> None:
        is_open = self.grants["handle"] != 0
        if self.begins_streams and is_open.any():
            names = [name for name, is_mine in zip(self.names, is_open, strict=True) if is_mine]
            handle = self.connection.table.add(names, self.grants[is_open], single=False)
            self.connection.flow.enqueue(Discard(self.connection, handle, lambda: self._end(error)))
        else:
            self._end(error)

    def cancel(self) -> None:
        self.abandoned = True
        if self.begins_streams and self.done and self.error is None:
            self.connection.flow.enqueue(Discard(self.connection, self.result()))

    def lost(self) -> bool:
        """Ask again, unless some were opened: those could not be told from another client's."""
        super().lost()
        if self.begins_streams and np.any(self.grants["handle"] != 0):
            self._end(self._doubt(self.names[0]))
            return False
        return True

    def _explain(self, refused: ColumnError, name: str) -> InstepError:
        if self.asked_before and refused.code is Code.NAME_IN_USE:
            return self._doubt(name)
        return StreamRefused(refused.code, refused.sentence, name)

    def _doubt(self, name: str, done: str = "opened") -> ConnectionFailed:
        """It may have been done over a connection that was lost, and nobody can tell."""
        return ConnectionFailed(
            f"the connection was lost while stream {name!r} was asked for, which may have been {done} over it; "
            "resume it with take_over=True"
        )


class OpenCall(Opening):
    """The opening of streams: one, with a state, or a group, with states of N streams; the initial one where None."""

    kind, reply = Kind.OPEN, Kind.OPENED

    def __init__(
        self,
        connection: Connection,
        names: Sequence[str],
        states: State | None,
        single: bool,
        first_seqs: npt.ArrayLike | None = None,
    ) -> None:
        super().__init__(connection, names, single)
        count = len(self.names)
        self._states = None if states is None else state_rows(states, connection.info.state, None if single else count)
        self._first_seqs = None if first_seqs is None else arrays.counts(first_seqs, count, "first seqs")

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
    """The copying of a handle's streams, as they are after everything sent through it, to new ones."""

    kind, reply = Kind.FORK, Kind.OPENED

    def __init__(self, connection: Connection, source: StreamHandle, names: Sequence[str]) -> None:
        super().__init__(connection, names, source.single, source)
        if len(self.names) != len(source.rows):
            raise InvalidInput(f"{len(source.rows)} streams are copied, there are names for {len(self.names)}")

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        return (), [self._handles_of(part).tobytes(), self._names_of(part)]


class ResumeCall(Opening):
    """The resuming of streams of which the user has the outputs of seqs below `have`; all that there are where None.

    A stream that was there before stays, whatever happens.
    """

    kind, reply = Kind.RESUME, Kind.RESUMED
    begins_streams = False

    def __init__(
        self,
        connection: Connection,
        names: Sequence[str],
        have: npt.ArrayLike | None,
        epochs: npt.ArrayLike,
        take_over: bool,
        single: bool,
    ) -> None:
        super().__init__(connection, names, single)
        self._claims = np.zeros(len(self.names), CLAIM)
        self._claims["have"] = HAVE_ALL if have is None else arrays.counts(have, len(self.names), "have")
        self._claims["epoch"] = arrays.counts(epochs, len(self.names), "epochs")
        self._take_over = int(take_over)

    def _begin(self) -> None:
        held = self.grants["handle"] != 0  # over a connection that was lost
        self._claims["epoch"][held] = self.grants["epoch"][held]
        self.connection.sleepers.resuming.update(self.names)
        super()._begin()

    def _encode(self, part: Indices) -> tuple[tuple[int, ...], Message]:
        return (self._take_over,), [self._names_of(part), self._claims[part].tobytes()]

    def _conclude(self) -> None:
        if self.refusal is None and not self.abandoned:
            self.grants["next_seq"] = np.minimum(self._claims["have"], self.grants["next_seq"])
            former = self.connection.table.rows_named(self.names).tolist()
            if former:
                self.connection.flow.end({(Code.FENCED, SENTENCES[Code.FENCED]): former})
        super()._conclude()

    def _end(self, error: InstepError | None = None) -> None:
        self.connection.sleepers.resuming.difference_update(self.names)
        super()._end(error)

    def _explain(self, refused: ColumnError, name: str) -> InstepError:
        which, _, code, sentence, expected_seq = refused
        if code in _SAID:
            return stream_ended(code, sentence, name, int(self._claims["have"][which]), expected_seq)
        if code is Code.FENCED:
            return self._doubt(name, "resumed") if self.asked_before else StreamRefused(code, _FENCED, name)
        return StreamRefused(code, sentence, name)
