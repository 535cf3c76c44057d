"""Writes frames and outputs into a file whose suffix selects the format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, Protocol, TypeAlias

import numpy as np

from instep_client.protocol.wire import F32, ServerInfo
from instep_client.states import state_rows
from instep_tools.formats.columns import input_columns, output_columns
from instep_tools.formats.mcap_file import McapWriter, check_installed
from instep_tools.formats.table import (
    CHUNK_FRAMES,
    StartState,
    TableHeader,
    TableRows,
    about_model,
)
from instep_tools.problems import BadFile, check_writable, reads_or_writes, written_aside
from instep_tools.sequences import RecordedSequences

Format: TypeAlias = Literal["parquet", "npz", "csv", "mcap"]


class TableWriter(Protocol):
    """Writes a table of one format into an open binary file, which it leaves open."""

    def write(self, rows: TableRows) -> None:
        """Append rows."""
        ...

    def close(self) -> None:
        """Write the end of the file."""
        ...


class NpzWriter:
    """Collects the table in memory, and writes an array per label, `x`, `y`, and `metadata` as JSON text."""

    def __init__(self, file: BinaryIO, header: TableHeader) -> None:
        self._file, self._header = file, header
        labels = (np.empty(0, np.object_), np.empty(0, np.int64), np.empty(0, np.uint64))
        x, y = (np.empty((0, len(names)), np.float32) for names in (header.inputs, header.outputs))
        self._parts = [TableRows(*labels, np.empty(0, np.int64) if header.timed else None, x, y)]

    def write(self, rows: TableRows) -> None:
        """Collect rows."""
        self._parts.append(rows)

    def close(self) -> None:
        """Write the archive."""
        rows = TableRows.join(self._parts)
        arrays: dict[str, Any] = {"stream": rows.names.astype(np.str_), "stream_id": rows.stream_ids.astype(np.uint32)}
        arrays |= {"seq": rows.seqs} | ({} if rows.times_ns is None else {"time_ns": rows.times_ns})
        arrays |= {"x": rows.x, "y": rows.y, "metadata": np.array(json.dumps(self._header.metadata).encode())}
        np.savez(self._file, **arrays)


class ArrowWriter:
    """Writes CSV, or zstd-compressed Parquet with a row group per `write`; each number is a column."""

    def __init__(self, file: BinaryIO, header: TableHeader, format: Format) -> None:
        import pyarrow as pa
        from pyarrow import csv, parquet

        self._pa = pa
        kinds = [("stream", pa.string()), ("stream_id", pa.uint32()), ("seq", pa.uint64())]
        kinds += [("time", pa.timestamp("ns", "UTC"))] * header.timed
        kinds += [(name, pa.float32()) for name in (*header.inputs, *header.outputs)]
        fields = [pa.field(name, kind, nullable=False) for name, kind in kinds]
        self._schema = pa.schema(fields, {f"instep.{key}": text for key, text in header.metadata.items()})
        if format == "csv":
            self._writer = csv.CSVWriter(file, self._schema)
        else:
            labels = ["stream", "stream_id"]
            self._writer = parquet.ParquetWriter(file, self._schema, compression="zstd", use_dictionary=labels)

    def write(self, rows: TableRows) -> None:
        """Write rows."""
        times = [] if rows.times_ns is None else [rows.times_ns]
        columns = [rows.names, rows.stream_ids, rows.seqs, *times, *rows.x.T, *rows.y.T]
        arrays = [self._pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(self._pa.record_batch(arrays, self._schema))

    def close(self) -> None:
        """Write the metadata at the end."""
        self._writer.close()


WRITERS: Final[dict[Format, Callable[[BinaryIO, TableHeader], TableWriter]]] = {
    "parquet": partial(ArrowWriter, format="parquet"),
    "csv": partial(ArrowWriter, format="csv"),
    "npz": NpzWriter,
    "mcap": McapWriter,
}


def check_output_path(path: Path) -> Format:
    """Check, before the work begins, whether a table can be saved at a path.

    Raises:
        CommandProblem: when it cannot be saved, or a library is missing.
    """
    kind = next((kind for kind in WRITERS if path.suffix.lower() == f".{kind}"), None)
    if kind is None:
        raise BadFile(f"cannot tell from the name {path} how to save: it must end in .csv, .npz, .parquet or .mcap")
    if kind == "mcap":
        check_installed()
    check_writable(path)
    return kind


@contextmanager
def written_table(path: Path, header: TableHeader, new: str = "") -> Iterator[TableWriter]:
    """A table file of the format that its suffix selects; see `written_aside`.

    Raises:
        CommandProblem: when it cannot be written, a library is missing, or the format cannot represent the table.
    """
    kind = check_output_path(path)
    with written_aside(path, new) as part, part.open("wb") as file:
        writer = WRITERS[kind](file, header)
        try:
            yield writer
        except BaseException:
            with suppress(Exception):  # some write to the file when they are collected, and it is closed by then
                writer.close()
            raise
        writer.close()


def table_header(info: ServerInfo, timed: bool = False, states: tuple[StartState, ...] = ()) -> TableHeader:
    """The metadata for outputs of a server."""
    about = about_model(info.model, info.fingerprint, info.arithmetic)
    inputs, outputs = input_columns(info.features), output_columns(info, info.outputs)
    return TableHeader(inputs, outputs, timed, about, info.state, states)


class SavedOutputs:
    """A file of frames and outputs from a live producer; use it in a `with` block.

    Rows have no time. The outputs so far are saved however the block ends; without any, an older file stays.
    """

    def __init__(self, path: Path, info: ServerInfo) -> None:
        self.path = path
        self._file = ExitStack()
        self._writer = self._file.enter_context(written_table(path, table_header(info)))
        self._ids: dict[str, int] = {}
        self._parts: list[TableRows] = []
        self._has_failed = False

    def add(self, stream: str, seq: int, frames: F32, outputs: F32) -> None:
        """Add frames `seq`, `seq + 1`, … of one stream: float32 [T, features] and [T, outputs]."""
        count, number = len(frames), self._ids.setdefault(stream, len(self._ids) + 1)
        labels = (np.full(count, stream, np.object_), np.full(count, number, np.int64))
        self._parts.append(TableRows(*labels, np.arange(seq, seq + count, dtype=np.uint64), None, frames, outputs))
        if sum(map(len, self._parts)) > CHUNK_FRAMES:
            self._flush()

    @property
    def has_rows(self) -> bool:
        """Whether anything was added."""
        return bool(self._ids)

    def _flush(self) -> None:
        if not self._parts:
            return
        self._has_failed = True
        with reads_or_writes(self.path, "written"):
            self._writer.write(TableRows.join(self._parts))
        self._parts, self._has_failed = [], False

    def __enter__(self) -> SavedOutputs:
        return self

    def __exit__(self, *failure: Any) -> None:
        if not self.has_rows:
            failure = (EOFError, EOFError(), None)  # so that an older file stays as it is
        if self._has_failed or not self.has_rows:
            self._file.__exit__(*failure)
            return
        with self._file:
            self._flush()


def save_sequences(path: Path, sequences: RecordedSequences, info: ServerInfo) -> None:
    """Save sequences with a server's outputs, its initial states, and times if known.

    Raises:
        CommandProblem: when it cannot be written; an older file stays unchanged.
    """
    states = tuple(
        StartState(row + 1, 0, state_rows(state, info.state, None)[0].tobytes())
        for row, state in sequences.initial_states.items()
    )
    outputs = sequences.outputs
    assert outputs is not None
    rows = np.repeat(np.arange(len(sequences)), sequences.lengths)
    seqs = (np.arange(len(rows)) - sequences.starts[rows]).astype(np.uint64)
    names = np.array(sequences.names, np.object_)[rows]
    with written_table(path, table_header(info, sequences.times_ns is not None, states)) as writer:
        for first in range(0, len(rows), CHUNK_FRAMES):
            at = slice(first, first + CHUNK_FRAMES)
            times_ns = None if sequences.times_ns is None else sequences.times_ns[at]
            writer.write(TableRows(names[at], rows[at] + 1, seqs[at], times_ns, sequences.frames[at], outputs[at]))
