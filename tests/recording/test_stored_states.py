from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from instep.core.typing import F32, I64
from instep.recording.schema import row_crc
from instep.recording.stored_states import StoredStates

LAYERS, SIZE = 2, 3


class Table:
    """The two tables, written by hand."""

    def __init__(self, path: Path) -> None:
        self.database = sqlite3.connect(path, isolation_level=None)
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute(
            "CREATE TABLE states (stream INTEGER PRIMARY KEY, position INTEGER, seq INTEGER, state BLOB,"
            " tail_seq INTEGER, tail_x BLOB, tail_y BLOB, crc INTEGER)"
        )
        self.database.execute(
            "CREATE TABLE openings (position INTEGER PRIMARY KEY, time_ns INTEGER, stream INTEGER UNIQUE, name TEXT,"
            " epoch INTEGER, first_seq INTEGER, initial_state BLOB, crc INTEGER)"
        )

    def state(self, stream: int, seq: int, state: F32) -> None:
        row = (stream, 5, seq, state.tobytes(), seq, b"", b"")
        self.database.execute("REPLACE INTO states VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, row_crc(*row)))

    def opening(self, stream: int, first_seq: int, state: F32 | None) -> None:
        row = (stream, 7, stream, f"s{stream}", 9, first_seq, None if state is None else state.tobytes())
        self.database.execute("INSERT INTO openings VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, row_crc(*row)))


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    table = Table(tmp_path / "r.instep")
    yield table
    table.database.close()


@pytest.fixture
def stored(tmp_path: Path, table: Table) -> Iterator[StoredStates]:
    stored = StoredStates(tmp_path / "r.instep", LAYERS, SIZE)
    yield stored
    stored.close()


def some(value: float) -> F32:
    return np.full((LAYERS, SIZE), value, np.float32)


def numbers(*values: int) -> I64:
    return np.array(values, np.int64)


def test_states_come_from_the_newest_snapshot_or_else_from_the_opening(table: Table, stored: StoredStates) -> None:
    table.opening(1, 0, some(1))
    table.opening(2, 4, some(2))
    table.opening(3, 0, None)
    table.state(1, 6, some(10))
    states, found = stored.read(numbers(3, 1, 2), numbers(0, 6, 4))
    assert found.all()
    np.testing.assert_array_equal(states, np.stack([some(0), some(10), some(2)]))
    table.state(1, 7, some(11))
    np.testing.assert_array_equal(stored.read(numbers(1), numbers(7))[0], some(11)[None])


def test_a_state_before_another_frame_is_not_the_one_that_is_asked_for(table: Table, stored: StoredStates) -> None:
    table.opening(1, 0, some(1))
    table.opening(2, 4, some(2))
    table.state(1, 6, some(10))
    states, found = stored.read(numbers(1, 2, 9), numbers(0, 5, 0))
    assert not found.any()
    assert not states.any()


def test_damaged_rows_are_not_found(table: Table, stored: StoredStates) -> None:
    for stream in range(1, 5):
        table.opening(stream, 0, some(stream))
    table.state(1, 6, some(10))
    table.state(2, 6, some(10)[:1])
    table.state(4, 6, some(12))
    table.database.execute("UPDATE states SET tail_seq = 5 WHERE stream = 1")
    table.database.execute("UPDATE openings SET epoch = 8 WHERE stream = 3")
    assert stored.read(numbers(1, 2, 3, 4), numbers(6, 6, 0, 6))[1].tolist() == [False, False, False, True]


def test_thousands_of_states_are_read_at_once(table: Table, stored: StoredStates, rng: np.random.Generator) -> None:
    table.database.execute("BEGIN")
    for stream in range(1, 2001):
        table.opening(stream, 0, some(-stream))
        if stream % 2:
            table.state(stream, 1, some(stream))
    table.database.execute("COMMIT")
    streams = rng.permutation(2000)[:1700] + 1
    states, found = stored.read(streams, streams % 2)
    assert found.all()
    np.testing.assert_array_equal(states[:, 0, 0], np.where(streams % 2, streams, -streams))


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "r.instep"
    path.write_bytes(b"no database" * 1000)
    stored = StoredStates(path, LAYERS, SIZE)
    with pytest.raises(sqlite3.Error):
        stored.read(numbers(1), numbers(0))
    stored.close()
