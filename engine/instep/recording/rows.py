"""Writing rows of a recording into one open transaction, made durable by `commit`."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Final

from instep.core.typing import F32, I64, U8, U32, U64, Bool
from instep.recording.errors import DamagedRecording
from instep.recording.schema import (
    COUNTED,
    FAILED_EVENT,
    PAGE_BYTES,
    SNAPSHOT_EVENT,
    STATES_EVENT,
    TABLES,
    Column,
    RecordingHeader,
    row_crc,
)
from instep.recording.states import StateRows, blob, state_blobs

CHECKPOINT_BYTES: Final = 4 * 2**20
"""The WAL is copied into the file when about so much is in it: a pause of some milliseconds, which grows with it."""

_PAGES_A_COMMIT: Final = 4
"""Those that every commit touches, about."""
_ROW_BYTES: Final = 64
"""What a row takes beside its blobs, about."""


class RowWriter:
    """Appends to a recording, every verb a row or more; see `schema` for what they mean.

    Errors of SQLite (`sqlite3.Error`: disk full, input/output error) come out of every method as they are.

    Args:
        path: the file that is written.
        database: a connection to it, which nobody else writes with.
        header: of the engine that writes.
        position: of the newest row.

    Attributes:
        position: of the newest row, committed or not.
    """

    def __init__(self, path: Path, database: sqlite3.Connection, header: RecordingHeader, position: int) -> None:
        self.path = path
        self.header = header
        self.position = position
        self._database = database
        self._in_transaction = False
        wal = Path(f"{path}-wal")  # what a killed writer left counts too: each start has to read it
        self._bytes_in_wal = wal.stat().st_size if wal.exists() else 0
        self._counts = {table: self._numbers(table, f"SELECT count(*) FROM {table}")[0] for table in COUNTED}
        mark = [self._numbers("snapshot", f"SELECT {column} FROM snapshot") for column in ("position", *COUNTED)]
        self._mark = tuple(column[0] if column else 0 for column in mark)
        self._with_state = set(self._numbers("states", "SELECT stream FROM states"))
        closed = "SELECT states.stream FROM states JOIN closings USING (stream)"
        self._closed_with_state = self._numbers("closings", closed) if self._with_state else []

    def open_streams(
        self,
        time_ns: int,
        streams: I64,
        names: Sequence[str],
        epochs: U64,
        first_seqs: I64,
        initial_states: U8 | None,
    ) -> None:
        """Streams opened.

        Args:
            time_ns: nanoseconds since 1970.
            streams: int64 [N], numbers of these openings, from 1, new in this recording.
            names: what the client calls them.
            epochs: uint64 [N], of their first ownerships.
            first_seqs: int64 [N], of their first frames.
            initial_states: before those frames, uint8 [N, row_bytes]; None for the model's initial state.
        """
        columns = (streams.tolist(), names, epochs.tolist(), first_seqs.tolist())
        self._insert_rows("openings", time_ns, *columns, state_blobs(initial_states, len(streams)))

    def add_inputs(self, time_ns: int, bucket: int, streams: U32, seqs: U64, x: F32) -> int:
        """A step begins; its outcome follows, in the order of the steps.

        Args:
            time_ns: nanoseconds since 1970.
            bucket: the padded batch size.
            streams: uint32 [B], each at most once.
            seqs: uint64 [B].
            x: float32 [B, features].

        Returns:
            The batch's position.
        """
        size = len(streams)
        assert seqs.shape == (size,)
        assert x.shape == (size, self.header.features)
        self._insert("batches", time_ns, int(bucket), size, blob(streams, "<u4"), blob(seqs, "<u8"), blob(x, "<f4"))
        return self.position

    def add_outputs(self, time_ns: int, batch: int, y: F32) -> None:
        """The step of the batch at that position was computed: y float32 [B, outputs]."""
        assert y.shape[1] == self.header.outputs
        self._insert("outputs", time_ns, int(batch), blob(y, "<f4"))

    def fail_batch(self, time_ns: int, batch: int, detail: str) -> None:
        """The step of the batch at that position failed: none of its frames was applied."""
        self.event(time_ns, FAILED_EVENT, int(batch), detail)

    def close_streams(self, time_ns: int, streams: I64, reason: str, frames: I64, final_states: U8, lost: Bool) -> None:
        """Streams ended.

        Args:
            time_ns: nanoseconds since 1970.
            streams: int64 [N].
            reason: of them all.
            frames: int64 [N], the seqs that their next frames would have had.
            final_states: rows of bytes, uint8 [N, row_bytes].
            lost: bool [N], whose state is not known, and not recorded.
        """
        states = (
            None if is_lost else found
            for is_lost, found in zip(lost.tolist(), state_blobs(final_states, len(streams)), strict=True)
        )
        numbers = streams.tolist()
        self._insert_rows("closings", time_ns, numbers, frames.tolist(), repeat(reason, len(numbers)), states)
        self._closed_with_state += [number for number in numbers if number in self._with_state]

    def stream_events(
        self, time_ns: int, kind: str, streams: I64, seqs: I64, details: Iterable[str], states: U8 | None = None
    ) -> None:
        """Something happened to streams, int64 [N], at `seqs`, int64 [N]; what the kinds mean is in `schema`."""
        count = len(streams)
        columns = (streams.tolist(), seqs.tolist(), repeat(kind, count), details, state_blobs(states, count))
        self._insert_rows("events", time_ns, *columns)

    def event(self, time_ns: int, kind: str, seq: int | None, detail: str) -> None:
        """Something happened that concerns no one stream; what the kinds mean is in `schema`."""
        self._insert("events", time_ns, None, seq, kind, detail, None)

    def snapshot(self, time_ns: int, through: int, rows: StateRows) -> None:
        """Bring the table of states up to a position.

        Args:
            time_ns: nanoseconds since 1970.
            through: a position: every batch up to it is in the states, here or of an earlier snapshot, and none after.
            rows: of the streams that have changed since the last snapshot and are open, those that `add_states` was
                given for this one left out.
        """
        self._mark = (int(through), *(self._count_until(table, through) for table in COUNTED))
        self.event(time_ns, SNAPSHOT_EVENT, int(through), f"{len(rows.streams):,} states")
        self._replace_states(int(through), rows)

    def add_states(self, time_ns: int, through: int, rows: StateRows) -> None:
        """Part of the next snapshot, as for `snapshot`: it may be committed before the rest.

        The states are newer then than the snapshot before, which stays the one that counts.
        """
        self.event(time_ns, STATES_EVENT, int(through), f"{len(rows.streams):,} states")
        self._replace_states(int(through), rows)

    def _replace_states(self, through: int, rows: StateRows) -> None:
        gone = self._closed_with_state
        self._database.executemany("DELETE FROM states WHERE stream = ?", ((stream,) for stream in gone))
        self._with_state.difference_update(gone)
        self._closed_with_state = []
        self._database.executemany("REPLACE INTO states VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows.as_rows(through))
        self._bytes_in_wal += rows.states.nbytes + rows.tail_x.nbytes + rows.tail_y.nbytes
        self._with_state.update(rows.streams.tolist())
        row = (*self._mark, len(self._with_state))
        self._database.execute("DELETE FROM snapshot")
        self._database.execute("INSERT INTO snapshot VALUES (?, ?, ?, ?, ?, ?)", (*row, row_crc(*row)))

    def commit(self) -> None:
        """Make everything written so far durable and visible to readers."""
        if self._in_transaction:
            self._database.execute("DELETE FROM newest")
            self._database.execute("INSERT INTO newest VALUES (?, ?)", (self.position, row_crc(self.position)))
            self._database.execute("COMMIT")
            self._in_transaction = False
            self._bytes_in_wal += _PAGES_A_COMMIT * PAGE_BYTES

    def checkpoint(self) -> None:
        """Copy the WAL into the file, if it is large enough to be worth it; nothing becomes more durable by it."""
        assert not self._in_transaction
        if self._bytes_in_wal > CHECKPOINT_BYTES:
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            self._bytes_in_wal = 0

    def _insert(self, table: str, time_ns: int, *columns: Column) -> None:
        self._insert_rows(table, time_ns, *((column,) for column in columns))

    def _insert_rows(self, table: str, time_ns: int, *columns: Iterable[Column]) -> None:
        """Rows of one table, one after another: columns of one length, those after `time_ns`."""
        if not self._in_transaction:
            self._database.execute("BEGIN IMMEDIATE")
            self._in_transaction = True
        before = self.position
        marks = ", ".join("?" * len(TABLES[table]))
        self._database.executemany(f"INSERT INTO {table} VALUES ({marks}, ?)", self._rows(int(time_ns), columns))
        if table in self._counts:
            self._counts[table] += self.position - before

    def _rows(self, time_ns: int, columns: tuple[Iterable[Column], ...]) -> Iterator[tuple[Column, ...]]:
        for values in zip(*columns, strict=True):
            self.position += 1
            row = (self.position, time_ns, *values)
            self._bytes_in_wal += _ROW_BYTES + sum(len(value) for value in values if isinstance(value, bytes))
            yield (*row, row_crc(*row))

    def _numbers(self, table: str, query: str) -> list[int]:
        try:
            return [int(row[0]) for row in self._database.execute(query)]
        except sqlite3.DatabaseError as error:
            raise DamagedRecording(
                f"{self.path} is damaged: the table {table} cannot be read: {error}", self.path
            ) from None

    def _count_until(self, table: str, position: int) -> int:
        later = f"SELECT count(*) FROM {table} WHERE position > ?"
        return self._counts[table] - int(self._database.execute(later, (int(position),)).fetchone()[0])
