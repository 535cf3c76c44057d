"""The recording as an SQLite file: opened for reading only, every row checked."""

from __future__ import annotations

import operator
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import numpy as np

from instep.core.typing import I64, U8
from instep.recording.errors import DamagedRecording, RecordingError, TrimmedMeanwhile, UnavailableRecording
from instep.recording.records import Trimmed
from instep.recording.schema import (
    APPLICATION_ID,
    FORMAT_VERSION,
    HISTORY,
    PAGE_BYTES,
    TABLES,
    RecordingHeader,
    create_statements,
    sound_rows,
)

UNREADABLE: Final = (sqlite3.Error, OverflowError, UnicodeDecodeError)
"""The exceptions of Python's sqlite3 on a damaged file."""

ROWS_AT_ONCE: Final = 1024
"""Rows that are read in one transaction at most."""
_START_BYTES: Final = 32
_READ_VERSION_OFFSET: Final = 19
_IN_WAL_MODE: Final = 2
_PASSING: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL)
"""Another program locks the file, or this one has too many files open."""


def connect_to_read(path: Path, mode: str = "ro") -> sqlite3.Connection:
    """A connection that writes nothing; `mode` is that of SQLite's URIs."""
    return sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode={mode}", uri=True, isolation_level=None)


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """How much is read in one transaction, which keeps the WAL from being reused."""

    bytes_at_once: int = 2**19
    """Bytes of blobs, about."""
    rows_a_look: int = 16
    """Rows that are read between two looks at the bytes; divides `ROWS_AT_ONCE`."""


READ_LIMITS: Final = ReadLimits()


class Closing:
    """A context manager that closes itself at the end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        raise NotImplementedError


class RecordingFile(Closing):
    """Checked rows of a recording that is finished or still being written; never writes to it.

    What it shows is fixed when it opens: rows of the history committed later are left out.

    Attributes:
        path: the file.
        limits: of one transaction.
        header: what the file says of the engine that began it.
        trimmed: where the history was trimmed.
        last_position: the newest row it shows; 0 where there is none.
        state_rows: how many rows the table `states` should hold.

    Raises:
        RecordingError: from every method, when the file is not a recording or of another version.
        UnavailableRecording: when it cannot be read at the moment.
        DamagedRecording: when it is damaged.
    """

    def __init__(self, path: Path, limits: ReadLimits = READ_LIMITS) -> None:
        self.path = path
        self.limits = limits
        # In WAL mode but without a WAL, nobody writes it, and its folder may be read-only.
        try:
            path.stat()
            beside = any(Path(f"{path}{suffix}").exists() for suffix in ("-wal", "-journal"))
            alone = not beside and self._is_left_in_wal_mode()
        except IsADirectoryError:
            raise RecordingError(
                f"cannot read the recording {path}: it is a folder; name a file in it, as `instep recordings info "
                f"{path}` lists them"
            ) from None
        except OSError as error:
            raise RecordingError(f"cannot read the recording {path}: {error.strerror}") from None
        with self._reading("is not a recording, or is damaged"):
            # A writer that was killed while it put the WAL away has left a journal. SQLite undoes that first.
            writable = "rw" if Path(f"{path}-journal").exists() else "ro"
            self._database = connect_to_read(path, "ro&immutable=1" if alone else writable)
        try:
            with self._reading("is not a recording, or is damaged"):
                self._open()
        except RecordingError:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Read several tables as of one commit, the newest; `last_position` is that of it from then on."""
        with self._reading("is damaged"):
            self._database.execute("BEGIN")
        try:
            self._find_ends()
            yield
        finally:
            self._database.rollback()

    @property
    def first_position(self) -> int:
        """From here on, no row of the history was trimmed."""
        return self.trimmed.position + 1

    def check_positions(self, first: int = 1, last: int | None = None) -> None:
        """Raise when a row of the history from `first` to `last` is missing or a position was given twice."""
        first = max(first, self.first_position)
        last = self.last_position if last is None else min(last, self.last_position)
        found = np.sort(np.concatenate([self._positions(table, first, last) for table in HISTORY]))
        expected: I64 = np.arange(first, last + 1)
        if len(found) != len(expected) or (found != expected).any():
            both = min(len(found), len(expected))
            wrong = np.flatnonzero(found[:both] != expected[:both])
            at = int(wrong[0]) if len(wrong) else both
            raise self.damaged(f"the row at position {first + at} is missing, or was written twice")

    def rows(self, table: str, first: int = 1, last: int | None = None) -> Iterator[tuple[Any, ...]]:
        """Checked rows of a table without their CRC, by their key; of the history at most up to `last_position`.

        Raises:
            RecordingError: also when the history was trimmed since this opened.
        """
        return chain.from_iterable(self.row_lists(table, first, last))

    def row_lists(self, table: str, first: int = 1, last: int | None = None) -> Iterator[list[tuple[Any, ...]]]:
        """As `rows`, in lists, each read in its own transaction: a long one would keep the WAL from being reused."""
        keys = ("stream", "position") if table == "states" else (next(iter(TABLES[table])),)
        columns = ", ".join((*TABLES[table], "crc"))
        key, order = keys[0], ", ".join(keys)
        query = f"SELECT {columns} FROM {table} WHERE ({order}) > ({', '.join('?' * len(keys))}) AND {key} <= ? "
        query += f"ORDER BY {order} LIMIT {ROWS_AT_ONCE}"
        until = 2**63 - 1 if last is None else last
        if table in HISTORY:
            until = min(until, self.last_position)
        before: tuple[int, ...] = (first - 1,) if len(keys) == 1 else (first - 1, 2**62)
        while True:
            rows, error = self._fetch(query, (*before, until))
            if table in HISTORY:
                self._check_trimmed()
            found = [row[: len(keys)] for row in rows[: sound_rows(table, rows)]]
            sound = [*map(operator.lt, [before, *found], found), False].index(False)
            if sound:
                yield [row[:-1] for row in rows[:sound]]
                before = found[sound - 1]
            if sound < len(rows):
                raise self.damaged(f"the row at {key} {rows[sound][0]} (of {table}) does not match its CRC")
            if error is not None:
                raise self.damaged(f"the rows after {key} {before[0]} (of {table}) cannot be read: {error}")
            if not rows or len(rows) % self.limits.rows_a_look:
                return  # the query had no more

    def _fetch(self, query: str, values: tuple[int, ...]) -> tuple[list[tuple[Any, ...]], Exception | None]:
        """The rows of a query up to its end, to the error that ended it, or to about `bytes_at_once`."""
        rows: list[tuple[Any, ...]] = []
        size, count, look = 0, 0, self.limits.rows_a_look
        try:
            with closing(self._database.execute(query, values)) as cursor:
                while len(rows) == count and size < self.limits.bytes_at_once:
                    count += look
                    rows.extend(islice(cursor, look))  # those before an error are kept
                    size += look * sum(len(value) for row in rows[-1:] for value in row if type(value) is bytes)
        except UNREADABLE as error:
            self._refuse_passing(error)
            return rows, error
        return rows, None

    def _check_trimmed(self) -> None:
        """Raise when rows that this should show may have been deleted."""
        rows, error = self._fetch("SELECT position FROM trimmed LIMIT 2", ())
        if error is None and (rows[0][0] if rows else 0) != self.trimmed.position:
            raise TrimmedMeanwhile(f"the history of {self.path} was trimmed while it was read: read it again")

    def newest_row(self, table: str, condition: str, stream: int) -> tuple[Any, ...] | None:
        """A stream's newest row of a table, checked and without its CRC; None if it has no row."""
        query = (
            f"SELECT {', '.join((*TABLES[table], 'crc'))} FROM {table} WHERE {condition} ORDER BY position DESC LIMIT 1"
        )
        rows, error = self._fetch(query, (stream,))
        if error is not None:
            raise self.damaged(f"the rows of stream {stream} (of {table}) cannot be read: {error}")
        if sound_rows(table, rows) < len(rows):
            raise self.damaged(f"a row of stream {stream} (of {table}) does not match its CRC")
        return rows[0][:-1] if rows else None

    def totals(self, first: int = 1, last: int | None = None) -> tuple[int, int]:
        """Count the batches at these positions, including those that failed, and the frames in them; unchecked."""
        with self._reading("is damaged"):
            query = "SELECT count(*), ifnull(sum(size), 0) FROM batches WHERE position BETWEEN ? AND ?"
            ends = (max(first, self.first_position), self.last_position if last is None else last)
            batches, frames = self._database.execute(query, ends).fetchone()
        return int(batches), int(frames)

    def time_at(self, position: int) -> int:
        """When the row at a position was recorded, in nanoseconds since 1970; 0 if there is none."""
        return next((row[1] for table in HISTORY for row in self.rows(table, position, position)), 0)

    def first_at(self, time_ns: int) -> int:
        """The first position that was recorded at this time or later, the one after the last if none was; unchecked."""
        some = "SELECT min(position) FROM {} WHERE time_ns >= ?1 AND position BETWEEN ?2 AND ?3"
        with self._reading("is damaged"):
            query = " UNION ALL ".join(map(some.format, HISTORY))
            found = self._database.execute(query, (time_ns, self.first_position, self.last_position)).fetchall()
        return min((position for (position,) in found if position is not None), default=self.last_position + 1)

    @cached_property
    def _state_bytes(self) -> int:
        return self.header.state_spec.row_bytes

    def state(self, blob: bytes | None, position: int) -> U8 | None:
        """A state, uint8 [row_bytes], from the row at that position."""
        if blob is None:
            return None
        self.check_bytes(blob, self._state_bytes, position)
        return np.frombuffer(blob, np.uint8)

    def check_bytes(self, blob: bytes, expected: int, position: int) -> None:
        """Raise when a column of the row at that position is not as long as it should be."""
        if len(blob) != expected:
            raise self.damaged(f"the row at position {position} holds {len(blob)} bytes where {expected} belong")

    def damaged(self, what: str) -> DamagedRecording:
        """The error that says so."""
        return DamagedRecording(f"{self.path} is damaged: {what}", self.path)

    def _is_left_in_wal_mode(self) -> bool:
        """Whether the header of a file without a WAL next to it says that it is in WAL mode."""
        # Only without a WAL: this process may be writing the file, and closing it would end SQLite's locks on it. Then
        # the next program to open and close the file would remove the WAL.
        with self.path.open("rb") as file:
            start = file.read(_START_BYTES).ljust(_START_BYTES, b"\0")
            length = file.seek(0, os.SEEK_END)
        alone = start[_READ_VERSION_OFFSET] == _IN_WAL_MODE
        expected = int.from_bytes(start[28:32]) * PAGE_BYTES
        if alone and length < expected and int.from_bytes(start[16:18]) == PAGE_BYTES:
            raise self.damaged(f"it ends after {length:,} of {expected:,} bytes")
        return alone

    def _open(self) -> None:
        (application,), (version,) = (
            self._database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if application != APPLICATION_ID:
            raise RecordingError(f"{self.path} is not a recording: it is another kind of database, or empty")
        if version != FORMAT_VERSION:
            advice = "record anew" if version < FORMAT_VERSION else "use the instep that wrote it"
            raise RecordingError(
                f"{self.path} has format version {version}, and this instep reads version {FORMAT_VERSION}: {advice}"
            )
        self._check_schema()
        try:
            rows = self._database.execute("SELECT key, value, crc FROM header").fetchall()
            self.header = RecordingHeader.from_rows(rows)
        except RecordingError as error:
            raise self.damaged(str(error)) from None
        with self.at_once():  # between two queries, a commit would put a second newest row behind the first
            pass

    def _check_schema(self) -> None:
        """Raise unless the tables are those of a recording: a view in the place of a table could be read for ever."""
        statements = set(create_statements())
        for name, statement in self._database.execute("SELECT name, sql FROM sqlite_schema"):
            if statement is None and str(name).startswith("sqlite_autoindex_"):
                continue  # SQLite's own, for a UNIQUE column
            if statement not in statements:
                raise self.damaged(f"the table {name!r} is not one of a recording")
            statements.discard(statement)
        if statements:
            raise self.damaged(f"the table of this statement is missing: {min(statements)}")

    def _find_ends(self) -> None:
        found = list(self.rows("newest", first=0))
        if len(found) != 1:
            raise self.damaged("the row that says which position is the newest is missing")
        self.last_position, self.state_rows = int(found[0][0]), int(found[0][1])
        trimmed = [Trimmed(*row) for row in self.rows("trimmed")]
        if len(trimmed) > 1:
            raise self.damaged("it holds more than one row about trimming")
        self.trimmed = trimmed[0] if trimmed else Trimmed()

    def _positions(self, table: str, first: int, last: int) -> I64:
        with self._reading(f"is damaged: the table {table} cannot be read"):
            query = f"SELECT position FROM {table} WHERE position BETWEEN {first} AND {last}"
            found = np.fromiter((row[0] for row in self._database.execute(query)), np.int64)
        self._check_trimmed()
        return found

    def _refuse_passing(self, error: Exception) -> None:
        """Raise where an error of SQLite says nothing about the file."""
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF in _PASSING:
            raise UnavailableRecording(f"{self.path} cannot be read now: {error}; try again") from None

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            self._refuse_passing(error)
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                raise RecordingError(
                    f"{self.path} is not a recording: it is not an SQLite database, or its first bytes are damaged"
                ) from None
            raise DamagedRecording(f"{self.path} {what}: {error}", self.path) from None
