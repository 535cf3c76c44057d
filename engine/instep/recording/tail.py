"""The end of a recording that is being written, read again and again as it grows."""

from __future__ import annotations

import heapq
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from instep.core.typing import U8
from instep.recording.errors import DamagedRecording
from instep.recording.reader import MARKS, READ_LIMITS, ReadLimits, RecordingReader
from instep.recording.records import BatchGroup, OpenStream, RecordedEvent
from instep.recording.schema import (
    CHECKPOINT_EVENT,
    ENGINE_EVENT,
    RECOVERED_EVENT,
    TABLES,
    read_checkpoint_frames,
    sound_rows,
)


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream opened."""

    position: int
    stream: int
    name: str
    first_seq: int
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A stream ended."""

    position: int
    stream: int


Item: TypeAlias = Opened | Closed | RecordedEvent | BatchGroup


class RecordingTail(RecordingReader):
    """A recording as of its newest commit, of which a former reader has seen the beginning.

    Each is open for a moment only: a reader that stays would keep the writer from closing the file in order.

    Args:
        path: the recording.
        former: read the same recording before, and saves this one reading all of its events; closed or not.
        limits: of one transaction; where `former` is given, its limits are used instead.

    Attributes:
        newest_checkpoint: the position of the newest complete one; 0 for none.
    """

    def __init__(self, path: Path, former: RecordingTail | None = None, limits: ReadLimits = READ_LIMITS) -> None:
        super().__init__(path, limits if former is None else former.limits)
        self._former_marks = None if former is None else (former.last_position, former._marks)
        try:
            with self.at_once():  # the writer may trim the history between two queries
                self.newest_checkpoint = self.checkpoint().position
                self._marks = self._read_marks()
        except BaseException:
            self.close()
            raise

    def history(self, first: int) -> Iterator[Item]:
        """Everything that happened from a position on, in order, up to the first batch whose outcome is not known yet.

        Batches come in groups, with nothing else between those of a group. Those that failed are left out, and those
        whose outputs will never come, because the engine was killed, have none.

        Raises:
            TrimmedMeanwhile: when the history was trimmed since this opened.
            RecordingError: when a row is damaged.
        """
        first = max(first, self.first_position)
        openings = (
            Opened(position, stream, name, first_seq, self.state(state, position))
            for position, _, stream, name, _, first_seq, state in self.rows("openings", first)
        )
        closings = (Closed(row[0], row[2]) for row in self.rows("closings", first))
        killed_before = max((mark.position for mark in self._marks if mark.kind == RECOVERED_EVENT), default=0)
        others: Iterator[Opened | Closed | RecordedEvent]
        others = heapq.merge(openings, closings, self.events(first), key=lambda item: item.position)
        other = next(others, None)
        for group in self.whole_groups(first):
            begin, positions = 0, group.positions
            end = len(positions) if group.y is not None else bisect(positions, killed_before)
            while other is not None and other.position < positions[min(end, len(positions) - 1)]:
                before = bisect(positions, other.position)
                if begin < before:
                    yield group.part(begin, before)
                yield other
                begin, other = before, next(others, None)
            if begin < end:
                yield group.part(begin, end)
            if end < len(positions):
                return
        if other is not None:
            yield other
        yield from others

    def newest_open(self, most: int) -> list[int]:
        """The numbers of streams that are open, those that opened last, up to `most`; nothing is checked."""
        has_closed = "SELECT 1 FROM closings WHERE closings.stream = openings.stream"
        query = f"SELECT stream FROM openings WHERE NOT EXISTS ({has_closed}) ORDER BY position DESC LIMIT ?"
        rows, error = self._fetch(query, (most,))
        if error is not None:
            raise self.damaged(f"the table openings cannot be read: {error}")
        return [row[0] for row in rows]

    def frames_until(self, position: int) -> int:
        """How many frames were applied up to a checkpoint's position, trimmed ones too; 0 where no event says so."""
        completed = f"position > ?1 AND kind = '{CHECKPOINT_EVENT}' AND seq = ?1 ORDER BY position LIMIT 1"
        query = f"SELECT {', '.join((*TABLES['events'], 'crc'))} FROM events WHERE {completed}"
        rows, error = self._fetch(query, (position,))
        if error is not None or sound_rows("events", rows) < len(rows):
            raise self.damaged(f"the event about the checkpoint of position {position} cannot be read")
        return sum(read_checkpoint_frames(row[5]) for row in rows)

    def newest_state(self, stream: int) -> OpenStream | None:
        """A stream in its newest state that the recording holds; None where it has closed."""
        try:
            found = self.open_stream(stream)
        except DamagedRecording:
            if self.newest_row("openings", "stream = ?", stream) is None:
                return None  # it has closed, and was trimmed
            raise
        # Looked for last: the states of a stream go once it has closed.
        return found if self.newest_row("closings", "stream = ?", stream) is None else None

    def forget(self, position: int) -> None:
        """Nothing up to a position is read any more, here or where this one is `former`: its marks are not needed."""
        self._marks = [mark for mark in self._marks if mark.kind == ENGINE_EVENT or mark.position > position]

    def _read_marks(self) -> list[RecordedEvent]:
        if self._former_marks is None:
            return super()._read_marks()
        last, before = self._former_marks
        return [*before, *(event for event in self.events(last + 1) if event.kind in MARKS)]
