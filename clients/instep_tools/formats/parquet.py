"""Parquet: one row a frame, a column for each number, and what is known about the model as metadata."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import F32
from instep_tools.formats.columns import Choice, find_roles, unit_ns
from instep_tools.formats.grouping import sequences_of
from instep_tools.formats.table import TableHeader, TableRows, TableWriter, optional_libraries
from instep_tools.problems import BadFile
from instep_tools.sequences import I64, RecordedSequences

PREFIX: Final = "instep."
"""Of the keys of the file's metadata."""


def read_parquet(path: Path, choice: Choice) -> RecordedSequences:
    """The rows as sequences; without a column `stream` they are one stream, called as the file.

    Raises:
        BadFile: when a column cannot be read as what it must be.
        CommandProblem: when a column that was named is not there, or pyarrow is missing.
    """
    with optional_libraries("Parquet"):
        import pyarrow as pa
        from pyarrow import parquet
    try:
        with parquet.ParquetFile(path) as file:
            metadata = file.schema_arrow.metadata or {}
            texts = {key.decode(errors="replace"): value.decode(errors="replace") for key, value in metadata.items()}
            own = {key.removeprefix(PREFIX): text for key, text in texts.items() if key.startswith(PREFIX)}
            header = TableHeader.from_metadata(own)
            names = file.schema_arrow.names
            roles = find_roles(names, choice, header)
            labels = {"stream": roles.stream, "stream_id": roles.stream_id, "seq": roles.seq, "time": roles.time}
            wanted = [at for at in (*labels.values(), *roles.inputs, *roles.outputs) if at is not None]
            table = file.read([names[at] for at in wanted])
    except pa.ArrowException as error:
        raise BadFile(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    column = {label: None if at is None else table.column(names[at]) for label, at in labels.items()}
    rows = table.num_rows
    streams = [path.stem] * rows if column["stream"] is None else [str(name) for name in column["stream"].to_pylist()]
    return sequences_of(
        path,
        streams,
        None if column["stream_id"] is None else _integers(path, "stream_id", column["stream_id"]).tolist(),
        None if column["seq"] is None else _integers(path, "seq", column["seq"]),
        None if roles.time is None else _times_ns(path, names[roles.time], column["time"]),
        _floats(path, table, [names[at] for at in roles.inputs]),
        _floats(path, table, [names[at] for at in roles.outputs]),
        header,
    )


def _floats(path: Path, table: Any, names: list[str]) -> F32:
    values = np.empty((table.num_rows, len(names)), np.float32)
    for at, name in enumerate(names):
        values[:, at] = _numbers(path, name, table.column(name), "fiu")
    return values


def _integers(path: Path, name: str, column: Any) -> I64:
    return _numbers(path, name, column, "iu").astype(np.int64)


def _numbers(path: Path, name: str, column: Any, kinds: str) -> npt.NDArray[Any]:
    found: npt.NDArray[Any] = column.to_numpy()
    if found.dtype.kind not in kinds:
        what = "whole numbers" if kinds == "iu" else "numbers"
        raise BadFile(
            f"{path}: the column {name!r} must be {what} and have no gaps, it is {column.type}; "
            "name the frame's columns with --columns, and give --named if the first column names the stream"
        )
    return found


def _times_ns(path: Path, name: str, column: Any) -> I64:
    values: npt.NDArray[Any] = column.to_numpy()
    if values.dtype.kind == "M" and not np.isnat(values).any():
        return values.astype("datetime64[ns]").astype(np.int64)
    unit = unit_ns(name)
    if values.dtype.kind in "iu":
        return values.astype(np.int64) * unit
    if values.dtype.kind == "f" and np.isfinite(values).all():
        return np.round(values * unit).astype(np.int64)
    raise BadFile(f"{path}: the column {name!r} must be times or numbers and have no gaps, it is {column.type}")


class ParquetWriter(TableWriter):
    """The table, compressed by zstd; a row group for each `add`."""

    def __init__(self, file: BinaryIO, header: TableHeader) -> None:
        with optional_libraries("Parquet"):
            import pyarrow as pa
            from pyarrow import parquet
        self._pa = pa
        kinds = [("stream", pa.string()), ("stream_id", pa.uint32()), ("seq", pa.uint64())]
        if header.timed:
            kinds.append(("time", pa.timestamp("ns", "UTC")))
        kinds += [(name, pa.float32()) for name in (*header.inputs, *header.outputs)]
        fields = [pa.field(name, kind, nullable=False) for name, kind in kinds]
        self._schema = pa.schema(fields, {PREFIX + key: text for key, text in header.metadata.items()})
        self._writer = parquet.ParquetWriter(
            file, self._schema, compression="zstd", use_dictionary=["stream", "stream_id"]
        )

    def add(self, rows: TableRows) -> None:
        """Write them as a row group."""
        columns: list[Any] = [rows.names, rows.stream_ids, rows.seqs]
        columns += [] if rows.times_ns is None else [rows.times_ns]
        columns += [*rows.x.T, *rows.y.T]
        arrays = [self._pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        self._writer.write_batch(self._pa.record_batch(arrays, self._schema))

    def close(self) -> None:
        """Write the metadata at the end."""
        self._writer.close()

    def discard(self) -> None:
        """End it before the file is closed: it would try to when it is collected."""
        with suppress(OSError, self._pa.ArrowException):
            self._writer.close()
