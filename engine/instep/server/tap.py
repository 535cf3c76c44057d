"""What the engine tells the recording, if there is one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import numpy as np

from instep.core.rings import Rings
from instep.core.streams import StreamTable
from instep.core.typing import F32, I64, Bool
from instep.recording.errors import RecordingError
from instep.recording.recorder import Recorder


class Tap:
    """Turns slots and rows into what a recording holds.

    A recorder that has failed raises; the server is about to stop then, so what it would have recorded is let go, and
    a batch that it did not take is not answered.

    Args:
        recorder: where it goes; None for nowhere.
        table: the streams.
        rings: their frames.
    """

    def __init__(self, recorder: Recorder | None, table: StreamTable, rings: Rings) -> None:
        self._recorder = recorder
        self._table = table
        self._rings = rings
        self._last_stream = 0
        self._last_ticket = 0
        self._buckets: dict[int, int] = {}

    @property
    def has_room(self) -> bool:
        """Whether a batch may be stepped now: False while the recorder is behind, and after it failed."""
        return self._recorder is None or (self._recorder.has_room and self._recorder.failed is None)

    def opened(self, slots: I64, initial_states: F32 | None) -> int:
        """Streams opened; initial states float32 [N, layers, size], None for zeros."""
        if self._recorder is None:
            return 0
        for index, slot in enumerate(slots.tolist()):
            self._last_stream += 1
            self._table.recording_id[slot] = self._last_stream
            state = None if initial_states is None else initial_states[index]
            with contextlib.suppress(RecordingError):
                self._recorder.open_stream(self._last_stream, self._table.name(slot), time.time_ns(), state)
        return 0

    def inputs(self, slots: I64, rows: I64, bucket: int) -> int:
        """A batch is about to be stepped; a ticket for what comes of it."""
        self._last_ticket += 1
        self._buckets[self._last_ticket] = bucket
        return self._last_ticket

    def outputs(self, ticket: int, slots: I64, rows: I64) -> None:
        """The batch of that ticket was computed."""
        bucket = self._buckets.pop(ticket)
        if self._recorder is None:
            return
        with contextlib.suppress(RecordingError):
            self._recorder.add_batch(
                time.time_ns(),
                bucket,
                self._table.recording_id[slots].astype(np.uint32),
                self._table.step_seq[slots].astype(np.uint64),
                self._rings.x[rows],
                self._rings.y[rows],
            )

    def when_durable(self, ticket: int, act: Callable[[], None]) -> None:
        """Do something as soon as what the ticket stands for is as durable as it must be."""
        if self._recorder is None or self._recorder.failed is None:
            act()

    def failed(self, ticket: int, slots: I64, seqs: I64, kind: str, detail: str) -> int:
        """The step of that ticket failed: one event a stream."""
        self._buckets.pop(ticket)
        if self._recorder is None:
            return 0
        streams = self._table.recording_id[slots].tolist()
        for stream, seq in zip(streams, seqs.tolist(), strict=True):
            with contextlib.suppress(RecordingError):
                self._recorder.event(time.time_ns(), kind, stream, seq, detail)
        return 0

    def resumed(self, slots: I64, taken_over: bool) -> int:
        """Streams have new owners."""
        return self._events(slots, "owner", "taken over" if taken_over else "resumed")

    def parked(self, slots: I64) -> int:
        """The connection of these streams is gone."""
        return self._events(slots, "parked", "")

    def reset(self, slots: I64, states: F32 | None) -> int:
        """Streams were given other states, zeros where None."""
        return self._events(slots, "reset", "")

    def _events(self, slots: I64, kind: str, detail: str) -> int:
        if self._recorder is not None:
            for slot in slots.tolist():
                with contextlib.suppress(RecordingError):
                    self._recorder.event(time.time_ns(), kind, int(self._table.recording_id[slot]), None, detail)
        return 0

    def closed(self, slots: I64, reason: str, final_states: F32, lost: Bool) -> int:
        """Streams closed; final states float32 [N, layers, size], not recorded where `lost`."""
        if self._recorder is None:
            return 0
        for index, slot in enumerate(slots.tolist()):
            with contextlib.suppress(RecordingError):
                self._recorder.close_stream(
                    int(self._table.recording_id[slot]),
                    time.time_ns(),
                    reason,
                    int(self._table.next_seq[slot]),
                    None if lost[index] else final_states[index],
                )
        return 0
