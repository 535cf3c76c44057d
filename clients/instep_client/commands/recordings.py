"""Reading an engine's recording: an SQLite file, by its documented layout and with nothing but sqlite3 and numpy."""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from instep_client.commands.problems import BadFile
from instep_client.commands.sequences import I64, Sequences
from instep_client.wire import F32

APPLICATION_ID: Final = 0x696E7374
FORMAT_VERSION: Final = 1
_SQLITE_MAGIC: Final = b"SQLite format 3\0"


def is_recording(path: Path) -> bool:
    """Whether the file is an SQLite database, whatever its name.

    Raises:
        BadFile: when it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from None


def read_recording(path: Path) -> Sequences:
    """All streams of a recording, in the order in which they opened; of one still being written, up to its last commit.

    Streams without a frame are left out. `times_s` and `opened_s` count from the first opening.

    Raises:
        BadFile: it is no recording, it is damaged, or it holds no frames.
    """
    try:
        database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
        try:
            database.execute("BEGIN")  # one snapshot for all tables
            return _read(path, database)
        finally:
            database.close()
    except (sqlite3.Error, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFile(f"{path} is no recording, or it is damaged: {error}") from None


class _Opening(NamedTuple):
    position: int
    time_ns: int
    stream: int
    name: str
    initial_state: bytes | None


_OPENING: Final = ", ".join(_Opening._fields)


@dataclass(frozen=True)
class _Frames:
    """All frames of a recording, sorted by stream and seq."""

    streams: I64
    seqs: npt.NDArray[np.uint64]
    times_ns: I64
    x: F32
    y: F32


def _read(path: Path, database: sqlite3.Connection) -> Sequences:
    if database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise BadFile(f"{path} is a database, but no recording of an instep engine")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version != FORMAT_VERSION:
        raise BadFile(f"{path} has format version {version}; this client reads version {FORMAT_VERSION}")
    header = {key: json.loads(value) for key, value in _rows(path, database, "header", "key, value")}
    gru = header["description"]["gru"]
    state_shape = (int(gru["num_layers"]), int(gru["hidden_size"]))
    frames = _frames(path, database, int(header["description"]["features"]))
    openings = [_Opening(*row) for row in _rows(path, database, "openings", _OPENING)]
    numbers, counts = np.unique(frames.streams, return_counts=True)
    place = {int(stream): at for at, stream in enumerate(numbers)}
    used = [opening for opening in openings if opening.stream in place]
    if len(used) != len(numbers):
        raise BadFile(f"{path} holds frames of a stream that never opened")
    starts = np.cumsum(counts) - counts
    _check_seqs(path, frames, {opening.stream: opening.name for opening in used}, starts)
    first_ns = used[0].time_ns
    by_number = sorted(used, key=lambda opening: opening.stream)
    sorted_by_number = Sequences(
        names=tuple(opening.name for opening in by_number),
        lengths=counts.astype(np.int64),
        frames=frames.x,
        outputs=frames.y,
        times_s=(frames.times_ns - first_ns) / 1e9,
        opened_s=np.array([opening.time_ns - first_ns for opening in by_number]) / 1e9,
        initial_states={
            at: np.frombuffer(opening.initial_state, "<f4").reshape(state_shape)
            for at, opening in enumerate(by_number)
            if opening.initial_state is not None
        },
        fingerprint=str(header["model_fingerprint"]),
    )
    in_order = [place[opening.stream] for opening in used]
    return sorted_by_number if in_order == sorted(in_order) else sorted_by_number.select(in_order)


def _frames(path: Path, database: sqlite3.Connection, features: int) -> _Frames:
    rows = _rows(path, database, "batches", "position, time_ns, bucket, size, streams, seqs, x, y")
    if not rows:
        raise BadFile(f"{path} holds no frames")
    sizes = np.array([row[3] for row in rows])
    streams = np.frombuffer(b"".join(row[4] for row in rows), "<u4").astype(np.int64)
    seqs = np.frombuffer(b"".join(row[5] for row in rows), "<u8")
    x = np.frombuffer(b"".join(row[6] for row in rows), "<f4").reshape(-1, features)
    y = np.frombuffer(b"".join(row[7] for row in rows), "<f4").reshape(len(x), -1)
    times_ns = np.repeat(np.array([row[1] for row in rows], np.int64), sizes)
    if not len(streams) == len(seqs) == len(x) == len(times_ns):
        raise BadFile(f"{path} is damaged: the columns of a batch differ in length")
    order = np.lexsort((seqs, streams))
    return _Frames(streams[order], seqs[order], times_ns[order], x[order], y[order])


def _check_seqs(path: Path, frames: _Frames, names: dict[int, str], starts: I64) -> None:
    """Every stream must hold frames 0, 1, 2, …: a stream with a hole cannot be run again."""
    counts = np.diff(np.append(starts, len(frames.streams)))
    expected = np.arange(len(frames.streams)) - np.repeat(starts, counts)
    wrong = np.flatnonzero(frames.seqs != expected.astype(np.uint64))
    if len(wrong):
        at = int(wrong[0])
        name = names[int(frames.streams[at])]
        raise BadFile(
            f"{path} is damaged: stream {name!r} holds seq {frames.seqs[at]} where {expected[at]} is expected"
        )


def _rows(path: Path, database: sqlite3.Connection, table: str, columns: str) -> list[tuple[Any, ...]]:
    """The rows of one table, their CRCs checked and taken off."""
    rows: list[tuple[Any, ...]] = []
    for *row, crc in database.execute(f"SELECT {columns}, crc FROM {table} ORDER BY 1"):
        if crc != _crc(row):
            raise BadFile(f"{path} is damaged: the CRC of row {row[0]} of table {table} does not match")
        rows.append(tuple(row))
    return rows


def _crc(row: Sequence[Any]) -> int:
    crc = 0
    for value in row:
        if isinstance(value, int):
            crc = zlib.crc32(struct.pack("<q", value), crc)
        elif value is not None:
            crc = zlib.crc32(value.encode() if isinstance(value, str) else value, crc)
    return crc
