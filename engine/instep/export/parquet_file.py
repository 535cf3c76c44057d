"""Parquet: one row a frame, one row group a chunk; floats as `float` columns, times as int64."""

from __future__ import annotations

from typing import BinaryIO

from instep.export.errors import optional_libraries
from instep.export.table import FrameTable


def write(table: FrameTable, file: BinaryIO) -> None:
    """Write the whole table.

    Raises:
        CannotExport: when pyarrow is not installed.
        OSError: when it cannot be written.
        RecordingError: when the recording is damaged.
    """
    with optional_libraries("parquet"):
        import pyarrow as pa
        from pyarrow import parquet
    labels = [pa.string(), pa.uint32(), pa.uint64(), pa.int64()]
    floats = [pa.float32()] * (table.features + table.outputs)
    fields = zip(table.columns, labels + floats, strict=True)
    schema = pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])
    names = pa.array(table.names, pa.string())
    with parquet.ParquetWriter(file, schema, compression="zstd", use_dictionary=["stream", "stream_id"]) as writer:
        for chunk in table.chunks():
            columns = [names.take(pa.array(chunk.names)), chunk.stream_ids, chunk.seqs, chunk.times_ns]
            columns += [*chunk.x.T, *chunk.y.T]
            writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema))
