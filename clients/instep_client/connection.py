"""One connection after another to a server, as rules: time, silence, loss and recovery."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from random import Random
from typing import Any

from instep_client.calls import Call, ListCall, PingCall, StatisticsCall
from instep_client.changes import Changes
from instep_client.claims import ask_for_own
from instep_client.endpoint import checked_endpoint
from instep_client.flow import Flow
from instep_client.openings import Openings
from instep_client.outbox import Outbox
from instep_client.protocol import wire
from instep_client.protocol.errors import ClientClosed, ConnectionFailed, InstepError, InvalidInput
from instep_client.protocol.wire import Kind, Message, ServerInfo
from instep_client.reconnection import Reconnection
from instep_client.requests import CloseCall, ForkCall, OpenCall, QueuedCall, ReadStateCall, ResetCall
from instep_client.sleepers import Sleepers
from instep_client.state_reads import StateReads
from instep_client.streams import OpenStreams, StreamHandle


class State(Enum):
    """Where the session stands."""

    GREETING = "HELLO is on its way"
    OPEN = "the server has welcomed us"
    RECONNECTING = "the connection was lost; there will be another"
    ENDED = "everything has failed or was closed"


class Connection:
    """The session's connection; `listener.Listener` adds the reactions to messages, `session.Session` the verbs."""

    def __init__(
        self,
        endpoint: str,
        name: str = "",
        timeout_s: float = 10.0,
        reconnect_s: float = 30.0,
        rng: Random | None = None,
    ) -> None:
        """A session whose HELLO waits to be sent.

        Args:
            endpoint: where the driver connects to, `tcp://HOST:PORT` or `ipc://PATH`.
            name: told to the server.
            timeout_s: how long a silent server is waited for.
            reconnect_s: for how long another connection is tried for when one is lost; 0 for not at all.
            rng: what the delays between attempts are drawn from.

        Raises:
            InvalidInput: for a bad endpoint, name or time.
        """
        self.endpoint = checked_endpoint(endpoint)
        if name and not wire.name_is_good(name):
            raise InvalidInput(f"a client's name must be at most {wire.MAX_NAME_BYTES} bytes of printable UTF-8")
        if not timeout_s > 0:
            raise InvalidInput("timeout_s must be more than 0 seconds")
        if not reconnect_s >= 0:
            raise InvalidInput("reconnect_s must be 0 seconds or more")
        self.state = State.GREETING
        self._name = name
        self._timeout_s = timeout_s
        self._outbox = Outbox()
        self._table = OpenStreams()
        self._reconnection = Reconnection(self._table, self._outbox, reconnect_s, timeout_s, rng or Random())
        self._info: ServerInfo | None = None
        self._forgets = False
        """Whether the server was restarted between the last two connections, and records nothing."""
        self._failure: tuple[type[InstepError], str] = (ClientClosed, "the client is not connected")
        self._heard_at = float("-inf")
        self._waiting_since: float | None = None
        self._probing = False
        self._wants_socket = False
        self._postponed: dict[Call[Any], None] = {}
        """Calls that are to be asked, or asked again, over the next connection."""
        self._openings: Openings
        self._changes: Changes
        self._state_reads: StateReads
        self._flow: Flow
        self._sleepers: Sleepers
        self._farewell: PingCall | None = None
        """Asked when everything was closed that was open at the end."""
        self.greeting: Call[ServerInfo] = Call()
        """Ends with the server's welcome."""
        self._outbox.ask(Kind.HELLO, self.greeting, wire.PROTOCOL_VERSION, name)
        self._is_new = True
        """Whether the server has yet to say that it does not know the connection that the socket has just made."""

    @property
    def info(self) -> ServerInfo:
        """The server's description of itself.

        Raises:
            InstepError: before the welcome.
        """
        if self._info is None:
            raise self._failure[0](self._failure[1])
        return self._info

    @property
    def loss(self) -> str:
        """How the connection was lost, while another one is tried for."""
        return self._reconnection.why

    def advance(self, now: float) -> None:
        """Send what may be sent; watch for silence; try for another connection when one was lost."""
        if self.state is State.RECONNECTING:
            self._recover(now)
        if self.state is State.OPEN:
            self._flow.advance(now, self._timeout_s)
            self._changes.advance()
            self._sleepers.advance(now)
        self._watch(now)

    def deadline(self) -> float | None:
        """When `advance` is to be called though nothing happens; None for never."""
        if self.state is State.ENDED:
            return None
        times = [self._reconnection.deadline()]
        if self.state is State.OPEN:
            times.append(self._flow.deadline(self._timeout_s))
            times.append(self._sleepers.deadline())
            if self._keeps_alive():
                times.append(self._heard_at + self.info.park_s / 2)
        if self._waiting_since is not None:
            timeout_s = self._timeout_s / 2 if self._may_probe() else self._timeout_s
            times.append(max(self._heard_at, self._waiting_since) + timeout_s)
        return min((time for time in times if time is not None), default=None)

    def take_messages(self) -> list[Message]:
        """The messages to be sent, in order."""
        messages, self._outbox.messages = self._outbox.messages, []
        return messages

    def take_woken(self) -> list[Call[Any] | StreamHandle]:
        """Calls that ended or were sent, and stream handles whose outputs changed."""
        woken, self._outbox.woken = self._outbox.woken, []
        return woken

    def take_reconnect(self) -> bool:
        """Whether to close the socket, drop what was not sent through it, and connect a new one now."""
        wanted, self._wants_socket = self._wants_socket, False
        return wanted

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """End the session: every call fails with that error, now and later."""
        if self.state is State.ENDED:
            return
        was_welcomed = self.state is not State.GREETING
        self.state = State.ENDED
        self._failure = (error, sentence)
        for call in [*(asked.what for asked in self._outbox.forget()), *self._postponed]:
            if isinstance(call, Call):
                call.fail(error(sentence))
                self._outbox.wake(call)
        self._postponed.clear()
        if was_welcomed:
            self._flow.fail(error, sentence)

    def leave(self, park: bool = False) -> PingCall | None:
        """End the session: what waits fails, open streams are closed. The Ping ends when the server has read that.

        With `park`, and without a connection, nothing is closed: the server parks the streams, and forgets them in
        time.
        """
        reachable = self.state is State.OPEN
        self.fail(ClientClosed, "the client was closed")
        if park or not reachable or not len(self._table.live_rows()):
            return None
        self._farewell = PingCall(0.0)
        self._changes.close_all()
        live = self._table.live_rows()
        asleep = live[self._table.asleep[live]]
        ask_for_own(self._table, self._outbox, asleep, self.info.max_message_bytes)  # to be closed, they must be awake
        self._say_farewell()
        return self._farewell

    def _say_farewell(self) -> None:
        """Ask what tells that the server has read everything, once nothing is left to be closed."""
        if not any(asked.kind is Kind.RESUME for asked in self._outbox.unanswered.values()):
            self._outbox.ask(Kind.PING, self._farewell)

    def _check_open(self) -> None:
        if self.state not in (State.OPEN, State.RECONNECTING):
            raise self._failure[0](self._failure[1])

    def _ask(self, call: Call[Any], now: float = 0.0) -> None:
        """Ask for what a call wants, now or when there is a connection again."""
        if self.state is State.RECONNECTING:
            self._postponed[call] = None
        elif isinstance(call, PingCall):
            call.sent_at = max(call.sent_at, now)
            self._outbox.ask(Kind.PING, call)
        elif isinstance(call, StatisticsCall):
            self._outbox.ask(Kind.STATS, call)
        elif isinstance(call, ListCall):
            fields = (call.cursor, call.most, call.place)
            self._outbox.ask(Kind.LIST, call, *fields, frames=[call.prefix.encode()])
        elif (
            isinstance(call, ForkCall | ReadStateCall | ResetCall) and call.handle is not None and call.handle.has_ended
        ):
            row = int(call.handle.rows[self._table.ended[call.handle.rows] != 0][0])
            call.fail(self._table.why_ended(row))
            self._outbox.wake(call)
            if not isinstance(call, ReadStateCall):
                self._flow.answered(call.handle)
        elif isinstance(call, OpenCall):
            self._openings.ask(call)
        elif isinstance(call, ReadStateCall):
            self._state_reads.ask(call)
        elif isinstance(call, ResetCall | CloseCall):
            self._changes.ask(call)

    def _ask_in_turn(self, call: QueuedCall) -> None:
        self._flow.enqueue(call)

    def _discard(self, handle: StreamHandle, on_end: Callable[[], None] | None = None) -> None:
        """Close a stream handle that nobody holds; `on_end` is called when that was done or failed."""
        handle.closing = True
        self._ask_in_turn(CloseCall(handle, self.info.state, on_end))

    # Silence, loss and recovery.

    def _watch(self, now: float) -> None:
        if self.state is State.ENDED or not self._outbox.unanswered:
            self._waiting_since = None
            if self._keeps_alive() and now >= self._heard_at + self.info.park_s / 2:
                self._probe()
            return
        if self._waiting_since is None:
            self._waiting_since = now
        quiet_since = max(self._heard_at, self._waiting_since)
        if now >= quiet_since + self._timeout_s:
            self._lose(
                now, f"nobody answers at {self.endpoint} (waited {self._timeout_s:g} s); is the server running there?"
            )
        elif now >= quiet_since + self._timeout_s / 2 and self._may_probe():
            self._probe()

    def _probe(self) -> None:
        self._probing = True
        self._outbox.ask(Kind.PING, None)

    def _may_probe(self) -> bool:
        return self.state is State.OPEN and not self._probing

    def _keeps_alive(self) -> bool:
        """Whether silence alone calls for a word: a connection that was lost unnoticed has its streams parked."""
        return (
            self.state is State.OPEN
            and self._reconnection.reconnect_s > 0
            and self.info.park_s > 0
            and not self._outbox.unanswered
            and not self._table.is_empty
        )

    def _lose(self, now: float, sentence: str) -> None:
        """The connection is lost: there will be another, or it is the end of the session."""
        if self.state is State.GREETING:
            self.fail(ConnectionFailed, sentence)
            return
        if not self._reconnection.lost(now, sentence):
            self._give_up()
            return
        waiting: list[object] = []
        if self.state is State.OPEN:
            self.state = State.RECONNECTING
            self._flow.in_flight.lost()
            waiting += [*self._sleepers.lost(), *self._changes.lost()]
        for call in dict.fromkeys([*(asked.what for asked in self._outbox.forget()), *waiting]):
            if isinstance(call, Call) and not (isinstance(call, OpenCall) and not self._openings.lost(call)):
                self._postponed[call] = None
        self._probing = False
        self._waiting_since = None

    def _give_up(self) -> None:
        why, reconnect_s = self._reconnection.why, self._reconnection.reconnect_s
        if reconnect_s:
            why += " " if why.endswith("?") else "; "
            why += f"this client tried to connect again for {reconnect_s:g} s and has given up: make another one"
        self.fail(ConnectionFailed, why)

    def _recover(self, now: float) -> None:
        if self._reconnection.is_over(now):
            self._give_up()
        elif self._reconnection.has_timed_out(now):
            self._lose(now, "")
        elif self._reconnection.is_due(now):
            self._wants_socket = True
            self._is_new = True
            self._outbox.ask(Kind.HELLO, None, wire.PROTOCOL_VERSION, self._name)
