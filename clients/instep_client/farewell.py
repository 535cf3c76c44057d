"""The end of a session: streams that are awake are closed, and those that hibernate are claimed and closed then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from instep_client import replies
from instep_client.arrays import NOBODY, Indices
from instep_client.calls import Request
from instep_client.connection import Connection
from instep_client.pending import Asked, parts
from instep_client.protocol.codes import HAVE_ALL
from instep_client.protocol.wire import CLOSING, U64, Frame, Header, Kind
from instep_client.replies import ErrorReply
from instep_client.requests import Question


def closings(handles: U64) -> bytes:
    """Of streams of which everything that was sent is answered: other outputs are not wanted."""
    records = np.zeros(len(handles), CLOSING)
    records["handle"], records["have"] = handles, HAVE_ALL
    return records.tobytes()


class Farewell(Request[None]):
    """The closing of every stream. It ends when the server has read that nothing else will come.

    Args:
        connection: whose session has ended.
        openings: OPENs and FORKs that the server will answer, by number: what it grants is closed too.
    """

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, connection: Connection, openings: Mapping[int, Asked]) -> None:
        self._connection = connection
        for number, asked in openings.items():
            connection.pending.unanswered[number] = Asked(_LastOpening(self), asked.part)

    def ask(self) -> None:
        """Close the streams that are awake, and claim the others: to be closed, they must be awake."""
        table = self._connection.table
        rows = table.live_rows()
        is_asleep = table.asleep[rows]
        self.close(table.numbers[rows[~is_asleep]])
        self.claim(rows[is_asleep])

    def close(self, handles: U64) -> None:
        """Close streams; nobody waits for their final states."""
        for part in parts(len(handles), self._connection.info):
            frames = [closings(handles[part])]
            Question(self._connection, Kind.CLOSE, Kind.CLOSED, _unheard, len(part), frames=frames).ask()

    def claim(self, rows: Indices) -> None:
        """Claim streams that hibernate, if there are any; PING once no grant is waited for."""
        self._connection.claim(_LastClaim(self), rows)
        pending = self._connection.pending
        if not pending.waits_for(Kind.RESUMED) and not pending.waits_for(Kind.OPENED):
            pending.ask(self)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        self.finish(None)


def _unheard(header: Header, frames: Sequence[Frame]) -> None:
    """CLOSED came."""


class _LastClaim(Request[None]):
    """A claim on streams that are then closed."""

    kind, reply = Kind.RESUME, Kind.RESUMED

    def __init__(self, farewell: Farewell) -> None:
        self._farewell = farewell

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        """Close what was granted; there is room for others then."""
        grants, _ = replies.granted(header, frames, len(part))
        is_awake = grants["handle"] != 0
        self._farewell.close(grants["handle"][is_awake])
        self._farewell.claim(part[~is_awake] if is_awake.any() else NOBODY)

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        self._farewell.claim(NOBODY)


class _LastOpening(_LastClaim):
    """An OPEN or FORK that was asked before the end."""

    kind, reply = Kind.OPEN, Kind.OPENED

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        grants, _ = replies.granted(header, frames, len(part))
        self._farewell.close(grants["handle"][grants["handle"] != 0])
        self._farewell.claim(NOBODY)
