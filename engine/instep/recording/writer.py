"""Writing a recording: rows into one open transaction, made durable by `commit`."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, U32, U64
from instep.recording.errors import RecordingError
from instep.recording.schema import (
    APPLICATION_ID,
    END_EVENT,
    FORMAT_VERSION,
    PAGE_BYTES,
    RecordingHeader,
    create_statements,
    row_crc,
)


class RecordingWriter:
    """Appends to a new recording; one thread at a time may use it.

    Durability: what was committed survives the death of the process (`kill -9`), and the death of the machine up to the
    last few commits (WAL with `synchronous=NORMAL`); the file is never torn by either.

    Errors of SQLite (`sqlite3.Error`: disk full, input/output error) come out of every method as they are.
    """

    def __init__(self, path: Path, database: sqlite3.Connection, header: RecordingHeader) -> None:
        self.path = path
        self.header = header
        self._database = database
        self._position = 0
        self._in_transaction = False

    @classmethod
    def create(cls, path: Path, header: RecordingHeader) -> RecordingWriter:
        """Start a new recording.

        Raises:
            RecordingError: when the file already holds something, or cannot be made.
        """
        try:
            if path.exists() and path.stat().st_size > 0:
                raise RecordingError(f"{path} already exists; a recording is never written over: choose another name")
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise RecordingError(f"cannot create the recording {path}: {error}") from None
        try:
            database.execute(f"PRAGMA page_size={PAGE_BYTES}")
            database.execute("BEGIN")
            database.execute(f"PRAGMA application_id={APPLICATION_ID}")
            database.execute(f"PRAGMA user_version={FORMAT_VERSION}")
            for statement in create_statements():
                database.execute(statement)
            database.executemany("INSERT INTO header VALUES (?, ?, ?)", header.rows())
            database.execute("COMMIT")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=NORMAL")
        except sqlite3.Error as error:
            database.close()
            raise RecordingError(f"cannot create the recording {path}: {error}") from None
        return cls(path, database, header)

    def open_stream(self, stream: int, name: str, time_ns: int, initial_state: F32 | None) -> None:
        """A stream opened.

        Args:
            stream: number of this opening, from 1, new in this recording.
            name: what the client calls it.
            time_ns: nanoseconds since 1970.
            initial_state: float32 [layers, hidden size]; None for zeros.
        """
        self._insert("openings", time_ns, int(stream), name, _blob(initial_state, "<f4"))

    def add_batch(self, time_ns: int, bucket: int, streams: U32, seqs: U64, x: F32, y: F32) -> None:
        """A step was run.

        Args:
            time_ns: nanoseconds since 1970.
            bucket: the padded batch size.
            streams: uint32 [B], each at most once.
            seqs: uint64 [B].
            x: float32 [B, features].
            y: float32 [B, outputs].
        """
        size = len(streams)
        assert seqs.shape == (size,)
        assert x.shape == (size, self.header.features)
        assert y.shape == (size, self.header.outputs)
        columns = (_blob(streams, "<u4"), _blob(seqs, "<u8"), _blob(x, "<f4"), _blob(y, "<f4"))
        self._insert("batches", time_ns, int(bucket), size, *columns)

    def close_stream(self, stream: int, time_ns: int, reason: str, frames: int, final_state: F32 | None) -> None:
        """A stream ended, after `frames` applied frames, in `final_state` (None where it is not known)."""
        self._insert("closings", time_ns, int(stream), int(frames), reason, _blob(final_state, "<f4"))

    def event(self, time_ns: int, kind: str, stream: int | None, seq: int | None, detail: str) -> None:
        """Anything else worth knowing later; it changes nothing in the replay."""
        which = (None if stream is None else int(stream), None if seq is None else int(seq))
        self._insert("events", time_ns, *which, kind, detail)

    def commit(self) -> None:
        """Make everything written so far durable and visible to readers."""
        if self._in_transaction:
            self._database.execute("COMMIT")
            self._in_transaction = False

    def close(self) -> None:
        """Mark the end, commit, and leave one file without a WAL beside it."""
        self.event(time.time_ns(), END_EVENT, None, None, "the recording was closed in order")
        self.commit()
        try:
            self._database.execute("PRAGMA journal_mode=DELETE")
        except sqlite3.OperationalError:
            pass  # somebody is reading it just now; the WAL stays beside it, which every reader understands
        finally:
            self._database.close()

    def abandon(self) -> None:
        """Let go of the file after a failure: what was committed stays, the rest is rolled back."""
        self._database.close()

    def _insert(self, table: str, time_ns: int, *columns: int | str | bytes | None) -> None:
        if not self._in_transaction:
            self._database.execute("BEGIN IMMEDIATE")
            self._in_transaction = True
        self._position += 1
        row = (self._position, int(time_ns), *columns)
        marks = ", ".join("?" * (len(row) + 1))
        self._database.execute(f"INSERT INTO {table} VALUES ({marks})", (*row, row_crc(*row)))


def _blob(array: npt.NDArray[Any] | None, dtype: str) -> bytes | None:
    """The array's bytes in the file's byte order, None for None."""
    return None if array is None else np.ascontiguousarray(array, dtype).tobytes()
