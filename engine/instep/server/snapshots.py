"""Snapshots: states that changed, written to the recording so that a restart has little to replay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from instep.core.rings import Rings
from instep.core.streams import NO_OWNER, StreamTable
from instep.core.typing import F32, I64, Bool
from instep.recording.states import StateRows
from instep.runtime.stepper import Stepper
from instep.runtime.worker import Job, Worker
from instep.server.tap import Tap

AT_ONCE = 1024


class Snapshots:
    """Keeps what a restart would have to replay within a time.

    A snapshot names the newest batch that every state in it contains. It takes several jobs of the worker, each with a
    transaction of the recorder after it, and streams go on meanwhile: a state may contain later frames, which its seq
    tells, so replay leaves those out for it. The last transaction makes the snapshot the one that counts.

    Args:
        table: the streams.
        rings: their frames.
        stepper: the states.
        worker: runs the stepper.
        tap: what has changed, and where snapshots go.
        log_failure: told of states that could not be read.
        target_ns: a snapshot is due when the steps since the last one took this long.
        at_once: states read in one job of the worker, and written in one transaction, for which answers may wait.
    """

    def __init__(
        self,
        table: StreamTable,
        rings: Rings,
        stepper: Stepper,
        worker: Worker,
        tap: Tap,
        log_failure: Callable[[Exception | None, int], None],
        target_ns: int,
        at_once: int = AT_ONCE,
    ) -> None:
        self._table = table
        self._rings = rings
        self._stepper = stepper
        self._worker = worker
        self._tap = tap
        self._log_failure = log_failure
        self._target_ns = target_ns
        self._at_once = at_once
        self.is_under_way = False
        """Until the recording holds it."""

    @property
    def is_due(self) -> bool:
        """Whether a restart would have to replay for longer than it should."""
        return self._tap.computed_ns > self._target_ns and not self.is_under_way

    def take(self) -> None:
        """Read the states that changed since the last snapshot and have them recorded; none is under way."""
        assert not self.is_under_way, "a second snapshot would count without what the first has not written yet"
        self.is_under_way = True
        tap, keeping = self._tap, self._table.keeping
        through = tap.last_inputs
        slots = keeping.take()
        streams = self._table.numbers(slots)
        tap.computed_ns = 0

        def read(first: int) -> None:
            part = slice(first, first + self._at_once)
            is_last = part.stop >= len(slots)

            def committed() -> None:
                keeping.committed(slots[part])
                if is_last:
                    self.is_under_way = False
                else:
                    read(part.stop)

            def done(states: F32 | None, error: Exception | None) -> None:
                if states is None:
                    self._log_failure(error, len(slots[part]))
                is_lost = self._table.lost[slots] & self._are_open(slots, streams)
                if states is None or is_lost.any():  # what is lost is about to close
                    self.is_under_way = False
                    keeping.failed(slots)  # they stay due, the older snapshot stays good
                    return
                rows = self._rows(slots[part], streams[part], states)
                record = tap.snapshot if is_last else tap.states
                tap.when_committed(record(through, rows), committed)

            self._worker.submit(Job(lambda: self._stepper.read(slots[part]), done))

        if len(slots):
            read(0)
        else:
            self.is_under_way = False

    def take_if_due(self) -> None:
        """Take one, if it is due."""
        if self.is_due:
            self.take()

    def _are_open(self, slots: I64, streams: I64) -> Bool:
        """Whether the streams are still there, those that are closing included: their end is not recorded yet."""
        table = self._table
        there: Bool = (table.recording_id[slots] == streams) & (table.owner[slots] != NO_OWNER)
        return there

    def _rows(self, slots: I64, streams: I64, states: F32) -> StateRows:
        good = self._are_open(slots, streams)
        return state_rows(self._table, self._rings, slots[good], states[good])


def state_rows(table: StreamTable, rings: Rings, slots: I64, states: F32) -> StateRows:
    """States that were just read, float32 [N, layers, size], of the open streams in `slots`, with what belongs to them.

    Steps that were submitted before the reading have been handed back before it.
    """
    return extents(table, rings, slots).rows(rings, states)


@dataclass(frozen=True, slots=True)
class Extents:
    """Which states are read, and which frames belong to them."""

    slots: I64
    """int64 [N]."""
    streams: I64
    """int64 [N]: their numbers."""
    seqs: I64
    """int64 [N]: of the next steps."""
    first: I64
    """int64 [N]: the client may not have the outputs of the frames from here on."""

    def rows(self, rings: Rings, states: F32) -> StateRows:
        """With the states, float32 [N, layers, size], and the frames, which have not changed since."""
        tail, _ = rings.stretches(self.slots, self.first, self.seqs - self.first)
        return StateRows(self.streams, self.seqs, states, self.first, rings.x[tail], rings.y[tail])


def extents(table: StreamTable, rings: Rings, slots: I64) -> Extents:
    """What the states of the open streams in `slots` are, as of now."""
    seqs = table.step_seq[slots]
    first = np.maximum(np.maximum(table.acked[slots], seqs - rings.window), table.first_seq[slots])
    return Extents(slots, table.recording_id[slots].astype(np.int64), seqs, first)
