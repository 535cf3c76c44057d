"""Writing a recording: its files from the first to the next one, made, gone on with, sealed and let go of."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Final
from urllib.parse import quote

from instep.recording import family
from instep.recording.carried import Carried, make_tables, write_following
from instep.recording.engines import changed_values, refuse_other_engine
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.family import Member
from instep.recording.lock import WriterLock
from instep.recording.one_file import is_in_use, put_wal_away, remove_with_all_beside, without_wal
from instep.recording.reader import RecordingReader
from instep.recording.rows import RowWriter
from instep.recording.schema import (
    END_EVENT,
    ENGINE_EVENT,
    FORMAT_VERSION,
    RECOVERED_EVENT,
    ROTATED_EVENT,
    Durability,
    RecordingHeader,
    row_crc,
)

_SYNCHRONOUS: Final[dict[Durability, str]] = {"memory": "NORMAL", "commit": "NORMAL", "fsync": "FULL"}


class RecordingWriter(RowWriter):
    """Appends to the newest file of a recording; one thread at a time may use it, and one writer in the world.

    What is appended is `RowWriter`; here is the life of the files.

    Durability: what was committed survives the death of the process (`kill -9`). With `fsync` it also survives the
    death of the machine (WAL with `synchronous=FULL`); otherwise that may cost the last commits, never more than the
    order allows. The file is never torn by either.

    Errors of SQLite (`sqlite3.Error`: disk full, input/output error) come out of every method as they are.

    Attributes:
        base: the recording's first file, or where that was.
        files: of the recording, in order, as they were when this writer began; the last is the one it went on with.
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
        self.files = [Member(path, began)]
        self.numerics_changed = False
        self._lock = lock
        # SQLite copies the WAL into the file when its last connection closes. After an error nothing may be written
        # any more, so there is always another connection, which may only read.
        self._guard = sqlite3.connect(
            f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
        )
        self._guard.execute("SELECT count(*) FROM header").fetchone()
        super().__init__(path, database, header, began, position)

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
            family.remove_unfinished(path)
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
            files = family.members(base, may_be_damaged=True)
            *sealed, path = [member.path for member in files] or [base]
            with RecordingReader(path) as reader:
                began, last, position = reader.header, reader.engines[-1].header, reader.last_position
            family.refuse_part(base, began)
            refuse_other_engine(path, last, header, accept_numerics_change)
            family.remove_orphans(base, began.number)
            for older in sealed:
                without_wal(older)
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                _set_up(database, header)
                writer = cls(base, path, lock, database, header, began, position)
                writer.files = files
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
            if isinstance(error, sqlite3.Error) and is_in_use(error):
                raise RecordingError(
                    f"cannot go on with the recording {base}: another program is reading it and has been for seconds; "
                    "start again when that is done"
                ) from None
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
            remove_with_all_beside(unfinished)
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

    def close(self) -> None:
        """Mark the end, commit, and leave one file without a WAL beside it; after an error it is to be abandoned."""
        self.event(time.time_ns(), END_EVENT, None, "the recording was closed in order")
        self._seal()
        self._tidy_up()
        self._lock.release()

    def _tidy_up(self) -> None:
        """Make the file before this one a single file, if somebody had it open as it was sealed."""
        older = family.member_path(self.base, self.began.number - 1)
        if self.began.number > 1 and older != self.path:  # of a part that was copied, this one has the first one's name
            without_wal(older)

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
        remove_with_all_beside(self.path)
        self._lock.release()


def _set_up(database: sqlite3.Connection, header: RecordingHeader) -> None:
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA wal_autocheckpoint=0")  # answers would wait for it, since it comes within a commit
    database.execute(f"PRAGMA synchronous={_SYNCHRONOUS[header.durability]}")
