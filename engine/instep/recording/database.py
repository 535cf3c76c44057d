"""The files of a recording's SQLite database: creating, closing, measuring and removing them."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep.recording.errors import RecordingError
from instep.recording.schema import (
    APPLICATION_ID,
    FORMAT_VERSION,
    HEADER,
    PAGE_BYTES,
    TABLES,
    create_statements,
    row_crc,
)

SUFFIX: Final = ".instep"
"""The suffix of recordings that the server names; users may choose other names."""
SUFFIXES: Final = ("-wal", "-shm", "-journal")
"""The suffixes that SQLite appends to the database's name for its other files."""

_SQLITE_MAGIC: Final = b"SQLite format 3\0"
_APPLICATION_ID_OFFSET: Final = 68


@dataclass(frozen=True, slots=True)
class DatabaseLimits:
    """Limits of a writer: the growth of the WAL, waits, and rows deleted at once.

    Attributes:
        page_bytes: the page size of a new file.
        wal_bytes: the WAL is copied into the file at about this size. The copy takes some milliseconds, more for a
            larger WAL.
        most_wal_bytes: the writer fails when the WAL would grow beyond this size, which happens while another program
            reads the file, because the WAL cannot be reused then.
        lock_wait_s: the longest time for which another program may lock the file. Meanwhile nothing is recorded and no
            frame answered.
        deleted_at_once: rows, or positions, that one transaction deletes when history is trimmed. A commit that becomes
            due meanwhile waits some milliseconds.
    """

    page_bytes: int = PAGE_BYTES
    wal_bytes: int = 4 * 2**20
    most_wal_bytes: int = 2**30
    lock_wait_s: float = 30.0
    deleted_at_once: int = 128


LIMITS: Final = DatabaseLimits()


def check_place(path: Path) -> None:
    """Raise RecordingError if no recording can be made at this path."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.stat(f"{path}{SUFFIXES[-1]}")  # the longest name that SQLite needs
    except OSError as error:
        raise RecordingError(f"cannot look for the recording {path}: {error.strerror}; name another file") from None
    if os.path.isdir(path):
        raise RecordingError(f"{path} is a folder: name a file for the recording, like {path / 'r.instep'}")
    if not os.path.isdir(path.parent):
        raise RecordingError(
            f"there is no folder {path.parent} for the recording {path.name}: make it, or name another"
        )


def check_file(path: Path) -> None:
    """Raise RecordingError if a file exists that is not a recording. Writes nothing."""
    with contextlib.suppress(OSError):  # whoever opens it says why it cannot be read
        is_begun = Path(f"{path}-journal").exists()  # by a writer that died
        if path.is_file() and path.stat().st_size and not is_begun and not looks_like_one(path):
            raise RecordingError(f"{path} is not a recording: name another file, which need not exist yet")


def looks_like_one(path: Path) -> bool:
    """Whether a file begins like a recording."""
    with path.open("rb") as file:
        start = file.read(_APPLICATION_ID_OFFSET + 4)
    return start.startswith(_SQLITE_MAGIC) and start[_APPLICATION_ID_OFFSET:] == struct.pack(">I", APPLICATION_ID)


def holds_recording(path: Path) -> bool:
    """Whether there is a recording to resume. Removes what a writer left that died while creating one.

    Raises:
        RecordingError: when the file cannot be read or written.
    """
    if Path(f"{path}-journal").exists() and path.is_file():
        database = sqlite3.connect(path, isolation_level=None)
        try:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()  # SQLite rolls the journal back
        except sqlite3.Error as error:
            raise RecordingError(f"cannot resume the recording {path}: {error}") from None
        finally:
            database.close()
    return path.is_file() and path.stat().st_size > 0


def make_tables(database: sqlite3.Connection, page_bytes: int = PAGE_BYTES) -> None:
    """Begin a transaction and create the empty tables in it; the caller commits."""
    database.execute(f"PRAGMA page_size={page_bytes}")
    database.execute("BEGIN")
    database.execute(f"PRAGMA application_id={APPLICATION_ID}")
    database.execute(f"PRAGMA user_version={FORMAT_VERSION}")
    for statement in create_statements():
        database.execute(statement)


@cache
def insertion(table: str) -> str:
    """The statement that appends a row, with its CRC, to a table."""
    columns = HEADER if table == "header" else TABLES[table]
    return f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns))}, ?)"


def insert(database: sqlite3.Connection, table: str, rows: Iterable[tuple[Any, ...]]) -> None:
    """Append rows, with their CRCs, to a table."""
    database.executemany(insertion(table), rows)


def with_crcs(rows: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    """Rows with their CRC as the last column."""
    return ((*row, row_crc(*row)) for row in rows)


def put_wal_away(database: sqlite3.Connection) -> None:
    """Copy the WAL into the file and remove it.

    While another program reads the file, the WAL stays next to it with the part that could not be copied, and readers
    use both. This does not wait.

    Raises:
        sqlite3.Error: when the disk is full or fails.
    """
    database.execute("PRAGMA busy_timeout=0")
    database.execute("PRAGMA wal_checkpoint(FULL)").fetchall()
    try:
        database.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.OperationalError as error:
        if not is_in_use(error):
            raise


def is_in_use(error: sqlite3.Error) -> bool:
    """Whether SQLite failed only because another program has the file open."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)  # errors of Python's module itself have none
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def remove_database(path: Path) -> None:
    """Remove a database and SQLite's other files for it, if they exist.

    The database is removed first, so a crash in between never leaves it without the rows that are only in its WAL.

    Raises:
        OSError: when it cannot be removed.
    """
    for suffix in ("", *SUFFIXES):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def bytes_on_disk(path: Path) -> int:
    """The size of a database with its WAL; 0 if there is none."""
    total = 0
    for there in (path, Path(f"{path}-wal")):
        with contextlib.suppress(FileNotFoundError):  # not looked for first: a recorder that ends removes the WAL
            total += there.stat().st_size
    return total


_HEADER: Final = struct.Struct(">8I")
_FRAME: Final = struct.Struct(">6I")
_MAGIC: Final = 0x377F0682
"""The first word of a WAL. Its lowest bit is set if checksums are over big-endian words."""


def lost_tail(path: Path) -> str:
    """A sentence about committed transactions that the WAL has lost; empty if none is missing.

    The WAL must not be written meanwhile. A transaction that was incomplete when the writer died does not count as
    missing.

    Args:
        path: the recording.
    """
    try:
        wal = Path(f"{path}-wal").read_bytes()
    except FileNotFoundError:
        return ""
    if len(wal) < _HEADER.size + _FRAME.size:
        return ""
    magic, _, page_bytes, _, *salts, sum1, sum2 = _HEADER.unpack_from(wal)
    order = ">" if magic & 1 else "<"
    if magic & ~1 != _MAGIC or _checksum(wal[:24], order, (0, 0)) != (sum1, sum2):
        return "the header of its WAL is damaged: the last commits are missing"
    size = _FRAME.size + page_bytes
    frames = (len(wal) - _HEADER.size) // size
    sums = (sum1, sum2)
    for at in range(frames):
        begin = _HEADER.size + at * size
        *_, salt1, salt2, sum1, sum2 = _FRAME.unpack_from(wal, begin)
        if [salt1, salt2] != salts:
            return _said(wal, at, frames, size, salts)  # left from before the WAL was begun again, or damaged
        sums = _checksum(wal[begin + _FRAME.size : begin + size], order, _checksum(wal[begin : begin + 8], order, sums))
        if sums != (sum1, sum2):
            return _said(wal, at, frames, size, salts)
    return ""


def _said(wal: bytes, bad: int, frames: int, size: int, salts: list[int]) -> str:
    """A sentence about a WAL whose frames are valid up to the one at index `bad`."""
    later = 0
    for at in range(bad + 1, frames):
        *_, salt1, salt2, _, _ = _FRAME.unpack_from(wal, _HEADER.size + at * size)
        later += [salt1, salt2] == salts
    if not later:
        return ""  # the writer died as it wrote this one
    return (
        f"its WAL is damaged after {bad:,} of {bad + 1 + later:,} pages: the commits after that are missing, and "
        "clients may have answers that rest on them"
    )


def _checksum(data: bytes, order: str, sums: tuple[int, int]) -> tuple[int, int]:
    """Continue SQLite's checksum, a pair of sums, over data whose length is a multiple of 8 bytes.

    Each result is a word plus the sum of the last two results, and therefore the sum of all earlier words, each times a
    Fibonacci number.
    """
    before = np.array([sums[0], (sums[1] - sums[0]) % 2**32], np.uint32)  # as words, these give the sums
    words = np.concatenate([before, np.frombuffer(data, f"{order}u4")])
    weights = _fibonacci(len(words))
    return int(words[:-1] @ weights[1:]), int(words @ weights)


@cache
def _fibonacci(count: int) -> npt.NDArray[np.uint32]:
    """Return `count` Fibonacci numbers modulo 2**32, in descending order."""
    numbers = [1, 1]
    while len(numbers) < count:
        numbers.append((numbers[-1] + numbers[-2]) % 2**32)
    return np.array(numbers[::-1], np.uint32)
