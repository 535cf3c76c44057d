"""Writing a recording: rows into one open transaction, made durable by `commit`."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import repeat
from json import dumps
from pathlib import Path
from typing import Final
from urllib.parse import quote

from instep.core.typing import F32, I64, U32, U64, Bool
from instep.recording import family
from instep.recording.carried import Carried, file_bytes, make_tables, write_following
from instep.recording.engines import changed_values, refuse_other_engine
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.lock import WriterLock
from instep.recording.one_file import put_wal_away, without_wal
from instep.recording.reader import RecordingReader
from instep.recording.schema import (
    COUNTED,
    END_EVENT,
    ENGINE_EVENT,
    FAILED_EVENT,
    FORMAT_VERSION,
    PAGE_BYTES,
    RECOVERED_EVENT,
    ROTATED_EVENT,
    SNAPSHOT_EVENT,
    STATES_EVENT,
    TABLES,
    Column,
    Durability,
    RecordingHeader,
    row_crc,
)
from instep.recording.states import StateRows, blob, state_blobs

CHECKPOINT_BYTES: Final = 4 * 2**20
"""The WAL is copied into the file when about so much is in it: a pause of some milliseconds, which grows with it."""

_SYNCHRONOUS: Final[dict[Durability, str]] = {"memory": "NORMAL", "commit": "NORMAL", "fsync": "FULL"}
_PAGES_A_COMMIT: Final = 4
"""Those that every commit touches, about."""
_ROW_BYTES: Final = 64
"""What a row takes beside its blobs, about."""


class RecordingWriter:
    """Appends to the newest file of a recording; one thread at a time may use it, and one writer in the world.

    Durability: what was committed survives the death of the process (`kill -9`). With `fsync` it also survives the
    death of the machine (WAL with `synchronous=FULL`); otherwise that may cost the last commits, never more than the
    order allows. The file is never torn by either.

    Errors of SQLite (`sqlite3.Error`: disk full, input/output error) come out of every method as they are.

    Attributes:
        base: the recording's first file, or where that was.
        path: the file that is written.
        header: of the engine that writes.
        began: the header of the file.
        position: of the newest row, committed or not.
        grown_bytes: what was written since the file began, as of the last commit.
        numerics_changed: whether floats come out with other bits than in what was there when it was gone on with.
    """

    def __init__(
        self,
        base: Path,
        path: Path,
        lock: WriterLock,
        database: sqlite3.Connection,
        header: RecordingHeader,
        began: RecordingHeader,
        position: int,
    ) -> None:
        self.base = base
        self.path = path
        self.header = header
        self.began = began
        self.position = position
        self._lock = lock
        self._database = database
        # SQLite copies the WAL into the file when its last connection closes. After an error nothing may be written
        # any more, so there is always another connection, which may only read.
        self._guard = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._guard.execute("SELECT count(*) FROM header").fetchone()
        self.numerics_changed = False
        self._in_transaction = False
        wal = Path(f"{path}-wal")  # what a killed writer left counts too: each start has to read it
        self._bytes_in_wal = wal.stat().st_size if wal.exists() else 0
        self._counts = {table: self._numbers(table, f"SELECT count(*) FROM {table}")[0] for table in COUNTED}
        mark = [self._numbers("snapshot", f"SELECT {column} FROM snapshot") for column in ("position", *COUNTED)]
        self._mark = tuple(column[0] if column else 0 for column in mark)
        self._with_state = set(self._numbers("states", "SELECT stream FROM states"))
        closed = "SELECT states.stream FROM states JOIN closings USING (stream)"
        self._closed_with_state = self._numbers("closings", closed) if self._with_state else []
        self.grown_bytes = self._grown_bytes()

    @classmethod
    def create(cls, path: Path, header: RecordingHeader) -> RecordingWriter:
        """Start a new recording.

        Raises:
            RecordingError: when the file already holds something, or cannot be made.
        """
        try:
            lock = WriterLock(path)
        except OSError as error:
            raise RecordingError(f"cannot create the recording {path}: {error}") from None
        try:
            if path.exists() and path.stat().st_size > 0:
                raise RecordingError(f"{path} already exists; a recording is never written over: choose another name")
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (RecordingError, OSError, sqlite3.Error) as error:
            lock.release()
            if isinstance(error, RecordingError):
                raise
            raise RecordingError(f"cannot create the recording {path}: {error}") from None
        try:
            make_tables(database, FORMAT_VERSION)
            database.executemany("INSERT INTO header VALUES (?, ?, ?)", header.rows())
            database.execute("INSERT INTO newest VALUES (0, ?)", (row_crc(0),))
            database.execute("COMMIT")
            _set_up(database, header)
            return cls(path, path, lock, database, header, header, 0)
        except (sqlite3.Error, DamagedRecording) as error:
            database.close()
            lock.release()
            raise RecordingError(f"cannot create the recording {path}: {error}") from None

    @classmethod
    def resume(cls, base: Path, header: RecordingHeader, accept_numerics_change: bool = False) -> RecordingWriter:
        """Go on with the newest file of a recording, after its last committed row.

        The first rows, `recovered` and, when this engine is not as the last one, `engine`, go into the first commit.

        Args:
            base: the recording's first file, or where that was.
            header: of the engine that goes on; the file keeps that of the first one.
            accept_numerics_change: go on also where floats may come out with other bits.

        Raises:
            RecordingError: when it is being written, damaged, of another model or of other numerics.
        """
        try:
            lock = WriterLock(base)
        except OSError as error:
            raise RecordingError(f"cannot go on with the recording {base}: {error}") from None
        try:
            family.remove_unfinished(base)
            *sealed, path = [member.path for member in family.members(base, may_be_damaged=True)] or [base]
            with RecordingReader(path) as reader:
                began, last, position = reader.header, reader.engines[-1].header, reader.last_position
            family.refuse_part(base, began)
            refuse_other_engine(path, last, header, accept_numerics_change)
            for older in sealed:
                without_wal(older)
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                _set_up(database, header)
                writer = cls(base, path, lock, database, header, began, position)
                writer.checkpoint()  # before anything is written: SQLite begins a WAL anew only if all of it was copied
                writer.event(time.time_ns(), RECOVERED_EVENT, position, "another process goes on")
                if changes := changed_values(last, header):
                    writer.numerics_changed = "numerics" in changes
                    writer.event(time.time_ns(), ENGINE_EVENT, None, dumps(changes, sort_keys=True))
            except BaseException:
                database.close()
                raise
            return writer
        except (OSError, sqlite3.Error) as error:
            lock.release()
            raise RecordingError(f"cannot go on with the recording {base}: {error}") from None
        except BaseException:
            lock.release()
            raise

    def follow(self, time_ns: int, carried: Carried) -> RecordingWriter:
        """Go on in another file, that begins with what is carried; this one is sealed and takes nothing more.

        A crash leaves this file the newest, or the other one complete. After an error this one is to be abandoned.

        Args:
            time_ns: nanoseconds since 1970.
            carried: every open stream, as of this moment.

        Returns:
            The writer of the new file, which holds the lock from now on.

        Raises:
            RecordingError: when a file is in the way of the new one.
            OSError: when the disk does not take it; so does `sqlite3.Error`.
        """
        number = self.began.number + 1
        path = family.member_path(self.base, number)
        unfinished = family.unfinished_path(path)
        first = self.position + 2  # after the row that seals this file
        header = replace(
            self.header,
            created_ns=time_ns,
            number=number,
            first_position=first,
            begun_ns=self.began.family,
            last_stream=carried.last_stream,
            last_epoch=carried.last_epoch,
        )
        self.commit()
        self._tidy_up()
        write_following(unfinished, header, time_ns, carried)
        try:
            self.event(time_ns, ROTATED_EVENT, None, path.name)
            self._seal()
            family.put_in_place(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        with RecordingReader(path) as reader:
            began = reader.header
        database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _set_up(database, header)
            last = first + carried.positions - 1
            return RecordingWriter(self.base, path, self._lock, database, self.header, began, last)
        except BaseException:
            database.close()
            raise

    def open_streams(
        self,
        time_ns: int,
        streams: I64,
        names: Sequence[str],
        epochs: U64,
        first_seqs: I64,
        initial_states: F32 | None,
    ) -> None:
        """Streams opened.

        Args:
            time_ns: nanoseconds since 1970.
            streams: int64 [N], numbers of these openings, from 1, new in this recording.
            names: what the client calls them.
            epochs: uint64 [N], of their first ownerships.
            first_seqs: int64 [N], of their first frames.
            initial_states: before those frames, float32 [N, layers, hidden size]; None for zeros.
        """
        columns = (streams.tolist(), names, epochs.tolist(), first_seqs.tolist())
        self._insert_rows("openings", time_ns, *columns, state_blobs(initial_states, len(streams)))

    def add_inputs(self, time_ns: int, bucket: int, streams: U32, seqs: U64, x: F32) -> int:
        """A step begins; its outcome follows, in the order of the steps.

        Args:
            time_ns: nanoseconds since 1970.
            bucket: the padded batch size.
            streams: uint32 [B], each at most once.
            seqs: uint64 [B].
            x: float32 [B, features].

        Returns:
            The batch's position.
        """
        size = len(streams)
        assert seqs.shape == (size,)
        assert x.shape == (size, self.header.features)
        self._insert("batches", time_ns, int(bucket), size, blob(streams, "<u4"), blob(seqs, "<u8"), blob(x, "<f4"))
        return self.position

    def add_outputs(self, time_ns: int, batch: int, y: F32) -> None:
        """The step of the batch at that position was computed: y float32 [B, outputs]."""
        assert y.shape[1] == self.header.outputs
        self._insert("outputs", time_ns, int(batch), blob(y, "<f4"))

    def fail_batch(self, time_ns: int, batch: int, detail: str) -> None:
        """The step of the batch at that position failed: none of its frames was applied."""
        self.event(time_ns, FAILED_EVENT, int(batch), detail)

    def close_streams(
        self, time_ns: int, streams: I64, reason: str, frames: I64, final_states: F32, lost: Bool
    ) -> None:
        """Streams ended.

        Args:
            time_ns: nanoseconds since 1970.
            streams: int64 [N].
            reason: of them all.
            frames: int64 [N], the seqs that their next frames would have had.
            final_states: float32 [N, layers, hidden size].
            lost: bool [N], whose state is not known, and not recorded.
        """
        states = (
            None if is_lost else found
            for is_lost, found in zip(lost.tolist(), state_blobs(final_states, len(streams)), strict=True)
        )
        numbers = streams.tolist()
        self._insert_rows("closings", time_ns, numbers, frames.tolist(), repeat(reason, len(numbers)), states)
        self._closed_with_state += [number for number in numbers if number in self._with_state]

    def stream_events(
        self, time_ns: int, kind: str, streams: I64, seqs: I64, details: Iterable[str], states: F32 | None = None
    ) -> None:
        """Something happened to streams, int64 [N], at `seqs`, int64 [N]; what the kinds mean is in `schema`."""
        count = len(streams)
        columns = (streams.tolist(), seqs.tolist(), repeat(kind, count), details, state_blobs(states, count))
        self._insert_rows("events", time_ns, *columns)

    def event(self, time_ns: int, kind: str, seq: int | None, detail: str) -> None:
        """Something happened that concerns no one stream; what the kinds mean is in `schema`."""
        self._insert("events", time_ns, None, seq, kind, detail, None)

    def snapshot(self, time_ns: int, through: int, rows: StateRows) -> None:
        """Bring the table of states up to a position.

        Args:
            time_ns: nanoseconds since 1970.
            through: a position: every batch up to it is in the states, here or of an earlier snapshot, and none after.
            rows: of the streams that have changed since the last snapshot and are open, those that `add_states` was
                given for this one left out.
        """
        self._mark = (int(through), *(self._count_until(table, through) for table in COUNTED))
        self.event(time_ns, SNAPSHOT_EVENT, int(through), f"{len(rows.streams):,} states")
        self._replace_states(int(through), rows)

    def add_states(self, time_ns: int, through: int, rows: StateRows) -> None:
        """Part of the next snapshot, as for `snapshot`: it may be committed before the rest.

        The states are newer then than the snapshot before, which stays the one that counts.
        """
        self.event(time_ns, STATES_EVENT, int(through), f"{len(rows.streams):,} states")
        self._replace_states(int(through), rows)

    def _replace_states(self, through: int, rows: StateRows) -> None:
        gone = self._closed_with_state
        self._database.executemany("DELETE FROM states WHERE stream = ?", ((stream,) for stream in gone))
        self._with_state.difference_update(gone)
        self._closed_with_state = []
        self._database.executemany("REPLACE INTO states VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows.as_rows(through))
        self._bytes_in_wal += rows.states.nbytes + rows.tail_x.nbytes + rows.tail_y.nbytes
        self._with_state.update(rows.streams.tolist())
        row = (*self._mark, len(self._with_state))
        self._database.execute("DELETE FROM snapshot")
        self._database.execute("INSERT INTO snapshot VALUES (?, ?, ?, ?, ?, ?)", (*row, row_crc(*row)))

    def commit(self) -> None:
        """Make everything written so far durable and visible to readers."""
        if self._in_transaction:
            self._database.execute("DELETE FROM newest")
            self._database.execute("INSERT INTO newest VALUES (?, ?)", (self.position, row_crc(self.position)))
            self._database.execute("COMMIT")
            self._in_transaction = False
            self._bytes_in_wal += _PAGES_A_COMMIT * PAGE_BYTES
            self.grown_bytes = self._grown_bytes()

    def checkpoint(self) -> None:
        """Copy the WAL into the file, if it is large enough to be worth it; nothing becomes more durable by it."""
        assert not self._in_transaction
        if self._bytes_in_wal > CHECKPOINT_BYTES:
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._bytes_in_wal = 0

    def close(self) -> None:
        """Mark the end, commit, and leave one file without a WAL beside it; after an error it is to be abandoned."""
        self.event(time.time_ns(), END_EVENT, None, "the recording was closed in order")
        self._seal()
        self._tidy_up()
        self._lock.release()

    def _tidy_up(self) -> None:
        """Make the file before this one a single file, if somebody had it open as it was sealed."""
        if self.began.number > 1:
            without_wal(family.member_path(self.base, self.began.number - 1))

    def _seal(self) -> None:
        """Commit, and leave one file without a WAL beside it, if nobody else has it open."""
        self.commit()
        self._guard.close()
        try:
            put_wal_away(self._database)
        finally:
            self._database.close()

    def abandon(self) -> None:
        """Let go of the file after a failure, writing nothing: what was committed stays, the rest is rolled back."""
        self._database.close()
        self._guard.close()
        self._lock.release()

    def discard(self) -> None:
        """Let go of a recording that was just made and holds nothing, and take it away while it is still ours."""
        self._database.close()
        self._guard.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)
        self._lock.release()

    def _insert(self, table: str, time_ns: int, *columns: Column) -> None:
        self._insert_rows(table, time_ns, *((column,) for column in columns))

    def _insert_rows(self, table: str, time_ns: int, *columns: Iterable[Column]) -> None:
        """Rows of one table, one after another: columns of one length, those after `time_ns`."""
        if not self._in_transaction:
            self._database.execute("BEGIN IMMEDIATE")
            self._in_transaction = True
        before = self.position
        marks = ", ".join("?" * len(TABLES[table]))
        self._database.executemany(f"INSERT INTO {table} VALUES ({marks}, ?)", self._rows(int(time_ns), columns))
        if table in self._counts:
            self._counts[table] += self.position - before

    def _rows(self, time_ns: int, columns: tuple[Iterable[Column], ...]) -> Iterator[tuple[Column, ...]]:
        for values in zip(*columns, strict=True):
            self.position += 1
            row = (self.position, time_ns, *values)
            self._bytes_in_wal += _ROW_BYTES + sum(len(value) for value in values if isinstance(value, bytes))
            yield (*row, row_crc(*row))

    def _numbers(self, table: str, query: str) -> list[int]:
        try:
            return [int(row[0]) for row in self._database.execute(query)]
        except sqlite3.DatabaseError as error:
            raise DamagedRecording(f"{self.path} is damaged: the table {table} cannot be read: {error}") from None

    def _grown_bytes(self) -> int:
        return file_bytes(self._database) - self.began.carried_bytes

    def _count_until(self, table: str, position: int) -> int:
        later = f"SELECT count(*) FROM {table} WHERE position > ?"
        return self._counts[table] - int(self._database.execute(later, (int(position),)).fetchone()[0])


def _set_up(database: sqlite3.Connection, header: RecordingHeader) -> None:
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA wal_autocheckpoint=0")  # answers would wait for it, since it comes within a commit
    database.execute(f"PRAGMA synchronous={_SYNCHRONOUS[header.durability]}")
