"""Claims on streams of this client, and the end of a session, which claims streams that hibernate to close them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from instep_client import replies
from instep_client.arrays import NOBODY, Indices
from instep_client.calls import Request
from instep_client.pending import Asked, Pending, parts
from instep_client.protocol.codes import HAVE_ALL
from instep_client.protocol.wire import CLAIM, CLOSING, U64, Frame, Header, Kind, ServerInfo, pack_names
from instep_client.replies import ErrorReply
from instep_client.streams import OpenStreams


def claim(table: OpenStreams, pending: Pending, request: Request[None], rows: Indices, info: ServerInfo) -> None:
    """Send RESUMEs for streams of this client, saying what has come of them."""
    for piece in parts(len(rows), info):
        part = rows[piece]
        claims = np.zeros(len(part), CLAIM)
        claims["have"] = table.acked[part]
        claims["epoch"] = table.epoch[part]
        pending.ask(request, len(part), 0, frames=[pack_names(table.names(part)), claims.tobytes()], part=part)


def closings(handles: U64) -> bytes:
    """Of streams of which everything that was sent is answered: other outputs are not wanted."""
    records = np.zeros(len(handles), CLOSING)
    records["handle"], records["have"] = handles, HAVE_ALL
    return records.tobytes()


class Farewell(Request[None]):
    """The closing of every stream. It ends when the server has read that nothing else will come.

    Args:
        table: the streams.
        pending: where messages go; what was asked before must have been forgotten.
        info: the server's limits.
        openings: OPENs and FORKs that the server will answer, by number: what it grants is closed too.
    """

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, table: OpenStreams, pending: Pending, info: ServerInfo, openings: Mapping[int, Asked]) -> None:
        self._table = table
        self._pending = pending
        self._info = info
        for number, asked in openings.items():
            pending.unanswered[number] = Asked(_LastOpening(self), asked.part)

    def ask(self, now: float) -> None:
        """Close the streams that are awake, and claim the others: to be closed, they must be awake."""
        rows = self._table.live_rows()
        is_asleep = self._table.asleep[rows]
        self.close(self._table.numbers[rows[~is_asleep]])
        self.claim(rows[is_asleep])

    def close(self, handles: U64) -> None:
        """Close streams; nobody waits for their final states."""
        for part in parts(len(handles), self._info):
            self._pending.ask(_UnheardClose(), len(part), frames=[closings(handles[part])])

    def claim(self, rows: Indices) -> None:
        """Claim streams that hibernate, if there are any; PING once no grant is waited for."""
        claim(self._table, self._pending, _LastClaim(self), rows, self._info)
        if not self._pending.waits_for(Kind.RESUMED) and not self._pending.waits_for(Kind.OPENED):
            self._pending.ask(self)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        self.finish(None)


class _UnheardClose(Request[None]):
    """A CLOSE whose reply nobody waits for."""

    kind, reply = Kind.CLOSE, Kind.CLOSED

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        """CLOSED came."""


class _LastClaim(Request[None]):
    """A claim on streams that are then closed."""

    kind, reply = Kind.RESUME, Kind.RESUMED

    def __init__(self, farewell: Farewell) -> None:
        self._farewell = farewell

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        """Close what was granted; there is room for others then."""
        grants, _ = replies.granted(header, frames, len(part))
        is_awake = grants["handle"] != 0
        self._farewell.close(grants["handle"][is_awake])
        self._farewell.claim(part[~is_awake] if is_awake.any() else NOBODY)

    def refused(self, part: Indices, refusal: ErrorReply, now: float) -> None:
        self._farewell.claim(NOBODY)


class _LastOpening(_LastClaim):
    """An OPEN or FORK that was asked before the end."""

    kind, reply = Kind.OPEN, Kind.OPENED

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        grants, _ = replies.granted(header, frames, len(part))
        self._farewell.close(grants["handle"][grants["handle"] != 0])
        self._farewell.claim(NOBODY)
