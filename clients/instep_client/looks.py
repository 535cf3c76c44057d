"""Looks at streams by name, whoever has them: no lane, no handle, nothing changed."""

from __future__ import annotations

from collections.abc import Sequence

from instep_client import arrays
from instep_client.openings import good_names
from instep_client.outbox import MAX_REPLY_BYTES, Outbox, parts
from instep_client.protocol import wire
from instep_client.protocol.errors import StreamRefused
from instep_client.protocol.wire import F32, U64, Kind, ServerInfo
from instep_client.replies import Failure
from instep_client.requests import LookCall


class Looks:
    """The LOOK requests of one session.

    Args:
        info: what the server takes.
        outbox: where requests go.
    """

    def __init__(self, info: ServerInfo, outbox: Outbox) -> None:
        self._outbox = outbox
        self._state = info.state_layers * info.state_size
        largest = max(wire.MAX_NAME_BYTES + 1, 4 * self._state)
        self._most = min(info.max_message_bytes // largest, MAX_REPLY_BYTES // (4 * self._state))

    def look(self, names: Sequence[str]) -> LookCall:
        """A call that looks at streams; see `Session.look`."""
        return LookCall(good_names(names), self._state)

    def ask(self, call: LookCall) -> None:
        """Ask for what a call wants; again, when it was asked before over a connection that is lost."""
        pieces = parts(len(call.names), self._most)
        call.begin(len(pieces))
        for part in pieces:
            names = wire.pack_names([call.names[index] for index in part])
            self._outbox.ask(Kind.LOOK, call, len(part), frames=[names], part=part)

    def looked(self, call: LookCall, part: arrays.Indices, seqs: U64, states: F32, failures: list[Failure]) -> None:
        """PEEKED came for a part of a call."""
        call.seqs[part], call.states[part] = seqs, states
        for failure in failures[:1]:
            call.note(int(part[failure.column]), failure.code, failure.sentence)
        self.part_answered(call)

    def part_answered(self, call: LookCall) -> None:
        """A part of a call was answered, or refused."""
        if not call.part_answered():
            return
        if call.refusal is None:
            call.finish((call.seqs, call.states))
        else:
            index, code, sentence, _ = call.refusal
            call.fail(StreamRefused(code, sentence, call.names[index]))
        self._outbox.wake(call)
