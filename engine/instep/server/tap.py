"""What the engine tells the recording, if there is one, and what waits until the recording holds it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, Final

import numpy as np

from instep.core.rings import Rings
from instep.core.streams import StreamTable
from instep.core.typing import F32, I64, Bool
from instep.recording.errors import RecordingError
from instep.recording.recorder import Recorder
from instep.recording.schema import OWNER_EVENT, PARKED_EVENT, RESET_EVENT, owner_detail
from instep.recording.states import StateRows
from instep.runtime.runs import MOST_STEPS

NEVER: Final = 2**63
"""The ticket of what was not recorded, because the recording has failed."""


class Tap:
    """Turns slots and rows into what a recording holds, and lets answers go when that is durable.

    Everything recorded gets a ticket, and tickets rise. Where answers wait, each waits for the ticket of what it
    tells: no client is given an output, a state, a stream or its end that a crash could undo. (Refusals of frames
    and messages do not wait, those of a resume do.) A recorder that has failed takes nothing more; what would have
    waited for it is never done, and the server is about to stop.

    Args:
        table: the streams.
        rings: their frames.
    """

    def __init__(self, table: StreamTable, rings: Rings) -> None:
        self._recorder: Recorder | None = None
        self._waits = False
        self._table = table
        self._rings = rings
        self._durable = 0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._uncommitted: deque[tuple[int, Callable[[], None]]] = deque()
        self._last_stream = 0
        self.last_inputs = 0
        """The ticket of the newest batch of inputs, or of the newest row that was there before."""
        self.newest = 0
        """The ticket of whatever was recorded last."""
        self.computed_ns = 0
        """How long the steps since then took."""

    def record(self, recorder: Recorder, last_stream: int, last_row: int, *, waits: bool) -> None:
        """From now on, tell a recorder.

        Args:
            recorder: where everything goes.
            last_stream: the highest number that a stream of the recording has.
            last_row: the newest position of the recording; the streams are as of it.
            waits: whether answers wait until what they tell is durable.
        """
        self._recorder = recorder
        self._last_stream = last_stream
        self.last_inputs = last_row
        self._waits = waits

    @property
    def has_room(self) -> bool:
        """Whether a batch may be stepped now: False while the recorder is behind, and after it failed."""
        return self._recorder is None or (self._recorder.has_room and not self.has_failed)

    @property
    def room(self) -> int:
        """How many batches may be stepped before asking `has_room` again."""
        return MOST_STEPS if self._recorder is None else self._recorder.room

    @property
    def has_failed(self) -> bool:
        """Whether the recorder has failed, so that the server is about to stop."""
        return self._recorder is not None and self._recorder.failed is not None

    @property
    def is_recording(self) -> bool:
        """Whether there is a recording."""
        return self._recorder is not None

    @property
    def is_quiet(self) -> bool:
        """Whether nothing waits to be durable."""
        return not self._waiting

    def when_durable(self, ticket: int, act: Callable[[], None]) -> None:
        """Do something once what the ticket stands for is as durable as asked; in order of the calls."""
        if ticket == NEVER:
            return
        if self._waits and (self._waiting or ticket > self._durable):
            self._waiting.append((ticket, act))
        else:
            act()

    def when_committed(self, ticket: int, act: Callable[[], None]) -> None:
        """Do something once the recording holds what the ticket stands for, whether answers wait or not."""
        if ticket == NEVER:
            return
        if self._uncommitted or ticket > self._durable:
            self._uncommitted.append((ticket, act))
        else:
            act()

    def durable(self, ticket: int) -> None:
        """Everything up to this ticket is durable now."""
        self._durable = ticket
        while self._uncommitted and self._uncommitted[0][0] <= ticket:
            self._uncommitted.popleft()[1]()
        while self._waiting and self._waiting[0][0] <= ticket:
            self._waiting.popleft()[1]()

    # ── Frames ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def inputs(self, slots: I64, rows: I64, bucket: int) -> list[int]:
        """A run is about to begin, of these slots, int64 [B], and rows, int64 [steps, B]; the ticket of each step."""
        if self._recorder is None:
            return [0] * len(rows)
        recorder, table = self._recorder, self._table
        table.keeping.changed(slots)  # now: a snapshot taken during the run says that it contains it
        streams = table.recording_id[slots].astype(np.uint32)
        seqs = table.step_seq[slots].astype(np.uint64)
        tickets = []
        for at, rows_of_step in enumerate(rows):
            frames = streams, seqs + np.uint64(at), self._rings.x[rows_of_step]
            tickets.append(self._said(recorder.add_inputs, time.time_ns(), bucket, *frames))
        self.last_inputs = tickets[-1]
        return tickets

    def outputs(self, ticket: int, rows: I64, computed_ns: int) -> None:
        """The batch of that ticket was computed."""
        if self._recorder is None or ticket == NEVER:
            return
        recorder, y = self._recorder, self._rings.y[rows]
        self.computed_ns += computed_ns
        self._said(recorder.add_outputs, ticket, time.time_ns(), y)

    def failed(self, ticket: int, detail: str) -> int:
        """The step of that ticket failed: none of its frames was applied."""
        if self._recorder is None or ticket == NEVER:
            return ticket
        recorder = self._recorder
        return self._said(recorder.fail_batch, ticket, time.time_ns(), detail)

    def states(self, through: int, rows: StateRows) -> int:
        """Part of the next snapshot; its ticket."""
        if self._recorder is None or through == NEVER:
            return NEVER
        return self._said(self._recorder.add_states, time.time_ns(), through, rows)

    def snapshot(self, through: int, rows: StateRows) -> int:
        """States that contain every batch up to the ticket `through`."""
        if self._recorder is None or through == NEVER:
            return NEVER
        return self._said(self._recorder.snapshot, time.time_ns(), through, rows)

    # ── Streams ────────────────────────────────────────────────────────────────────────────────────────────────────

    def opened(self, slots: I64, names: Sequence[str], initial_states: F32 | None) -> int:
        """Streams opened under those names; initial states float32 [N, layers, size], None for zeros."""
        if self._recorder is None:
            return 0
        recorder, table = self._recorder, self._table
        streams = np.arange(self._last_stream + 1, self._last_stream + 1 + len(slots))
        self._last_stream += len(slots)
        table.recording_id[slots] = streams
        columns = (streams, names, table.epoch[slots], table.first_seq[slots])
        return self._said(recorder.open_streams, time.time_ns(), *columns, initial_states)

    def resumed(self, slots: I64) -> int:
        """Streams have new owners, and so new epochs."""
        table = self._table
        details = map(owner_detail, table.former_epoch[slots].tolist(), table.granted_seq[slots].tolist())
        return self._events(slots, OWNER_EVENT, table.epoch[slots].astype(np.int64), details)

    def parked(self, slots: I64) -> int:
        """The connection of these streams is gone."""
        return self._events(slots, PARKED_EVENT, self._table.next_seq[slots], repeat("", len(slots)))

    def reset(self, slots: I64, states: F32 | None) -> int:
        """Streams with nothing pending were given other states, float32 [N, layers, size], or zeros."""
        if self._recorder is not None:
            self._table.keeping.changed(slots)  # again: a snapshot may have taken them since the change began
        return self._events(slots, RESET_EVENT, self._table.step_seq[slots], repeat("", len(slots)), states)

    def closed(self, slots: I64, reason: str, final_states: F32, lost: Bool) -> int:
        """Streams closed; final states float32 [N, layers, size], not recorded where `lost`."""
        if self._recorder is None or not len(slots):
            return 0
        recorder, table = self._recorder, self._table
        table.keeping.kept(slots)
        streams, frames = table.numbers(slots), table.next_seq[slots]
        return self._said(recorder.close_streams, time.time_ns(), streams, reason, frames, final_states, lost)

    def _events(self, slots: I64, kind: str, seqs: I64, details: Iterable[str], states: F32 | None = None) -> int:
        if self._recorder is None or not len(slots):
            return 0
        recorder, streams = self._recorder, self._table.numbers(slots)
        return self._said(recorder.stream_events, time.time_ns(), kind, streams, seqs, details, states)

    def _said(self, say: Callable[..., int], *values: Any) -> int:
        try:
            self.newest = say(*values)
        except RecordingError:
            self.newest = NEVER
        return self.newest
