"""Trimming: which checkpoints are kept, when the history before one of them goes, and deleting it bit by bit."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from instep.recording.records import Checkpoint, Trimmed
from instep.recording.schema import ENGINE_EVENT, OWNER_EVENT

ROWS_AT_ONCE: Final = 128
"""Rows, or positions, that one transaction deletes: a pause of some milliseconds for what waits to be committed."""
APART_BYTES: Final = 2**28
"""Where nothing is trimmed, a checkpoint is kept for so much history: a range can be cut out from there."""
_SHARES: Final = 8
"""A checkpoint is kept for every such share of what is kept: up to one share more is kept than was asked for."""


@dataclass(frozen=True, slots=True)
class Retention:
    """How much of the history is kept.

    Attributes:
        keep_bytes: about the size of the file; 0 for any size.
        keep_ns: nanoseconds; what is older goes. 0 for any age.
    """

    keep_bytes: int = 0
    keep_ns: int = 0

    @property
    def is_limited(self) -> bool:
        """Whether anything is ever trimmed."""
        return bool(self.keep_bytes or self.keep_ns)

    def is_apart(self, before: Checkpoint, bytes: int, time_ns: int) -> bool:
        """Whether a checkpoint now is far enough from the one before to be kept."""
        if not self.is_limited:
            return bytes - before.bytes >= APART_BYTES
        by_bytes = 0 < self.keep_bytes <= (bytes - before.bytes) * _SHARES
        return by_bytes or 0 < self.keep_ns <= (time_ns - before.time_ns) * _SHARES

    def due(self, checkpoints: Sequence[Checkpoint], trimmed: Trimmed, now_ns: int, file_bytes: int) -> int:
        """The position of the checkpoint up to which the history should be trimmed now; 0 for not at all.

        Args:
            checkpoints: complete ones, in order, the one that the history begins with now among them.
            trimmed: up to where it was trimmed.
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


@dataclass(frozen=True, slots=True)
class Deletion:
    """Statements of one transaction."""

    statements: Sequence[tuple[str, Sequence[tuple[int, ...]]]]
    """SQL, and the values with which it is executed one after another."""
    states: int = 0
    """How many rows of `states` they delete."""


def events_that_count(database: sqlite3.Connection, position: int) -> list[int]:
    """Positions of the events that still count when the history up to a position goes, rising."""
    open_streams = set(_column(database, _OPEN_STREAMS, position))
    owners, found = dict[int, int](), list[int]()
    events = "SELECT position, stream, kind FROM events WHERE position <= ? ORDER BY position"
    for at, stream, kind in database.execute(events, (position,)):
        if kind == ENGINE_EVENT:
            found.append(at)
        elif kind == OWNER_EVENT and stream in open_streams:
            owners[stream] = at
    return sorted([*found, *owners.values()])


def deletions(database: sqlite3.Connection, position: int) -> Iterator[Deletion]:
    """The deletions up to a position, in parts; each is to be executed before the next one is asked for.

    A crash in between loses nothing: what is left is found again.
    """
    yield from _states(database, position)
    pairs = list(database.execute(_ENDED, (position, position)))
    for part in _parts(pairs):
        openings, closings = ([(row[column],) for row in part] for column in (0, 1))
        yield Deletion((("DELETE FROM openings WHERE position = ?", openings), (_DELETE["closings"], closings)))
    kept = set(events_that_count(database, position))
    events = _column(database, "SELECT position FROM events WHERE position <= ?", position)
    for part in _parts([(at,) for at in events if at not in kept]):
        yield Deletion(((_DELETE["events"], part),))
    for table in ("batches", "outputs"):
        while (first := _column(database, f"SELECT min(position) FROM {table}")[0]) and first <= position:
            until = min(first + ROWS_AT_ONCE - 1, position)
            yield Deletion(((f"DELETE FROM {table} WHERE position <= ?", [(until,)]),))


_DELETE: Final = {table: f"DELETE FROM {table} WHERE position = ?" for table in ("closings", "events")}
_ENDED: Final = """
    SELECT openings.position, closings.position FROM closings JOIN openings USING (stream)
    WHERE closings.position <= ? AND openings.position <= ?"""
_OPEN_STREAMS: Final = """
    SELECT stream FROM openings WHERE position <= ?1
    AND stream NOT IN (SELECT stream FROM closings WHERE position <= ?1)"""


def _states(database: sqlite3.Connection, position: int) -> Iterator[Deletion]:
    """States of streams that have ended, and those older than the one that a stream begins with now."""
    ended = set(_column(database, "SELECT stream FROM closings WHERE position <= ?", position))
    doomed: list[tuple[int, ...]] = []
    before: tuple[int, int] | None = None
    for stream, at in database.execute("SELECT stream, position FROM states ORDER BY stream, position"):
        if stream in ended:
            doomed.append((stream, at))
        elif at <= position:
            if before is not None and before[0] == stream:
                doomed.append(before)
            before = (stream, at)
    for part in _parts(doomed):
        yield Deletion((("DELETE FROM states WHERE stream = ? AND position = ?", part),), len(part))


def _parts(rows: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield rows[first : first + ROWS_AT_ONCE]


def _column(database: sqlite3.Connection, query: str, *values: int) -> list[int]:
    return [row[0] for row in database.execute(query, values)]
