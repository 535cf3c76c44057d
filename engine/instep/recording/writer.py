"""Writing a recording: the file created, resumed, closed and abandoned."""

from __future__ import annotations

import os
import sqlite3
import time
from contextlib import ExitStack, suppress
from json import dumps
from pathlib import Path
from typing import Final
from urllib.parse import quote

from instep.recording.database import (
    LIMITS,
    DatabaseLimits,
    insert,
    is_in_use,
    make_tables,
    put_wal_away,
    remove_database,
    with_crcs,
)
from instep.recording.errors import RecordingError
from instep.recording.lock import WriterLock
from instep.recording.reader import RecordingReader
from instep.recording.records import changed_values, refuse_other_model
from instep.recording.rows import RowWriter
from instep.recording.schema import (
    END_EVENT,
    ENGINE_EVENT,
    RECOVERED_EVENT,
    Durability,
    RecordingHeader,
)
from instep.recording.trim import KEEP_ALL, Retention

WAL_KEPT_BYTES: Final = 64 * 2**20
_SYNCHRONOUS: Final[dict[Durability, str]] = {"memory": "NORMAL", "commit": "NORMAL", "fsync": "FULL"}


class RecordingWriter(RowWriter):
    """Appends to a recording; one thread at a time may use it, and one writer in the world.

    What is appended is `RowWriter`; here is the life of the file.

    A commit survives the death of the process (`kill -9`). With `fsync` it also survives the death of the machine (WAL
    with `synchronous=FULL`); otherwise that may cost the last commits. Neither ever tears the file.

    Errors of SQLite (`sqlite3.Error`: disk full, input/output error) come out of every method as they are.
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
        self._wal: tuple[int, int] | None = None
        """Device and inode of the WAL."""
        self._lock = lock
        # SQLite copies the WAL into the file when its last connection closes. After an error nothing may be written
        # any more, so a second connection, for reading only, is always open.
        self._guard = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._guard.execute("SELECT count(*) FROM header").fetchone()
        self._wal_name = f"{path}-wal"
        super().__init__(path, database, header, position, retention, limits)

    @classmethod
    def create(
        cls, path: Path, header: RecordingHeader, retention: Retention = KEEP_ALL, limits: DatabaseLimits = LIMITS
    ) -> RecordingWriter:
        """Start a new recording.

        Raises:
            RecordingError: when the file already holds something, or cannot be made.
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
                set_up(database, header, limits)
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
        """Continue a recording, after its last committed row.

        The first rows, `recovered` and, when this engine is not as the last one, `engine`, go into the first commit.

        Args:
            path: the recording.
            header: of the engine that continues it; the file keeps that of the first one.
            retention: how much of the history is kept.
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
                set_up(database, header, limits)
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

    def commit(self) -> None:
        """As `RowWriter.commit`.

        Raises:
            RecordingError: when the file or its WAL was moved or removed.
        """
        super().commit()
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

    def close(self) -> None:
        """Mark the end, commit, and leave one file without a WAL. After an error, call `abandon`."""
        self.event(time.time_ns(), END_EVENT, None, "the recording was closed in order")
        self.commit()
        self._guard.close()
        try:
            put_wal_away(self._database)
        finally:
            self._database.close()
        self._lock.release()

    def abandon(self) -> None:
        """Close the file after a failure and write nothing: commits stay, the rest is rolled back."""
        self._database.close()
        self._guard.close()
        self._lock.release()

    def discard(self) -> None:
        """Remove a recording that was just made and holds nothing, while its lock is still held."""
        self._database.close()
        self._guard.close()
        remove_database(self.path)
        self._lock.release()


def set_up(database: sqlite3.Connection, header: RecordingHeader, limits: DatabaseLimits) -> None:
    """Make a connection durable as the header says; never faster at the cost of that."""
    database.execute("PRAGMA journal_mode=WAL")
    database.execute(f"PRAGMA busy_timeout={round(limits.lock_wait_s * 1000)}")
    database.execute(f"PRAGMA journal_size_limit={WAL_KEPT_BYTES}")  # after a long read, the WAL is cut to this
    database.execute("PRAGMA secure_delete=OFF")  # trimmed pages are reused; overwriting them first would cost as much
    database.execute("PRAGMA wal_autocheckpoint=0")  # answers would wait for it, since it comes within a commit
    database.execute(f"PRAGMA synchronous={_SYNCHRONOUS[header.durability]}")
