"""What the engine tells the recording, if there is one."""

from __future__ import annotations

import contextlib
import time

import numpy as np

from instep.core.pending import PendingFrames
from instep.core.streams import StreamTable
from instep.core.typing import F32, I32, I64, Bool
from instep.recording.errors import RecordingError
from instep.recording.recorder import Recorder


class Tap:
    """Turns slots and rows into what a recording holds.

    A recorder that has failed raises; the server is about to stop then, so what it would have recorded is let go, and
    a batch that it did not take is not answered.

    Args:
        recorder: where it goes; None for nowhere.
        table: the streams.
        pending: the frames.
    """

    def __init__(self, recorder: Recorder | None, table: StreamTable, pending: PendingFrames) -> None:
        self._recorder = recorder
        self._table = table
        self._pending = pending
        self._last_stream = 0

    @property
    def has_room(self) -> bool:
        """Whether a batch may be stepped now: False while the recorder is behind, and after it failed."""
        return self._recorder is None or (self._recorder.has_room and self._recorder.failed is None)

    def opened(self, slots: I64, initial_states: F32 | None) -> None:
        """Streams opened; initial states float32 [N, layers, size], None for zeros."""
        if self._recorder is None:
            return
        for index, slot in enumerate(slots.tolist()):
            self._last_stream += 1
            self._table.recording_id[slot] = self._last_stream
            state = None if initial_states is None else initial_states[index]
            with contextlib.suppress(RecordingError):
                self._recorder.open_stream(self._last_stream, self._table.name(slot), time.time_ns(), state)

    def stepped(self, slots: I64, rows: I32, bucket: int) -> bool:
        """A batch was computed; False when it cannot be recorded any more, and so must not be answered."""
        if self._recorder is None:
            return True
        try:
            self._recorder.add_batch(
                time.time_ns(),
                bucket,
                self._table.recording_id[slots].astype(np.uint32),
                self._table.step_seq[slots].astype(np.uint64),
                self._pending.x[rows],
                self._pending.y[rows],
            )
        except RecordingError:
            return False
        return True

    def failed(self, slots: I64, seqs: I64, kind: str, detail: str) -> None:
        """A step failed: one event a stream."""
        if self._recorder is None:
            return
        streams = self._table.recording_id[slots].tolist()
        for stream, seq in zip(streams, seqs.tolist(), strict=True):
            with contextlib.suppress(RecordingError):
                self._recorder.event(time.time_ns(), kind, stream, seq, detail)

    def closed(self, slots: I64, reason: str, final_states: F32, lost: Bool) -> None:
        """Streams closed; final states float32 [N, layers, size], not recorded where `lost`."""
        if self._recorder is None:
            return
        for index, slot in enumerate(slots.tolist()):
            with contextlib.suppress(RecordingError):
                self._recorder.close_stream(
                    int(self._table.recording_id[slot]),
                    time.time_ns(),
                    reason,
                    int(self._table.next_seq[slot]),
                    None if lost[index] else final_states[index],
                )
