"""Trimming: which checkpoints to keep, when to drop the history before one, and its deletion in portions."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from instep.recording.records import Checkpoint, Trimmed
from instep.recording.schema import ENGINE_EVENT, OWNER_EVENT

_SCANNED_AT_ONCE: Final = 1024
"""The number of rows examined between two transactions."""
APART_BYTES: Final = 2**28
"""Without trimming, the bytes between kept checkpoints, at which a range can begin."""
_SHARES: Final = 8
"""The number of parts of the limit, with a checkpoint kept for each; the history exceeds the limit by one at most."""


@dataclass(frozen=True, slots=True)
class Retention:
    """The limits of the kept history.

    Attributes:
        keep_bytes: the approximate size limit of the file; 0 for no limit.
        keep_ns: the age at which history is dropped, in nanoseconds; 0 for no limit.
    """

    keep_bytes: int = 0
    keep_ns: int = 0

    @property
    def is_limited(self) -> bool:
        """Whether anything is ever trimmed."""
        return bool(self.keep_bytes or self.keep_ns)

    def is_apart(self, before: Checkpoint, bytes: int, time_ns: int) -> bool:
        """Whether a checkpoint now is far enough from the last kept one to be kept."""
        if not self.is_limited:
            return bytes - before.bytes >= APART_BYTES
        by_bytes = 0 < self.keep_bytes <= (bytes - before.bytes) * _SHARES
        return by_bytes or 0 < self.keep_ns <= (time_ns - before.time_ns) * _SHARES

    def due(self, checkpoints: Sequence[Checkpoint], trimmed: Trimmed, now_ns: int, file_bytes: int) -> int:
        """The position of the checkpoint to which the history should be trimmed now; 0 for none.

        Args:
            checkpoints: complete ones in order, including the one at the beginning of the history.
            trimmed: the position to which it was trimmed before.
            now_ns: nanoseconds since 1970.
            file_bytes: size of the file without its free pages.
        """
        later = [checkpoint for checkpoint in checkpoints if checkpoint.position > trimmed.position]
        if not later:
            return 0
        position = 0
        if self.keep_ns:
            old = [checkpoint.position for checkpoint in later if checkpoint.time_ns <= now_ns - self.keep_ns]
            position = max(old, default=0)
        if 0 < self.keep_bytes < file_bytes:
            began = next((each.bytes for each in checkpoints if each.position == trimmed.position), 0)
            enough = [each.position for each in later if each.bytes - began >= file_bytes - self.keep_bytes]
            position = max(position, min(enough, default=later[-1].position))
        return position


KEEP_ALL: Final = Retention()


Deletion: TypeAlias = tuple[str, Sequence[tuple[int, ...]]]
"""An SQL statement that deletes rows, and the values for each of its executions."""


def counts_of_events(database: sqlite3.Connection, position: int) -> Iterator[int]:
    """The number of events up to a position that count after trimming there, in parts to be added up."""
    for first, last in _ranges(database, "events", "position", position):
        yield len(list(database.execute(f"{_EVENTS} AND {_COUNTS}", (position, first, last))))


def deletions(database: sqlite3.Connection, position: int, rows_at_once: int) -> Iterator[list[Deletion]]:
    """Deletions of the history up to a position, in portions; execute each before asking for the next.

    A portion is found within milliseconds, and may be empty. A crash in between loses nothing: the next call finds the
    rest.
    """
    for first, last in _ranges(database, "states", "stream", _ALL):
        for part in _parts(list(database.execute(_OLD_STATES, (position, first, last))), rows_at_once):
            yield [(DELETE_STATES, part)]
    for first, last in _ranges(database, "closings", "position", position):
        for part in _parts(list(database.execute(_ENDED, (first, last))), rows_at_once):
            openings, closings = ([(row[column],) for row in part] for column in (0, 1))
            yield [("DELETE FROM openings WHERE position = ?", openings), (_DELETE_CLOSINGS, closings)]
    for first, last in _ranges(database, "events", "position", position):
        old = list(database.execute(f"{_EVENTS} AND NOT {_COUNTS}", (position, first, last)))
        for part in _parts(old, rows_at_once):
            yield [("DELETE FROM events WHERE position = ?", part)]
    for table in ("batches", "outputs"):
        for ends in _ranges(database, table, "position", position, rows_at_once):
            yield [(f"DELETE FROM {table} WHERE position BETWEEN ? AND ?", [ends])]


DELETE_STATES: Final = "DELETE FROM states WHERE stream = ? AND position = ?"
_DELETE_CLOSINGS: Final = "DELETE FROM closings WHERE position = ?"
_ALL: Final = 2**62
_OLD_STATES: Final = """
    SELECT stream, position FROM states WHERE stream BETWEEN ?2 AND ?3 AND (
    EXISTS (SELECT 1 FROM closings WHERE closings.stream = states.stream AND closings.position <= ?1)
    OR EXISTS (SELECT 1 FROM states AS later
               WHERE later.stream = states.stream AND later.position > states.position AND later.position <= ?1))"""
"""States of streams that have ended, and states older than the one at which a stream begins now."""
_ENDED: Final = """
    SELECT openings.position, closings.position FROM closings JOIN openings USING (stream)
    WHERE closings.position BETWEEN ? AND ?"""
_EVENTS: Final = "SELECT position FROM events WHERE position BETWEEN ?2 AND ?3"
_COUNTS: Final = f"""(kind = '{ENGINE_EVENT}' OR (kind = '{OWNER_EVENT}'
    AND EXISTS (SELECT 1 FROM openings WHERE openings.stream = events.stream)
    AND NOT EXISTS (SELECT 1 FROM closings WHERE closings.stream = events.stream AND closings.position <= ?1)
    AND NOT EXISTS (SELECT 1 FROM events AS later WHERE later.kind = '{OWNER_EVENT}'
                    AND later.stream = events.stream AND later.position > events.position AND later.position <= ?1)))"""
"""Every engine, and the newest owner of each stream that is open at the position `?1`."""


def _ranges(
    database: sqlite3.Connection, table: str, column: str, last: int, rows: int = _SCANNED_AT_ONCE
) -> Iterator[tuple[int, int]]:
    """Ranges of a column's values up to the last, each with about `rows` rows of the table."""
    some = f"SELECT max({column}) FROM (SELECT {column} FROM {table} WHERE {column} BETWEEN ? AND ? ORDER BY 1 LIMIT ?)"
    first = 0
    while (end := database.execute(some, (first, last, rows)).fetchone()[0]) is not None:
        yield first, end
        first = end + 1


def _parts(rows: list[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the rows in parts; one empty part if there are none, so that other work gets its turn."""
    for first in range(0, max(1, len(rows)), size):
        yield rows[first : first + size]
