"""The recorder: a thread that writes a recording, several batches in one commit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from instep.core.histogram import add_to, new_histogram
from instep.core.typing import I64
from instep.recording.errors import RecordingError
from instep.recording.writer import RecordingWriter

Write: TypeAlias = Callable[[RecordingWriter], object]

TRIM_EVERY_S: Final = 1.0
"""The interval at which the age of the history is checked when nothing is written."""
LATE_S: Final = 0.02
"""The longest delay of rows that nothing waits for, so that they can share a commit with later rows."""
SMALL_ROWS_PER_BATCH: Final = 256
"""The number of openings, closings and events that may wait for each batch that may wait."""


class Recorder:
    """Takes rows without blocking, and writes them in order from a thread; each commit has all waiting rows.

    A ticket is the position that a row will have in the recording, so tickets rise by one for each row.

    The caller bounds the queue: check `room` before adding a batch, and wait for `on_room` when there is none. Batches
    and rows count as waiting until they are committed; the outcome of a batch is not counted again.

    When the disk is full or fails, `failed` is set, `on_failure` is called once, uncommitted rows are dropped, and
    `put` raises from then on. After a failure nothing is written or reported as durable.

    Args:
        writer: a recording; the recorder owns and closes it.
        queue_batches: at most this many batches may wait.
        on_room: called in the recorder's thread when the queue has room again.
        on_failure: called once in the recorder's thread with the error.
        on_durable: called in the recorder's thread after each commit with the newest ticket in it.
        commit_us: a histogram (`core.histogram`) of the time of each transaction, from its first row to its commit.
        on_trimmed: called in the recorder's thread after trimming, with the position of the checkpoint at the new
            beginning.
        late_s: the longest delay of rows that nothing waits for.
    """

    def __init__(
        self,
        writer: RecordingWriter,
        queue_batches: int,
        on_room: Callable[[], None],
        on_failure: Callable[[Exception], None],
        on_durable: Callable[[int], None],
        commit_us: I64 | None = None,
        on_trimmed: Callable[[int], None] = lambda position: None,
        late_s: float = LATE_S,
    ) -> None:
        self._writer = writer
        self._queue_batches = queue_batches
        self._on_room = on_room
        self._on_failure = on_failure
        self._on_durable = on_durable
        self._commit_us = new_histogram() if commit_us is None else commit_us
        self._on_trimmed = on_trimmed
        self._late_s = late_s
        self.wants_checkpoint = False
        """Whether a checkpoint is needed, so that the history before it can be trimmed later."""
        self._is_trimming = True
        self._trim_every_s = TRIM_EVERY_S if writer.retention.is_limited else None
        self._changed = threading.Condition()
        self._queue: list[Write] = []
        self._ticket = writer.position
        self._batches = 0
        self._small_rows = 0
        self._was_full = False
        self._is_awaited = False
        """Whether an answer waits for the queued rows."""
        self._is_asleep = False
        """Whether the thread has to be woken even for rows that nothing waits for."""
        self._stopping = False
        self.failed: Exception | None = None
        """The error that ended the recording, or None."""
        self._thread = threading.Thread(target=self._run, name="instep-recorder", daemon=True)
        self._thread.start()

    @property
    def room(self) -> int:
        """The number of batches that may be added now; 0 or less means none."""
        is_full = self._small_rows >= self._queue_batches * SMALL_ROWS_PER_BATCH
        return 0 if is_full else self._queue_batches - self._batches

    @property
    def uses_second_place(self) -> bool | None:
        """Whether answers depend on a second place now; None where there is no such place."""
        place = self._writer.second_place
        return None if place is None else place.is_used

    def put(
        self, write: Write, *, rows: int = 1, batches: int = 0, small_rows: int = 0, is_awaited: bool = True
    ) -> int:
        """Queue rows for the writer.

        Args:
            write: called in the recorder's thread with the writer; its arrays may not change afterwards.
            rows: the number of positions that it uses.
            batches: the number of rows that are inputs of a batch.
            small_rows: the number of openings, closings, events and states.
            is_awaited: whether something waits for the commit. Otherwise it may be delayed by up to `late_s`, unless
                the queue is half full or `hurry` is called.

        Returns:
            The ticket of the last of these rows.

        Raises:
            RecordingError: after a failure or `stop`.
        """
        with self._changed:
            if self.failed is not None:
                raise RecordingError(f"the recording {self._writer.path} failed and takes nothing more: {self.failed}")
            if self._stopping:
                raise RecordingError(f"the recording {self._writer.path} was stopped and takes nothing more")
            self._queue.append(write)
            self._batches += batches
            self._small_rows += small_rows
            self._was_full = self._was_full or self.room <= 0
            self._ticket += rows
            self._is_awaited |= is_awaited or 2 * self._batches >= self._queue_batches
            if self._is_awaited or self._is_asleep:
                self._changed.notify()
            return self._ticket

    def hurry(self) -> None:
        """Commit queued rows soon, because something waits for them now."""
        with self._changed:
            if self._queue and not self._is_awaited:
                self._is_awaited = True
                self._changed.notify()

    def stop(self, timeout_s: float | None = None) -> bool:
        """Write and commit queued rows, close the file and end the thread; check `failed` afterwards.

        Returns:
            Whether this is done; False after the timeout. May be called again.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while self._write_what_waits():
                pass
            self._writer.close()
        except Exception as error:  # SQLite's, the system's or a bug's: the recording is over in any case
            with self._changed:
                self.failed = error
                self._queue.clear()
            try:
                self._writer.abandon()
            finally:
                self._on_failure(error)

    def _write_what_waits(self) -> bool:
        """Wait for rows and commit them in one transaction; False once stopped and empty."""
        with self._changed:
            if not (self._is_awaited or self._stopping or self._is_trimming):
                self._wait()
            writes, self._queue, self._is_awaited = self._queue, [], False
            batches, small_rows = self._batches, self._small_rows
            if not writes and self._stopping:
                return False
        before = self._writer.position
        if writes:
            self._write(writes, batches, small_rows)
        self._trim(self._writer.position - before)
        return True

    def _wait(self) -> None:
        if not self._changed.wait(self._late_s) and not (self._queue or self._stopping):
            self._is_asleep = True
            self._changed.wait(self._trim_every_s)
            self._is_asleep = False

    def _write(self, writes: list[Write], batches: int, small_rows: int) -> None:
        began_ns = time.monotonic_ns()
        for write in writes:
            write(self._writer)
        self._writer.commit()
        add_to(self._commit_us, (time.monotonic_ns() - began_ns) // 1000, 1)
        self._on_durable(self._writer.position)
        self._writer.copy_wal()
        with self._changed:
            self._batches -= batches
            self._small_rows -= small_rows
            room_again = self._was_full and self.room > 0
            self._was_full = self._was_full and not room_again
        if room_again:
            self._on_room()

    def _trim(self, positions: int) -> None:
        """Trim part of the history, several times faster than it grew (by `positions`)."""
        now_ns, before = time.time_ns(), self._writer.trimmed
        for _ in range(1 + positions // 16):
            self._is_trimming = self._writer.trim(now_ns)
            if not self._is_trimming:
                break
        self._writer.copy_wal()
        self.wants_checkpoint = self._writer.wants_checkpoint(now_ns)
        if self._writer.trimmed != before:
            self._on_trimmed(self._writer.trimmed.position)
