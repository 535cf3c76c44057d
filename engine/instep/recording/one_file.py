"""Making one file of a database and the WAL beside it."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

BESIDE: Final = ("-wal", "-shm", "-journal")
"""What the names of files that SQLite makes beside a database have beyond its own."""


def put_wal_away(database: sqlite3.Connection) -> None:
    """Copy the WAL into the file and remove it.

    Where somebody reads the file just now, the WAL stays beside it, with what could not be copied; every reader
    understands that. Nobody is waited for.

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
    """Whether SQLite failed for no other reason than that somebody else has the file open."""
    code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK)  # what sqlite3 refuses by itself has none
    return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


def without_wal(path: Path) -> None:
    """Make a file that nobody writes any more one file, if somebody had it open as it was sealed.

    Raises:
        sqlite3.Error: when the disk is full or fails.
    """
    if not path.exists() or not Path(f"{path}-wal").exists():
        return
    database = sqlite3.connect(path, isolation_level=None)
    try:
        put_wal_away(database)
    finally:
        database.close()


def remove_with_all_beside(path: Path) -> None:
    """Remove a file, if it is there, and what SQLite made beside it.

    The file goes first: whatever dies in between leaves no file that lacks what is in its WAL.

    Raises:
        OSError: when it cannot be removed.
    """
    for suffix in ("", *BESIDE):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


def bytes_on_disk(path: Path) -> int:
    """How large a file is, with the WAL beside it; 0 where there is none."""
    return sum(there.stat().st_size for there in (path, Path(f"{path}-wal")) if there.exists())
