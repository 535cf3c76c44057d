"""The requests with which a connection begins, and those that keep it: greeting, claims on own streams, probes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from instep_client import replies
from instep_client.arrays import Indices, parts
from instep_client.calls import Request
from instep_client.pending import Pending
from instep_client.protocol.codes import MAX_NAME_BYTES, PROTOCOL_VERSION
from instep_client.protocol.wire import CLAIM, Frame, Header, Kind, ServerInfo, pack_names
from instep_client.replies import ErrorReply
from instep_client.streams import OpenStreams


class Greeted(Protocol):
    """The connection whose requests these are."""

    @property
    def pending(self) -> Pending:
        """Where messages go."""
        ...

    def welcomed(self, info: ServerInfo, now: float) -> None:
        """WELCOME came."""
        ...

    def turned_away(self, refusal: ErrorReply, now: float) -> None:
        """HELLO was refused."""
        ...

    def claimed(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        """RESUMED came for streams in these rows."""
        ...

    def claim_refused(self, part: Indices, refusal: ErrorReply, now: float) -> None:
        """A claim was refused."""
        ...


class Greeting(Request[ServerInfo]):
    """HELLO, at the beginning of every connection. The call ends with the first welcome."""

    kind, reply = Kind.HELLO, Kind.WELCOME

    def __init__(self, connection: Greeted, name: str) -> None:
        self._connection = connection
        self._name = name

    def ask(self, now: float) -> None:
        """Send HELLO."""
        self._connection.pending.ask(self, PROTOCOL_VERSION, self._name)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        """WELCOME came."""
        info = replies.welcome(header)
        self._connection.welcomed(info, now)
        self.finish(info)

    def refused(self, part: Indices, refusal: ErrorReply, now: float) -> None:
        """The server does not take this client, now or at all."""
        super().refused(part, refusal, now)
        self._connection.turned_away(refusal, now)

    def lost(self) -> bool:
        """The next attempt sends its own."""
        return False


class Claim(Request[None]):
    """A claim on streams that are this client's already: after a loss, or because they hibernated."""

    kind, reply = Kind.RESUME, Kind.RESUMED

    def __init__(self, connection: Greeted) -> None:
        self._connection = connection

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        """RESUMED came."""
        self._connection.claimed(part, header, frames, now)

    def refused(self, part: Indices, refusal: ErrorReply, now: float) -> None:
        """The server does not give the streams, now or at all."""
        self._connection.claim_refused(part, refusal, now)

    def lost(self) -> bool:
        """The next connection has claims of its own."""
        return False


class Probe(Request[None]):
    """A PING that only asks for a word of the server."""

    kind, reply = Kind.PING, Kind.PONG

    def __init__(self, pending: Pending) -> None:
        self._pending = pending
        self.is_unanswered = False

    def ask(self, now: float) -> None:
        """Send PING."""
        self.is_unanswered = True
        self._pending.ask(self)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame], now: float) -> None:
        """PONG came."""
        self.is_unanswered = False

    def refused(self, part: Indices, refusal: ErrorReply, now: float) -> None:
        """Any word will do."""
        self.is_unanswered = False

    def lost(self) -> bool:
        """The next connection has probes of its own."""
        self.is_unanswered = False
        return False


def claim(table: OpenStreams, pending: Pending, request: Request[None], rows: Indices, max_message_bytes: int) -> None:
    """Send RESUMEs for streams of this client, saying what has come of them."""
    for piece in parts(len(rows), max_message_bytes // max(MAX_NAME_BYTES + 1, CLAIM.itemsize)):
        part = rows[piece]
        claims = np.zeros(len(part), CLAIM)
        claims["have"] = table.acked[part]
        claims["epoch"] = table.epoch[part]
        pending.ask(request, len(part), 0, frames=[pack_names(table.names(part)), claims.tobytes()], part=part)
