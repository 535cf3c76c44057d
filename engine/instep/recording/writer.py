"""Writes a recording: creates, resumes and closes the file, and appends rows in transactions."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple
from functools import partial
from itertools import repeat
from json import dumps
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import quote

import numpy as np

from instep.core.typing import F32, I64, U8, U32, U64, Bool
from instep.recording.database import (
    LIMITS,
    DatabaseLimits,
    insert,
    insertion,
    is_in_use,
    make_tables,
    put_wal_away,
    remove_database,
    with_crcs,
)
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.lock import WriterLock
from instep.recording.reader import RecordingReader
from instep.recording.records import (
    Checkpoint,
    MovedStreams,
    StateRows,
    Trimmed,
    blob,
    changed_values,
    refuse_other_model,
    state_blobs,
)
from instep.recording.schema import (
    CHECKPOINT_EVENT,
    COUNTED,
    END_EVENT,
    ENGINE_EVENT,
    FAILED_EVENT,
    HISTORY,
    LOST,
    MOVED_EVENT,
    OWNER_EVENT,
    RECOVERED_EVENT,
    STATES_EVENT,
    Column,
    Durability,
    RecordingHeader,
    checkpoint_detail,
    moved_detail,
    owner_detail,
    read_checkpoint_frames,
    row_crc,
)
from instep.recording.trim import DELETE_STATES, KEEP_ALL, Retention, counts_of_events, deletions

WAL_KEPT_BYTES: Final = 64 * 2**20
SET_NEWEST: Final = "UPDATE newest SET position = ?, states = ?, crc = ?"
_SYNCHRONOUS: Final[dict[Durability, str]] = {"memory": "NORMAL", "commit": "NORMAL", "fsync": "FULL"}
_PAGES_A_COMMIT: Final = 4
"""The approximate number of pages that every commit changes."""
_MOST_CLOSED: Final = 4096
_ROW_BYTES: Final = 64
"""The approximate size of a row without its blobs, in bytes."""

Statement: TypeAlias = tuple[str, list[tuple[Column, ...]]]
"""An SQL statement that changes rows, and the values for each of its executions."""


class SecondPlace(Protocol):
    """Another place that has every transaction of recordings before anything is answered that rests on it.

    Its methods are called in the writers' threads, and end a recording if they raise.
    """

    @property
    def is_used(self) -> bool:
        """Whether answers depend on it now."""
        ...

    def commit(self, file: Path, statements: Sequence[Statement], here: Callable[[], object]) -> None:
        """Commit a transaction of a recording `here` and there."""
        ...

    def barrier(self) -> None:
        """Return once the place has taken an empty transaction."""
        ...

    def copy_wal(self, file: Path) -> None:
        """Copy the WAL of a recording into its file there, while the same is done here."""
        ...


class RecordingWriter:
    """Appends rows to a recording. Only one thread at a time may use it, and a file has only one writer.

    `schema` explains the rows. A commit survives the death of the process (`kill -9`). With `fsync` it also survives
    the death of the machine (WAL with `synchronous=FULL`); without it the last commits may be lost then. Neither ever
    corrupts the file.

    Every method may raise SQLite's own errors (`sqlite3.Error`: disk full, input/output error).

    Attributes:
        retention: the limits of the kept history.
        position: of the newest row, committed or not.
        trimmed: the beginning of a trimmed history.
        second_place: gets all later transactions; may be set while no transaction is open.
    """

    def __init__(
        self,
        path: Path,
        lock: WriterLock,
        database: sqlite3.Connection,
        header: RecordingHeader,
        position: int,
        retention: Retention,
        limits: DatabaseLimits,
    ) -> None:
        self.path = path
        self.header = header
        self.position = position
        self.retention = retention
        self._lock = lock
        self._database = database
        self._limits = limits
        self._in_transaction = False
        self.second_place: SecondPlace | None = None
        self._statements: list[Statement] = []
        """Those of the open transaction, for the second place."""
        # SQLite copies the WAL into the file when its last connection closes. After an error nothing may be written
        # any more, so a second connection, for reading only, is always open.
        self._guard = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._guard.execute("SELECT count(*) FROM header").fetchone()
        self._wal_name = f"{path}-wal"
        self._wal: tuple[int, int] | None = None
        """Device and inode of the WAL."""
        wal = Path(f"{path}-wal")  # that of a killed writer counts too: each start has to read it
        self._bytes_in_wal = wal.stat().st_size if wal.exists() else 0
        self._version = self._data_version()
        self._page_bytes = int(self._read("header", "PRAGMA page_size")[0][0])
        self._checkpoints = [Checkpoint(*row[:-1]) for row in self._read("checkpoints")]
        trimmed = [Trimmed(*row[:-1]) for row in self._read("trimmed")]
        self.trimmed = trimmed[0] if trimmed else Trimmed()
        newest = self._checkpoints[-1] if self._checkpoints else Checkpoint()
        self._kept = self._newest_kept()
        """The newest checkpoint whose states are kept when later ones are written."""
        self._bytes = newest.bytes
        """The approximate bytes written to the history since the recording began."""
        self._counts = {table: int(getattr(newest, table)) for table in COUNTED}
        for table, columns in HISTORY.items():
            blobs = "".join(f" + ifnull(length({name}), 0)" for name in columns if columns[name].startswith("BLOB"))
            query = f"SELECT count(*), ifnull(sum({_ROW_BYTES}{blobs}), 0) FROM {table} WHERE position > ?"
            ((count, size),) = self._read(table, query, newest.position)
            self._bytes += size
            if table in COUNTED:
                self._counts[table] += count
        completed = self._read("events", "SELECT detail FROM events WHERE position = ?", newest.completed)
        self._frames = sum(read_checkpoint_frames(detail) for (detail,) in completed)
        """The number of frames applied since the recording began."""
        self._frames += self._frames_after(newest.position)
        self._state_rows = int(self._read("states", "SELECT count(*) FROM states")[0][0])
        self._is_partial = True
        """Whether the newest checkpoint may lack states, because later ones replaced them or their streams have closed.
        After a restart this is assumed.
        """
        left = "SELECT DISTINCT stream FROM states WHERE position > ? AND stream IN (SELECT stream FROM closings)"
        self._closed = [row[0] for row in self._read("states", left, self._kept.position)]
        """Closed streams whose rows in `states` are deleted when the next states are written."""
        self._last_stream = max(self.trimmed.last_stream, self._highest("openings", "stream"))
        owners = self._highest("events", "seq", f"WHERE kind = '{OWNER_EVENT}'")
        self._last_epoch = max(self.trimmed.last_epoch, self._highest("openings", "epoch"), owners)
        self._trimming = self._delete_until(self.trimmed.position) if self.trimmed.position else iter(())

    @classmethod
    def create(
        cls, path: Path, header: RecordingHeader, retention: Retention = KEEP_ALL, limits: DatabaseLimits = LIMITS
    ) -> RecordingWriter:
        """Start a new recording.

        Raises:
            RecordingError: when the file is not empty, or cannot be made.
        """
        try:
            with ExitStack() as undo:
                lock = WriterLock(path)
                undo.callback(lock.release)
                if path.exists() and path.stat().st_size > 0:
                    raise RecordingError(
                        f"{path} already exists; a recording is never written over: choose another name"
                    )
                database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                undo.callback(database.close)
                make_tables(database, limits.page_bytes)
                lock.hold()
                insert(database, "header", header.rows())
                insert(database, "newest", with_crcs([(0, 0)]))
                database.execute("COMMIT")
                set_up(database, header.durability, limits)
                writer = cls(path, lock, database, header, 0, retention, limits)
                undo.pop_all()
                return writer
        except (OSError, sqlite3.Error) as error:
            raise RecordingError(f"cannot create the recording {path}: {error}") from None

    @classmethod
    def resume(
        cls,
        path: Path,
        header: RecordingHeader,
        retention: Retention = KEEP_ALL,
        limits: DatabaseLimits = LIMITS,
    ) -> RecordingWriter:
        """Continue a recording after its last committed row.

        The first commit contains the event `recovered` and, if this engine differs from the last one, `engine`.

        Args:
            path: the recording.
            header: of the engine that continues it; the file keeps the header of the first one.
            retention: the limits of the kept history.
            limits: of the WAL and of waits.

        Raises:
            RecordingError: when it is being written, damaged or of another model.
        """
        try:
            with ExitStack() as undo:
                lock = WriterLock(path)
                undo.callback(lock.release)
                if path.is_file():
                    lock.hold()
                with RecordingReader(path) as reader:
                    last, position = reader.engines[-1].header, reader.last_position
                refuse_other_model(path, last, header)
                database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
                undo.callback(database.close)
                set_up(database, header.durability, limits)
                writer = cls(path, lock, database, header, position, retention, limits)
                writer.copy_wal()  # before anything is written: SQLite begins a WAL anew only if all of it was copied
                writer.event(time.time_ns(), RECOVERED_EVENT, position, "another process goes on")
                if changes := changed_values(last, header):
                    writer.event(time.time_ns(), ENGINE_EVENT, None, dumps(changes, sort_keys=True))
                undo.pop_all()
                return writer
        except (OSError, sqlite3.Error) as error:
            why = str(error)
            if isinstance(error, sqlite3.Error) and is_in_use(error):
                why = "another program is reading it and has been for seconds; start again when that is done"
            raise RecordingError(f"cannot continue the recording {path}: {why}") from None

    def open_streams(
        self,
        time_ns: int,
        streams: I64,
        names: Sequence[str],
        epochs: U64,
        first_seqs: I64,
        initial_states: U8 | None,
    ) -> None:
        """Record opened streams.

        Args:
            time_ns: nanoseconds since 1970.
            streams: int64 [N], numbers of these openings, from 1, new in this recording.
            names: the clients' names.
            epochs: uint64 [N], the epochs of their first ownerships.
            first_seqs: int64 [N], the seqs of their first frames.
            initial_states: the states before those frames, uint8 [N, row_bytes]; None for the model's initial state.
        """
        columns = (streams.tolist(), names, epochs.tolist(), first_seqs.tolist())
        self._insert_rows("openings", time_ns, *columns, state_blobs(initial_states, len(streams)))
        self._last_stream = max([self._last_stream, *streams.tolist()])
        self._last_epoch = max([self._last_epoch, *epochs.tolist()])

    def move_streams(self, time_ns: int, moved: MovedStreams, file: str) -> None:
        """Continue streams of another version's recording, `file`, in this one, with three rows each."""
        count, epochs = len(moved.streams), np.array([epoch for epoch, *_ in moved.owners], np.uint64)
        self.open_streams(time_ns, moved.streams, moved.names, epochs, moved.next_seqs, moved.states)
        came = [moved_detail(number, file) for number in moved.numbers.tolist()]
        from_seqs = [None] * count if moved.replayed_from is None else moved.replayed_from.tolist()
        kinds, no_states = repeat(MOVED_EVENT, count), state_blobs(None, count)
        self._insert_rows("events", time_ns, moved.streams.tolist(), from_seqs, kinds, came, no_states)
        details = [owner_detail(former_epoch, seq) for _, former_epoch, seq in moved.owners]
        self.stream_events(time_ns, OWNER_EVENT, moved.streams, epochs.astype(np.int64), details)

    def add_inputs(self, time_ns: int, streams: U32, seqs: U64, x: F32) -> int:
        """Record that a step begins; its outcome follows, in the order of the steps.

        Args:
            time_ns: nanoseconds since 1970.
            streams: uint32 [B], each at most once.
            seqs: uint64 [B].
            x: float32 [B, features].

        Returns:
            The batch's position.
        """
        size = len(streams)
        assert seqs.shape == (size,)
        assert x.shape == (size, self.header.features)
        self._insert("batches", time_ns, size, blob(streams, "<u4"), blob(seqs, "<u8"), blob(x, "<f4"))
        self._frames += size
        return self.position

    def add_outputs(self, time_ns: int, batch: int, y: F32) -> None:
        """Record the outputs, float32 [B, outputs], of the batch at a position."""
        assert y.shape[1] == self.header.outputs
        self._insert("outputs", time_ns, int(batch), blob(y, "<f4"))

    def fail_batch(self, time_ns: int, batch: int, detail: str) -> None:
        """Record that the step of the batch at a position failed: none of its frames was applied."""
        self.event(time_ns, FAILED_EVENT, int(batch), detail)
        failed = self._database.execute("SELECT size FROM batches WHERE position = ?", (int(batch),))
        self._frames -= sum(size for (size,) in failed)

    def close_streams(self, time_ns: int, streams: I64, reason: str, frames: I64, final_states: U8, lost: Bool) -> None:
        """Record ended streams.

        Args:
            time_ns: nanoseconds since 1970.
            streams: int64 [N].
            reason: of the streams that are not lost, or of all if they moved.
            frames: int64 [N], the seqs that their next frames would have had.
            final_states: rows of bytes, uint8 [N, row_bytes].
            lost: bool [N], streams whose state is unknown and not recorded.
        """
        numbers, are_lost = streams.tolist(), lost.tolist()
        reasons = (LOST if is_lost and reason != MOVED_EVENT else reason for is_lost in are_lost)
        blobs = state_blobs(final_states, len(numbers))
        states = (None if is_lost else found for is_lost, found in zip(are_lost, blobs, strict=True))
        self._insert_rows("closings", time_ns, numbers, frames.tolist(), reasons, states)
        self._closed += numbers
        if len(self._closed) > _MOST_CLOSED:
            self._delete_states([])

    def stream_events(
        self, time_ns: int, kind: str, streams: I64, seqs: I64, details: Iterable[str], states: U8 | None = None
    ) -> None:
        """Append events of streams, int64 [N], at `seqs`, int64 [N]; `schema` lists the kinds."""
        count = len(streams)
        columns = (streams.tolist(), seqs.tolist(), repeat(kind, count), details, state_blobs(states, count))
        self._insert_rows("events", time_ns, *columns)
        if kind == OWNER_EVENT:
            self._last_epoch = max([self._last_epoch, *seqs.tolist()])

    def event(self, time_ns: int, kind: str, seq: int | None, detail: str) -> None:
        """Append an event that concerns no single stream; `schema` lists the kinds."""
        self._insert("events", time_ns, None, seq, kind, detail, None)

    def checkpoint(self, time_ns: int, through: int, rows: StateRows) -> None:
        """Complete a checkpoint.

        Args:
            time_ns: nanoseconds since 1970.
            through: a position. States, here or in an earlier checkpoint, include every batch up to it.
            rows: of the open streams that have changed since the last checkpoint, except those given to `add_states`
                for this one.
        """
        frames = self._frames - self._frames_after(int(through))
        self.event(time_ns, CHECKPOINT_EVENT, int(through), checkpoint_detail(len(rows.streams), frames))
        self._replace_states(int(through), rows)
        self._is_partial = False
        counts = (self._count_until(table, through) for table in COUNTED)
        new = Checkpoint(int(through), self.position, int(time_ns), self._bytes, *counts)
        while self._checkpoints and self._checkpoints[-1].position > self._kept.position:
            self._change("DELETE FROM checkpoints WHERE position = ?", [(self._checkpoints.pop().position,)])
        if self._checkpoints and self._checkpoints[-1].position == new.position:
            return  # nothing has changed since the one that is kept
        self._change(insertion("checkpoints"), with_crcs([astuple(new)]))
        self._checkpoints.append(new)
        if self.retention.is_apart(self._kept, new.bytes, new.time_ns):
            self._kept = new

    def add_states(self, time_ns: int, through: int, rows: StateRows) -> None:
        """Add a part of the next checkpoint, with `rows` as in `checkpoint`; it may be committed earlier.

        Until the checkpoint is complete, the one before it counts, although these states are newer.
        """
        self.event(time_ns, STATES_EVENT, int(through), f"{len(rows.streams):,} states")
        self._replace_states(int(through), rows)

    def _newest_kept(self) -> Checkpoint:
        """The newest kept checkpoint. All complete ones were kept, except perhaps the newest."""
        *before, newest = [Checkpoint(), *self._checkpoints]
        return newest if not before or newest.position == self.trimmed.position else before[-1]

    def wants_checkpoint(self, now_ns: int) -> bool:
        """Whether a checkpoint is needed now, so that the history before it can be trimmed later."""
        has_more = not self._checkpoints or self.position > self._checkpoints[-1].completed
        return self.retention.is_limited and has_more and self.retention.is_apart(self._kept, self._bytes, now_ns)

    def trim(self, now_ns: int) -> bool:
        """Trim the history, if due, in a small transaction of its own; return whether more is left to do."""
        if self._in_transaction:
            return False  # the first rows after a restart wait for the first commit
        for _ in self._trimming:
            return True
        if not self.retention.is_limited:
            return False
        position = self.retention.due(self._whole_checkpoints(), self.trimmed, now_ns, self._used_bytes())
        if not position:
            return False
        if position > self._kept.position:  # from now on it stays: others may be written before the first portion
            self._kept = self._checkpoints[-1]
        self._trimming = self._trim_until(position)
        return True

    def _whole_checkpoints(self) -> list[Checkpoint]:
        newest = self._kept.position if self._is_partial else self.position
        return [checkpoint for checkpoint in self._checkpoints if checkpoint.position <= newest]

    def _trim_until(self, position: int) -> Iterator[None]:
        """Record that the history begins after a checkpoint's position, then delete the rows before it."""
        events = 0
        for count in counts_of_events(self._database, position):
            events += count
            yield
        self._begin()
        self.trimmed = Trimmed(position, events, self._last_stream, self._last_epoch)
        self._change("DELETE FROM trimmed", [()])
        self._change(insertion("trimmed"), with_crcs([astuple(self.trimmed)]))
        self._change("DELETE FROM checkpoints WHERE position < ?", [(position,)])
        self.commit()
        self._checkpoints = [each for each in self._checkpoints if each.position >= position]
        yield
        yield from self._delete_until(position)

    def _delete_until(self, position: int) -> Iterator[None]:
        for portion in deletions(self._database, position, self._limits.deleted_at_once):
            for statement, rows in portion:
                if rows:
                    self._begin()
                    self._change(statement, rows)
                    self._state_rows -= len(rows) if statement is DELETE_STATES else 0
            self.commit()
            yield

    def _used_bytes(self) -> int:
        pages, free = (self._read("header", f"PRAGMA {name}")[0][0] for name in ("page_count", "freelist_count"))
        return int((pages - free) * self._page_bytes)

    def commit(self) -> None:
        """Make all written rows durable and visible to readers.

        Raises:
            RecordingError: when the file or its WAL was moved or removed.
        """
        if self._in_transaction:
            row = (self.position, self._state_rows)
            self._change(SET_NEWEST, [(*row, row_crc(*row))])
            if self.second_place is None:
                self._database.execute("COMMIT")
            else:
                self.second_place.commit(self.path, self._statements, partial(self._database.execute, "COMMIT"))
                self._statements = []
            self._in_transaction = False
            self._bytes_in_wal += _PAGES_A_COMMIT * self._page_bytes
        there = None
        with suppress(FileNotFoundError):
            found = os.stat(self._wal_name)
            there = (found.st_dev, found.st_ino)
        self._wal = there if self._wal is None else self._wal
        if not self._lock.is_recording_in_place() or there != self._wal:
            raise RecordingError(
                f"{self.path} or its WAL was moved or removed while it was being written: it holds everything up to "
                "then, and nothing more is written"
            )

    def barrier(self) -> None:
        """Return once the second place, if there is one, has taken an empty transaction."""
        if self.second_place is not None:
            self.second_place.barrier()

    def copy_wal(self) -> None:
        """Copy the WAL into the file once it is large enough. This does not change durability."""
        if not self._in_transaction and self._bytes_in_wal > self._limits.wal_bytes:
            if self.second_place is not None:
                self.second_place.copy_wal(self.path)
            ((_, pages, copied),) = self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._bytes_in_wal = 0
            size = pages * self._page_bytes
            if copied < pages and size > self._limits.most_wal_bytes:
                raise RecordingError(
                    f"another program has been reading {self.path} for so long that its WAL has grown to "
                    f"{size / 2**20:,.0f} MiB: it cannot be reused while that reads"
                )

    def close(self) -> None:
        """Mark the end, commit, and leave one file without a WAL. After an error call `abandon` instead."""
        self.event(time.time_ns(), END_EVENT, None, "the recording was closed in order")
        self.commit()
        self._guard.close()
        try:
            put_wal_away(self._database)
        finally:
            self._database.close()
        self._lock.release()

    def abandon(self) -> None:
        """Close the file after a failure without writing: commits stay, the rest is rolled back."""
        self._database.close()
        self._guard.close()
        self._lock.release()

    def discard(self) -> None:
        """Remove a new, empty recording while its lock is still held."""
        self._database.close()
        self._guard.close()
        remove_database(self.path)
        self._lock.release()

    def _replace_states(self, through: int, rows: StateRows) -> None:
        streams = rows.streams.tolist()
        self._delete_states(streams)
        self._change(insertion("states"), with_crcs(rows.as_rows(through)))
        self._bytes_in_wal += rows.states.nbytes + rows.tail_x.nbytes + rows.tail_y.nbytes
        self._state_rows += len(streams)

    def _delete_states(self, streams: list[int]) -> None:
        """Delete states of these streams, and of closed ones, that no kept checkpoint needs."""
        changes = "SELECT total_changes()"
        ((before,),) = self._database.execute(changes)
        delete = "DELETE FROM states WHERE stream = ? AND position > ?"
        self._change(delete, [(stream, self._kept.position) for stream in [*self._closed, *streams]])
        self._is_partial = True
        self._closed = []
        ((after,),) = self._database.execute(changes)
        self._state_rows -= after - before

    def _begin(self) -> None:
        if self._in_transaction:
            return
        try:
            self._database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if is_in_use(error):
                raise RecordingError(
                    f"another program keeps {self.path} locked, and has done so for longer than the recording may wait"
                ) from None
            raise
        self._in_transaction = True
        version = self._data_version()
        if version != self._version:
            raise RecordingError(
                f"another program has written to {self.path}: its rows after position {self.position:,} cannot be "
                "trusted"
            )

    def _data_version(self) -> int:
        """A number that changes with every commit of another connection."""
        return int(self._read("header", "PRAGMA data_version")[0][0])

    def _insert(self, table: str, time_ns: int, *columns: Column) -> None:
        self._insert_rows(table, time_ns, *((column,) for column in columns))

    def _insert_rows(self, table: str, time_ns: int, *columns: Iterable[Column]) -> None:
        """Insert rows into a table from equally long columns, which follow `time_ns`."""
        self._begin()
        before = self.position
        self._change(insertion(table), self._rows(int(time_ns), columns))
        if table in self._counts:
            self._counts[table] += self.position - before

    def _change(self, statement: str, rows: Iterable[tuple[Column, ...]]) -> None:
        if self.second_place is not None:
            rows = list(rows)
            self._statements.append((statement, rows))
        self._database.executemany(statement, rows)

    def _rows(self, time_ns: int, columns: tuple[Iterable[Column], ...]) -> Iterator[tuple[Column, ...]]:
        for values in zip(*columns, strict=True):
            self.position += 1
            row = (self.position, time_ns, *values)
            size = _ROW_BYTES + sum(len(value) for value in values if isinstance(value, bytes))
            self._bytes_in_wal += size
            self._bytes += size
            yield (*row, row_crc(*row))

    def _read(self, table: str, query: str = "", *values: int) -> list[tuple[Any, ...]]:
        try:
            return list(self._database.execute(query or f"SELECT * FROM {table}", values))
        except sqlite3.Error as error:
            raise DamagedRecording(
                f"{self.path} is damaged: the table {table} cannot be read: {error}", self.path
            ) from None

    def _highest(self, table: str, column: str, where: str = "") -> int:
        return int(self._read(table, f"SELECT ifnull(max({column}), 0) FROM {table} {where}")[0][0])

    def _frames_after(self, position: int) -> int:
        """Frames of the batches after a position whose step did not fail."""
        failed = f"SELECT seq FROM events WHERE kind = '{FAILED_EVENT}' AND position > ?1"
        query = f"SELECT ifnull(sum(size), 0) FROM batches WHERE position > ?1 AND position NOT IN ({failed})"
        return int(self._database.execute(query, (position,)).fetchone()[0])

    def _count_until(self, table: str, position: int) -> int:
        later = f"SELECT count(*) FROM {table} WHERE position > ?"
        return self._counts[table] - int(self._database.execute(later, (int(position),)).fetchone()[0])


def set_up(database: sqlite3.Connection, durability: Durability, limits: DatabaseLimits = LIMITS) -> None:
    """Set a connection's durability."""
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(f"PRAGMA busy_timeout={round(limits.lock_wait_s * 1000)}")
    database.execute(f"PRAGMA journal_size_limit={WAL_KEPT_BYTES}")  # after a long read, the WAL is cut to this
    database.execute("PRAGMA secure_delete=OFF")  # trimmed pages are reused; overwriting them first would cost as much
    database.execute("PRAGMA wal_autocheckpoint=0")  # answers would wait for it, since it comes within a commit
    database.execute(f"PRAGMA synchronous={_SYNCHRONOUS[durability]}")
