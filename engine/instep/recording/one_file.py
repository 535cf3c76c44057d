"""Making one file of a database and the WAL beside it."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


def put_wal_away(database: sqlite3.Connection) -> None:
    """Copy the WAL into the file and remove it.

    Where somebody else has the file open the WAL stays beside it, copied, which every reader understands.

    Raises:
        sqlite3.Error: when the disk is full or fails.
    """
    database.execute("PRAGMA wal_checkpoint(FULL)").fetchall()
    with contextlib.suppress(sqlite3.OperationalError):
        database.execute("PRAGMA journal_mode=DELETE")


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
