"""One connection after another to a server, as rules: messages, silence, loss and recovery.

Requests hold the connection, and use what it is made of: the table of streams, the flow of their frames, the requests
that wait for replies, and the streams that hibernate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from typing import Any, Final, TypeVar

from instep_client import replies
from instep_client.arrays import Indices, check_settings
from instep_client.calls import Request
from instep_client.endpoint import DEFAULT_HTTP_PORT, DEFAULT_PORT, checked_endpoint
from instep_client.flow import Flow
from instep_client.liveness import ENDED, GREETING, OPEN, RECONNECTING, Attempts, Silence, cannot_continue
from instep_client.pending import Pending, parts
from instep_client.protocol import wire
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, InstepError, MalformedMessage
from instep_client.protocol.wire import Frame, Header, Kind, ServerInfo
from instep_client.replies import ErrorReply
from instep_client.sleepers import Sleepers
from instep_client.streams import OpenStreams

Q = TypeVar("Q", bound=Request[Any])

_STEPPED: Final = int(Kind.STEPPED)
_LEAST_RETRY_S: Final = 0.05
_PASSES: Final = frozenset({Code.BUSY, Code.SHUTTING_DOWN, Code.UNKNOWN_MODEL})
"""Why a HELLO or RESUME is refused that may be granted a little later: a model is unloaded and loaded again, too."""
_RESTARTED: Final = "the server was restarted and no longer has this stream, which was not recorded; open it again"


class Connection:
    """The state of one session's connection.

    Args:
        endpoint: where the driver connects to, `tcp://HOST:PORT` or `ipc://PATH`.
        name: told to the server.
        model: the model that the connection is to; empty for the server's default.
        timeout_s: how long a silent server is waited for.
        reconnect_s: for how long another connection is tried for when one is lost; 0 for not at all.
        rng: what the delays between attempts are drawn from.

    Raises:
        InvalidInput: for a bad endpoint, name or time.
    """

    def __init__(
        self,
        endpoint: str,
        name: str = "",
        timeout_s: float = 10.0,
        reconnect_s: float = 30.0,
        rng: Random | None = None,
        model: str = "",
    ) -> None:
        self.endpoint = checked_endpoint(endpoint)
        check_settings(name, model, timeout_s, reconnect_s)
        self.state = GREETING
        self.now = 0.0
        """The time of the last `receive` or `advance`, on the driver's clock."""
        self.table = OpenStreams()
        self.pending = Pending()
        self.sleepers = Sleepers(self.table)
        self.flow = Flow(self.table, self.pending, self.sleepers, timeout_s, reconnect_s)
        self.attempts = Attempts(reconnect_s, timeout_s, rng or Random())
        self.greeting = Greeting(self, name, model)
        """Ends with the server's welcome."""
        self._silence = Silence(self.pending, timeout_s)
        self._info: ServerInfo | None = None
        self.forgets = False
        """Whether the server was restarted between the last two connections, and records nothing."""
        self._failure: tuple[type[InstepError], str] = (
            ClientClosed,
            "the client is not connected: use `async with`, or await client.connect()",
        )
        self.wants_socket = False
        """Whether the driver is to connect another socket."""
        self._postponed: dict[Request[Any], None] = {}
        """Requests that are to be asked, or asked again, over the next connection."""
        self._is_new = True
        """Whether the server has yet to say that it does not know the connection that the socket has just made."""
        self.greeting.ask()

    @property
    def info(self) -> ServerInfo:
        """The server's description of itself and of the model; raises before the welcome."""
        if self._info is None:
            raise self.failure()
        return self._info

    def failure(self) -> InstepError:
        """Why nothing can be asked: an error object of its own each time."""
        error, sentence = self._failure
        return error(sentence)

    def check_open(self) -> ServerInfo:
        """The server's description of itself, where anything may be asked; raises where not."""
        if self._info is None or self.state is ENDED:
            raise self.failure()
        return self._info

    def ask(self, request: Q) -> Q:
        """Ask, now or when there is a connection again; raises where nothing may be asked."""
        self.check_open()
        if self.state is RECONNECTING:
            self._postponed[request] = None
        else:
            request.ask()
        return request

    # What the driver does.

    @property
    def is_waiting(self) -> bool:
        """Whether anything is unanswered."""
        return bool(self.flow.in_flight.on_the_way or self.pending.unanswered)

    def receive(self, frames: Sequence[Frame], now: float) -> None:
        """A message came. One that does not follow the protocol ends the session."""
        if self.state is RECONNECTING and not self.is_waiting:
            return  # of the connection that was given up
        self.now = self._silence.heard_at = now
        try:
            if frames and len(frames[0]) and frames[0][0] == _STEPPED:
                self._handle_stepped(frames)
            else:
                self._handle(wire.unpack_header(frames), frames)
        except MalformedMessage as error:
            self.fail(
                MalformedMessage,
                f"the server at {self.endpoint} does not follow the protocol, the connection was given up: {error}",
            )

    def advance(self, now: float) -> None:
        """Send what may be sent; watch for silence; try for another connection when one was lost."""
        self.now = now
        if self.state is RECONNECTING:
            self._recover()
        if self.state is OPEN:
            self.flow.advance(now)
            rows = self.sleepers.due(now)
            if len(rows):
                self.claim(Claim(self), rows)
        is_waiting = self.state is not ENDED and self.is_waiting
        keep_alive_s = math.inf if is_waiting else self._keep_alive_s()
        if self._silence.lasts_too_long(now, is_waiting, self.state is OPEN, keep_alive_s):
            asks = "is the server running there"
            if self.state is GREETING and self.endpoint.startswith("tcp://"):
                asks += (
                    f", and is that its port for ZeroMQ ({DEFAULT_PORT} by default), not for HTTP ({DEFAULT_HTTP_PORT})"
                )
            self.lose(f"nobody answers at {self.endpoint} (waited {self._silence.timeout_s:g} s); {asks}?")

    def deadline(self) -> float | None:
        """When `advance` is to be called though nothing happens; None for never."""
        if self.state is ENDED:
            return None
        soonest = self._silence.deadline
        if self.state is OPEN:
            soonest = min(soonest, self.flow.deadline(), self.sleepers.again_at)
        elif self.state is RECONNECTING and not self.pending.waits_for(Kind.RESUMED):
            soonest = min(soonest, self.attempts.deadline())
        return None if soonest == math.inf else soonest

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """End the session: every call fails with that error, now and later."""
        if self.state is ENDED:
            return
        self.state = ENDED
        self._failure = (error, sentence)
        for request in [*self.pending.forget(), *self.sleepers.lost(), *self._postponed]:
            request.fail(error(sentence))
            self.pending.woken.append(request)
        self._postponed.clear()
        self.flow.fail(error, sentence)

    # Messages.

    def _handle_stepped(self, frames: Sequence[Frame]) -> None:
        for answer in replies.stepped(frames):
            if self.state is ENDED:
                return
            self.flow.stepped(answer)
            if self.state is OPEN:
                self.attempts.worked()

    def _handle(self, header: Header, frames: Sequence[Frame]) -> None:
        kind, number = header.kind, header.request
        asked = self.pending.unanswered.get(number)
        if self.state is ENDED and asked is None:
            return  # only the farewell is still waited for
        if kind is Kind.ERROR:
            self._handle_error(number, replies.error(header))
        elif kind is Kind.GOODBYE:
            self.lose(replies.goodbye(header))
        elif kind is Kind.EVICTED:
            self._handle_evicted(header, frames)
        elif kind is Kind.MOVED:
            self.table.moved(*replies.moved(header, frames))
        elif kind is Kind.WELCOME and number == 0:
            self._info = replies.welcome(header, frames)
        elif kind is Kind.PING:
            self.pending.messages.append([wire.pack_header(Kind.PONG, number)])  # all up to the PING was read
        else:
            if asked is None or asked.request.reply is not kind:
                raise MalformedMessage(f"{kind.name} with number {number} answers nothing that was asked")
            if self.state is OPEN:
                self.attempts.worked()
            del self.pending.unanswered[number]
            try:
                asked.request.answered(asked.part, header, frames)
            except MalformedMessage:
                self.pending.unanswered[number] = asked  # it fails with the others
                raise
            if asked.request.done:
                self.pending.woken.append(asked.request)

    def _handle_evicted(self, header: Header, frames: Sequence[Frame]) -> None:
        handles, code, sentence = replies.evicted(header, frames)
        rows = self.table.rows_of(handles)
        if code is Code.HIBERNATED:
            self.table.sleep(rows)
        else:
            self.flow.end({(code, sentence): rows.tolist()})

    def _handle_error(self, number: int, refusal: ErrorReply) -> None:
        if refusal.code is Code.HELLO_FIRST and number == 0 and self._is_new:
            # ZeroMQ announced the connection before our HELLO, as it does each time it makes one. Perhaps it made one
            # before and lost our HELLO with it: then the server will not know who sends this PING, and say so.
            self._is_new = False
            self._silence.ask()
        elif refusal.code is Code.HELLO_FIRST:
            self.lose(f"the connection to {self.endpoint} broke, or the server there was restarted; connect again")
        elif (asked := self.pending.unanswered.pop(number, None)) is not None:
            asked.request.refused(asked.part, refusal)
            if asked.request.done:
                self.pending.woken.append(asked.request)
        elif not self.flow.refused(number, refusal, self.now):
            self.fail(
                ConnectionFailed,
                f"the server at {self.endpoint} could not read a message of this client, the connection was given up: "
                f"{refusal.code.name}: {refusal.sentence}",
            )

    # Greeting and claims.

    def welcomed(self, info: ServerInfo) -> None:
        """WELCOME came.

        Raises:
            MalformedMessage: when the server speaks another version of the protocol.
        """
        self._is_new = False
        if info.protocol_version != wire.PROTOCOL_VERSION:
            raise MalformedMessage(
                f"it speaks protocol version {info.protocol_version}, this client {wire.PROTOCOL_VERSION}"
            )
        former, self._info = self._info, info
        if former is None:
            self.flow.limit(info)
            self.state = OPEN
            return
        problem = cannot_continue(former, info)
        if problem:
            self.fail(ConnectionFailed, f"the server at {self.endpoint} was restarted with {problem}; connect again")
            return
        self.forgets = info.boot_id != former.boot_id and info.durability == "memory"
        rows = self.table.live_rows()
        # Those that hibernate are resumed when there is something to send to them.
        self.claim(Claim(self), rows[~self.table.asleep[rows]])
        self.open_again()

    def turned_away(self, refusal: ErrorReply) -> None:
        """A HELLO or a claim was refused."""
        if refusal.code in _PASSES and self.state is RECONNECTING:
            self.lose(refusal.sentence)
        else:
            self.fail(ConnectionFailed, f"the server at {self.endpoint} refused this client: {refusal.sentence}")

    def claim(self, request: Request[None], rows: Indices) -> None:
        """Send RESUMEs for streams of this client, saying what has come of them."""
        for piece in parts(len(rows), self.info):
            part = rows[piece]
            names = wire.pack_names(self.table.names(part))
            self.pending.ask(request, len(part), 0, frames=[names, self.table.claims(part)], part=part)

    def open_again(self) -> None:
        """Send unanswered frames and requests again, once the last claim after a loss was answered."""
        if self.state is not RECONNECTING or self.pending.waits_for(Kind.RESUMED):
            return
        self.state = OPEN
        postponed, self._postponed = self._postponed, {}
        for request in postponed:
            request.ask()
        if not self.pending.unanswered:
            self.attempts.worked()

    # Silence, loss and recovery.

    def lose(self, sentence: str) -> None:
        """The connection is lost: there will be another, or it is the end of the session."""
        if self.state is ENDED:
            return
        if self.state is GREETING:
            self.fail(ConnectionFailed, sentence)
            return
        if not self.attempts.lost(self.now, sentence):
            self.fail(ConnectionFailed, self.attempts.why_given_up())
            return
        self.state = RECONNECTING
        self.flow.in_flight.lost()
        for request in dict.fromkeys([*self.pending.forget(), *self.sleepers.lost()]):
            if request.lost():
                self._postponed[request] = None
        self._silence.lost()

    def _recover(self) -> None:
        if self.pending.waits_for(Kind.RESUMED):
            return  # the attempt has had its WELCOME, and only silence ends it now
        if self.attempts.is_over(self.now):
            self.fail(ConnectionFailed, self.attempts.why_given_up())
        elif self.attempts.is_due(self.now) and self.is_waiting:
            self.lose("")
        elif self.attempts.is_due(self.now):
            self.attempts.begin(self.now)
            self.wants_socket = True
            self._is_new = True
            self.greeting.ask()

    def _keep_alive_s(self) -> float:
        """How long silence alone is no reason for a word: a connection lost unnoticed has its streams parked."""
        is_needed = self.state is OPEN and not self.table.is_empty and self.attempts.reconnect_s > 0
        return self.info.park_s / 2 if is_needed and self.info.park_s > 0 else math.inf


class Greeting(Request[ServerInfo]):
    """HELLO, at the beginning of every connection. The call ends with the first welcome."""

    kind, reply = Kind.HELLO, Kind.WELCOME

    def __init__(self, connection: Connection, name: str, model: str) -> None:
        self._connection = connection
        self._name = name
        self._model = model

    def ask(self) -> None:
        self._connection.pending.ask(self, wire.PROTOCOL_VERSION, self._name, self._model)

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        info = replies.welcome(header, frames)
        self._model = info.model  # a server that is started again may have another default
        self._connection.welcomed(info)
        self.finish(info)

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        super().refused(part, refusal)
        self._connection.turned_away(refusal)

    def lost(self) -> bool:
        return False  # each attempt sends its own


class Claim(Request[None]):
    """A claim on streams that are this client's already: after a loss, or because they hibernated."""

    kind, reply = Kind.RESUME, Kind.RESUMED

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._asked_at = connection.table.stamp()

    def answered(self, part: Indices, header: Header, frames: Sequence[Frame]) -> None:
        connection = self._connection
        grants, failures = replies.granted(header, frames, len(part))
        ended = connection.sleepers.granted(part, grants, failures, self._asked_at, connection.now)
        if connection.state is RECONNECTING and connection.forgets:
            ended = {
                (code, _RESTARTED if code is Code.UNKNOWN_STREAM else sentence): rows
                for (code, sentence), rows in ended.items()
            }
        connection.flow.end(ended)
        connection.open_again()

    def refused(self, part: Indices, refusal: ErrorReply) -> None:
        connection = self._connection
        if connection.state is OPEN and refusal.code in _PASSES:
            connection.sleepers.refused(part, connection.now + max(refusal.retry_after_s, _LEAST_RETRY_S))
        else:
            connection.turned_away(refusal)

    def lost(self) -> bool:
        return False  # the next connection has claims of its own
