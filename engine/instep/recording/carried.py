"""Following files: made complete under another name, with every open stream in its state."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from instep.core.typing import I64, U64, Bool
from instep.recording.one_file import remove_with_all_beside
from instep.recording.schema import (
    APPLICATION_ID,
    CARRIED_EVENT,
    FORMAT_VERSION,
    PAGE_BYTES,
    SNAPSHOT_EVENT,
    RecordingHeader,
    create_statements,
    owner_detail,
    row_crc,
)
from instep.recording.states import StateRows, blob

_Row: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Carried:
    """Everything that goes on in the next file: the open streams at one moment, as columns."""

    parts: Sequence[StateRows]
    """Of all of them, streams rising from part to part; nothing of theirs is under way."""
    names: list[str]
    epochs: U64
    """uint64 [N]: of their present ownerships."""
    former_epochs: U64
    """uint64 [N]: the epochs that their owners held before, 0 for none or somebody else's."""
    granted_seqs: I64
    """int64 [N]: the frames that were due next when those were given."""
    renumbered: Bool
    """bool [N]: whether a restart with other numerics took them from their owners."""
    first_seqs: I64
    """int64 [N]: the seqs they opened with."""
    last_stream: int
    """The highest number ever given to a stream."""
    last_epoch: int
    """The highest epoch ever given."""

    @property
    def positions(self) -> int:
        """How many rows of the history they begin the next file with."""
        return 2 * len(self.names) + 1

    def openings(self, first_position: int, time_ns: int) -> Iterator[_Row]:
        """Their rows of the table `openings`."""
        at = 0
        for part in self.parts:
            epochs = self.epochs[at : at + len(part.streams)].tolist()
            is_zero = ~np.any(part.states.view(np.uint32), axis=(1, 2)).astype(np.bool_)
            columns = (part.streams.tolist(), epochs, part.seqs.tolist(), part.states, is_zero.tolist())
            for stream, epoch, seq, state, is_blank in zip(*columns, strict=True):
                initial = None if is_blank else blob(state, "<f4")
                row = (first_position + at, time_ns, stream, self.names[at], epoch, seq, initial)
                yield (*row, row_crc(*row))
                at += 1

    def events(self, first_position: int, time_ns: int) -> Iterator[_Row]:
        """Their rows of the table `events`, the one of the snapshot last."""
        streams = (stream for part in self.parts for stream in part.streams.tolist())
        columns = (self.first_seqs, self.former_epochs, self.granted_seqs, self.renumbered)
        each = zip(streams, *(column.tolist() for column in columns), strict=True)
        for at, (stream, first_seq, former, granted, renumbered) in enumerate(each):
            detail = owner_detail(former, granted, renumbered)
            row = (first_position + at, time_ns, stream, first_seq, CARRIED_EVENT, detail, None)
            yield (*row, row_crc(*row))
        last = first_position + len(self.names)
        row = (last, time_ns, None, last - 1, SNAPSHOT_EVENT, f"{len(self.names):,} states", None)
        yield (*row, row_crc(*row))


def write_following(path: Path, header: RecordingHeader, time_ns: int, carried: Carried) -> None:
    """Make a file that goes on from where another one ends, all in it and closed.

    Nobody may look at it before `family.put_in_place`, so its rows need no journal and nothing is synced. What there is
    of it goes when it fails. It is left in WAL mode: from then on somebody may read it at any moment, which would keep
    a writer from changing that.

    Args:
        path: where; what a killed writer left there is removed.
        header: of the file; the first row gets its `first_position`, and its `carried_bytes` is filled in.
        time_ns: nanoseconds since 1970.
        carried: the open streams.

    Raises:
        sqlite3.Error: when the disk is full or fails.
    """
    first, count = header.first_position, len(carried.names)
    snapshot = first + 2 * count - 1
    remove_with_all_beside(path)
    try:
        database = sqlite3.connect(path, isolation_level=None)
        try:
            database.execute("PRAGMA journal_mode=OFF")
            database.execute("PRAGMA synchronous=OFF")
            make_tables(database, FORMAT_VERSION)
            _insert(database, "openings", carried.openings(first, time_ns), 8)
            _insert(database, "events", carried.events(first + count, time_ns), 8)
            for part in carried.parts:
                _insert(database, "states", part.as_rows(snapshot), 8)
            mark = (snapshot, count, 0, count, count)
            _insert(database, "snapshot", [(*mark, row_crc(*mark))], 6)
            _insert(database, "newest", [(snapshot + 1, row_crc(snapshot + 1))], 2)
            header = replace(header, carried_bytes=file_bytes(database))
            _insert(database, "header", header.rows(), 3)
            database.execute("COMMIT")
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        finally:
            database.close()
    except BaseException:
        remove_with_all_beside(path)
        raise


def make_tables(database: sqlite3.Connection, version: int) -> None:
    """Begin a transaction that makes the empty tables; whoever calls commits it."""
    database.execute(f"PRAGMA page_size={PAGE_BYTES}")
    database.execute("BEGIN")
    database.execute(f"PRAGMA application_id={APPLICATION_ID}")
    database.execute(f"PRAGMA user_version={version}")
    for statement in create_statements():
        database.execute(statement)


def file_bytes(database: sqlite3.Connection) -> int:
    """How large the file is, or will be when the WAL is in it."""
    return int(database.execute("PRAGMA page_count").fetchone()[0]) * PAGE_BYTES


def _insert(database: sqlite3.Connection, table: str, rows: Any, columns: int) -> None:
    database.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * columns)})", rows)
