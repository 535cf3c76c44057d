"""The session's reactions to the server's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from instep_client import replies
from instep_client.arrays import Indices
from instep_client.blocks import StepBlock
from instep_client.calls import Call, PingCall
from instep_client.changes import Changes
from instep_client.claims import ask_for_own
from instep_client.connection import Connection, State
from instep_client.flow import Flow
from instep_client.openings import Openings
from instep_client.outbox import Asked
from instep_client.protocol import wire
from instep_client.protocol.errors import ConnectionFailed, MalformedMessage, Refused
from instep_client.protocol.wire import Code, Frame, Header, Kind, ServerInfo
from instep_client.reconnection import Phase
from instep_client.requests import CloseCall, OpenCall, ReadStateCall, Request, ResetCall
from instep_client.sleepers import Sleepers
from instep_client.state_reads import StateReads

_REPLY: Final = {
    Kind.HELLO: Kind.WELCOME,
    Kind.OPEN: Kind.OPENED,
    Kind.CLOSE: Kind.CLOSED,
    Kind.PING: Kind.PONG,
    Kind.STATS: Kind.STATISTICS,
    Kind.LIST: Kind.LISTED,
    Kind.RESUME: Kind.RESUMED,
    Kind.READ_STATE: Kind.STATE_READ,
    Kind.RESET: Kind.CHANGED,
    Kind.FORK: Kind.OPENED,
}
_STEPPED: Final = bytes([Kind.STEPPED])
_SAME: Final = ("fingerprint", "features", "outputs", "state")
_NOT_LESS: Final = ("window_frames", "credit_frames", "max_block_frames", "max_message_bytes")
_LEAST_RETRY_S: Final = 0.05
_PASSES: Final = frozenset({Code.BUSY, Code.SHUTTING_DOWN})
"""Why a HELLO or RESUME is refused that may be granted a little later."""
_RESTARTED: Final = "the server was restarted and no longer has this stream, which was not recorded; open it again"


class Listener(Connection):
    """A connection whose messages are read."""

    def receive(self, frames: Sequence[Frame], now: float) -> None:
        """A message came. One that does not follow the protocol ends the session."""
        if self._reconnection.phase is Phase.LOST:
            return  # of the connection that was given up
        self._heard_at = now
        try:
            self._handle(frames, now)
        except MalformedMessage as error:
            self.fail(
                MalformedMessage,
                f"the server at {self.endpoint} does not follow the protocol, the connection was given up: {error}",
            )

    def _handle(self, frames: Sequence[Frame], now: float) -> None:
        if frames and frames[0][:1] == _STEPPED:
            for stepped in replies.stepped(frames):
                self._handle_stepped(stepped)
        else:
            self._handle_other(wire.unpack_header(frames), frames, now)

    def _handle_stepped(self, stepped: replies.Stepped) -> None:
        if self.state is State.ENDED:
            return
        asked = self._outbox.unanswered.get(stepped.request)
        block = None if asked is None else asked.what
        if not isinstance(block, StepBlock):
            raise MalformedMessage(f"STEPPED with number {stepped.request} answers nothing that was asked")
        if stepped.outputs.shape != (*block.x.shape[:2], self.info.outputs):
            raise MalformedMessage("a block of another size was sent than the one that was answered")
        del self._outbox.unanswered[stepped.request]
        if self.state is State.OPEN:
            self._reconnection.worked()
        self._flow.in_flight.answered(block, stepped)

    def _handle_other(self, header: Header, frames: Sequence[Frame], now: float) -> None:
        kind, request = header.kind, header.request
        asked = self._outbox.unanswered.get(request)
        if self.state is State.ENDED:
            self._handle_farewell(header, frames, asked)
        elif kind is Kind.ERROR:
            self._handle_error(request, asked, replies.error(header), now)
        elif kind is Kind.GOODBYE:
            replies.goodbye(header)
            self._lose(now, "the server is shutting down")
        elif kind is Kind.EVICTED:
            handles, code, sentence = replies.evicted(header, frames)
            if self.state is State.GREETING:
                return
            if code is Code.HIBERNATED:
                self._table.sleep(self._table.rows_of(handles))
            else:
                self._flow.end(self._table.rows_of(handles), code, sentence)
        elif kind is Kind.PING:
            self._outbox.answer_ping(request)
        else:
            if asked is None or _REPLY.get(asked.kind) is not kind:
                raise MalformedMessage(f"{kind.name} with number {request} answers nothing that was asked")
            del self._outbox.unanswered[request]
            if self.state is State.OPEN:
                self._reconnection.worked()
            try:
                self._handle_reply(header, frames, asked, now)
            except MalformedMessage:
                self._outbox.unanswered[request] = asked  # it fails with the others
                raise

    def _handle_reply(self, header: Header, frames: Sequence[Frame], asked: Asked, now: float) -> None:
        what, part = asked.what, asked.part
        if header.kind is Kind.WELCOME:
            self._welcomed(replies.welcome(header), now)
        elif part is not None:
            self._handle_part(header, frames, asked, part, now)
        elif header.kind is Kind.STATISTICS:
            self._end(what, replies.statistics(header))
        elif header.kind is Kind.LISTED:
            self._end(what, replies.listed(header, frames))
        elif isinstance(what, PingCall):
            self._end(what, now - what.sent_at)
        elif header.kind is Kind.PONG:
            self._probing = False

    def _handle_part(self, header: Header, frames: Sequence[Frame], asked: Asked, part: Indices, now: float) -> None:
        what, count, row_bytes = asked.what, len(part), self.info.state.row_bytes
        if isinstance(what, OpenCall):
            self._openings.opened(what, part, *replies.granted(header, frames, count))
        elif isinstance(what, CloseCall):
            self._changes.closed(what, part, *replies.closed(header, frames, count, row_bytes))
        elif isinstance(what, ReadStateCall):
            self._state_reads.read(what, part, *replies.state_read(header, frames, count, row_bytes))
        elif isinstance(what, ResetCall):
            self._changes.changed(what, part, replies.changed(header, frames, count))
        else:
            if self.state is State.RECONNECTING:
                self._reconnection.resumed()
            ended = self._sleepers.resumed(part, *replies.granted(header, frames, count), now)
            for (code, sentence), rows in ended.items():
                if code is Code.UNKNOWN_STREAM and self.state is State.RECONNECTING and self._forgets:
                    sentence = _RESTARTED
                self._flow.end(np.array(rows, np.int64), code, sentence)
            self._sleepers.go_on(part)
            self._go_on(now)

    def _handle_error(self, request: int, asked: Asked | None, refusal: replies.ErrorReply, now: float) -> None:
        if refusal.code is Code.HELLO_FIRST and request == 0 and self._is_new:
            # ZeroMQ announced the connection before our HELLO, as it does each time it makes one. Perhaps it made one
            # before and lost our HELLO with it: then the server will not know who sends this PING, and say so.
            self._is_new = False
            self._outbox.ask(Kind.PING, None)
            return
        if refusal.code is Code.HELLO_FIRST:
            self._lose(
                now, f"the connection to {self.endpoint} broke, or the server there was restarted; connect again"
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
        if isinstance(what, StepBlock):
            self._flow.in_flight.refused(what, refusal, now)
        elif isinstance(what, Request) and asked.part is not None:
            what.note(int(asked.part[0]), refusal.code, refusal.sentence)
            if isinstance(what, OpenCall):
                self._openings.part_answered(what)
            elif isinstance(what, ReadStateCall):
                self._state_reads.part_answered(what)
            elif isinstance(what, ResetCall | CloseCall):
                self._changes.part_answered(what)
        elif isinstance(what, Call):
            what.fail(Refused(refusal.code, refusal.sentence))
            self._outbox.wake(what)
            if what is self.greeting:
                self.fail(ConnectionFailed, f"the server at {self.endpoint} refused this client: {refusal.sentence}")
        elif asked.kind is Kind.PING:
            self._probing = False
        elif self.state is State.OPEN and asked.part is not None and refusal.code in _PASSES:
            self._sleepers.refused(asked.part, now + max(refusal.retry_after_s, _LEAST_RETRY_S))
        elif refusal.code in _PASSES:
            self._lose(now, refusal.sentence)
        elif asked.kind in (Kind.HELLO, Kind.RESUME):
            self.fail(ConnectionFailed, f"the server at {self.endpoint} refused this client: {refusal.sentence}")

    def _handle_farewell(self, header: Header, frames: Sequence[Frame], asked: Asked | None) -> None:
        """The session is over; streams that hibernated are still to be closed."""
        if asked is None or header.kind not in (Kind.PONG, Kind.RESUMED, Kind.ERROR):
            return
        if asked.kind is Kind.PING and header.kind is Kind.PONG:
            self._end(asked.what, 0.0)
        elif asked.kind is Kind.RESUME and asked.part is not None:
            del self._outbox.unanswered[header.request]
            if header.kind is Kind.RESUMED:
                grants, _ = replies.granted(header, frames, len(asked.part))
                is_awake = grants["handle"] != 0
                self._changes.close_handles(grants["handle"][is_awake])
                if is_awake.any():  # there is room for others now
                    left = asked.part[~is_awake]
                    ask_for_own(self._table, self._outbox, left, self.info.max_message_bytes)
            self._say_farewell()

    def _welcomed(self, info: ServerInfo, now: float) -> None:
        self._is_new = False
        if info.protocol_version != wire.PROTOCOL_VERSION:
            raise MalformedMessage(
                f"it speaks protocol version {info.protocol_version}, this client {wire.PROTOCOL_VERSION}"
            )
        if self._info is not None:
            self._welcomed_again(self._info, info, now)
            return
        self._info = info
        table, outbox = self._table, self._outbox
        self._sleepers = sleepers = Sleepers(table, outbox, info.max_message_bytes)
        self._flow = Flow(table, info, outbox, self._ask, sleepers, self._reconnection.reconnect_s)
        self._openings = Openings(
            table, info, outbox, sleepers, self._discard, self._flow.answered, self._taken_over_here
        )
        self._state_reads = StateReads(table, info, outbox, sleepers)
        self._changes = Changes(table, info, outbox, sleepers, self._flow.answered)
        self.state = State.OPEN
        self._end(self.greeting, info)

    def _taken_over_here(self, rows: Indices) -> None:
        """This client has resumed streams that it already had: their former handles are void."""
        self._flow.end(rows, Code.FENCED, wire.SENTENCES[Code.FENCED])

    def _welcomed_again(self, former: ServerInfo, info: ServerInfo, now: float) -> None:
        for name in _SAME:
            if getattr(info, name) != getattr(former, name):
                self.fail(
                    ConnectionFailed,
                    f"the server at {self.endpoint} was restarted with another model ({info.model!r}); connect again",
                )
                return
        for name in _NOT_LESS:
            if getattr(info, name) < getattr(former, name):
                self.fail(
                    ConnectionFailed,
                    f"the server at {self.endpoint} was restarted with a smaller {name}; connect again",
                )
                return
        self._forgets = info.boot_id != former.boot_id and info.durability == "memory"
        self._info = info
        self._reconnection.claim(info)
        self._go_on(now)

    def _go_on(self, now: float) -> None:
        """When every claim was answered: what was on its way goes out again, and what was asked is asked again."""
        if not self._reconnection.is_complete():
            return
        self.state = State.OPEN
        self._flow.in_flight.resumed()
        postponed, self._postponed = self._postponed, {}
        for call in postponed:
            self._ask(call, now)
        if not self._outbox.unanswered:
            self._reconnection.worked()

    def _end(self, what: Call[Any] | StepBlock | None, result: object) -> None:
        assert isinstance(what, Call)
        what.finish(result)
        self._outbox.wake(what)
