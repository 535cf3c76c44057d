"""Reads checked rows of a recording, finished or still being written, and decodes them."""

from __future__ import annotations

import operator
import os
import sqlite3
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from instep.core.typing import I64, U8
from instep.recording.errors import DamagedRecording, RecordingError, TrimmedMeanwhile, UnavailableRecording
from instep.recording.records import (
    Checkpoint,
    OpenStream,
    RecordedEngine,
    RecordedEvent,
    RecordedFrames,
    StreamInfo,
    StreamState,
    Trimmed,
)
from instep.recording.schema import (
    APPLICATION_ID,
    END_EVENT,
    ENGINE_EVENT,
    FAILED_EVENT,
    FORMAT_VERSION,
    HISTORY,
    LOST,
    MOVED_EVENT,
    OWNER_EVENT,
    PAGE_BYTES,
    RECOVERED_EVENT,
    RESET_EVENT,
    TABLES,
    UNKNOWN_SEQ,
    RecordingHeader,
    create_statements,
    read_owner_detail,
    sound_rows,
)

MARKS: Final = (ENGINE_EVENT, FAILED_EVENT, RECOVERED_EVENT)
"""The kinds of events that affect how other rows are read."""
UNREADABLE: Final = (sqlite3.Error, OverflowError, UnicodeDecodeError)
"""The exceptions of Python's sqlite3 for a damaged file."""

ROWS_AT_ONCE: Final = 1024
"""The most rows read in one transaction, because an open transaction keeps the WAL from being reused."""
BYTES_AT_ONCE: Final = 2**19
"""The approximate bytes of blobs read in one transaction."""
ROWS_A_LOOK: Final = 16
"""Rows read between two checks of the bytes; divides `ROWS_AT_ONCE`."""
_START_BYTES: Final = 32
_READ_VERSION_OFFSET: Final = 19
_IN_WAL_MODE: Final = 2
_PASSING: Final = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PROTOCOL)
"""Temporary errors: another program locks the file, or this process has too many files open."""


def load_open_streams(path: Path, streams: Iterable[int]) -> list[OpenStream]:
    """Load open streams by number, as of the last commit.

    Raises:
        RecordingError: when the file cannot be read.
        DamagedRecording: when a row of one of them is damaged or missing.
    """
    with RecordingReader(path) as reader, reader.at_once():
        return reader.open_streams(streams)


class Closing:
    """A context manager that calls `close` at its end."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        raise NotImplementedError


class RecordingReader(Closing):
    """Checked rows of a recording that is finished or still being written. It never writes.

    It shows the rows that were committed when it opened. With `since`, for a reader that follows a recording, `engines`
    are those after that position.

    Attributes:
        path: the file.
        header: the engine that began the file.
        trimmed: the beginning of a trimmed history.
        last_position: of the newest row; 0 if there is none.
        state_rows: the expected count of rows in the table `states`.

    Raises:
        RecordingError: from every method, when the file is not a recording or of another version.
        UnavailableRecording: when it cannot be read at the moment.
        DamagedRecording: when it is damaged.
    """

    def __init__(self, path: Path, since: int = 0) -> None:
        self.path = path
        self._since = since
        # In WAL mode but without a WAL, nobody writes it, and its folder may be read-only.
        try:
            path.stat()
            has_more = any(Path(f"{path}{suffix}").exists() for suffix in ("-wal", "-journal"))
            alone = not has_more and self._is_left_in_wal_mode()
        except IsADirectoryError:
            raise RecordingError(
                f"cannot read the recording {path}: it is a folder; name a file in it, as `instep recordings info "
                f"{path}` lists them"
            ) from None
        except OSError as error:
            raise RecordingError(f"cannot read the recording {path}: {error.strerror}") from None
        with self._reading("is not a recording, or is damaged"):
            # A writer that was killed while it put the WAL away has left a journal. SQLite undoes that first.
            writable = "rw" if Path(f"{path}-journal").exists() else "ro"
            uri = f"file:{quote(str(path.absolute()))}?mode={'ro&immutable=1' if alone else writable}"
            self._database = sqlite3.connect(uri, uri=True, isolation_level=None)
        try:
            with self._reading("is not a recording, or is damaged"):
                self._open()
        except RecordingError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Read several tables as of the newest commit; from then on `last_position` is of that commit."""
        with self._reading("is damaged"):
            self._database.execute("BEGIN")
        try:
            self._find_ends()
            yield
        finally:
            self._database.rollback()

    @property
    def first_position(self) -> int:
        """The first position that was not trimmed."""
        return self.trimmed.position + 1

    def check_positions(self, first: int = 1) -> None:
        """Raise if a row from `first` on is missing or two have the same position."""
        first = max(first, self.first_position)
        last = self.last_position
        found = np.sort(np.concatenate([self._positions(table, first, last) for table in HISTORY]))
        expected: I64 = np.arange(first, last + 1)
        if len(found) != len(expected) or (found != expected).any():
            both = min(len(found), len(expected))
            wrong = np.flatnonzero(found[:both] != expected[:both])
            at = int(wrong[0]) if len(wrong) else both
            raise self.damaged(f"the row at position {first + at} is missing, or was written twice")

    def rows(self, table: str, first: int = 1, last: int | None = None) -> Iterator[tuple[Any, ...]]:
        """Checked rows of a table in the order of its key, without CRCs; of the history up to `last_position`.

        Raises:
            RecordingError: also when the history was trimmed since this opened.
        """
        return chain.from_iterable(self.row_lists(table, first, last))

    def row_lists(self, table: str, first: int = 1, last: int | None = None) -> Iterator[list[tuple[Any, ...]]]:
        """Like `rows`, in lists that are read in short transactions, so that the WAL can be reused."""
        keys = ("stream", "position") if table == "states" else (next(iter(TABLES[table])),)
        columns = ", ".join((*TABLES[table], "crc"))
        key, order = keys[0], ", ".join(keys)
        query = f"SELECT {columns} FROM {table} WHERE ({order}) > ({', '.join('?' * len(keys))}) AND {key} <= ? "
        query += f"ORDER BY {order} LIMIT {ROWS_AT_ONCE}"
        until = 2**63 - 1 if last is None else last
        if table in HISTORY:
            until = min(until, self.last_position)
        before: tuple[int, ...] = (first - 1,) if len(keys) == 1 else (first - 1, 2**62)
        while True:
            rows, error = self._fetch(query, (*before, until))
            if table in HISTORY:
                self._check_trimmed()
            found = [row[: len(keys)] for row in rows[: sound_rows(table, rows)]]
            sound = [*map(operator.lt, [before, *found], found), False].index(False)
            if sound:
                yield [row[:-1] for row in rows[:sound]]
                before = found[sound - 1]
            if sound < len(rows):
                raise self.damaged(f"the row at {key} {rows[sound][0]} (of {table}) does not match its CRC")
            if error is not None:
                raise self.damaged(f"the rows after {key} {before[0]} (of {table}) cannot be read: {error}")
            if not rows or len(rows) % ROWS_A_LOOK:
                return  # the query had no more

    def _fetch(self, query: str, values: tuple[int, ...]) -> tuple[list[tuple[Any, ...]], Exception | None]:
        """Rows of a query up to its end, to an error, or to about `BYTES_AT_ONCE`."""
        rows: list[tuple[Any, ...]] = []
        size, count, look = 0, 0, ROWS_A_LOOK
        try:
            with closing(self._database.execute(query, values)) as cursor:
                while len(rows) == count and size < BYTES_AT_ONCE:
                    count += look
                    rows.extend(islice(cursor, look))  # those before an error are kept
                    size += look * sum(len(value) for row in rows[-1:] for value in row if type(value) is bytes)
        except UNREADABLE as error:
            self._refuse_passing(error)
            return rows, error
        return rows, None

    def _is_at_once(self) -> bool:
        return self._database.in_transaction

    def _check_trimmed(self) -> None:
        """Raise if rows that this reader shows may have been deleted."""
        rows, error = self._fetch("SELECT position FROM trimmed LIMIT 2", ())
        if error is None and (rows[0][0] if rows else 0) != self.trimmed.position:
            raise TrimmedMeanwhile(f"the history of {self.path} was trimmed while it was read: read it again")

    def newest_row(self, table: str, condition: str, stream: int) -> tuple[Any, ...] | None:
        """A stream's newest row of a table, checked and without its CRC; None if it has no row."""
        query = (
            f"SELECT {', '.join((*TABLES[table], 'crc'))} FROM {table} WHERE {condition} ORDER BY position DESC LIMIT 1"
        )
        rows, error = self._fetch(query, (stream,))
        if error is not None:
            raise self.damaged(f"the rows of stream {stream} (of {table}) cannot be read: {error}")
        if sound_rows(table, rows) < len(rows):
            raise self.damaged(f"a row of stream {stream} (of {table}) does not match its CRC")
        return rows[0][:-1] if rows else None

    def totals(self) -> tuple[int, int]:
        """Count the batches, including those that failed, and the frames in them; unchecked."""
        with self._reading("is damaged"):
            query = "SELECT count(*), ifnull(sum(size), 0) FROM batches WHERE position BETWEEN ? AND ?"
            batches, frames = self._database.execute(query, (self.first_position, self.last_position)).fetchone()
        return int(batches), int(frames)

    def time_at(self, position: int) -> int:
        """The time of the row at a position, in nanoseconds since 1970; 0 if there is none."""
        return next((row[1] for table in HISTORY for row in self.rows(table, position, position)), 0)

    def first_at(self, time_ns: int) -> int:
        """The first position recorded at this time or later, or the one after the last; unchecked."""
        some = "SELECT min(position) FROM {} WHERE time_ns >= ?1 AND position BETWEEN ?2 AND ?3"
        with self._reading("is damaged"):
            query = " UNION ALL ".join(map(some.format, HISTORY))
            found = self._database.execute(query, (time_ns, self.first_position, self.last_position)).fetchall()
        return min((position for (position,) in found if position is not None), default=self.last_position + 1)

    @cached_property
    def _state_bytes(self) -> int:
        return self.header.state_spec.row_bytes

    def state(self, blob: bytes | None, position: int) -> U8 | None:
        """The state, uint8 [row_bytes], in the row at a position."""
        if blob is None:
            return None
        self.check_bytes(blob, self._state_bytes, position)
        return np.frombuffer(blob, np.uint8)

    def check_bytes(self, blob: bytes, expected: int, position: int) -> None:
        """Raise if a column of the row at a position has the wrong length."""
        if len(blob) != expected:
            raise self.damaged(f"the row at position {position} holds {len(blob)} bytes where {expected} belong")

    def damaged(self, what: str) -> DamagedRecording:
        """The error for damage, with this recording's path."""
        return DamagedRecording(f"{self.path} is damaged: {what}", self.path)

    @property
    def finished(self) -> bool:
        """Whether it ended with a clean shutdown."""
        return any(row[4] == END_EVENT for row in self.rows("events", self.last_position))

    @cached_property
    def engines(self) -> tuple[RecordedEngine, ...]:
        """The engines that wrote it, in order."""
        engines = [RecordedEngine(0, self.header)]
        for event in self._marks:
            if event.kind == ENGINE_EVENT:
                try:
                    header = engines[-1].header.changed(event.detail)
                except RecordingError as error:
                    raise self.damaged(f"the event at position {event.position}: {error}") from None
                engines.append(RecordedEngine(event.position, header))
        return tuple(engines)

    def openings(self) -> Iterator[tuple[Any, ...]]:
        """Rows of the table `openings`, without those that trimming is about to delete."""
        ended, count = self.ended_where_trimmed, 0
        for row in self.rows("openings"):
            if row[0] > self.trimmed.position or row[2] not in ended:
                count += row[0] <= self.trimmed.position
                yield row
        expected = self.oldest.openings - self.oldest.closings
        if count != expected:
            raise self.damaged(f"{count:,} streams are left from before it was trimmed instead of {expected:,}")

    def streams(self) -> list[StreamInfo]:
        """Every opening in order; in a trimmed history, each as of the checkpoint at its beginning."""
        closings = {row[2]: row for row in self.rows("closings", self.first_position)}
        opened = [self._stream(row, closings.pop(row[2], None)) for row in self.openings()]
        if closings:
            raise self.damaged(f"stream {min(closings)} was closed, but never opened")
        return [self._as_trimmed(info) for info in opened if info.stream not in self._forgotten]

    def frames(self, first: int = 1, last: int | None = None) -> Iterator[RecordedFrames]:
        """Frames of the batches at positions `first` to `last` (None: the newest) whose step did not fail.

        Each item has the frames of one read, either all with outputs or all without. A batch without outputs may only
        be followed by others without, up to the end or to an event `recovered`. Up to `trimmed_until` the items include
        frames that do not count.
        """
        first, failed = max(first, self.first_position), set(self._failed)
        outputs_ahead = self.rows("outputs", first)
        outputs: dict[int, bytes] = {}
        """Outputs that were read ahead, by the rising position of the batch."""
        newest = 0
        for rows in self.row_lists("batches", first, last):
            waiting = [row for row in rows if row[0] not in failed]
            while waiting and newest < waiting[-1][0] and (output := next(outputs_ahead, None)) is not None:
                if first <= output[2] <= newest:
                    raise self._misplaced(output[2])
                newest = output[2]
                if newest >= first:
                    outputs[newest] = output[3]
            for are_answered, group in groupby(waiting, lambda row: row[0] in outputs):
                batches = list(group)
                if are_answered:
                    yield self._frames(batches, [outputs.pop(row[0]) for row in batches])
                else:
                    for row in batches:
                        self._check_unanswered(row[0], next((batch for batch in outputs if batch > row[0]), None))
                    yield self._frames(batches, None)
            for batch in islice(outputs, 1):
                if waiting and batch <= waiting[-1][0]:
                    raise self._misplaced(batch)
        if last is None:
            for batch in (*outputs, *(output[2] for output in outputs_ahead if output[2] >= first)):
                raise self._misplaced(batch)

    def _misplaced(self, batch: int) -> DamagedRecording:
        return self.damaged(
            f"it holds outputs of the batch at position {batch}, which there is not, or not in this order"
        )

    def events(self, first: int = 1) -> Iterator[RecordedEvent]:
        """Events from position `first` on, in order; none from before the beginning of a trimmed history."""
        return map(self._event, self.rows("events", max(first, self.first_position)))

    def events_that_count(self) -> list[RecordedEvent]:
        """Events before the trimmed position on which later rows depend, in order."""
        rows = self.rows_that_count(self.trimmed.position, self._open_where_trimmed)
        if len(rows) != self.trimmed.events:
            raise self.damaged(
                f"{len(rows):,} events are left from before it was trimmed instead of {self.trimmed.events:,}"
            )
        return [self._event(row) for row in rows]

    def rows_that_count(self, position: int, open_streams: Set[int]) -> list[tuple[Any, ...]]:
        """Rows of `events` up to a position on which later rows depend: each newest owner, every engine."""
        owners, engines = dict[int, tuple[Any, ...]](), list[tuple[Any, ...]]()
        for row in self.rows("events", last=position):
            if row[4] == ENGINE_EVENT:
                engines.append(row)
            elif row[4] == OWNER_EVENT and row[2] in open_streams:
                owners[row[2]] = row
        return sorted([*engines, *owners.values()])

    def _event(self, row: tuple[Any, ...]) -> RecordedEvent:
        position, time_ns, stream, seq, kind, detail, state = row
        return RecordedEvent(position, time_ns, stream, seq, kind, detail, self.state(state, position))

    def resets(self) -> Iterator[tuple[int, int, RecordedEvent]]:
        """Resets in order, with stream and seq, except those that the initial states already contain."""
        for event in self.events():
            if event.kind == RESET_EVENT:
                if event.stream is None or event.seq is None:
                    raise self.damaged(f"the event at position {event.position} resets no stream")
                if event.position > self.oldest.completed or not (
                    event.stream in self._forgotten or event.seq < self._trimmed_to.get(event.stream, (0, None))[0]
                ):
                    yield event.stream, event.seq, event

    def start_states(self, streams: Sequence[StreamInfo]) -> Iterator[tuple[int, int, bytes | None]]:
        """For these streams, states that do not result from the frame before: stream, seq, state.

        The state is None for the model's initial one, which is not listed for frame 0.
        """
        begins = [(info.stream, info.first_seq, info.initial_state) for info in streams]
        found = [each for each in begins if each[1] or each[2] is not None]
        numbers = {info.stream for info in streams}
        found += [(stream, seq, reset.state) for stream, seq, reset in self.resets() if stream in numbers]
        for stream, seq, state in found:
            yield stream, seq, None if state is None else state.tobytes()

    @property
    def trimmed_until(self) -> int:
        """Batches up to this position may contain frames that the initial states already include."""
        return self.oldest.completed

    def checkpoints(self) -> list[Checkpoint]:
        """Complete checkpoints in order; a trimmed history begins at the first.

        Only within `at_once` is the list complete: later checkpoints may have replaced some since this opened.
        """
        found = [Checkpoint(*row) for row in self.rows("checkpoints")]
        if not self._is_at_once():
            self._check_trimmed()
            found = [checkpoint for checkpoint in found if checkpoint.completed <= self.last_position]
        for checkpoint in found:
            if not self.trimmed.position <= checkpoint.position <= checkpoint.completed <= self.last_position:
                raise self.damaged(f"its checkpoint is of position {checkpoint.position}, which there is not")
        if self.trimmed.position and (not found or found[0].position != self.trimmed.position):
            raise self.damaged(f"the checkpoint at position {self.trimmed.position}, where it was trimmed, is missing")
        return found

    def checkpoint(self) -> Checkpoint:
        """The newest complete checkpoint, with position 0 if there is none."""
        return (self.checkpoints() or [Checkpoint()])[-1]

    def states(self) -> Iterator[StreamState]:
        """All states, within `at_once`, by stream and checkpoint, so a stream's last is its newest.

        Raises:
            DamagedRecording: at the end also when some are missing.
        """
        count = 0
        for row in self.rows("states"):
            state, count = self.stream_state(row), count + 1
            if state.position > self.last_position:
                raise self.damaged(
                    f"a state of stream {state.stream} is of position {state.position}, which there is not"
                )
            yield state
        if count != self.state_rows:
            raise self.damaged(f"it holds {count:,} states instead of {self.state_rows:,}")

    def stream_state(self, row: tuple[Any, ...]) -> StreamState:
        """Decode a row of the table `states`."""
        stream, position, seq, state, tail_seq, tail_x, tail_y = row
        if not 0 <= tail_seq <= seq:
            raise self.damaged(f"the state of stream {stream} has a tail from {tail_seq} to {seq}")
        widths = (self.header.features, self.header.outputs)
        for blob, width in zip((tail_x, tail_y), widths, strict=True):
            self.check_bytes(blob, (seq - tail_seq) * width * 4, position)
        found = self.state(state, position)
        assert found is not None, "the column is NOT NULL"
        x, y = (
            np.frombuffer(blob, "<f4").reshape(-1, width) for blob, width in zip((tail_x, tail_y), widths, strict=True)
        )
        return StreamState(stream, position, seq, found, tail_seq, x, y)

    def open_streams(self, streams: Iterable[int]) -> list[OpenStream]:
        """Open streams by number, each in its newest state.

        Raises:
            DamagedRecording: when a row of one of them is damaged or missing.
        """
        found = list[OpenStream]()
        for number in streams:
            if (stream := self.open_stream(number)) is None:
                raise self.damaged(f"the table openings has no row of stream {number}, or the table closings has one")
            found.append(stream)
        return found

    def open_stream(self, stream: int) -> OpenStream | None:
        """A stream by number, in its newest state; None if it has closed or never opened.

        Raises:
            DamagedRecording: when a row of it is damaged.
        """
        opening = self.newest_row("openings", "stream = ?", stream)
        row = self.newest_row("states", "stream = ?", stream)
        # Looked for last: the states of a stream go once it has closed.
        if opening is None or self.newest_row("closings", "stream = ?", stream) is not None:
            return None
        position, _, _, name, epoch, first_seq, initial = opening
        owner = (int(epoch), 0, int(first_seq))
        taken = self.newest_row("events", f"kind = '{OWNER_EVENT}' AND stream = ?", stream)
        if taken is not None:
            try:
                owner = (int(taken[3]), *read_owner_detail(taken[5]))
            except (TypeError, ValueError):
                raise self.damaged(f"the event at position {taken[0]} names no owner") from None
        if row is not None:
            state = self.stream_state(row)
            tail = (state.tail_seq, state.tail_x, state.tail_y)
            return OpenStream(stream, name, *owner, first_seq, state.seq, state.state, *tail)
        x, y = (np.zeros((0, width), np.float32) for width in (self.header.features, self.header.outputs))
        found = self.state(initial, position)
        return OpenStream(stream, name, *owner, first_seq, first_seq, found, first_seq, x, y)

    def check_announced(self, position: int) -> None:
        """Raise unless the newest checkpoint is the one of the newest event `checkpoint`."""
        if (newest := self.checkpoint().position) != position:
            raise self.damaged(
                f"up to position {self.last_position} its newest checkpoint should be of position {position}, and is "
                f"of {newest}"
            )

    @cached_property
    def _marks(self) -> list[RecordedEvent]:
        before = self.events_that_count() if self.trimmed.position > self._since else []
        return [event for event in (*before, *self.events(self._since + 1)) if event.kind in MARKS]

    @cached_property
    def oldest(self) -> Checkpoint:
        """The checkpoint at which the history begins; its position is 0 if nothing was trimmed."""
        return self.checkpoints()[0] if self.trimmed.position else Checkpoint()

    @cached_property
    def _trimmed_to(self) -> dict[int, tuple[int, U8]]:
        """For streams open at the trimmed position: the first frame that counts, and the state before it."""
        found: dict[int, tuple[int, U8]] = {}
        if self.trimmed.position:
            open_streams = self._open_where_trimmed
            for state in map(self.stream_state, self.rows("states")):
                if state.position <= self.trimmed.position and state.stream in open_streams:
                    found[state.stream] = (state.seq, state.state)
        return found

    @cached_property
    def _forgotten(self) -> frozenset[int]:
        """Streams that closed during the checkpoint of the trimmed position; they may have no state there."""
        if not self.trimmed.position:
            return frozenset()
        closed = {row[2] for row in self.rows("closings", self.first_position, self.oldest.completed)}
        return self._open_where_trimmed & closed

    @cached_property
    def ended_where_trimmed(self) -> frozenset[int]:
        """Streams that had closed at the trimmed position, whose rows are about to be deleted."""
        return frozenset(row[2] for row in self.rows("closings", last=self.trimmed.position))

    @cached_property
    def _open_where_trimmed(self) -> frozenset[int]:
        return frozenset(row[2] for row in self.openings() if row[0] <= self.trimmed.position)

    def _as_trimmed(self, info: StreamInfo) -> StreamInfo:
        if info.stream not in self._trimmed_to:
            return info
        first_seq, state = self._trimmed_to[info.stream]
        return replace(info, first_seq=first_seq, initial_state=state)

    @cached_property
    def _failed(self) -> list[int]:
        """Positions of the failed batches, in order."""
        return [event.seq for event in self._marks if event.kind == FAILED_EVENT and event.seq is not None]

    @cached_property
    def recovered_at(self) -> list[int]:
        """Positions of the events `recovered`."""
        return [event.position for event in self._marks if event.kind == RECOVERED_EVENT]

    def _check_unanswered(self, position: int, next_computed: int | None) -> None:
        """Raise if a later batch has an outcome, unless another process continued the recording between."""
        at = bisect_right(self._failed, position)
        outcomes = [] if next_computed is None else [next_computed]
        outcomes += self._failed[at : at + 1]
        later = bisect_right(self.recovered_at, position)
        went_on_at = self.recovered_at[later] if later < len(self.recovered_at) else self.last_position + 1
        if outcomes and min(outcomes) < went_on_at:
            raise self.damaged(f"the outputs of the batch at position {position} are missing")

    def _stream(self, opening: tuple[Any, ...], closing: tuple[Any, ...] | None) -> StreamInfo:
        opened_position, opened_ns, stream, name, epoch, first_seq, state = opening
        opened = (stream, name, epoch, first_seq, opened_ns, opened_position, self.state(state, opened_position))
        if closing is None:
            return StreamInfo(*opened)
        position, time_ns, _, frames, reason, _ = closing
        known = None if frames == UNKNOWN_SEQ else frames
        return StreamInfo(*opened, time_ns, position, reason, known, self.final_state(closing))

    def final_state(self, closing: tuple[Any, ...]) -> U8 | None:
        """Decode the state in a row of the table `closings`."""
        position, _, stream, _, reason, state = closing
        if state is None and reason not in (LOST, MOVED_EVENT):
            raise self.damaged(f"the final state of stream {stream} is missing")
        return self.state(state, position)

    def no_frames(self) -> RecordedFrames:
        """Empty columns of frames."""
        x, y = (np.empty((0, width), np.float32) for width in (self.header.features, self.header.outputs))
        none = np.empty(0, np.int64)
        return RecordedFrames(none, none, none, none, x, y, none.astype(np.bool_))

    def _frames(self, rows: list[tuple[Any, ...]], outputs: list[bytes] | None) -> RecordedFrames:
        positions, times_ns, sizes, streams, seqs, x = zip(*rows, strict=True)
        for position, size in zip(positions, sizes, strict=True):
            if size < 1:
                raise self.damaged(f"the batch at position {position} holds {size} frames")
        features, width = self.header.features, self.header.outputs

        def joined(blobs: Sequence[bytes], dtype: str, values: int) -> npt.NDArray[Any]:
            item = values * np.dtype(dtype).itemsize
            if list(map(len, blobs)) != [size * item for size in sizes]:
                for blob, size, position in zip(blobs, sizes, positions, strict=True):
                    self.check_bytes(blob, size * item, position)
            return np.frombuffer(b"".join(blobs), dtype)

        count = sum(sizes)
        return RecordedFrames(
            np.repeat(np.array(positions, np.int64), sizes),
            np.repeat(np.array(times_ns, np.int64), sizes),
            joined(streams, "<u4", 1).astype(np.int64),
            joined(seqs, "<u8", 1).astype(np.int64),  # one of 2^63 or more turns negative, and is out of order
            joined(x, "<f4", features).reshape(-1, features),
            np.zeros((count, width), np.float32)
            if outputs is None
            else joined(outputs, "<f4", width).reshape(-1, width),
            np.full(count, outputs is not None),
        )

    def _is_left_in_wal_mode(self) -> bool:
        """Whether the header of a file without a WAL says that it is in WAL mode."""
        # Only without a WAL: this process may be writing the file, and closing it would end SQLite's locks on it. Then
        # the next program to open and close the file would remove the WAL.
        with self.path.open("rb") as file:
            start = file.read(_START_BYTES).ljust(_START_BYTES, b"\0")
            length = file.seek(0, os.SEEK_END)
        alone = start[_READ_VERSION_OFFSET] == _IN_WAL_MODE
        expected = int.from_bytes(start[28:32]) * PAGE_BYTES
        if alone and length < expected and int.from_bytes(start[16:18]) == PAGE_BYTES:
            raise self.damaged(f"it ends after {length:,} of {expected:,} bytes")
        return alone

    def _open(self) -> None:
        (application,), (version,) = (
            self._database.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
        )
        if application != APPLICATION_ID:
            raise RecordingError(f"{self.path} is not a recording: it is another kind of database, or empty")
        if version != FORMAT_VERSION:
            advice = "record anew" if version < FORMAT_VERSION else "use the instep that wrote it"
            raise RecordingError(
                f"{self.path} has format version {version}, and this instep reads version {FORMAT_VERSION}: {advice}"
            )
        self._check_schema()
        try:
            rows = self._database.execute("SELECT key, value, crc FROM header").fetchall()
            self.header = RecordingHeader.from_rows(rows)
        except RecordingError as error:
            raise self.damaged(str(error)) from None
        with self.at_once():  # between two queries, a commit would put a second newest row behind the first
            pass

    def _check_schema(self) -> None:
        """Raise unless the tables are those of a recording. A view in place of one could return rows forever."""
        statements = set(create_statements())
        for name, statement in self._database.execute("SELECT name, sql FROM sqlite_schema"):
            if statement is None and str(name).startswith("sqlite_autoindex_"):
                continue  # SQLite's own, for a UNIQUE column
            if statement not in statements:
                raise self.damaged(f"the table {name!r} is not one of a recording")
            statements.discard(statement)
        if statements:
            raise self.damaged(f"the table of this statement is missing: {min(statements)}")

    def _find_ends(self) -> None:
        found = list(self.rows("newest", first=0))
        if len(found) != 1:
            raise self.damaged("the row that says which position is the newest is missing")
        self.last_position, self.state_rows = int(found[0][0]), int(found[0][1])
        trimmed = [Trimmed(*row) for row in self.rows("trimmed")]
        if len(trimmed) > 1:
            raise self.damaged("it holds more than one row about trimming")
        self.trimmed = trimmed[0] if trimmed else Trimmed()

    def _positions(self, table: str, first: int, last: int) -> I64:
        with self._reading(f"is damaged: the table {table} cannot be read"):
            query = f"SELECT position FROM {table} WHERE position BETWEEN {first} AND {last}"
            found = np.fromiter((row[0] for row in self._database.execute(query)), np.int64)
        self._check_trimmed()
        return found

    def _refuse_passing(self, error: Exception) -> None:
        """Raise UnavailableRecording if an error of SQLite is temporary."""
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_OK) & 0xFF in _PASSING:
            raise UnavailableRecording(f"{self.path} cannot be read now: {error}; try again") from None

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except UNREADABLE as error:
            self._refuse_passing(error)
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB:
                raise RecordingError(
                    f"{self.path} is not a recording: it is not an SQLite database, or its first bytes are damaged"
                ) from None
            raise DamagedRecording(f"{self.path} {what}: {error}", self.path) from None
