"""Reading a recording: checked rows, up to the last commit at the time it was opened."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import numpy as np

from instep.core.typing import F32, U32, U64
from instep.recording.errors import RecordingError
from instep.recording.schema import (
    APPLICATION_ID,
    END_EVENT,
    FORMAT_VERSION,
    HISTORY,
    RecordingHeader,
    row_is_sound,
)


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """One opening of a stream, from its opening to its close."""

    stream: int
    name: str
    opened_ns: int
    opened_position: int
    initial_state: F32 | None
    """float32 [layers, hidden size]; None for zeros."""
    closed_ns: int | None
    """None where it was still open at the last commit; so are all the fields below."""
    closed_position: int | None
    reason: str | None
    frames: int | None
    """How many frames were applied, as counted at the close."""
    final_state: F32 | None
    """float32 [layers, hidden size]; None also where it was not known."""


@dataclass(frozen=True, slots=True)
class RecordedBatch:
    """One step, as read-only columns."""

    position: int
    time_ns: int
    bucket: int
    streams: U32
    """uint32 [B]."""
    seqs: U64
    """uint64 [B]."""
    x: F32
    """float32 [B, features]."""
    y: F32
    """float32 [B, outputs]."""


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """Anything else the engine wrote down."""

    position: int
    time_ns: int
    stream: int | None
    seq: int | None
    kind: str
    detail: str


class RecordingReader:
    """Reads a recording that is finished or still being written; never writes to it.

    What it shows is fixed when it opens: rows committed later are left out.

    Attributes:
        path: the file.
        header: what the recording says of the engine that wrote it.
        last_position: the newest row it shows; 0 for none.
        finished: whether the recording was closed in order.

    Raises:
        RecordingError: from every method, when the file is not a recording, of another version, or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb"):
                pass
        except OSError as error:
            raise RecordingError(f"cannot read the recording {path}: {error.strerror}") from None
        # Without a WAL beside it nobody writes the file, and it may lie where not even a lock can be written.
        mode = "ro" if Path(f"{path}-wal").exists() else "ro&immutable=1"
        with self._reading():
            uri = f"file:{quote(str(path.absolute()))}?mode={mode}"
            self._database = sqlite3.connect(uri, uri=True, isolation_level=None)
        try:
            with self._reading():
                self._open()
        except RecordingError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        self._database.close()

    def streams(self) -> list[StreamInfo]:
        """Every opening, in the order they opened."""
        closings = {row[2]: row for row in self._rows("closings")}
        opened = [self._stream(row, closings.pop(row[2], None)) for row in self._rows("openings")]
        if closings:
            raise self._damaged(f"stream {min(closings)} was closed, but never opened")
        return opened

    def batches(self, first: int = 1, last: int | None = None) -> Iterator[RecordedBatch]:
        """The batches at positions `first` to `last` (None: the newest), in order."""
        return (self._batch(row) for row in self._rows("batches", first, last))

    def events(self) -> Iterator[RecordedEvent]:
        """The events, in order."""
        return (RecordedEvent(*row) for row in self._rows("events"))

    def check_positions(self) -> None:
        """Raise when a row of the history is missing or a position was given twice."""
        with self._reading():
            columns = [
                np.fromiter((row[0] for row in self._database.execute(f"SELECT position FROM {table}")), np.int64)
                for table in HISTORY
            ]
        found = np.sort(np.concatenate(columns))
        found = found[found <= self.last_position]
        wrong = np.flatnonzero(found != np.arange(1, len(found) + 1))
        if len(wrong):
            raise self._damaged(f"the row at position {wrong[0] + 1} is missing, or was written twice")

    def _open(self) -> None:
        if self._value("PRAGMA application_id") != APPLICATION_ID:
            raise RecordingError(f"{self.path} is not a recording: it is another kind of database, or empty")
        version = self._value("PRAGMA user_version")
        if version != FORMAT_VERSION:
            raise RecordingError(
                f"{self.path} has format version {version}, and this instep reads version {FORMAT_VERSION}; "
                "use the instep that wrote it"
            )
        rows = self._database.execute("SELECT key, value, crc FROM header").fetchall()
        self.header = RecordingHeader.from_rows(rows)
        # One statement sees one commit: positions only grow, so rows up to the newest are what was committed then.
        newest = " UNION ALL ".join(f"SELECT max(position) FROM {table}" for table in HISTORY)
        self.last_position: int = max(row[0] or 0 for row in self._database.execute(newest))
        end = "SELECT count(*) FROM events WHERE position = ? AND kind = ?"
        self.finished = bool(self._value(end, self.last_position, END_EVENT))

    def _value(self, query: str, *values: object) -> Any:
        return self._database.execute(query, values).fetchone()[0]

    def _rows(self, table: str, first: int = 1, last: int | None = None) -> Iterator[tuple[Any, ...]]:
        """Checked rows without their CRC, by position."""
        until = self.last_position if last is None else min(last, self.last_position)
        columns = ", ".join((*HISTORY[table], "crc"))
        query = f"SELECT {columns} FROM {table} WHERE position BETWEEN ? AND ? ORDER BY position"
        with self._reading():
            for row in self._database.execute(query, (first, until)):
                if not row_is_sound(table, row):
                    raise self._damaged(f"the row at position {row[0]} (of {table}) does not match its CRC")
                yield row[:-1]

    def _stream(self, opening: tuple[Any, ...], closing: tuple[Any, ...] | None) -> StreamInfo:
        opened_position, opened_ns, stream, name, state = opening
        initial_state = self._state(state, opened_position)
        if closing is None:
            return StreamInfo(stream, name, opened_ns, opened_position, initial_state, *[None] * 5)
        position, time_ns, _, frames, reason, state = closing
        final_state = self._state(state, position)
        return StreamInfo(
            stream, name, opened_ns, opened_position, initial_state, time_ns, position, reason, frames, final_state
        )

    def _state(self, blob: bytes | None, position: int) -> F32 | None:
        if blob is None:
            return None
        layers, size = self.header.state_layers, self.header.state_size
        self._check_bytes(blob, layers * size * 4, position)
        return np.frombuffer(blob, "<f4").reshape(layers, size)

    def _batch(self, row: tuple[Any, ...]) -> RecordedBatch:
        position, time_ns, bucket, size, streams, seqs, x, y = row
        if not 0 < size <= bucket:
            raise self._damaged(f"the batch at position {position} holds {size} frames in a bucket of {bucket}")
        if bucket not in self.header.buckets:
            raise self._damaged(
                f"the batch at position {position} was stepped in a bucket of {bucket}, which is none of the engine's"
            )
        self._check_bytes(streams, size * 4, position)
        self._check_bytes(seqs, size * 8, position)
        self._check_bytes(x, size * 4 * self.header.features, position)
        self._check_bytes(y, size * 4 * self.header.outputs, position)
        return RecordedBatch(
            position,
            time_ns,
            bucket,
            np.frombuffer(streams, "<u4"),
            np.frombuffer(seqs, "<u8"),
            np.frombuffer(x, "<f4").reshape(size, -1),
            np.frombuffer(y, "<f4").reshape(size, -1),
        )

    def _check_bytes(self, blob: bytes, expected: int, position: int) -> None:
        if len(blob) != expected:
            raise self._damaged(f"the row at position {position} holds {len(blob)} bytes where {expected} belong")

    def _damaged(self, what: str) -> RecordingError:
        return RecordingError(f"{self.path} is damaged: {what}")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RecordingError(f"{self.path} is not a recording, or is damaged: {error}") from None
