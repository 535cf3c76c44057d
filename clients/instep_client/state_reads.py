"""Reads of states: of a client's own streams by handle, of anybody's by name. A read changes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instep_client import arrays
from instep_client.openings import good_names
from instep_client.outbox import MAX_REPLY_BYTES, Outbox, parts
from instep_client.protocol import wire
from instep_client.protocol.errors import StreamEvicted, StreamRefused
from instep_client.protocol.state_spec import U8
from instep_client.protocol.wire import U64, Kind, ServerInfo
from instep_client.replies import ColumnError
from instep_client.requests import ReadStateCall
from instep_client.sleepers import Sleepers, without_columns
from instep_client.streams import ENDING, HANDLE, OpenStreams, StreamHandle


class StateReads:
    """The READ_STATE requests of one session.

    Args:
        table: the streams.
        info: what the server takes.
        outbox: where requests go.
        sleepers: knows which streams hibernate.
    """

    def __init__(self, table: OpenStreams, info: ServerInfo, outbox: Outbox, sleepers: Sleepers) -> None:
        self._table = table
        self._sleepers = sleepers
        self._outbox = outbox
        self._state = info.state
        self._most_message_bytes = info.max_message_bytes

    def by_handle(self, handle: StreamHandle) -> ReadStateCall:
        """A call that reads a handle's states; see `Session.read_state`."""
        return ReadStateCall(handle.names, handle, self._state.missing(len(handle.rows)))

    def by_name(self, names: Sequence[str]) -> ReadStateCall:
        """A call that reads the states of streams by name; see `Session.read_state_by_name`."""
        names = good_names(names)
        return ReadStateCall(names, None, self._state.missing(len(names)))

    def ask(self, call: ReadStateCall) -> None:
        """Send a call's requests; again, if the connection was lost before they were answered."""
        call.begin(0)
        self._ask(call, np.arange(len(call.names)))

    def _ask(self, call: ReadStateCall, wanted: arrays.Indices) -> None:
        """Ask for some of a call's streams, in as many parts as it takes."""
        by_name = call.handle is None or call.handle.has_sleepers  # a stream that hibernates has no handle
        state_bytes = self._state.row_bytes
        asked_bytes = wire.MAX_NAME_BYTES + 1 if by_name else 8  # a name and its line end, or a handle
        most = min(self._most_message_bytes // max(asked_bytes, state_bytes), MAX_REPLY_BYTES // state_bytes)
        for piece in parts(len(wanted), most):
            call.parts_left += 1
            self._ask_for_part(call, wanted[piece], by_name)

    def _ask_for_part(self, call: ReadStateCall, part: arrays.Indices, by_name: bool) -> None:
        if by_name or call.handle is None:
            streams = wire.pack_names([call.names[index] for index in part])
        else:
            streams = self._table.columns[call.handle.rows[part], HANDLE].tobytes()
        self._outbox.ask(Kind.READ_STATE, call, len(part), int(by_name), frames=[streams], part=part)

    def read(
        self, call: ReadStateCall, part: arrays.Indices, seqs: U64, states: U8, failures: list[ColumnError]
    ) -> None:
        """STATE_READ came for a part of a call."""
        call.seqs[part], call.states[part] = seqs, states
        if call.handle is not None and len(asleep := self._sleepers.are_asleep(call.handle.rows[part], failures)):
            self._ask(call, part[asleep])
            part, failures = without_columns(part, failures, asleep)
        for failure in failures[:1]:
            call.note(int(part[failure.column]), failure.code, failure.sentence)
        self.part_answered(call)

    def part_answered(self, call: ReadStateCall) -> None:
        """A part of a call was answered, or refused."""
        if not call.part_answered():
            return
        if call.refusal is None:
            call.finish((call.seqs, call.states))
        else:
            index, code, sentence, _ = call.refusal
            has_ended = call.handle is not None and code in ENDING
            call.fail((StreamEvicted if has_ended else StreamRefused)(code, sentence, call.names[index]))
        self._outbox.wake(call)
