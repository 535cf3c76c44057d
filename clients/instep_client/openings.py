"""Opening and closing streams: in as many messages as it takes, and all of a group or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from instep_client import arrays, wire
from instep_client.calls import ENDING, CloseCall, OpenCall
from instep_client.errors import InvalidInput, StreamEvicted, StreamRefused
from instep_client.outbox import Outbox
from instep_client.replies import Failure, Refusal
from instep_client.streams import HANDLE, StreamTable
from instep_client.wire import F32, MAX_BLOCK_STREAMS, Code, GrantArray, Kind, Message, ServerInfo, raw

MAX_REPLY_BYTES: Final = 64 * 2**20
"""The largest frame the client lets the server send; requests are cut so that no honest reply is larger."""


class Openings:
    """The OPEN and CLOSE requests of one connection."""

    def __init__(self, table: StreamTable, info: ServerInfo, outbox: Outbox) -> None:
        self._table = table
        self._info = info
        self._outbox = outbox
        self._state = info.state_layers * info.state_size
        self._most_opened = info.max_message_bytes // max(wire.MAX_NAME_BYTES + 1, 4 * self._state)
        self._most_closed = min(
            info.max_message_bytes // (4 * max(2, self._state)), MAX_REPLY_BYTES // (4 * self._state)
        )

    def open(self, names: Sequence[str], initial_states: npt.ArrayLike | None, single: bool) -> OpenCall:
        """Ask for streams; see `Session.open`."""
        if isinstance(names, str):
            raise InvalidInput("a group's names must be a sequence of strings, not one string")
        names = tuple(names)
        if not names or not all(isinstance(name, str) and wire.name_is_good(name) for name in names):
            raise InvalidInput(
                f"there must be at least one name, and each 1 to {wire.MAX_NAME_BYTES} bytes of printable UTF-8"
            )
        if len(set(names)) != len(names):
            raise InvalidInput("two streams of a group may not have the same name")
        initial: F32 | None = None
        if initial_states is not None:
            shape = (self._info.state_layers, self._info.state_size)
            initial = arrays.states(initial_states, shape if single else (len(names), *shape))
            initial = initial.reshape(len(names), self._state)
        call = OpenCall(names, single)
        for part in _parts(len(names), self._most_opened):
            states = b"" if initial is None else raw(initial[part])
            frames: Message = [wire.pack_names([names[index] for index in part]), states, b""]
            call.parts_left += 1
            self._outbox.ask(Kind.OPEN, call, len(part), int(initial is not None), 0, frames=frames, part=part)
        return call

    def opened(self, call: OpenCall, part: arrays.Indices, grants: GrantArray, failures: list[Failure]) -> None:
        """OPENED came for a part of a call."""
        call.grants[part] = grants
        for failure in failures[:1]:
            _note(call, int(part[failure.column]), failure.code, failure.sentence)
        self._part_opened(call)

    def cancel(self, call: OpenCall) -> None:
        """Nobody wants the streams any more."""
        call.abandoned = True
        if call.done and call.error is None:
            self.close_quietly(call.result().rows)

    def close(self, call: CloseCall) -> None:
        """Close a lane's streams, of which nothing is unanswered; those that the server has ended need no closing."""
        lane = call.lane
        live = np.flatnonzero(self._table.ended[lane.rows] == 0)
        parts = _parts(len(live), self._most_closed)
        call.parts_left = len(parts)
        for part in parts:
            self._ask_close(lane.rows[live[part]], call, live[part])
        if not parts:
            self._end_close(call)

    def close_quietly(self, rows: arrays.Indices) -> None:
        """Close streams that nobody holds any more."""
        live = rows[self._table.ended[rows] == 0]
        for part in _parts(len(live), self._most_closed):
            self._ask_close(live[part], None, None)

    def closed(self, call: CloseCall, part: arrays.Indices, finals: F32, failures: list[Failure]) -> None:
        """CLOSED came for a part of a call."""
        call.finals[part] = finals
        for column, _, code, sentence, _ in failures:
            index = int(part[column])
            call.finals[index] = np.nan
            if call.lane.single or code not in ENDING:
                _note(call, index, code, sentence)
        self._part_closed(call)

    def refused(self, call: OpenCall | CloseCall, part: arrays.Indices, refusal: Refusal) -> None:
        """ERROR came for a part of a call."""
        _note(call, int(part[0]), refusal.code, refusal.sentence)
        if isinstance(call, OpenCall):
            self._part_opened(call)
        else:
            self._part_closed(call)

    def _ask_close(self, rows: arrays.Indices, call: CloseCall | None, part: arrays.Indices | None) -> None:
        handles = self._table.columns[rows, HANDLE].tobytes()
        self._outbox.ask(Kind.CLOSE, call, len(rows), frames=[handles], part=part)

    def _part_opened(self, call: OpenCall) -> None:
        call.parts_left -= 1
        if call.parts_left:
            return
        opened = call.grants["handle"] != 0
        if call.refusal is None and not call.abandoned:
            call.finish(self._table.add(call.names, call.grants, call.single))
        else:
            if np.any(opened):
                names = [name for name, is_open in zip(call.names, opened, strict=True) if is_open]
                lane = self._table.add(names, call.grants[opened], single=False)
                self.close_quietly(lane.rows)
                self._table.remove(lane)
            if call.refusal is not None:
                index, code, sentence = call.refusal
                call.fail(StreamRefused(code, sentence, call.names[index]))
        self._outbox.wake(call)

    def _part_closed(self, call: CloseCall) -> None:
        call.parts_left -= 1
        if call.parts_left == 0:
            self._end_close(call)

    def _end_close(self, call: CloseCall) -> None:
        lane = call.lane
        row = int(lane.rows[0])
        if lane.single and self._table.ended[row]:
            code = Code(int(self._table.ended[row]))
            call.fail(StreamEvicted(code, self._table.sentences[code], lane.names[0]))
        elif call.refusal is not None:
            index, code, sentence = call.refusal
            call.fail(StreamRefused(code, sentence, lane.names[index]))
        else:
            call.finish(call.finals)
        if call.refusal is not None and call.refusal[1] not in ENDING:
            lane.closing = False  # the streams are as they were: the user may try again
        else:
            self._table.remove(lane)
        self._outbox.wake(call)
        self._outbox.wake(lane)


def _note(call: OpenCall | CloseCall, index: int, code: Code, sentence: str) -> None:
    if call.refusal is None or index < call.refusal[0]:
        call.refusal = (index, code, sentence)


def _parts(count: int, most: int) -> list[arrays.Indices]:
    """The numbers below `count` in parts of at most `most`, and of what one message may carry."""
    most = max(1, min(most, MAX_BLOCK_STREAMS))
    return [np.arange(start, min(start + most, count)) for start in range(0, count, most)]
