"""Writing a recording: rows into one open transaction, made durable by `commit`."""

from __future__ import annotations

import sqlite3
import time
from json import dumps
from pathlib import Path
from typing import Final
from urllib.parse import quote

from instep.core.typing import F32, U32, U64
from instep.recording.engines import changed_values, refuse_other_engine
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.lock import WriterLock
from instep.recording.reader import RecordingReader
from instep.recording.schema import (
    APPLICATION_ID,
    COUNTED,
    END_EVENT,
    ENGINE_EVENT,
    FAILED_EVENT,
    FORMAT_VERSION,
    PAGE_BYTES,
    RECOVERED_EVENT,
    SNAPSHOT_EVENT,
    Durability,
    RecordingHeader,
    create_statements,
    row_crc,
)
from instep.recording.states import StateRows, blob

CHECKPOINT_BYTES: Final = 4 * 2**20
"""The WAL is copied into the file when about so much is in it: a pause of some milliseconds, which grows with it."""

_SYNCHRONOUS: Final[dict[Durability, str]] = {"memory": "NORMAL", "commit": "NORMAL", "fsync": "FULL"}
_PAGES_A_COMMIT: Final = 4
"""Those that every commit touches, about."""


class RecordingWriter:
    """Appends to a recording; one thread at a time may use it, and one writer in the world.

    Durability: what was committed survives the death of the process (`kill -9`). With `fsync` it also survives the
    death of the machine (WAL with `synchronous=FULL`); otherwise that may cost the last commits, never more than the
    order allows. The file is never torn by either.

    Errors of SQLite (`sqlite3.Error`: disk full, input/output error) come out of every method as they are.

    Attributes:
        path: the file.
        header: of the engine that writes.
        position: of the newest row, committed or not.
    """

    def __init__(
        self, path: Path, lock: WriterLock, database: sqlite3.Connection, header: RecordingHeader, position: int
    ) -> None:
        self.path = path
        self.header = header
        self.position = position
        self._lock = lock
        self._database = database
        # SQLite copies the WAL into the file when its last connection closes. After an error nothing may be written
        # any more, so there is always another connection, which may only read.
        self._guard = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._guard.execute("SELECT count(*) FROM header").fetchone()
        self._in_transaction = False
        self._bytes_in_wal = 0
        self._counts = {table: self._numbers(table, f"SELECT count(*) FROM {table}")[0] for table in COUNTED}
        self._with_state = set(self._numbers("states", "SELECT stream FROM states"))
        closed = "SELECT states.stream FROM states JOIN closings USING (stream)"
        self._closed_with_state = self._numbers("closings", closed) if self._with_state else []

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
            database.execute(f"PRAGMA page_size={PAGE_BYTES}")
            database.execute("BEGIN")
            database.execute(f"PRAGMA application_id={APPLICATION_ID}")
            database.execute(f"PRAGMA user_version={FORMAT_VERSION}")
            for statement in create_statements():
                database.execute(statement)
            database.executemany("INSERT INTO header VALUES (?, ?, ?)", header.rows())
            database.execute("INSERT INTO newest VALUES (0, ?)", (row_crc(0),))
            database.execute("COMMIT")
            _set_up(database, header)
            return cls(path, lock, database, header, 0)
        except (sqlite3.Error, DamagedRecording) as error:
            database.close()
            lock.release()
            raise RecordingError(f"cannot create the recording {path}: {error}") from None

    @classmethod
    def resume(cls, path: Path, header: RecordingHeader, accept_numerics_change: bool = False) -> RecordingWriter:
        """Go on with a recording, after its last committed row.

        The first rows, `recovered` and, when this engine is not as the last one, `engine`, go into the first commit.

        Args:
            path: the recording.
            header: of the engine that goes on; the recording keeps that of the first one.
            accept_numerics_change: go on also where floats may come out with other bits.

        Raises:
            RecordingError: when it is being written, damaged, of another model or of other numerics.
        """
        try:
            lock = WriterLock(path)
        except OSError as error:
            raise RecordingError(f"cannot go on with the recording {path}: {error}") from None
        try:
            with RecordingReader(path) as reader:
                last, position = reader.engines[-1].header, reader.last_position
            refuse_other_engine(path, last, header, accept_numerics_change)
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                _set_up(database, header)
                writer = cls(path, lock, database, header, position)
                writer.event(time.time_ns(), RECOVERED_EVENT, None, position, "another process goes on")
                if changes := changed_values(last, header):
                    writer.event(time.time_ns(), ENGINE_EVENT, None, None, dumps(changes, sort_keys=True))
            except BaseException:
                database.close()
                raise
            return writer
        except sqlite3.Error as error:
            lock.release()
            raise RecordingError(f"cannot go on with the recording {path}: {error}") from None
        except BaseException:
            lock.release()
            raise

    def open_stream(
        self, stream: int, name: str, epoch: int, first_seq: int, time_ns: int, initial_state: F32 | None
    ) -> None:
        """A stream opened.

        Args:
            stream: number of this opening, from 1, new in this recording.
            name: what the client calls it.
            epoch: of its first ownership.
            first_seq: of its first frame.
            time_ns: nanoseconds since 1970.
            initial_state: before that frame, float32 [layers, hidden size]; None for zeros.
        """
        self._insert("openings", time_ns, int(stream), name, int(epoch), int(first_seq), blob(initial_state, "<f4"))

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
        self.event(time_ns, FAILED_EVENT, None, batch, detail)

    def close_stream(self, stream: int, time_ns: int, reason: str, frames: int, final_state: F32 | None) -> None:
        """A stream ended before the frame `frames`, in `final_state` (None where it is not known)."""
        self._insert("closings", time_ns, int(stream), int(frames), reason, blob(final_state, "<f4"))
        if int(stream) in self._with_state:
            self._closed_with_state.append(int(stream))

    def event(
        self, time_ns: int, kind: str, stream: int | None, seq: int | None, detail: str, state: F32 | None = None
    ) -> None:
        """Anything else worth knowing later; what the kinds mean is in `schema`."""
        which = (None if stream is None else int(stream), None if seq is None else int(seq))
        self._insert("events", time_ns, *which, kind, detail, blob(state, "<f4"))

    def snapshot(self, time_ns: int, through: int, rows: StateRows) -> None:
        """Bring the table of states up to a position.

        Args:
            time_ns: nanoseconds since 1970.
            through: a position: every batch up to it is in the states, here or of an earlier snapshot, and none after.
            rows: of the streams that have changed since the last snapshot and are open.
        """
        counts = {table: self._count_until(table, through) for table in COUNTED}
        self.event(time_ns, SNAPSHOT_EVENT, None, through, f"{len(rows.streams):,} states")
        gone = self._closed_with_state
        self._database.executemany("DELETE FROM states WHERE stream = ?", ((stream,) for stream in gone))
        self._with_state.difference_update(gone)
        self._closed_with_state = []
        self._database.executemany("REPLACE INTO states VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows.as_rows(int(through)))
        self._bytes_in_wal += rows.states.nbytes + rows.tail_x.nbytes + rows.tail_y.nbytes
        self._with_state.update(rows.streams.tolist())
        row = (int(through), *counts.values(), len(self._with_state))
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

    def checkpoint(self) -> None:
        """Copy the WAL into the file, if it is large enough to be worth it; nothing becomes more durable by it."""
        assert not self._in_transaction
        if self._bytes_in_wal > CHECKPOINT_BYTES:
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._bytes_in_wal = 0

    def close(self) -> None:
        """Mark the end, commit, and leave one file without a WAL beside it."""
        self.event(time.time_ns(), END_EVENT, None, None, "the recording was closed in order")
        self.commit()
        self._guard.close()
        try:
            self._database.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.OperationalError:
            pass  # somebody is reading it just now; the WAL stays beside it, which every reader understands
        finally:
            self._database.close()
            self._lock.release()

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

    def _insert(self, table: str, time_ns: int, *columns: int | str | bytes | None) -> None:
        if not self._in_transaction:
            self._database.execute("BEGIN IMMEDIATE")
            self._in_transaction = True
        self.position += 1
        row = (self.position, int(time_ns), *columns)
        marks = ", ".join("?" * (len(row) + 1))
        self._database.execute(f"INSERT INTO {table} VALUES ({marks})", (*row, row_crc(*row)))
        self._bytes_in_wal += sum(len(column) for column in columns if isinstance(column, bytes))
        if table in self._counts:
            self._counts[table] += 1

    def _numbers(self, table: str, query: str) -> list[int]:
        try:
            return [int(row[0]) for row in self._database.execute(query)]
        except sqlite3.DatabaseError as error:
            raise DamagedRecording(f"{self.path} is damaged: the table {table} cannot be read: {error}") from None

    def _count_until(self, table: str, position: int) -> int:
        later = f"SELECT count(*) FROM {table} WHERE position > ?"
        return self._counts[table] - int(self._database.execute(later, (int(position),)).fetchone()[0])


def _set_up(database: sqlite3.Connection, header: RecordingHeader) -> None:
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA wal_autocheckpoint=0")  # answers would wait for it, since it comes within a commit
    database.execute(f"PRAGMA synchronous={_SYNCHRONOUS[header.durability]}")
