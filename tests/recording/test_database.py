"""The file on the disk: left as one, and what a damaged WAL of a killed writer costs."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from instep.recording.database import DatabaseLimits, lost_tail, put_wal_away
from instep.recording.inspection import inspect
from instep.recording.reader import RecordingReader
from instep.recording.writer import RecordingWriter
from tests.support.disk import Disk
from tests.support.recordings import gru_description, make_gru, make_header
from tests.support.rows import open_stream

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


HEADER = make_header(gru_description(make_gru(3, 4)))
FRAME_BYTES = 24 + 16_384
LAST = 25


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """What a writer left that was killed: a WAL that was begun again once, with older frames at its end."""
    writer = RecordingWriter.create(tmp_path / "a.rec", HEADER, limits=DatabaseLimits(wal_bytes=0))
    for stream in range(1, 21):
        open_stream(writer, stream, f"s{stream}", stream, 0, 1, None)
        writer.commit()
    writer.copy_wal()
    for stream in range(21, LAST + 1):
        open_stream(writer, stream, f"s{stream}", stream, 0, 1, None)
        writer.commit()
    for suffix in ("", "-wal"):
        shutil.copy(f"{writer.path}{suffix}", tmp_path / f"k.rec{suffix}")
    writer.abandon()
    return tmp_path / "k.rec"


def position(path: Path) -> int:
    with RecordingReader(path) as reader:
        return reader.last_position


def change(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 255
    path.write_bytes(data)


def frames(path: Path) -> int:
    """How many frames hold the last commit: a commit writes the same pages each time."""
    wal = path.read_bytes()
    salts = wal[16:24]
    return sum(wal[at + 8 : at + 16] == salts for at in range(32, len(wal), FRAME_BYTES))


def test_nothing_is_said_of_a_wal_without_damage(killed: Path) -> None:
    wal = Path(f"{killed}-wal")
    assert 32 + frames(wal) * FRAME_BYTES < wal.stat().st_size, "older frames are there"
    assert lost_tail(killed) == ""
    assert position(killed) == LAST


def test_damage_before_other_frames_is_said_with_how_far_it_reaches(killed: Path) -> None:
    wal, rng = Path(f"{killed}-wal"), np.random.default_rng(0)
    whole, count = wal.read_bytes(), frames(wal)
    for _ in range(20):
        wal.write_bytes(whole)
        bad = int(rng.integers(count - 1))
        change(wal, 32 + bad * FRAME_BYTES + int(rng.integers(FRAME_BYTES)))
        assert f"its WAL is damaged after {bad} of {count} pages: the commits after that" in lost_tail(killed)
        reached = position(killed)
        assert reached < LAST
        inspect(killed)


def test_a_damaged_header_is_said(killed: Path) -> None:
    change(Path(f"{killed}-wal"), 17)
    assert "the header of its WAL is damaged" in lost_tail(killed)
    assert position(killed) == 20


@pytest.mark.parametrize("cut", [0, 31, 40, FRAME_BYTES])
def test_a_transaction_that_was_not_complete_is_not_missing(killed: Path, cut: int) -> None:
    wal = Path(f"{killed}-wal")
    end = 32 + frames(wal) * FRAME_BYTES
    wal.write_bytes(wal.read_bytes()[: end - cut] if cut > 31 else wal.read_bytes()[:cut])
    assert lost_tail(killed) == ""
