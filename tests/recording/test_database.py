"""A WAL is put away where that is possible at once, and left where somebody reads."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from instep.recording.database import check_place, put_wal_away
from instep.recording.errors import RecordingError
from tests.support.disk import Disk

FOR_EVER_MS = 10**9
"""A wait for a reader ends with the test's own timeout."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.db"


@pytest.fixture
def database(path: Path) -> Iterator[sqlite3.Connection]:
    """Two rows, of which the second is in the WAL alone."""
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE numbers (number)")
        database.execute("INSERT INTO numbers VALUES (1)")
        database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        database.execute("PRAGMA wal_autocheckpoint=0")
        database.execute(f"PRAGMA busy_timeout={FOR_EVER_MS}")
        yield database


def reading(path: Path) -> sqlite3.Connection:
    """Somebody in the middle of reading."""
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM numbers").fetchall()
    return reader


def beside(path: Path) -> list[str]:
    return sorted(file.name.removeprefix(path.name) for file in path.parent.iterdir() if file != path)


def rows(path: Path) -> list[int]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return [row[0] for row in database.execute("SELECT number FROM numbers ORDER BY number")]


def test_alone_it_makes_one_file(path: Path, database: sqlite3.Connection, tmp_path: Path) -> None:
    database.execute("INSERT INTO numbers VALUES (2)")
    put_wal_away(database)
    assert beside(path) == []
    shutil.copy(path, tmp_path / "copy.db")
    assert rows(tmp_path / "copy.db") == [1, 2]


def test_it_waits_for_no_reader_and_leaves_the_wal(path: Path, database: sqlite3.Connection) -> None:
    with closing(reading(path)) as reader:
        database.execute("INSERT INTO numbers VALUES (2)")
        put_wal_away(database)
        database.close()
        assert "-wal" in beside(path)
        assert rows(path) == [1, 2]
        assert reader.execute("SELECT count(*) FROM numbers").fetchone() == (1,)
    assert rows(path) == [1, 2]


def test_what_is_no_place_for_a_recording(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match=r"is a folder: name a file for the recording, like .*r\.instep"):
        check_place(tmp_path)
    with pytest.raises(RecordingError, match=r"there is no folder .*nodir for the recording x\.instep: make it"):
        check_place(tmp_path / "nodir" / "x.instep")
    check_place(tmp_path / "x.instep")


def test_a_disk_that_fails_as_the_wal_is_removed_is_said(tmp_path: Path, path: Path) -> None:
    disk = Disk(str(tmp_path))
    try:
        database = disk.connect(path)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE numbers (number)")
        database.execute("PRAGMA wal_checkpoint(FULL)").fetchall()
        disk.on_operation = lambda operation: "broken" if operation.file == "-journal" else None
        with pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
            put_wal_away(database)  # type: ignore[arg-type]
        disk.on_operation = lambda operation: None
        database.close()
    finally:
        disk.close()
