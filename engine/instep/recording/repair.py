"""Makes new recordings from old ones: a range, or everything before the first damage."""

from __future__ import annotations

import heapq
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import astuple, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

from instep.interrupts import stop_no_more
from instep.recording import inspection
from instep.recording.database import check_place, insert, make_tables, remove_database, with_crcs
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.inspection import Inspection
from instep.recording.lock import WriterLock
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint, Trimmed
from instep.recording.schema import CHECKPOINT_EVENT, END_EVENT, HISTORY, OWNER_EVENT, REPAIRED_EVENT
from instep_client.files import rename_to_new
from instep_tools.problems import part_of, parts_left

Row: TypeAlias = tuple[Any, ...]
T = TypeVar("T")

_SLICE_POSITIONS: Final = 1024


@dataclass(frozen=True, slots=True)
class Cut:
    """The range that was cut out."""

    first_position: int
    last_position: int
    streams: int
    frames: int


def cut(reader: RecordingReader, target: Path, after: int = 0, last: int | None = None) -> Cut:
    """Write a range of a recording, which may still be being written, to a new one.

    Args:
        reader: reads the original.
        target: the new file.
        after: the range begins at the last kept checkpoint up to this position, or at the start of the recording.
        last: the position of its last row; None for the end of the recording.

    Raises:
        RecordingError: when the range is empty, or a file cannot be read or written, or the new one exists.
    """
    last = reader.last_position if last is None else min(last, reader.last_position)
    base = _base(reader, after, last) if after < last else None
    if base is None:
        raise RecordingError(
            f"the range is empty: {reader.path} holds the positions {reader.first_position:,} to "
            f"{reader.last_position:,}"
        )
    try:
        _, found = write_new(target, lambda database: _write_range(reader, database, base, last))
    except InconsistentCopy:
        raise DamagedRecording(f"{reader.path} is damaged, and so is what was cut out of it", reader.path) from None
    return Cut(base.position + 1, last, found.streams, found.frames)


def _base(reader: RecordingReader, until: int, last: int) -> Checkpoint | None:
    """The checkpoint at the start of the range, of position 0 at the start of the recording; None if it is empty.

    It is the newest checkpoint whose position is at most `until` and that was completed before `last`.
    """
    with reader.at_once():
        kept = [*([] if reader.trimmed.position else [Checkpoint()]), *reader.checkpoints()]
    if kept[-1].position > reader.trimmed.position:
        kept.pop()  # the newest may lack states: later ones replaced them, or their streams have closed
    later = [each for each in kept[1:] if each.position <= until and each.completed < last]
    found = later[-1] if later else kept[0]
    return found if max(found.position, found.completed) < last else None


def _write_range(reader: RecordingReader, database: sqlite3.Connection, base: Checkpoint, last: int) -> None:
    make_tables(database)
    insert(database, "header", reader.header.rows())
    states = _write_beginning(reader, database, base) if base.position else 0
    # In slices, so that a copy that was cut off holds all that came before in every table.
    for first in range(base.position + 1, last + 1, _SLICE_POSITIONS):
        for table in HISTORY:
            rows = reader.rows(table, first, min(first + _SLICE_POSITIONS - 1, last))
            insert(database, table, with_crcs(rows))
    last = _add_event(database, last, CHECKPOINT_EVENT, base.position, "later states were left out")
    last = _add_event(database, last, END_EVENT, None, f"cut out of {reader.path.name}")
    insert(database, "newest", with_crcs([(last, states)]))
    database.execute("COMMIT")


def _write_beginning(reader: RecordingReader, database: sqlite3.Connection, base: Checkpoint) -> int:
    """Write the rows that trimming would keep from before the range; return the number of states."""
    position, before = base.position, reader.trimmed
    closed = {row[2] for row in reader.rows("closings", last=position)}
    opened = list(reader.rows("openings", last=position))
    openings = [row for row in opened if row[2] not in closed]
    streams = {row[2] for row in openings}
    events = reader.rows_that_count(position, streams)
    owners = (row[3] for row in reader.rows("events", last=position) if row[4] == OWNER_EVENT)
    states = {row[0]: row for row in reader.rows("states") if row[0] in streams and row[1] <= position}
    trimmed = Trimmed(
        position,
        len(events),
        max([before.last_stream, *(row[2] for row in opened)]),
        max([before.last_epoch, *(row[4] for row in opened), *owners]),
    )
    tables: dict[str, Iterable[Row]] = {
        "openings": openings,
        "events": events,
        "trimmed": [astuple(trimmed)],
        "checkpoints": [astuple(base)],
        "states": states.values(),
    }
    for table, rows in tables.items():
        insert(database, table, with_crcs(rows))
    return len(states)


@dataclass(frozen=True, slots=True)
class Repaired:
    """The result of a repair."""

    positions: int
    """The number of saved rows of the history, which are all before the first damage."""
    frames: int
    streams: int
    left_out: str
    """Sentences that name the losses; empty if nothing was missing."""


def repair(source: Path, target: Path) -> Repaired:
    """Write a new recording with everything of a damaged one up to the first damage.

    The damaged recording is only read. The new one can be verified, exported and continued: its streams continue at the
    damage, and their clients are notified. It has only the states at its beginning, because later ones can be computed;
    the next start therefore replays all of it.

    Raises:
        RecordingError: when nothing can be saved, or the new file exists or cannot be written.
    """
    try:
        reader = _DamagedReader(source)
    except RecordingError as error:
        raise RecordingError(f"nothing of {source} can be saved: {error}") from None
    with reader:
        try:
            (positions, left_out), found = write_new(target, lambda database: _write_sound_rows(reader, database))
        except InconsistentCopy as error:
            raise RecordingError(
                f"{source} cannot be repaired, it is not only damaged but inconsistent: {error}"
            ) from None
    return Repaired(positions, found.frames, found.streams, left_out)


class _DamagedReader(RecordingReader):
    """Reads a recording that may be damaged anywhere except in its header.

    Attributes:
        damage: by table, the reason that reading ended early.
    """

    def __init__(self, path: Path) -> None:
        self.damage: dict[str, str] = {}
        super().__init__(path)

    def sound(self, table: str) -> Iterator[Row]:
        """The rows of a table in order, up to the first damaged one."""
        try:
            yield from self.rows(table)
        except DamagedRecording as error:
            self.damage[table] = str(error).removeprefix(f"{self.path} is damaged: ")

    def history(self) -> Iterator[tuple[str, Row]]:
        """Rows of all tables by position, from the first that was not trimmed to the first that is missing."""
        tables = (zip(repeat(table), self.sound(table), strict=False) for table in HISTORY)
        rows = heapq.merge(*tables, key=lambda item: item[1][0])
        later = (item for item in rows if item[1][0] >= self.first_position)
        for position, (table, row) in enumerate(later, start=self.first_position):
            if row[0] != position:
                return
            yield table, row

    def _is_left_in_wal_mode(self) -> bool:
        try:
            return super()._is_left_in_wal_mode()
        except DamagedRecording:  # it was cut off
            return True

    def _open(self) -> None:
        self._database.execute("PRAGMA writable_schema=ON")  # so that a file that was cut off is read at all
        super()._open()

    def _check_schema(self) -> None:
        pass

    def _find_ends(self) -> None:
        self.last_position = 2**63 - 1
        self.trimmed = next((Trimmed(*row) for row in self.sound("trimmed")), Trimmed())

    def _check_trimmed(self) -> None:
        pass


def _write_sound_rows(reader: _DamagedReader, database: sqlite3.Connection) -> tuple[int, str]:
    """Write the sound rows; return the number of positions that were saved, and sentences about the losses."""
    make_tables(database)
    insert(database, "header", reader.header.rows())
    first = last = reader.trimmed.position
    states = list[Row]()
    if first:
        insert(database, "trimmed", with_crcs([astuple(reader.trimmed)]))
        for table in ("openings", "closings", "events"):
            insert(database, table, with_crcs(row for row in reader.sound(table) if row[0] <= first))
        checkpoints = [row for row in reader.sound("checkpoints") if row[0] == first]
        states = [row for row in reader.sound("states") if row[1] <= first]
        if not checkpoints or "states" in reader.damage:
            raise RecordingError(f"nothing of {reader.path} can be saved: the states that it begins with are damaged")
        insert(database, "checkpoints", with_crcs(checkpoints))
        insert(database, "states", with_crcs(states))
    for table, row in reader.history():
        insert(database, table, with_crcs([row]))
        last = row[0]
    positions, newest = last - first, next(reader.sound("newest"), None)
    reasons = f" ({'; '.join(reader.damage.values())})" if reader.damage else ""
    if not positions and not states:
        raise RecordingError(f"nothing of {reader.path} can be saved{reasons}")
    left_out = ""
    if newest is None or newest[0] > last:
        left_out = f"positions {last + 1:,} to {'the last' if newest is None else f'{newest[0]:,}'}{reasons}"
    last = _add_event(database, last, CHECKPOINT_EVENT, first, "later states were left out")
    last = _add_event(database, last, REPAIRED_EVENT, None, f"left out: {left_out or 'the newer states'}")
    insert(database, "newest", with_crcs([(last, len(states))]))
    database.execute("COMMIT")
    return positions, left_out


def _add_event(database: sqlite3.Connection, last: int, kind: str, seq: int | None, detail: str) -> int:
    insert(database, "events", with_crcs([(last + 1, time.time_ns(), None, seq, kind, detail, None)]))
    return last + 1


class InconsistentCopy(RecordingError):
    """A new recording is inconsistent, although every row matches its CRC; the message names the problem."""


def write_new(target: Path, write: Callable[[sqlite3.Connection], T]) -> tuple[T, Inspection]:
    """Make and check a new recording. It gets its name once it is complete; after a failure nothing is left of it.

    Unfinished files that killed runs left for the same target are removed. Signals are ignored from just before the
    file gets its name.

    Args:
        target: the new file.
        write: begins, fills and commits a transaction in the empty database.

    Raises:
        RecordingError: when the file exists, is being written or cannot be written.
        InconsistentCopy: when the new file is not a sound recording.
    """
    check_place(target)
    exists = RecordingError(f"{target} already exists; a recording is never written over: choose another name")
    if os.path.lexists(target):
        raise exists
    part = part_of(target)
    try:
        with ExitStack() as held:
            held.callback(WriterLock(target).release)
            for left in parts_left(target):
                remove_database(left)
            with closing(sqlite3.connect(part, isolation_level=None)) as database:
                written = write(database)
            found = inspection.inspect(part)
            stop_no_more()
            rename_to_new(part, target)
        return written, found
    except FileExistsError:
        raise exists from None
    except (sqlite3.Error, OSError) as error:
        raise RecordingError(f"cannot write the recording {target}: {error}") from None
    except DamagedRecording as error:
        if error.path != part:
            raise
        raise InconsistentCopy(str(error).removeprefix(f"{part} is damaged: ")) from None
    finally:
        remove_database(part)
