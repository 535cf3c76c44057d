"""Checkpoints: states that changed, written to the recording so that a restart has little to replay."""

from __future__ import annotations

import time
from typing import Final

from instep.streaming.engine import Engine
from instep.streaming.states import StreamStates, state_rows
from instep.streaming.tasks import Tasks

AT_ONCE: Final = 1024
"""States read in one go and written in one transaction. Replies may wait for it."""


class Checkpoints:
    """Keeps the time that a restart would need to replay within a target.

    A checkpoint names the newest batch that every state in it contains. It is read and written in parts, and streams
    continue meanwhile: a state may contain later frames, which its seq tells, so a replay leaves those out for it. The
    last part makes the checkpoint the one that counts.

    One is due when the steps since the last one took longer than `target_ns`.
    """

    def __init__(
        self,
        engine: Engine,
        states: StreamStates,
        tasks: Tasks,
        target_ns: int,
        at_once: int = AT_ONCE,
    ) -> None:
        self._engine = engine
        self._states = states
        self._tasks = tasks
        self._target_ns = target_ns
        self._at_once = at_once
        self.is_under_way = False
        """Until the recording holds it."""
        self.taken_ns = time.monotonic_ns()
        """When the newest one began that was complete; before the first one, when the service was made."""

    def take_if_due(self) -> None:
        """Begin one if a restart would have to replay for longer than the target, or the recording is to be trimmed."""
        journal = self._engine.journal
        if (journal.computed_ns > self._target_ns or journal.wants_checkpoint) and not self.is_under_way:
            self._tasks.start(self.take())

    async def take(self) -> None:
        """Write the states that changed since the last checkpoint; a failed one leaves the older one in force."""
        if self.is_under_way or not self._engine.journal.is_recording:
            return
        self.is_under_way = True
        began_ns = time.monotonic_ns()
        journal, table = self._engine.journal, self._engine.table
        through = journal.begin_checkpoint()
        slots = journal.dirty.begin_flush()
        incarnations = table.incarnations(slots)
        journal.computed_ns = 0
        try:
            # Where nothing has changed, the recording may still want one: it holds other rows than frames.
            end = max(len(slots), 1) if journal.wants_checkpoint else len(slots)
            for first in range(0, end, self._at_once):
                part = slice(first, first + self._at_once)
                async with self._states.settled(slots[part]):
                    is_open = table.are_open(slots[part], incarnations[part])
                    opened = slots[part][is_open]
                    if table.lost[opened].any():  # it is about to close
                        return
                    rows = state_rows(self._engine.tables, table, opened, self._states.access.read(opened))
                lsn = journal.states(through, rows, is_last=part.stop >= len(slots))
                await journal.committed(lsn)
                journal.dirty.flushed(slots[part])
            self.taken_ns = began_ns
            self._engine.events.add("checkpoint", detail=f"{len(slots)} states")
        except Exception as error:
            self._engine.log_failure(error, len(slots))
        finally:
            journal.dirty.flush_failed(slots)  # those that were not flushed, also where it is cancelled
            journal.end_checkpoint()
            self.is_under_way = False
