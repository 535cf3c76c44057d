"""The journal hands records to the recorder and tracks which are durable.

Everything recorded has a rising log sequence number (`lsn`). With `commit` and `fsync` a reply waits until every record
that it depends on is durable, so a crash cannot undo an output, a state, or the opening or end of a stream that a
client knows of. (Refusals of frames and messages do not wait; refusals of a resume do.)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.dirty import DirtyTracker
from instep.core.streams import StreamTable
from instep.core.tables import Tables
from instep.core.typing import F32, I64, U8, U32, U64, Bool
from instep.recording.errors import RecordingError
from instep.recording.recorder import Recorder, Write
from instep.recording.records import MovedStreams, StateRows
from instep.recording.schema import (
    OWNER_EVENT,
    PARKED_EVENT,
    RESET_EVENT,
    owner_detail,
)
from instep.recording.writer import RecordingWriter
from instep.streaming.tasks import Waiters

NEVER: Final = 2**62
"""The lsn of records that were dropped because the recording has failed."""
_MANY: Final = 2**31


class Journal:
    """Turns slots and rows into records. Without a recorder, everything counts as durable at once.

    A failed recorder accepts nothing more, and waiting requests wait until the server ends soon after.

    `wake` lets the loop take a turn; it is called on the loop's thread when more records are durable.
    """

    def __init__(self, tables: Tables, table: StreamTable, wake: Callable[[], None]) -> None:
        self.dirty = DirtyTracker(len(tables.streams) - 1)
        self.newest = 0
        """The lsn of the newest record."""
        self.last_inputs = 0
        """The lsn of the newest batch of inputs, or of the newest row that the recording had at the start."""
        self.released = NEVER - 1
        """Replies that depend on nothing newer than this lsn may be sent."""
        self.computed_ns = 0
        """The duration of the steps since the last checkpoint."""
        self._tables = tables
        self._table = table
        self._wake = wake
        self._recorder: Recorder | None = None
        self._waits = False
        self._committed = NEVER - 1
        self._last_stream = 0
        self._through = 0
        """The lsn up to which the states of the checkpoint under way contain every batch; 0 without a checkpoint."""
        self._durable = Waiters()
        """Requests that wait for durability."""
        self._committing = Waiters()
        """Waiters for a commit, whatever the durability."""
        self._barriers_wanted = self._barriers_begun = self._barriers_passed = 0
        """Numbers of barriers."""
        self._releases = 0
        """Releases of replies that follow after the coroutines that waited."""

    def record(self, recorder: Recorder, last_stream: int, last_row: int, *, waits: bool, replayed_ns: int = 0) -> None:
        """Record from now on.

        Args:
            recorder: writes all records.
            last_stream: the highest number of a stream in the recording.
            last_row: the newest position of the recording; the streams are as they were there.
            waits: whether replies wait until everything that they rest on is durable.
            replayed_ns: the time for stepping the frames that are in no checkpoint yet, because the next restart would
                step them again.
        """
        self._recorder = recorder
        self.computed_ns = replayed_ns
        self._last_stream = last_stream
        self.newest = self.last_inputs = self._committed = last_row
        self._waits = waits
        if waits:
            self.released = last_row

    @property
    def is_recording(self) -> bool:
        """Whether there is a recording."""
        return self._recorder is not None

    @property
    def has_failed(self) -> bool:
        """Whether the recorder has failed, so that the server is about to stop."""
        return self._recorder is not None and self._recorder.failed is not None

    @property
    def room(self) -> int:
        """The number of batches that may begin now; 0 while the recorder is behind, and after it failed."""
        if self._recorder is None:
            return _MANY
        return 0 if self.has_failed else self._recorder.room

    @property
    def wants_checkpoint(self) -> bool:
        """Whether the recorder needs a checkpoint, so that it can trim the history before it later."""
        return self._recorder is not None and self._recorder.wants_checkpoint

    @property
    def is_quiet(self) -> bool:
        """Whether no request waits for the recorder or has yet to answer after waiting."""
        return not self._durable

    def advance(self, lsn: int) -> None:
        """Note that everything up to this lsn is committed; called on the loop's thread."""
        self._committed = lsn
        if self._barriers_wanted > self._barriers_begun == self._barriers_passed:
            self._begin_barrier()
        if not (self._committing or self._durable or self._releases):
            self._release(lsn)
            return
        self._committing.check()
        self._durable.check()
        # Coroutines that waited run first: what they answer precedes the outputs of later frames.
        self._releases += 1
        asyncio.get_running_loop().call_soon(self._release_behind, lsn)

    def _release_behind(self, lsn: int) -> None:
        self._releases -= 1
        self._release(lsn)

    def _release(self, lsn: int) -> None:
        if self._waits:
            self.released = max(self.released, lsn)
        self._wake()

    async def durable(self, lsn: int) -> None:
        """Wait until a reply may depend on the record of this lsn."""
        if self._waits:
            self._hurry(lsn)
            await self._durable.until(lambda: lsn <= self._committed)

    async def current(self) -> None:
        """Wait until a reply may say what memory holds now: it is durable, and no other server has taken over."""
        await self.durable(self.newest)
        await self.barrier()

    async def barrier(self) -> None:
        """Wait until a second place of the recording, if there is one, has taken something that was sent after this.

        All that wait share one barrier.
        """
        if self._waits and self._recorder is not None and self._recorder.uses_second_place:
            number = self._barriers_wanted = self._barriers_begun + 1  # not the one under way: it began before
            if self._barriers_begun == self._barriers_passed:
                self._begin_barrier()
            await self._durable.until(lambda: self._barriers_passed >= number)

    def _begin_barrier(self) -> None:
        self._barriers_begun += 1

        def pass_barrier(writer: RecordingWriter) -> None:
            writer.barrier()
            self._barriers_passed += 1  # the recorder's thread calls `advance` after this

        self._put(pass_barrier, rows=0)

    async def committed(self, lsn: int) -> None:
        """Wait until the record of this lsn is committed, whatever the durability."""
        self._hurry(lsn)
        await self._committing.until(lambda: lsn <= self._committed)

    def _hurry(self, lsn: int) -> None:
        if lsn > self._committed and self._recorder is not None:
            self._recorder.hurry()

    # ── Frames ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def inputs(self, slots: I64, rows: I64) -> list[int]:
        """Record the inputs of a run, slots int64 [B] and rows int64 [steps, B]; return the lsn of each step."""
        if self._recorder is None:
            return [0] * len(rows)
        self.dirty.mark_dirty(slots)  # now: a checkpoint taken during the run says that it contains the run
        streams = self._table.recording_id[slots]
        seqs = self._table.step_seq[slots].astype(np.uint64)
        lsns = [
            self._batch(streams, seqs + np.uint64(at), self._tables.x[rows_of_step])
            for at, rows_of_step in enumerate(rows)
        ]
        self.last_inputs = lsns[-1]
        return lsns

    def _batch(self, streams: U32, seqs: U64, x: F32) -> int:
        time_ns = time.time_ns()
        return self._put(lambda writer: writer.add_inputs(time_ns, streams, seqs, x), batches=1, is_awaited=self._waits)

    def outputs(self, lsn: int, rows: I64, computed_ns: int) -> None:
        """Record the outputs of the batch of an lsn. Nothing waits for this, because replies depend on the inputs."""
        if self._recorder is None:
            return
        self.computed_ns += computed_ns
        time_ns, y = time.time_ns(), self._tables.y[rows]
        self._put(lambda writer: writer.add_outputs(time_ns, lsn, y), is_awaited=False)

    def failed(self, lsn: int, detail: str) -> int:
        """Record that the step of an lsn failed and none of its frames was applied."""
        time_ns = time.time_ns()
        return self._put(lambda writer: writer.fail_batch(time_ns, lsn, detail))

    def begin_checkpoint(self) -> int:
        """Begin a checkpoint; return the lsn up to which its states include every batch."""
        self._through = self.newest
        return self._through

    def end_checkpoint(self) -> None:
        """End the checkpoint under way, whether complete or failed."""
        self._through = 0

    def hibernated(self, slots: I64, rows: StateRows) -> int:
        """Record states of streams that leave memory, as part of the present or the next checkpoint."""
        self.dirty.mark_clean(slots)
        return self.states(self._through or self.newest, rows, is_last=False)

    def states(self, through: int, rows: StateRows, *, is_last: bool) -> int:
        """Record part of a checkpoint; its states contain every batch up to the lsn `through`."""
        if is_last:
            self._through = 0
        time_ns = time.time_ns()
        if is_last:
            return self._put(lambda writer: writer.checkpoint(time_ns, through, rows))
        return self._put(lambda writer: writer.add_states(time_ns, through, rows), small_rows=len(rows.streams))

    # ── Streams ────────────────────────────────────────────────────────────────────────────────────────────────────

    def opened(self, slots: I64, names: Sequence[str], initial_states: U8 | None) -> int:
        """Record streams that were opened.

        Args:
            slots: int64 [N].
            names: N names.
            initial_states: the states before their next frames, [N, …]; None for the model's own.
        """
        table, count, time_ns = self._table, len(slots), time.time_ns()
        streams = self._number(slots)
        epochs, first_seqs = table.epoch[slots], table.next_seq[slots]
        return self._put_rows(
            count, lambda writer: writer.open_streams(time_ns, streams, names, epochs, first_seqs, initial_states)
        )

    def moved(
        self, slots: I64, names: Sequence[str], now: StateRows, replayed_from: I64 | None, file: Path | None
    ) -> int:
        """Record streams that come from another version; see `RecordingWriter.move_streams`.

        `now` includes the frames whose outputs clients may lack, because this recording has no other copy. `file` is
        the other version's recording; None without one.
        """
        table, count, time_ns = self._table, len(slots), time.time_ns()
        numbers, streams = table.recording_ids(slots), self._number(slots)
        columns = (table.epoch[slots], table.former_epoch[slots], table.granted_seq[slots])
        owners = list(zip(*(column.tolist() for column in columns), strict=True))
        moved = MovedStreams(streams, names, owners, now.seqs, now.states, replayed_from, numbers)
        source = "" if file is None else file.name
        now = replace(now, streams=streams)

        def write(writer: RecordingWriter) -> None:
            writer.move_streams(time_ns, moved, source)
            writer.add_states(time_ns, writer.position, now)

        return self._put_rows(3 * count + 1, write) if count else 0

    def _number(self, slots: I64) -> I64:
        streams = np.arange(self._last_stream + 1, self._last_stream + 1 + len(slots))
        self._last_stream += len(slots)
        self._table.recording_id[slots] = streams
        return streams

    def resumed(self, slots: I64) -> int:
        """Record new owners, and therefore new epochs, of streams."""
        table = self._table
        details = map(owner_detail, table.former_epoch[slots].tolist(), table.granted_seq[slots].tolist())
        return self._events(slots, OWNER_EVENT, table.epoch[slots].astype(np.int64), details)

    def parked(self, slots: I64) -> int:
        """Record that the connection of these streams is lost."""
        return self._events(slots, PARKED_EVENT, self._table.next_seq[slots], repeat("", len(slots)))

    def reset(self, slots: I64, states: U8 | None) -> int:
        """Record new states [N, …] of streams without pending frames; None for the model's initial ones."""
        self.dirty.mark_dirty(slots)
        return self._events(slots, RESET_EVENT, self._table.step_seq[slots], repeat("", len(slots)), states)

    def closed(self, slots: I64, reason: str, final_states: U8, lost: Bool) -> int:
        """Record closed streams with their final states [N, …], without a state where `lost`."""
        self.dirty.mark_clean(slots)
        return self.ended(self._table.recording_ids(slots), reason, self._table.next_seq[slots], final_states, lost)

    def ended(self, streams: I64, reason: str, frames: I64, final_states: U8, lost: Bool) -> int:
        """Record the ends of streams by their numbers, with the seqs that they expected next; see `closed`."""
        time_ns = time.time_ns()
        return self._put_rows(
            len(streams), lambda writer: writer.close_streams(time_ns, streams, reason, frames, final_states, lost)
        )

    def _events(self, slots: I64, kind: str, seqs: I64, details: Iterable[str], states: U8 | None = None) -> int:
        time_ns, streams = time.time_ns(), self._table.recording_ids(slots)
        return self._put_rows(
            len(slots), lambda writer: writer.stream_events(time_ns, kind, streams, seqs, details, states)
        )

    def _put_rows(self, count: int, write: Write) -> int:
        return self._put(write, rows=count, small_rows=count) if count else 0

    def _put(
        self, write: Write, *, rows: int = 1, batches: int = 0, small_rows: int = 0, is_awaited: bool = True
    ) -> int:
        """Put a record into the recorder's queue; return its lsn, 0 without a recording."""
        if self._recorder is None:
            return 0
        try:
            self.newest = self._recorder.put(
                write, rows=rows, batches=batches, small_rows=small_rows, is_awaited=is_awaited
            )
        except RecordingError:
            self.newest = NEVER
        return self.newest
