"""The client's rules without sockets, clock or event loop: calls and messages in, messages and ended calls out.

A driver (`driver.py` is one) does five things and nothing else:

1. hands every message to `receive`, and lets users make calls (`open`, `step`, `close`, …), each giving a `Call`;
2. calls `advance(now)` after that, and when `deadline()` has come;
3. connects a new socket in place of the old one when `take_reconnect` says so;
4. sends what `outbox.take_messages` gives, in order;
5. wakes what `outbox.take_woken` gives: calls that ended or were sent, and stream handles whose outputs changed.

`now` is any monotonic clock in seconds. A session owns a table of streams (`streams.py`) and the queue of their frames
(`frames.py`). Everything else that is asked is a request, which knows how it is sent and what its replies mean
(`requests.py`). `connection.py` has the state of the connection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from instep_client import arguments, replies
from instep_client.arguments import DEFAULT_HTTP_PORT, DEFAULT_PORT, check_settings, checked_endpoint
from instep_client.cluster import ShardMap
from instep_client.connection import (
    ENDED,
    GREETING,
    OPEN,
    RECONNECTING,
    Attempts,
    Call,
    Outbox,
    Request,
    Silence,
    cannot_continue,
)
from instep_client.frames import SendQueue, StepCall
from instep_client.protocol import wire
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import (
    ClientClosed,
    ConnectionFailed,
    HandshakeFailed,
    InstepError,
    InvalidInput,
    MalformedMessage,
)
from instep_client.protocol.wire import MAX_NAME_BYTES, Frame, Header, Kind, ServerInfo, ShardTable
from instep_client.replies import ColumnError, ErrorReply, ListedStream, ServedModel
from instep_client.requests import (
    Claim,
    CloseCall,
    Farewell,
    ForkCall,
    Greeting,
    OpenCall,
    Opening,
    PingCall,
    Question,
    ReadStateCall,
    ResetCall,
    ResumeCall,
    TurnCall,
)
from instep_client.streams import SLEEPS_ON, OpenStreams, StreamHandle

P = ParamSpec("P")
Q = TypeVar("Q", bound=Request[Any])
T = TypeVar("T", bound=TurnCall[Any])

_STEPPED: Final = int(Kind.STEPPED)
_DOUBT_S: Final = 1.0
"""The silence of a shard's server after which others are asked whether another one has taken its place."""
_AGAIN_S: Final = 0.25
"""The time after which a request is asked again that was refused because the server ends."""
_PASSES: Final = frozenset({Code.BUSY, Code.SHUTTING_DOWN, Code.UNKNOWN_MODEL})
"""Codes with which a HELLO or RESUME is refused only for a while; a model may also be unloaded and loaded again."""


def asks(kind: Callable[Concatenate[Session, P], Q]) -> Callable[Concatenate[Session, P], Q]:
    """Make a method of `Session` that asks a request of this kind; it has the arguments of the request."""

    def verb(session: Session, /, *args: P.args, **kwargs: P.kwargs) -> Q:
        return session.ask(kind(session, *args, **kwargs))

    verb.__doc__ = kind.__doc__
    return verb


def queues(
    kind: Callable[Concatenate[Session, StreamHandle, P], T],
) -> Callable[Concatenate[Session, StreamHandle, P], T]:
    """Make a method of `Session` that asks a request of this kind after everything that was sent through a handle."""

    def verb(session: Session, handle: StreamHandle, /, *args: P.args, **kwargs: P.kwargs) -> T:
        session.check_handle(handle)
        request = kind(session, handle, *args, **kwargs)
        session.queue.enqueue(request)
        return request

    verb.__doc__ = kind.__doc__
    return verb


class Session:
    """One client's side of the protocol: methods for users' calls, and methods for the driver.

    A call that cannot be asked raises at once: InvalidInput for its arguments, ClientClosed after the end of the client
    or handle, StreamEvicted when the server ended a stream. Nothing is sent before `advance`. Calls wait while there
    is no connection.

    Args:
        endpoint: where the driver connects to, `tcp://HOST:PORT` or `ipc://PATH`.
        name: for the server's log.
        timeout_s: seconds to wait for a silent server.
        reconnect_s: seconds to try for another connection after one was lost; 0 for none.
        rng: randomizes the delays between attempts.
        model: the model to connect to; empty for the server's default.

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
        self.outbox = Outbox()
        self.queue = SendQueue(self.table, self.outbox, timeout_s, reconnect_s)
        self.attempts = Attempts(reconnect_s, timeout_s, rng or Random())
        self.greeting = Greeting(self, name, model)
        """The request that ends with the server's welcome."""
        self._silence = Silence(self.outbox, timeout_s)
        self._info: ServerInfo | None = None
        self.forgets = False
        """Whether the server was restarted between the last two connections and keeps no recording."""
        self._failure: tuple[type[InstepError], str] = (
            ClientClosed,
            "the client is not connected: use `async with`, or await client.connect()",
        )
        self._silent_because = ""
        """Why a handshake failed; empty if none did, or for a reason that is not known."""
        self._wants_socket = False
        self._postponed: dict[Request[Any], None] = {}
        """Requests to ask, or ask again, over the next connection; or a little later, if the server is about to end."""
        self._postponed_until = 0.0
        self._claim: Claim | None = None
        """The claim over a new connection, from its WELCOME on until all streams were claimed."""
        self._is_new = True
        """Whether the socket is new, so that the next HELLO_FIRST may only announce its connection."""
        self.shards = ShardMap(1)
        """All shards of the server's cluster, from the first welcome on; the client's sessions share it."""
        self.shard = 0
        """The shard to which this is a connection."""
        self.greeting.ask()

    @property
    def info(self) -> ServerInfo:
        """The server's description of itself and of the model.

        Raises:
            InstepError: before the first welcome.
        """
        if self._info is None:
            raise self.failure()
        return self._info

    # ── For the driver ─────────────────────────────────────────────────────────────────────────────────────────────

    def join(self, other: Session, shard: int, now: float) -> None:
        """Become a connection to another shard of a session's cluster. Calls wait for its server from now on."""
        self.shards, self.shard, self._info = other.shards, shard, other.info
        self.queue.limit(other.info)
        self.state, self.now = RECONNECTING, now
        self.attempts.begin(now)

    def is_in_trouble(self, now: float) -> bool:
        """Whether the connection is lost, or an answer has been missing for a second."""
        is_silent = self.state is OPEN and now >= self._silence.quiet_since + _DOUBT_S
        return is_silent or self.state is RECONNECTING

    def follow_shards(self, now: float) -> None:
        """Leave the server at once if `shards` names a higher term or, for a server in trouble, another endpoint."""
        self.now, endpoint = now, self.shards.endpoints[self.shard] or self.endpoint
        is_former = self.state is OPEN and self.info.term < self.shards.terms[self.shard]
        if is_former or (self.is_in_trouble(now) and self.endpoint != endpoint):
            self.lose(f"another server takes shard {self.shard} over from the one at {self.endpoint}")
            self.attempts.at_once(now)

    @property
    def is_waiting(self) -> bool:
        """Whether anything is unanswered."""
        return bool(self.outbox.unanswered or self._claim) or (self.state is OPEN and self.queue.is_waiting)

    def handshake_failed(self, why: str, *, is_final: bool) -> None:
        """The handshake of a connection failed; unless that `is_final`, another try may succeed."""
        if self.state is GREETING:
            self._silent_because = why
            if is_final:
                self.fail(HandshakeFailed, why)
        elif self.state is RECONNECTING and why:
            self.attempts.why = why

    def take_reconnect(self) -> bool:
        """Whether to close the socket with its unsent messages and connect a new one now; asking clears it."""
        wanted, self._wants_socket = self._wants_socket, False
        return wanted

    def receive(self, frames: Sequence[Frame], now: float) -> None:
        """Process a message. One that violates the protocol ends the session."""
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
        """Send what may be sent, watch for silence, and try for another connection after a loss."""
        self.now = now
        if self.state is RECONNECTING:
            self._recover()
        if self.state is OPEN:
            if now >= self._postponed_until:
                self._ask_postponed()
            self.queue.advance(now)
        is_waiting = self.state is not ENDED and self.is_waiting
        keep_alive_s = math.inf if is_waiting else self._keep_alive_s()
        if self._silence.lasts_too_long(now, is_waiting, self.state is OPEN or self._claim is not None, keep_alive_s):
            asks = "is the server running there"
            if self.state is GREETING and self.endpoint.startswith("tcp://"):
                asks += (
                    f", and is that its port for ZeroMQ ({DEFAULT_PORT} by default), not for HTTP "
                    f"({DEFAULT_HTTP_PORT}), or does it want a key"
                )
            if self.state is GREETING and self._silent_because:
                self.fail(HandshakeFailed, self._silent_because)
            self.lose(f"nobody answers at {self.endpoint} (waited {self._silence.timeout_s:g} s); {asks}?")

    def deadline(self) -> float | None:
        """The time to call `advance` even if nothing happens; None for never."""
        if self.state is ENDED:
            return None
        soonest = self._silence.deadline
        if self.state is OPEN:
            soonest = min(soonest, self.queue.deadline(), self._postponed_until if self._postponed else math.inf)
        elif self.state is RECONNECTING and not self.outbox.waits_for(Kind.RESUMED):
            soonest = min(soonest, self.attempts.deadline())
        return None if soonest == math.inf else soonest

    def cancel(self, call: Call[Any]) -> None:
        """Cancel a call. Sent frames stay sent, and their answers are dropped."""
        if self.state is OPEN or self.state is RECONNECTING:
            call.cancel()

    def leave(self, park: bool = False) -> Call[None] | None:
        """End the session: waiting calls fail, and open streams are closed.

        The call ends when the server has read the messages. Streams that are being opened are closed once granted. With
        `park`, or without a connection, nothing is closed: the server parks the streams, and closes them after a while.
        """
        can_tell = self.state is OPEN and not park
        openings = self.outbox.under_way(Kind.OPENED)
        begun = {asked.request for asked in openings.values()}
        grants = [request.grants["handle"] for request in begun if isinstance(request, Opening)]
        self.fail(ClientClosed, "the client was closed")
        handles = np.concatenate([self.table.numbers[self.table.live_rows()], *grants])
        handles = handles[handles != 0]
        if not can_tell or not (openings or len(handles)):
            return None
        farewell = Farewell(self, openings)
        farewell.close(handles)
        return farewell

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """End the session: every present and later call fails with this error."""
        if self.state is ENDED:
            return
        self.state = ENDED
        self._failure = (error, sentence)
        for request in [*self.outbox.forget(), *self._postponed]:
            request.fail(error(sentence))
            self.outbox.woken.append(request)
        self._postponed.clear()
        self.queue.fail(error, sentence)

    # ── Streams ────────────────────────────────────────────────────────────────────────────────────────────────────

    open = asks(OpenCall)
    resume = asks(ResumeCall)
    fork = queues(ForkCall)
    reset = queues(ResetCall)

    def close(self, handle: StreamHandle) -> CloseCall:
        """Close a handle after everything sent through it was answered; the result is final states [N, row_bytes]."""
        self.check_open()
        _check_not_closed(handle)
        call = CloseCall(self, handle)
        self.queue.enqueue(call)
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

    # ── Frames ─────────────────────────────────────────────────────────────────────────────────────────────────────

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
            table_rows = handle.rows[arguments.row_indices(rows, len(handle.rows))]
        if handle.single:
            frames, prefix = arguments.stream_frames(x, info.features)
        else:
            frames, prefix = arguments.group_frames(x, len(table_rows), info.features)
        if handle.has_ended:
            self.table.check_not_ended(table_rows)
        call = StepCall(self.queue, handle, table_rows, frames, (*prefix, info.outputs), self.table.stamp(), keep)
        self.queue.submit(call)
        return call

    def finish(self, handle: StreamHandle) -> None:
        """Send nothing more; outputs end after those of frames sent with `keep`."""
        handle.finished = True
        self.outbox.woken.append(handle)

    def take(self, handle: StreamHandle) -> StepCall | None:
        """The next kept call, if it has ended. After None, wait until the handle is woken and call this again."""
        return self.queue.take(handle)

    def outputs_end(self, handle: StreamHandle) -> bool:
        """Whether `take` will never return anything more.

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

    # ── The server ─────────────────────────────────────────────────────────────────────────────────────────────────

    ping = asks(PingCall)

    def statistics(self) -> Question[dict[str, float]]:
        """Ask for the server's numbers."""
        return self.ask(Question(self, Kind.STATS, Kind.STATISTICS, replies.statistics))

    def remove(self, names: Sequence[str], park: bool) -> Question[list[ColumnError]]:
        """Close or park streams of others; the result is what was refused."""
        frames = [wire.pack_names(names)]
        decode = partial(replies.changed, count=len(names))
        return self.ask(Question(self, Kind.REMOVE, Kind.CHANGED, decode, len(names), int(park), frames=frames))

    def models(self) -> Question[list[ServedModel]]:
        """Ask for the server's models."""
        return self.ask(Question(self, Kind.MODELS, Kind.SERVED, replies.served))

    def where(self) -> Question[ShardTable]:
        """Ask where the shards are."""
        return self.ask(Question(self, Kind.SHARDS, Kind.SHARDED, ShardTable.unpack))

    def list_streams(self, cursor: int, most: int, place: int, prefix: str) -> Question[tuple[list[ListedStream], int]]:
        """Ask for a page of at most `most` streams; `place` is a `wire.Place` or 0, `cursor` 0 at first."""
        begins = prefix.encode()
        if len(begins) > MAX_NAME_BYTES:
            raise InvalidInput(f"names have at most {MAX_NAME_BYTES} bytes, and so has what they begin with")
        question = Question(self, Kind.LIST, Kind.LISTED, replies.listed, cursor, most, place, frames=[begins])
        return self.ask(question)

    # ── What may be asked ──────────────────────────────────────────────────────────────────────────────────────────

    def failure(self) -> InstepError:
        """A new exception with the reason why nothing can be asked."""
        error, sentence = self._failure
        return error(sentence)

    def check_open(self) -> ServerInfo:
        """Return the server's description of itself.

        Raises:
            InstepError: before the first welcome, and after the end of the session.
        """
        if self._info is None or self.state is ENDED:
            raise self.failure()
        return self._info

    def check_handle(self, handle: StreamHandle) -> None:
        """Raise the error of a client, handle or stream that has ended."""
        self.check_open()
        _check_not_closed(handle)
        if handle.has_ended:
            self.table.check_not_ended(handle.rows)

    def ask(self, request: Q) -> Q:
        """Ask now, or when there is a connection again.

        Raises:
            InstepError: before the first welcome, and after the end of the session.
        """
        self.check_open()
        if self.state is RECONNECTING:
            self._postponed[request] = None
        else:
            request.ask()
        return request

    def ask_again(self, request: Request[Any]) -> None:
        """Ask a refused request a little later, perhaps another server, because the shard moves."""
        self._postponed[request] = None
        self._postponed_until = self.now + _AGAIN_S

    def _ask_postponed(self) -> None:
        postponed, self._postponed = self._postponed, {}
        for request in postponed:
            request.ask()

    # ── Messages ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _handle_stepped(self, frames: Sequence[Frame]) -> None:
        for answer in replies.stepped(frames):
            if self.state is ENDED:
                return
            self.queue.stepped(answer)
            if self.state is OPEN:
                self.attempts.worked()

    def _handle(self, header: Header, frames: Sequence[Frame]) -> None:
        kind, number = header.kind, header.request
        asked = self.outbox.unanswered.get(number)
        if self.state is ENDED and asked is None:
            return  # only the farewell is still waited for
        if kind is Kind.ERROR:
            self._handle_error(number, replies.error(header))
        elif kind is Kind.GOODBYE:
            self.lose(replies.goodbye(header))
        elif kind is Kind.EVICTED:
            self._handle_evicted(header, frames)
        elif kind is Kind.WOKEN:
            self.queue.woke(self.table.woke(*replies.woken(header, frames)))
        elif kind is Kind.MOVED:
            self.table.moved(*replies.moved(header, frames))
        elif kind is Kind.WELCOME and number == 0:
            self._info = replies.welcome(header, frames)
        elif kind is Kind.PING:
            self.outbox.messages.append([wire.pack_header(Kind.PONG, number)])  # all up to the PING was read
        else:
            if asked is None or asked.request.reply is not kind:
                raise MalformedMessage(f"{kind.name} with number {number} answers nothing that was asked")
            if self.state is OPEN:
                self.attempts.worked()
            del self.outbox.unanswered[number]
            try:
                asked.request.accept(asked.part, header, frames)
            except MalformedMessage:
                self.outbox.unanswered[number] = asked  # it fails with the others
                raise
            if asked.request.done:
                self.outbox.woken.append(asked.request)

    def _handle_evicted(self, header: Header, frames: Sequence[Frame]) -> None:
        handles, code, sentence = replies.evicted(header, frames)
        rows = self.table.rows_of(handles)
        if code is Code.HIBERNATED:
            self.table.sleep(rows)
        elif code in SLEEPS_ON:
            self.queue.sleep_on(rows, code, sentence)
        else:
            self.queue.end({(code, sentence): rows.tolist()})

    def _handle_error(self, number: int, refusal: ErrorReply) -> None:
        if refusal.code is Code.HELLO_FIRST and number == 0 and self._is_new:
            # ZeroMQ announced the connection before our HELLO, as it does each time it makes one. Perhaps it made one
            # before and lost our HELLO with it: then the server will not know who sends this PING, and say so.
            self._is_new = False
            self._silence.ask()
        elif refusal.code is Code.HELLO_FIRST:
            self.lose(f"the connection to {self.endpoint} broke, or the server there was restarted")
        elif (asked := self.outbox.unanswered.pop(number, None)) is not None:
            asked.request.refused(asked.part, refusal)
            if asked.request.done:
                self.outbox.woken.append(asked.request)
        elif not self.queue.refused(number, refusal, self.now):
            self.fail(
                ConnectionFailed,
                f"the server at {self.endpoint} could not read a message of this client, the connection was given up: "
                f"{refusal.code.name}: {refusal.sentence}",
            )

    # ── Greeting, loss and recovery ────────────────────────────────────────────────────────────────────────────────

    def welcomed(self, info: ServerInfo) -> None:
        """Process WELCOME.

        Raises:
            MalformedMessage: when the server speaks another version of the protocol.
        """
        self._is_new = False
        if info.protocol_version != wire.PROTOCOL_VERSION:
            raise MalformedMessage(
                f"it speaks protocol version {info.protocol_version}, this client {wire.PROTOCOL_VERSION}"
            )
        if self._info is None:
            self.shards, self.shard = ShardMap(info.shards), info.shard
        if info.shards != len(self.shards):
            was = f"the server was one of {len(self.shards)} shards when this client connected"
            self.fail(ConnectionFailed, f"{was}, and is one of {info.shards} now: make another client")
            return
        if not self.shards.learn(info.shard, info.term, self.endpoint) or info.shard != self.shard:
            place = self.shards.endpoints[self.shard] or "no known endpoint"
            self.lose(
                f"the server at {self.endpoint} has shard {info.shard} in term {info.term}, and shard {self.shard} is "
                f"in term {self.shards.terms[self.shard]} now, at {place}"
            )
            return
        former, self._info = self._info, info
        if former is None:
            self.queue.limit(info)
            self.state = OPEN
            return
        problem = cannot_continue(former, info)
        if problem:
            self.fail(ConnectionFailed, f"the server at {self.endpoint} has {problem}; make another client")
            return
        self.forgets = info.boot_id != former.boot_id and info.durability == "memory"
        self._claim = Claim(self, self.table.live_rows())
        self._claim.ask()

    def turned_away(self, refusal: ErrorReply) -> None:
        """Process the refusal of a HELLO or a claim."""
        if refusal.code in _PASSES and self.state is RECONNECTING:
            self.lose(refusal.sentence)
        else:
            self.fail(ConnectionFailed, f"the server at {self.endpoint} refused this client: {refusal.sentence}")

    def claimed(self) -> None:
        """All streams were claimed after a loss: send unanswered frames and requests again."""
        self._claim = None
        self.state = OPEN
        self._ask_postponed()
        if not self.outbox.unanswered:
            self.attempts.worked()

    def lose(self, sentence: str) -> None:
        """Note a lost connection, which is replaced or ends the session."""
        if self.state is ENDED:
            return
        if self.state is GREETING:
            self.fail(ConnectionFailed, sentence)
            return
        if not self.attempts.lost(self.now, sentence):
            self._give_up()
            return
        self.state = RECONNECTING
        self._claim = None
        self.queue.lost()
        for request in self.outbox.forget():
            if request.lost():
                self._postponed[request] = None
        self._silence.lost()

    def _give_up(self) -> None:
        if len(self.shards) == 1:
            self.fail(ConnectionFailed, self.attempts.why_given_up("make another client"))
        else:  # the next call that opens or resumes makes another session
            why = self.attempts.why_given_up("open or resume its streams to try again")
            self.fail(ConnectionFailed, f"shard {self.shard}: {why}")

    def _recover(self) -> None:
        if self._claim is not None:  # only silence ends the attempt now
            if self.now >= self.attempts.deadline() and not self.outbox.waits_for(Kind.RESUMED):
                self._claim.ask()
        elif self.attempts.is_over(self.now):
            self._give_up()
        elif self.attempts.is_due(self.now) and self.is_waiting:
            self.lose(f"nobody answers at {self.endpoint}")
        elif self.attempts.is_due(self.now):
            self.endpoint = self.shards.endpoints[self.shard] or self.endpoint
            self.attempts.begin(self.now)
            self._wants_socket = True
            self._is_new = True
            self.greeting.ask()

    def _keep_alive_s(self) -> float:
        """The longest silence without a PING: the streams of an unnoticed lost connection are parked."""
        is_needed = self.state is OPEN and not self.table.is_empty and self.attempts.reconnect_s > 0
        return self.info.park_s / 2 if is_needed and self.info.park_s > 0 else math.inf


def _check_not_closed(handle: StreamHandle) -> None:
    if handle.closing:
        raise ClientClosed(f"stream {handle.names[0]!r} was closed; open it again to send more")
