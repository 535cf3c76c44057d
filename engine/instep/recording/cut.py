"""Cutting a range out of a recording, as a recording of its own."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import astuple, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from instep.recording.database import insert, make_tables, with_crcs
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.inspection import when, write_new
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint, Trimmed
from instep.recording.schema import CHECKPOINT_EVENT, END_EVENT, HISTORY, OWNER_EVENT

_SLICE_POSITIONS: Final = 1024


@dataclass(frozen=True, slots=True)
class Bound:
    """One end of a range: a position of the history, or a time."""

    kind: Literal["position", "time"]
    value: int
    """A position, or nanoseconds since 1970."""

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read a position (`1200`) or a time (`2026-11-26T18:30`, in UTC where it names no offset).

        Raises:
            RecordingError: when it is neither.
        """
        if text.isascii() and text.isdecimal():
            return cls("position", int(text))
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            raise RecordingError(
                f"{text!r} is neither a position, like 1200, nor a time, like 2026-11-26T18:30 or "
                "2026-11-26T18:30:05+01:00"
            ) from None
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        return cls("time", round(moment.timestamp() * 1e6) * 1000)


@dataclass(frozen=True, slots=True)
class Archive:
    """The range that was cut out."""

    first_position: int
    last_position: int
    """Of the source."""
    first_ns: int
    last_ns: int
    """When they were recorded."""
    streams: int
    frames: int
    begins_early: bool
    """Whether the range begins before what was asked for."""


def cut(source: Path, target: Path, begin: Bound | None, end: Bound | None) -> Archive:
    """Write a new recording that holds a range of another, from the last checkpoint at or before its beginning.

    Args:
        source: a recording, which may still be written; it is only read.
        target: the new file.
        begin: where the range begins; None for where the recording does.
        end: the last position, or the last moment, in it; None for the end of the recording.

    Raises:
        RecordingError: when the range is empty, or a file cannot be read or written, or the new one exists.
    """
    with RecordingReader(source) as reader:
        last = _last(reader, end)
        base = _base(reader, begin, end, last)
        first = base.position + 1
        # Read now: once the new file is written, the source may have been trimmed.
        first_ns, last_ns = _time_at(reader, first), _time_at(reader, last)
        try:
            _, found = write_new(target, lambda database: _write(reader, database, base, last))
        except DamagedRecording as error:
            if error.path != target:
                raise
            raise DamagedRecording(f"{source} is damaged, and so is what was cut out of it", source) from None
    early = begin is not None and (first if begin.kind == "position" else first_ns) < begin.value
    return Archive(first, last, first_ns, last_ns, found.streams, found.frames, early)


def _time_at(reader: RecordingReader, position: int) -> int:
    """The time at which a position was recorded, or 0 if it does not exist."""
    return next((row[1] for table in HISTORY for row in reader.rows(table, position, position)), 0)


def _last(reader: RecordingReader, end: Bound | None) -> int:
    if end is None:
        return reader.last_position
    if end.kind == "position":
        return min(end.value, reader.last_position)
    later = (row[0] for table in HISTORY for row in reader.rows(table, reader.first_position) if row[1] > end.value)
    return min(later, default=reader.last_position + 1) - 1


def _base(reader: RecordingReader, begin: Bound | None, end: Bound | None, last: int) -> Checkpoint:
    """The checkpoint that the range begins with; of position 0 for the beginning of all."""
    if begin is not None and begin.kind == "position" and begin.value > last:
        raise RecordingError(f"the range is empty: it begins at position {begin.value:,} and ends at {last:,}")
    if begin is not None and begin.kind == "time":
        begin = _beginning(reader, begin, last)
    kept = [Checkpoint()] if not reader.trimmed.position else []
    kept += reader.checkpoints()
    # The newest one may lack states: later ones replaced them, or their streams have closed.
    if kept[-1].position > reader.trimmed.position:
        kept.pop()
    found = kept[0]
    for checkpoint in kept[1:]:
        if begin is None:
            break
        at = checkpoint.position if begin.kind == "position" else checkpoint.time_ns
        if at <= begin.value and checkpoint.completed < last:
            found = checkpoint
    start = max(found.position, found.completed)
    if last <= start:
        since = _time_at(reader, reader.first_position)
        if since and last < reader.first_position and end is not None and end.kind == "time":
            raise RecordingError(
                f"the range is empty: it ends at {when(end.value)}, and {reader.path} begins later, at {when(since)}"
            )
        raise RecordingError(
            f"the range is empty: {reader.path} begins at position {reader.first_position:,} and has checkpoints at "
            f"{', '.join(f'{each.position:,}' for each in kept if each.position) or 'no position'}"
        )
    return found


def _beginning(reader: RecordingReader, begin: Bound, last: int) -> Bound:
    """The time at which a range begins, or the position where it does if the clock has gone back since."""
    ends = _time_at(reader, last)
    if not ends or begin.value <= ends:
        return begin
    first = last + 1
    for table in HISTORY:
        for position, time_ns, *_ in reader.rows(table, reader.first_position, last):
            ends = max(ends, time_ns)
            if time_ns >= begin.value:
                first = min(first, position)
    if begin.value > ends:
        raise RecordingError(f"the range is empty: it begins at {when(begin.value)} and ends at {when(ends)}")
    return Bound("position", first - 1)


def _write(reader: RecordingReader, database: sqlite3.Connection, base: Checkpoint, last: int) -> None:
    make_tables(database)
    insert(database, "header", reader.header.rows())
    states = 0
    if base.position:
        closings = {row[2] for row in reader.rows("closings", last=base.position)}
        openings = [row for row in reader.openings() if row[0] <= base.position and row[2] not in closings]
        streams = {row[2] for row in openings}
        events = reader.rows_that_count(base.position, streams)
        begun = {row[0]: row for row in reader.rows("states") if row[0] in streams and row[1] <= base.position}
        states = len(begun)
        trimmed = _trimmed(reader, base.position, len(events))
        for table, values in (
            ("openings", openings),
            ("events", events),
            ("trimmed", [astuple(trimmed)]),
            ("checkpoints", [astuple(base)]),
            ("states", begun.values()),
        ):
            insert(database, table, with_crcs(values))
    # In slices, so that a copy that was cut off holds all that came before in every table.
    for first in range(base.position + 1, last + 1, _SLICE_POSITIONS):
        for table in HISTORY:
            rows = reader.rows(table, first, min(first + _SLICE_POSITIONS - 1, last))
            insert(database, table, with_crcs(rows))
    now = time.time_ns()
    for kind, seq, detail in (
        (CHECKPOINT_EVENT, base.position, "later states were left out"),
        (END_EVENT, None, f"cut out of {reader.path.name}"),
    ):
        last += 1
        insert(database, "events", with_crcs([(last, now, None, seq, kind, detail, None)]))
    insert(database, "newest", with_crcs([(last, states)]))
    database.execute("COMMIT")


def _trimmed(reader: RecordingReader, position: int, events: int) -> Trimmed:
    openings = list(reader.rows("openings", last=position))
    owners = [row[3] for row in reader.rows("events", last=position) if row[4] == OWNER_EVENT]
    before = reader.trimmed
    return Trimmed(
        position,
        events,
        max([before.last_stream, *(row[2] for row in openings)]),
        max([before.last_epoch, *(row[4] for row in openings), *owners]),
    )
