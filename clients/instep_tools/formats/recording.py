"""Reading an engine's recording: an SQLite file, by its documented layout and with nothing but sqlite3 and numpy."""

from __future__ import annotations

import json
import sqlite3
import struct
import zlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from instep_client.protocol.state_spec import StateSpec
from instep_tools.formats.grouping import grouped
from instep_tools.formats.table import StartState, TableHeader
from instep_tools.problems import BadFile
from instep_tools.sequences import RecordedSequences

APPLICATION_ID: Final = 0x696E7374
FORMAT_VERSION: Final = 2


def read_recording(path: Path) -> RecordedSequences:
    """All streams of a recording, in the order in which they opened; of one still being written, up to its last commit.

    Where the state of a stream was reset, what follows is a sequence of its own. Sequences without a frame are left
    out, and so are the frames of steps that failed. Times are nanoseconds since 1970.

    Raises:
        BadFile: it is no recording, it is damaged, or it holds no frames.
    """
    try:
        with closing(_opened(path)) as database:
            return _read(path, database)
    except (sqlite3.Error, struct.error, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFile(f"{path} is no recording, or it is damaged: {error}") from None


def _opened(path: Path) -> sqlite3.Connection:
    database = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
    database.execute("BEGIN")  # one snapshot for all tables
    return database


class _Opening(NamedTuple):
    position: int
    time_ns: int
    stream: int
    name: str
    epoch: int
    first_seq: int
    initial_state: bytes | None


_OPENING: Final = ", ".join(_Opening._fields)
_EVENT: Final = "position, time_ns, stream, seq, kind, detail, state"
_CHECKPOINT: Final = "position, completed, time_ns, bytes, openings, closings, events"
_STATE: Final = "stream, position, seq, state, tail_seq, tail_x, tail_y"


def _read(path: Path, database: sqlite3.Connection) -> RecordedSequences:
    if database.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        tables = {name for (name,) in database.execute("SELECT name FROM sqlite_schema")}
        if {"topics", "messages"} <= tables:
            mcap = path.with_suffix(".mcap")
            raise BadFile(f"{path} is a ROS 2 bag in SQLite: convert it, by `mcap convert {path} {mcap}` for example")
        raise BadFile(f"{path} is a database, but no recording of an instep engine")
    version = database.execute("PRAGMA user_version").fetchone()[0]
    if version != FORMAT_VERSION:
        raise BadFile(f"{path} has format version {version}; this client reads version {FORMAT_VERSION}")
    header = {key: json.loads(value) for key, value in _rows(path, database, "header", "key, value")}
    first, openings = _openings(path, database)
    events = [event for event in _rows(path, database, "events", _EVENT) if event[0] >= first]
    failed = {seq for _, _, _, seq, kind, *_ in events if kind == "failed"}
    first_seqs = {opening.stream: opening.first_seq for opening in openings}
    columns = _frames(path, database, int(header["features"]), int(header["outputs"]), failed, first)
    if first > 1:  # after trimming, the states with which streams begin hold the frames before them
        pairs = zip(columns[0].tolist(), columns[1].tolist(), strict=True)
        kept = np.array([seq >= first_seqs.get(stream, seq + 1) for stream, seq in pairs], np.bool_)
        columns = tuple(column[kept] for column in columns)
    streams, seqs, times_ns, x, y, answered = columns
    numbers, codes = np.unique(streams, return_inverse=True)
    names = {opening.stream: opening.name for opening in openings}
    if not names.keys() >= set(numbers.tolist()):
        raise BadFile(f"{path} holds frames of a stream that never opened")
    opened = [(names[number], number) for number in numbers.tolist()]
    begins = {(each.stream, each.first_seq): (each.position, each.time_ns, each.initial_state) for each in openings}
    begins |= {(stream, seq): (at, ns, row) for at, ns, stream, seq, kind, _, row in events if kind == "reset"}
    states = [StartState(*key, row) for key, (_, _, row) in begins.items()]
    about = {"fingerprint": str(header["model_fingerprint"]), "model": str(header["model_name"])}
    table = TableHeader(about=about, spec=StateSpec.decode(header["state"]), states=states)
    sequences, keys = grouped(path, opened, codes, seqs, times_ns, x, y, answered, table)
    if any(first_seqs[stream] != seq for stream, seq in dict(reversed(keys)).items()):
        raise BadFile(f"{path} is damaged: the first frames of a stream are missing")
    sequences = replace(sequences, opened_ns=np.array([begins[key][1] for key in keys], np.int64))
    order = sorted(range(len(keys)), key=lambda row: begins[keys[row]][0])
    return sequences if order == list(range(len(keys))) else sequences.select(order)


def _openings(path: Path, database: sqlite3.Connection) -> tuple[int, list[_Opening]]:
    """The first position that was not trimmed, and the streams, each as of the checkpoint where it was trimmed."""
    openings = [_Opening(*row) for row in _rows(path, database, "openings", _OPENING)]
    trimmed = _rows(path, database, "trimmed", "position, events, last_stream, last_epoch")
    if not trimmed:
        return 1, openings
    position = trimmed[0][0]
    (completed,) = (row[1] for row in _rows(path, database, "checkpoints", _CHECKPOINT) if row[0] == position)
    closings = _rows(path, database, "closings", "position, time_ns, stream, frames, reason, final_state")
    gone = {row[2] for row in closings if row[0] <= completed}  # these may have no state there
    begins: dict[int, tuple[int, bytes]] = {}
    for stream, at, seq, state, *_ in sorted(_rows(path, database, "states", _STATE), key=lambda row: row[:2]):
        if at <= position:
            begins[stream] = seq, state
    found = []
    for opening in openings:
        if opening.position > position:
            found.append(opening)
        elif opening.stream not in gone:
            seq, initial = begins.get(opening.stream, (opening.first_seq, opening.initial_state))
            found.append(opening._replace(first_seq=seq, initial_state=initial))
    return position + 1, found


def _frames(
    path: Path, database: sqlite3.Connection, features: int, outputs: int, failed: set[int], first: int
) -> tuple[npt.NDArray[Any], ...]:
    """The frames of batches from the position `first` on, by stream, seq, time, x, y, and whether they have one."""
    rows = _rows(path, database, "batches", "position, time_ns, size, streams, seqs, x")
    rows = [row for row in rows if row[0] not in failed and row[0] >= first]
    if not rows:
        raise BadFile(f"{path} holds no frames")
    answers = {batch: y for _, _, batch, y in _rows(path, database, "outputs", "position, time_ns, batch, y")}
    sizes = np.array([row[2] for row in rows])
    nothing = np.full((int(sizes.max()), outputs), np.nan, "<f4").tobytes()
    streams = np.frombuffer(b"".join(row[3] for row in rows), "<u4").astype(np.int64)
    seqs = np.frombuffer(b"".join(row[4] for row in rows), "<u8").astype(np.int64)
    times_ns = np.repeat(np.array([row[1] for row in rows], np.int64), sizes)
    x = np.frombuffer(b"".join(row[5] for row in rows), "<f4").reshape(-1, features)
    y = np.frombuffer(b"".join(answers.get(row[0], nothing[: 4 * row[2] * outputs]) for row in rows), "<f4")
    answered = np.repeat(np.array([row[0] in answers for row in rows]), sizes)
    if not len(streams) == len(seqs) == len(times_ns) == len(x) == len(y) / outputs:
        raise BadFile(f"{path} is damaged: the columns of a batch differ in length")
    return streams, seqs, times_ns, x, y.reshape(-1, outputs), answered


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
