"""The client's rules without sockets, clock or event loop: calls and messages in, messages and ended calls out.

A driver (`driver.py` is one) does four things and nothing else:

1. hands every message to `receive`, and lets users make calls (`open`, `step`, `close`, …), each giving a `Call`;
2. calls `advance(now)` after that, and when `deadline()` has come;
3. sends what `take_messages` gives, in order;
4. wakes what `take_woken` gives: calls that ended or were sent, and lanes whose outputs changed.

`now` is any monotonic clock in seconds. The rules of sending frames are in `flow.py`, those of opening and closing in
`openings.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep_client import arrays, replies, wire
from instep_client.blocks import Block
from instep_client.calls import Call, CloseCall, OpenCall, Ping, StepCall
from instep_client.errors import (
    ClientClosed,
    ConnectionFailed,
    InstepError,
    InvalidInput,
    MalformedMessage,
    Refused,
    StreamEvicted,
)
from instep_client.flow import Flow
from instep_client.openings import Openings
from instep_client.outbox import Asked, Outbox
from instep_client.streams import Lane, StreamTable
from instep_client.wire import Code, Frame, Header, Kind, Message, ServerInfo

_REPLY: Final = {
    Kind.HELLO: Kind.WELCOME,
    Kind.OPEN: Kind.OPENED,
    Kind.STEP: Kind.STEPPED,
    Kind.CLOSE: Kind.CLOSED,
    Kind.PING: Kind.PONG,
    Kind.STATS: Kind.STATISTICS,
}


class State(Enum):
    """Where the session stands."""

    GREETING = "HELLO is on its way"
    OPEN = "the server has welcomed us"
    ENDED = "everything has failed or was closed"


class Session:
    """One connection to a server, as rules."""

    def __init__(self, endpoint: str, name: str = "", timeout_s: float = 10.0) -> None:
        """A session whose HELLO waits to be sent.

        Raises:
            InvalidInput: for a bad name or timeout.
        """
        if name and not wire.name_is_good(name):
            raise InvalidInput(f"a client's name must be at most {wire.MAX_NAME_BYTES} bytes of printable UTF-8")
        if not timeout_s > 0:
            raise InvalidInput("timeout_s must be more than 0 seconds")
        self.endpoint = endpoint
        self.state = State.GREETING
        self._timeout_s = timeout_s
        self._outbox = Outbox()
        self._table = StreamTable()
        self._info: ServerInfo | None = None
        self._failure: tuple[type[InstepError], str] = (ClientClosed, "the client is not connected")
        self._heard_at = float("-inf")
        self._waiting_since: float | None = None
        self._probing = False
        self.greeting: Call[ServerInfo] = Call()
        """Ends with the server's welcome."""
        self._outbox.ask(Kind.HELLO, self.greeting, wire.PROTOCOL_VERSION, name)

    # What the user asks for. Each raises at once when it cannot be asked, and nothing is sent before `advance`.

    @property
    def info(self) -> ServerInfo:
        """What the server said of itself.

        Raises:
            InstepError: before the welcome.
        """
        if self._info is None:
            raise self._failure[0](self._failure[1])
        return self._info

    def open(self, names: Sequence[str], initial_states: npt.ArrayLike | None, single: bool) -> OpenCall:
        """Open streams: one, with a state [L, H], or a group, with states [N, L, H]; zeros where None.

        Raises:
            InvalidInput: for bad or repeated names, or states of another shape.
        """
        self._check_open()
        return self._openings.open(names, initial_states, single)

    def step(self, lane: Lane, x: npt.ArrayLike, rows: npt.ArrayLike | None = None, keep: bool = False) -> StepCall:
        """Send frames of a lane; with `keep` the outputs wait to be taken with `take`.

        A lane of one stream takes [features] or [T, features]; a group [N, features] or [T, N, features], where N is
        the number of `rows`, or of all its streams.

        Raises:
            InvalidInput: for another shape, or values that float32 cannot hold.
            StreamEvicted: when the server ended one of the streams.
            ClientClosed: when the lane was closed, or finished and `keep` is set.
        """
        self._check_open()
        info = self.info
        if lane.closing:
            raise ClientClosed(f"stream {lane.names[0]!r} was closed; open it again to send more")
        if keep and lane.finished:
            raise ClientClosed(f"stream {lane.names[0]!r} was finished; nothing more can be sent through it")
        table_rows = lane.rows
        if rows is not None:
            table_rows = lane.rows[arrays.row_indices(rows, len(lane.rows))]
        if lane.single:
            frames, prefix = arrays.stream_frames(x, info.features)
        else:
            frames, prefix = arrays.group_frames(x, len(table_rows), info.features)
        if lane.has_ended:
            self._refuse_ended(lane, table_rows)
        call = StepCall(lane, table_rows, frames, prefix, info.outputs, self._flow.stamp(), keep)
        self._flow.submit(call)
        return call

    def finish(self, lane: Lane) -> None:
        """Nothing more will be sent with `keep`; the outputs end after those of what was."""
        lane.finished = True
        self._outbox.wake(lane)

    def take(self, lane: Lane) -> StepCall | None:
        """The next kept call, if it is done. None means: wait until the lane is woken, and ask again."""
        return self._flow.take(lane)

    def outputs_end(self, lane: Lane) -> bool:
        """Whether `take` will never give anything more.

        Raises:
            InstepError: when that is because the stream was evicted or the connection is over.
        """
        if lane.results:
            return False
        if lane.finished or lane.closed:
            return True
        if self.state is State.ENDED:
            raise self._failure[0](self._failure[1])
        if lane.has_ended:
            self._refuse_ended(lane, lane.rows)
        return False

    def close(self, lane: Lane) -> CloseCall:
        """Close a lane after everything sent through it was answered; the result is its final states [N, L × H].

        Raises:
            ClientClosed: when it was closed before.
            StreamEvicted: when it is one stream, and the server has ended it.
        """
        self._check_open()
        if lane.closing:
            raise ClientClosed(f"stream {lane.names[0]!r} was closed before")
        lane.closing = True
        call = CloseCall(lane, self.info.state_layers * self.info.state_size)
        self._flow.enqueue(lane, call)
        if lane.single and lane.has_ended:
            self._refuse_ended(lane, lane.rows)  # the call stays, to give the row back when nothing is unanswered
        return call

    def ping(self, now: float) -> Ping:
        """Measure a round trip."""
        self._check_open()
        call = Ping(now)
        self._outbox.ask(Kind.PING, call)
        return call

    def statistics(self) -> Call[dict[str, float]]:
        """Ask for the server's numbers."""
        self._check_open()
        call: Call[dict[str, float]] = Call()
        self._outbox.ask(Kind.STATS, call)
        return call

    def cancel(self, call: Call[Any]) -> None:
        """Nobody waits for a call any more. What was sent counts as sent, and its answer is dropped when it comes."""
        if self.state is State.OPEN:
            if isinstance(call, OpenCall):
                self._openings.cancel(call)
            elif isinstance(call, StepCall):
                self._flow.withdraw(call)

    def next_seqs(self, lane: Lane) -> wire.U64:
        """The seq that each stream of a lane sends next."""
        return self._table.next_seqs(lane)

    def leave(self) -> Ping | None:
        """End the session: what waits fails, open streams are closed. The Ping ends when the server has read that."""
        reachable = self.state is State.OPEN
        self.fail(ClientClosed, "the client was closed")
        lanes = self._table.live_lanes()
        if not reachable or not lanes:
            return None
        self._openings.close_quietly(np.concatenate([lane.rows for lane in lanes]))
        call = Ping(0.0)
        self._outbox.ask(Kind.PING, call)
        return call

    # Time and messages.

    def receive(self, frames: Sequence[Frame], now: float) -> None:
        """A message came. One that does not follow the protocol ends the session."""
        self._heard_at = now
        try:
            self._handle(frames, now)
        except MalformedMessage as error:
            self.fail(
                MalformedMessage,
                f"the server at {self.endpoint} does not follow the protocol, the connection was given up: {error}",
            )

    def advance(self, now: float) -> None:
        """Send what may be sent; watch for silence."""
        if self.state is State.OPEN:
            self._flow.advance(now, self._timeout_s)
        if self.state is State.ENDED or not self._outbox.unanswered:
            self._waiting_since = None
            return
        if self._waiting_since is None:
            self._waiting_since = now
        quiet_since = max(self._heard_at, self._waiting_since)
        if now >= quiet_since + self._timeout_s:
            self.fail(
                ConnectionFailed,
                f"nobody answers at {self.endpoint} (waited {self._timeout_s:g} s); is the server running there?",
            )
        elif now >= quiet_since + self._timeout_s / 2 and self._may_probe():
            self._probing = True
            self._outbox.ask(Kind.PING, None)

    def deadline(self) -> float | None:
        """When `advance` is to be called though nothing happens; None for never."""
        if self.state is State.ENDED:
            return None
        deadline = self._flow.deadline(self._timeout_s) if self.state is State.OPEN else None
        if self._waiting_since is not None:
            patience_s = self._timeout_s / 2 if self._may_probe() else self._timeout_s
            silence = max(self._heard_at, self._waiting_since) + patience_s
            deadline = silence if deadline is None else min(deadline, silence)
        return deadline

    def fail(self, error: type[InstepError], sentence: str) -> None:
        """End the session: every call fails with that error, now and later."""
        if self.state is State.ENDED:
            return
        was_open = self.state is State.OPEN
        self.state = State.ENDED
        self._failure = (error, sentence)
        for asked in self._outbox.unanswered.values():
            if isinstance(asked.what, Call):
                asked.what.fail(error(sentence))
                self._outbox.wake(asked.what)
        self._outbox.unanswered.clear()
        if was_open:
            self._flow.fail(error, sentence)

    def take_messages(self) -> list[Message]:
        """What is to be sent, in order."""
        messages, self._outbox.messages = self._outbox.messages, []
        return messages

    def take_woken(self) -> list[Call[Any] | Lane]:
        """Calls that ended or were sent, and lanes whose outputs changed."""
        woken, self._outbox.woken = self._outbox.woken, []
        return woken

    def _check_open(self) -> None:
        if self.state is not State.OPEN:
            raise self._failure[0](self._failure[1])

    def _refuse_ended(self, lane: Lane, rows: arrays.Indices) -> None:
        for row in rows[self._table.ended[rows] != 0].tolist():
            code = Code(int(self._table.ended[row]))
            raise StreamEvicted(code, self._table.sentences[code], lane.name_of(row))

    def _may_probe(self) -> bool:
        return self.state is State.OPEN and not self._probing

    def _handle(self, frames: Sequence[Frame], now: float) -> None:
        header = wire.unpack_header(frames)
        kind, request = header.kind, header.request
        asked = self._outbox.unanswered.get(request)
        if self.state is State.ENDED:
            if kind is Kind.PONG and asked is not None and asked.kind is Kind.PING:
                self._end(asked.what, 0.0)
        elif kind is Kind.ERROR:
            self._handle_error(request, asked, replies.error(header), now)
        elif kind is Kind.GOODBYE:
            replies.goodbye(header)
            self.fail(ConnectionFailed, "the server is shutting down")
        elif kind is Kind.EVICTED:
            handles, code, sentence = replies.evicted(header, frames)
            if self.state is State.OPEN:
                self._flow.end(self._table.rows_of(handles), code, sentence)
        elif kind is Kind.PING:
            self._outbox.answer_ping(request)
        else:
            if asked is None or _REPLY[asked.kind] is not kind:
                raise MalformedMessage(f"{kind.name} with number {request} answers nothing that was asked")
            self._handle_reply(header, frames, asked, now)
            del self._outbox.unanswered[request]

    def _handle_reply(self, header: Header, frames: Sequence[Frame], asked: Asked, now: float) -> None:
        what = asked.what
        if isinstance(what, Block):
            steps, columns, _ = what.x.shape
            self._flow.answered(what, replies.stepped(header, frames, steps, columns, self.info.outputs))
        elif header.kind is Kind.WELCOME:
            self._welcomed(replies.welcome(header))
        elif isinstance(what, OpenCall) and asked.part is not None:
            self._openings.opened(what, asked.part, *replies.granted(header, frames, len(asked.part)))
        elif isinstance(what, CloseCall) and asked.part is not None:
            state = what.finals.shape[1]
            self._openings.closed(what, asked.part, *replies.closed(header, frames, len(asked.part), state))
        elif header.kind is Kind.STATISTICS:
            self._end(what, replies.statistics(header))
        elif isinstance(what, Ping):
            self._end(what, now - what.sent_at)
        elif header.kind is Kind.PONG:
            self._probing = False

    def _handle_error(self, request: int, asked: Asked | None, refusal: replies.Refusal, now: float) -> None:
        if refusal.code is Code.HELLO_FIRST:
            self.fail(
                ConnectionFailed,
                f"the server at {self.endpoint} was restarted and knows nothing of this connection; connect again",
            )
            return
        if asked is None:
            self.fail(
                ConnectionFailed,
                f"the server at {self.endpoint} could not read a message of this client, the connection was given up: "
                f"{refusal.code.name}: {refusal.sentence}",
            )
            return
        what = asked.what
        del self._outbox.unanswered[request]
        if isinstance(what, Block):
            self._flow.refused(what, refusal, now)
        elif isinstance(what, OpenCall | CloseCall) and asked.part is not None:
            self._openings.refused(what, asked.part, refusal)
        elif what is not None:
            what.fail(Refused(refusal.code, refusal.sentence))
            self._outbox.wake(what)
            if what is self.greeting:
                self.fail(ConnectionFailed, f"the server at {self.endpoint} refused this client: {refusal.sentence}")
        elif asked.kind is Kind.PING:
            self._probing = False

    def _welcomed(self, info: ServerInfo) -> None:
        if info.protocol_version != wire.PROTOCOL_VERSION:
            raise MalformedMessage(
                f"it speaks protocol version {info.protocol_version}, this client {wire.PROTOCOL_VERSION}"
            )
        self._info = info
        self._openings = Openings(self._table, info, self._outbox)
        self._flow = Flow(self._table, info, self._outbox, self._openings)
        self.state = State.OPEN
        self._end(self.greeting, info)

    def _end(self, what: Call[Any] | Block | None, result: object) -> None:
        assert isinstance(what, Call)
        what.finish(result)
        self._outbox.wake(what)
