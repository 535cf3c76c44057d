"""A disk that forgets what was not synced, and the recording on it: rows in memory, read and written by the real rules.

Transactions reach the system one by one (a killed process loses none of those) and the platters when they are synced
(power loss takes back any number of the others, the newest first). Only SQLite is replaced: the recorder, the rows and
their CRCs, the reader's checks and the recovery are the engine's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias
from unittest import mock

import numpy as np

from instep.recording import reader as recording_reader
from instep.recording import recovery as recording_recovery
from instep.recording.database import LIMITS, DatabaseLimits, with_crcs
from instep.recording.reader import RecordingReader
from instep.recording.recorder import Recorder
from instep.recording.records import StateRows, Trimmed
from instep.recording.schema import (
    CHECKPOINT_EVENT,
    COUNTED,
    FAILED_EVENT,
    HISTORY,
    OWNER_EVENT,
    RECOVERED_EVENT,
    RESET_EVENT,
    TABLES,
    Column,
    Durability,
    RecordingHeader,
    row_crc,
)
from instep.recording.trim import KEEP_ALL, Retention
from instep.recording.writer import RecordingWriter
from instep.replay import recovery as streaming_recovery
from tests.support.states import gru_state

Row: TypeAlias = tuple[Any, ...]
Change: TypeAlias = tuple[str, int, Row | None]
"""Table, key, and the row that is there from now on (None: none)."""
Image: TypeAlias = dict[str, dict[int, Row]]

QUEUE_BATCHES = 2


class DiskFull(OSError):
    """What a failing disk raises."""


class Disk:
    """Transactions in order; `synced` of them are on the platters."""

    def __init__(self, durability: Durability) -> None:
        self.durability = durability
        self.transactions: list[list[Change]] = []
        self.synced = 0
        self.broken = False
        self._rebuild()

    @property
    def is_empty(self) -> bool:
        return not self.transactions

    def commit(self, changes: list[Change]) -> None:
        if self.broken:
            raise DiskFull("no space left on device")
        self.transactions.append(changes)
        self._apply(changes)
        if self.durability == "fsync":
            self.sync()

    def sync(self) -> None:
        self.synced = len(self.transactions)

    def lose_power(self, lost: int) -> None:
        """The newest `lost` transactions are gone, but none that was synced."""
        del self.transactions[max(self.synced, len(self.transactions) - lost) :]
        self._rebuild()

    def next_seqs(self) -> dict[int, int]:
        """What each stream that is open expects next, counted from the rows of batches alone."""
        failed = {row[3] for row in self.image["events"].values() if row[4] == FAILED_EVENT}
        expected = {row[2]: row[5] for row in self.image["openings"].values()}
        for position, row in sorted(self.image["batches"].items()):
            if position not in failed:
                for stream, seq in zip(np.frombuffer(row[3], "<u4"), np.frombuffer(row[4], "<u8"), strict=True):
                    expected[int(stream)] = int(seq) + 1
        for row in self.image["closings"].values():
            del expected[row[2]]
        return expected

    def _rebuild(self) -> None:
        self.image: Image = {table: {} for table in TABLES}
        self.frames: dict[tuple[int, int], bytes] = {}
        """Inputs that are committed: by number of the stream and seq."""
        self.resets: list[tuple[int, int, int]] = []
        """RESETs that are committed, in order: number of the stream, seq of the next frame, and state."""
        self.epochs: set[int] = set()
        """Epochs whose giving is committed."""
        for changes in self.transactions:
            self._apply(changes)

    def _apply(self, changes: list[Change]) -> None:
        for table, key, row in changes:
            if row is None:
                self.image[table].pop(key, None)
                continue
            self.image[table][key] = row
            if table == "openings":
                self.epochs.add(row[4])
            elif table == "events" and row[4] == OWNER_EVENT:
                self.epochs.add(row[3])
            elif table == "events" and row[4] == RESET_EVENT:
                self.resets.append((row[2], row[3], int(np.frombuffer(row[6] or bytes(4), "<f4")[0])))
            elif table == "batches":
                streams, seqs, width = np.frombuffer(row[3], "<u4"), np.frombuffer(row[4], "<u8"), len(row[5]) // row[2]
                for at, (stream, seq) in enumerate(zip(streams.tolist(), seqs.tolist(), strict=True)):
                    self.frames[stream, seq] = row[5][at * width : (at + 1) * width]


class MemoryReader(RecordingReader):
    """The engine's reader over a `Disk`."""

    def __init__(self, disk: Any, header: RecordingHeader | None = None) -> None:
        self.path, self._since, self.second_place = disk, 0, None
        self.header = HEADER[0] if header is None else header
        self._image: Image = disk.image
        self._find_ends()

    def close(self) -> None:
        pass

    @contextmanager
    def at_once(self) -> Iterator[None]:
        yield

    def check_positions(self, first: int = 1, last: int | None = None) -> None:
        last = self.last_position if last is None else last
        found = sorted(key for table in HISTORY for key in self._image[table] if first <= key <= last)
        if found != list(range(first, last + 1)):
            raise self.damaged("a row is missing, or was written twice")

    def _is_at_once(self) -> bool:
        return True

    def _check_trimmed(self) -> None:
        pass

    def newest_row(self, table: str, condition: str, stream: int) -> Row | None:
        at = 0 if table == "states" else 2
        rows = [row for _, row in sorted(self._image[table].items()) if row[at] == stream]
        rows = [row for row in rows if table != "events" or row[4] == OWNER_EVENT]
        return rows[-1][:-1] if rows else None

    def row_lists(self, table: str, first: int = 1, last: int | None = None) -> Iterator[list[Row]]:
        until = 2**63 - 1 if last is None else last
        if table in HISTORY:
            until = min(until, self.last_position)
        found = [(key, row) for key, row in sorted(self._image[table].items()) if first <= key <= until]
        for key, row in found:
            if not recording_reader.sound_rows(table, [row]):  # type: ignore[attr-defined]  # where a mutant replaces it
                raise self.damaged(f"the row {key} (of {table}) does not match its CRC")
        yield [row[:-1] for _, row in found]


class MemoryWriter(RecordingWriter):
    """The engine's writer onto a `Disk`."""

    def __init__(self, disk: Any, header: RecordingHeader) -> None:
        newest = disk.image["newest"].values()
        self.path, self._since, self.second_place = disk, 0, None
        self.header = header
        self.position = next(iter(newest))[0] if newest else 0
        self._disk: Disk = disk
        self._changes: list[Change] = []
        self._bytes_in_wal = 0
        self._positions = {table: sorted(disk.image[table]) for table in COUNTED}
        self._with_state = set(disk.image["states"])
        self._closed = [row[2] for row in disk.image["closings"].values()]
        self.retention, self.trimmed = KEEP_ALL, Trimmed()
        self._bytes = self._frames = self._last_stream = self._last_epoch = 0

    @classmethod
    def create(
        cls, path: Any, header: RecordingHeader, retention: Retention = KEEP_ALL, limits: DatabaseLimits = LIMITS
    ) -> MemoryWriter:
        HEADER[0] = header
        path.commit([("newest", 0, (0, 0, row_crc(0, 0)))])
        return cls(path, header)

    @classmethod
    def resume(
        cls,
        path: Any,
        header: RecordingHeader,
        retention: Retention = KEEP_ALL,
        limits: DatabaseLimits = LIMITS,
    ) -> MemoryWriter:
        writer = cls(path, header)
        writer.event(0, RECOVERED_EVENT, writer.position, "another process goes on")
        return writer

    def _count_until(self, table: str, position: int) -> int:
        return sum(at <= position for at in self._positions[table])

    def fail_batch(self, time_ns: int, batch: int, detail: str) -> None:
        self.event(time_ns, FAILED_EVENT, batch, detail)

    def checkpoint(self, time_ns: int, through: int, rows: StateRows) -> None:
        self.event(time_ns, CHECKPOINT_EVENT, through, "")
        self._replace_states(through, rows)
        row = (through, self.position, time_ns, 0, *(self._count_until(table, through) for table in COUNTED))
        self._changes += [("checkpoints", position, None) for position in self._disk.image["checkpoints"]]
        self._changes += [("checkpoints", through, (*row, row_crc(*row)))]

    def _replace_states(self, through: int, rows: StateRows) -> None:
        self._delete_states(rows.streams.tolist())
        self._changes += [("states", row[0], row) for row in with_crcs(rows.as_rows(through))]
        self._with_state.update(rows.streams.tolist())

    def _delete_states(self, streams: list[int]) -> None:
        streams, self._closed = [*self._closed, *streams], []
        self._changes += [("states", stream, None) for stream in self._with_state.intersection(streams)]
        self._with_state.difference_update(streams)

    def commit(self) -> None:
        if self._changes:
            changes, self._changes = self._changes, []
            row = (self.position, len(self._with_state))
            self._disk.commit([*changes, ("newest", 0, (*row, row_crc(*row)))])

    def copy_wal(self) -> None:
        pass

    def trim(self, now_ns: int) -> bool:
        return False

    def wants_checkpoint(self, now_ns: int) -> bool:
        return False

    def close(self) -> None:
        self.commit()

    def abandon(self) -> None:
        self._changes = []

    def _insert_rows(self, table: str, time_ns: int, *columns: Iterable[Column]) -> None:
        before = self.position
        self._changes += [(table, int(str(row[0])), row) for row in self._rows(0, columns)]
        if table in self._positions:
            self._positions[table] += range(before + 1, self.position + 1)


HEADER: list[RecordingHeader] = [
    RecordingHeader(
        instep_version="0",
        created_ns=0,
        model_name="exact",
        model_folder="nowhere",
        description={"features": 1, "after": [], "gru": {"num_layers": 1, "hidden_size": 1}},
        features=1,
        outputs=1,
        state=gru_state(1, 1).encode(),
        model_fingerprint="f",
        arithmetic="portable-1",
        durability="commit",
    )
]
"""Of the engine under test; all of them are alike."""


class HandRecorder(Recorder):
    """The engine's recorder without its thread: it writes when told."""

    def __init__(
        self,
        writer: RecordingWriter,
        on_room: Callable[[], None],
        on_failure: Callable[[Exception], None],
        on_durable: Callable[[int], None],
    ) -> None:
        with mock.patch.object(threading.Thread, "start", _is_not_started):
            super().__init__(writer, QUEUE_BATCHES, on_room, on_failure, on_durable)

    @property
    def has_work(self) -> bool:
        """Whether anything waits to be written."""
        return bool(self._queue)

    def commit(self) -> None:
        """Write all that waits, as the thread does."""
        if self._queue and self.failed is None:
            self._stopping = True  # so that nothing waits for more
            try:
                self._write_what_waits()
            except DiskFull as error:
                self.failed = error
                self._queue.clear()
                self._writer.abandon()
                self._on_failure(error)
            finally:
                self._stopping = False


def _is_not_started(thread: threading.Thread) -> None:
    """Instead of `start`: a mock object takes a third of the time that it takes to make a server."""


@contextmanager
def files_in_memory() -> Iterator[None]:
    """Within, the engine's recovery reads and writes a `Disk` where it was given a path."""
    with (
        mock.patch.object(streaming_recovery, "RecordingWriter", MemoryWriter),
        mock.patch.object(recording_recovery, "RecordingReader", MemoryReader),
        mock.patch.object(recording_reader, "RecordingReader", MemoryReader),
    ):
        yield
