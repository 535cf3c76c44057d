"""Rotation: the recording goes on in another file, cut exactly between two steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import numpy as np

from instep.core.rings import Rings
from instep.core.streams import NO_OWNER, StreamTable
from instep.core.typing import I64
from instep.recording.states import StateRows
from instep.recording.writer import RecordingWriter
from instep.runtime.stepper import Stepper
from instep.runtime.worker import Job, Worker
from instep.server.gathering import Gathered, Gathering
from instep.server.snapshots import AT_ONCE, Snapshots
from instep.server.tap import Tap

AGAIN_NS: Final = 10**9
"""After states could not be read, it is tried again so much later."""


class Rotation:
    """Cuts the recording when the newest file is large or old enough.

    From `begin` on no step is submitted, and no message is handled. Steps under way are handed back before the first
    states are read, since the worker does one job after another, so a state that was read stays true, but for resets
    that were under way. States and frames are gathered some at a time, by the worker, so the loop does not stop. Once
    those of all open streams have been read, they are handed over in one go: what was recorded before is the old file,
    and the new one begins with them. Until the recording holds it, it counts as a snapshot that is under way, since it
    is one of all states.

    Args:
        table: the streams.
        rings: their frames.
        stepper: the states.
        worker: runs the stepper.
        tap: what is paused, and where the states go.
        snapshots: of which none may be under way.
        log_failure: told of states that could not be read.
        max_bytes: the file is due when so much was written since it began; 0 for never.
        max_age_ns: it is due when it began so long ago; 0 for never.
        began_ns: when it began, on the clock that `is_due` is asked with.
    """

    def __init__(
        self,
        table: StreamTable,
        rings: Rings,
        stepper: Stepper,
        worker: Worker,
        tap: Tap,
        snapshots: Snapshots,
        log_failure: Callable[[Exception | None, int], None],
        max_bytes: int,
        max_age_ns: int,
        began_ns: int,
    ) -> None:
        self._table = table
        self._rings = rings
        self._stepper = stepper
        self._worker = worker
        self._tap = tap
        self._snapshots = snapshots
        self._log_failure = log_failure
        self._max_bytes = max_bytes
        self._max_age_ns = max_age_ns
        self._began_ns = began_ns
        self._not_before_ns = began_ns
        self._cut_at = 0
        """The ticket of the newest file's first rows; nothing was added to it while that is the newest ticket."""
        self.paused_ns = 0
        """How long steps paused for the last one."""
        self._paused_at_ns = 0
        self._taken: I64 = np.empty(0, np.int64)
        """Slots whose states had changed when the present one began."""

    def is_due(self, now_ns: int) -> bool:
        """Whether the newest file is large or old enough, something was added to it, and no snapshot is under way."""
        if self._snapshots.is_under_way or self._tap.newest == self._cut_at or now_ns < self._not_before_ns:
            return False
        is_old = 0 < self._max_age_ns <= now_ns - self._began_ns
        return is_old or 0 < self._max_bytes <= self._tap.grown_bytes

    def begin(self, now_ns: int) -> None:
        """Pause, read, cut."""
        self._snapshots.is_under_way = self._tap.is_paused = True
        self._paused_at_ns = time.monotonic_ns()
        table, tap = self._table, self._tap
        # What changes from now on stays so: it may be later than what is read, and no step follows that would tell.
        self._taken = table.keeping.take()
        gathering = Gathering(table, self._rings)

        def go_on() -> None:
            slots = gathering.next_slots(AT_ONCE)
            if (table.lost & (table.owner != NO_OWNER)).any():  # about to close; the file goes on until the next time
                self._give_up(now_ns)
            elif len(slots):
                read(slots)
            else:
                self._cut(gathering.all(), now_ns)

        def read(slots: I64) -> None:
            extents = gathering.extents(slots)

            def done(rows: StateRows | None, error: Exception | None) -> None:
                if rows is None:
                    self._log_failure(error, len(slots))
                    self._give_up(now_ns)
                    return
                gathering.add(slots, rows)
                go_on()

            # In the worker, since they are many bytes; nothing of them changes while steps pause.
            self._worker.submit(Job(lambda: extents.rows(self._rings, self._stepper.read(slots)), done))

        tap.on_reset = gathering.forget
        self._worker.submit(Job(lambda: None, lambda *_: go_on()))  # behind the steps that are under way

    def _cut(self, gathered: Gathered, now_ns: int) -> None:
        keeping, tap = self._table.keeping, self._tap
        changed = self._taken
        tap.rotate(gathered.slots, gathered.names, gathered.parts)
        self._cut_at = tap.newest
        self._began_ns = now_ns
        self._go_on()

        def committed() -> None:
            keeping.committed(changed)
            self._snapshots.is_under_way = False
            self._snapshots.on_committed()

        tap.when_committed(tap.newest, committed)

    def _give_up(self, now_ns: int) -> None:
        """Nothing was cut."""
        self._not_before_ns = now_ns + AGAIN_NS
        self._table.keeping.failed(self._taken)
        self._snapshots.is_under_way = False
        self._go_on()

    def _go_on(self) -> None:
        self.paused_ns = time.monotonic_ns() - self._paused_at_ns
        self._tap.on_reset = lambda slots: None
        self._tap.is_paused = False


def age_ns(writer: RecordingWriter | None) -> int:
    """How long ago the newest file of the recording began."""
    return 0 if writer is None else max(time.time_ns() - writer.began.created_ns, 0)
