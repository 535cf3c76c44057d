"""Saving what a damaged recording holds before its first damage."""

from __future__ import annotations

import heapq
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import quote

from instep.recording.database import insert, make_tables, with_crcs
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.file import UNREADABLE
from instep.recording.inspection import write_new
from instep.recording.schema import (
    APPLICATION_ID,
    BESIDE,
    CHECKPOINT_EVENT,
    FORMAT_VERSION,
    HISTORY,
    REPAIRED_EVENT,
    TABLES,
    RecordingHeader,
    sound_rows,
)

Row: TypeAlias = tuple[Any, ...]
"""Of a table, its CRC last."""

_KIND: Final = list(HISTORY["events"]).index("kind")
_STATE_POSITION: Final = list(BESIDE["states"]).index("position")
_COMPLETED: Final = list(BESIDE["checkpoints"]).index("completed")
_SEQ: Final = list(HISTORY["events"]).index("seq")
_GIVEN: Final = {
    "openings": list(HISTORY["openings"]).index("initial_state"),
    "events": list(HISTORY["events"]).index("state"),
}
"""By table, the column of a state that a client has given."""


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of a repair."""

    positions: int
    """Rows of the history, all that come before the first damage."""
    frames: int
    streams: int
    left_out: str
    """The losses, in words; empty where nothing was missing."""


def repair(source: Path, target: Path) -> Repaired:
    """Write a new recording that holds everything of a damaged one up to its first damage.

    The damaged one is only read. The new one can be verified, exported and continued. Its streams continue from where
    the damage was, and their clients are told so.

    Raises:
        RecordingError: when nothing can be saved, or the new file exists or cannot be written.
    """
    with closing(_Salvage(source)) as salvage:
        try:
            (positions, left_out), found = write_new(target, lambda database: _write(salvage, database))
        except DamagedRecording as error:
            what = str(error).removeprefix(f"{target} is damaged: ")
            raise RecordingError(
                f"{source} cannot be repaired, it is not only damaged but inconsistent: {what}"
            ) from None
    return Repaired(positions, found.frames, found.streams, left_out)


class _Salvage:
    """Rows of a recording that may be damaged anywhere."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not os.path.isfile(path):  # Path's raises if it cannot be looked for
            raise RecordingError(f"cannot read the recording {path}: there is no such file")
        self.damage: dict[str, tuple[str, str]] = {}
        """By table, why reading it ended early: the rows concerned, and their fault."""
        self._database = sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True, isolation_level=None)
        try:
            self._database.execute("PRAGMA writable_schema=ON")  # so that a file that was cut off is read at all
            (application,) = self._database.execute("PRAGMA application_id").fetchone()
            (version,) = self._database.execute("PRAGMA user_version").fetchone()
            if application != APPLICATION_ID or version != FORMAT_VERSION:
                raise RecordingError(f"{path} is not a recording of format version {FORMAT_VERSION}")
            self.header = self._database.execute("SELECT key, value, crc FROM header").fetchall()
            RecordingHeader.from_rows(self.header)
        except (*UNREADABLE, RecordingError) as error:
            self.close()
            raise RecordingError(f"nothing of {path} can be saved: {error}") from None

    def close(self) -> None:
        self._database.close()

    def rows(self, table: str) -> Iterator[Row]:
        """Sound rows in order, up to the first that is not."""
        key, *_ = TABLES[table]
        order = "stream, position" if table == "states" else key
        columns = ", ".join((*TABLES[table], "crc"))
        before = 0
        try:
            for row in self._database.execute(f"SELECT {columns} FROM {table} ORDER BY {order}"):
                if not sound_rows(table, [row]):
                    self.damage[table] = (f"the row at {key} {row[0]}", "does not match its CRC")
                    return
                before = row[0]
                yield row
        except UNREADABLE as error:
            rows = f"the rows after {key} {before}" if before else "the rows"
            self.damage[table] = (rows, f"cannot be read: {error}")

    def reasons(self) -> str:
        """The damage in words."""
        tables: dict[tuple[str, str], list[str]] = {}
        for table, damage in sorted(self.damage.items()):
            tables.setdefault(damage, []).append(table)
        return "; ".join(f"{rows} (of {', '.join(of)}) {what}" for (rows, what), of in sorted(tables.items()))

    def history(self, after: int) -> Iterator[tuple[str, Row]]:
        """Rows of all tables, by position from the one after `after`, up to the first that is missing."""
        tables = (zip(repeat(table), self.rows(table), strict=False) for table in HISTORY)
        later = (item for item in heapq.merge(*tables, key=lambda item: item[1][0]) if item[1][0] > after)
        for position, (table, row) in enumerate(later, start=after + 1):
            if row[0] != position:
                return
            yield table, row


def _write(salvage: _Salvage, database: sqlite3.Connection) -> tuple[int, str]:
    """The number of positions that were saved, and the losses in words."""
    make_tables(database)
    insert(database, "header", salvage.header)
    trimmed = list(salvage.rows("trimmed"))
    insert(database, "trimmed", trimmed)
    first = last = trimmed[0][0] if trimmed else 0
    holds_something = False  # frames, or states
    for table in ("openings", "closings", "events"):
        rows = [row for row in salvage.rows(table) if row[0] <= first]
        insert(database, table, rows)
        holds_something |= any(_gives_state(table, row) for row in rows)
    named = first
    for table, row in salvage.history(first):
        insert(database, table, [row])
        holds_something |= table == "batches" or _gives_state(table, row)
        last = row[0]
        if table == "events" and row[_KIND] == CHECKPOINT_EVENT:
            named = row[_SEQ]
    positions = last - first
    newest = list(salvage.rows("newest"))
    left_out = []
    if not newest or newest[0][0] > last:
        until = f"{newest[0][0]:,}" if newest else "the last"
        left_out.append(f"positions {last + 1:,} to {until}")
    expected = newest[0][1] if newest else None
    found, states = _copy_states(salvage, database, first, named, last, expected, is_whole=not left_out)
    if found != named:
        left_out.append("the states of the newest checkpoint, which can be computed from everything before it")
        last = _add_event(database, last, CHECKPOINT_EVENT, found, "newer states were lost")
    reasons = salvage.reasons()
    if not holds_something and not states:
        raise RecordingError(
            f"nothing of {salvage.path} can be saved, neither frames nor states{f': {reasons}' if reasons else ''}"
        )
    said = "; ".join(left_out) + (f" ({reasons})" if reasons else "")
    if left_out:
        last = _add_event(database, last, REPAIRED_EVENT, None, f"left out {said}")
    insert(database, "newest", with_crcs([(last, states)]))
    database.execute("COMMIT")
    return positions, said if left_out else ""


def _gives_state(table: str, row: Row) -> bool:
    return table in _GIVEN and row[_GIVEN[table]] is not None


def _copy_states(
    salvage: _Salvage,
    database: sqlite3.Connection,
    first: int,
    named: int,
    last: int,
    expected: int | None,
    *,
    is_whole: bool,
) -> tuple[int, int]:
    """Save the checkpoints, if they are whole, and otherwise at least the one that the history begins with.

    States of a checkpoint that was not completed are newer, perhaps than the part of the history that was saved.

    Args:
        salvage: the damaged recording.
        database: the new one.
        first: position of the checkpoint that the history begins with; 0 for none.
        named: position of the newest checkpoint, as the saved history says.
        last: position of the newest row that was saved.
        expected: how many states there should be; None where that is damaged.
        is_whole: whether all of the history was saved.

    Returns:
        The position of the newest checkpoint that was saved, 0 for none, and the number of states.
    """
    checkpoints = [row for row in salvage.rows("checkpoints") if first <= row[0] and row[_COMPLETED] <= last]
    states = list(salvage.rows("states"))
    newest = checkpoints[-1][0] if checkpoints else 0
    is_newer = any(state[_STATE_POSITION] > named for state in states)
    are_sound = "states" not in salvage.damage and "checkpoints" not in salvage.damage
    if are_sound and newest == named and (is_whole or not is_newer) and expected in (None, len(states)):
        insert(database, "checkpoints", checkpoints)
        insert(database, "states", states)
        return newest, len(states)
    if not first:
        return 0, 0
    if not are_sound or not checkpoints or checkpoints[0][0] != first:
        raise RecordingError(f"nothing of {salvage.path} can be saved: the states that it begins with are damaged")
    states = [state for state in states if state[_STATE_POSITION] <= first]
    insert(database, "checkpoints", checkpoints[:1])
    insert(database, "states", states)
    return first, len(states)


def _add_event(database: sqlite3.Connection, last: int, kind: str, seq: int | None, detail: str) -> int:
    """The position of the new event."""
    insert(database, "events", with_crcs([(last + 1, time.time_ns(), None, seq, kind, detail, None)]))
    return last + 1
