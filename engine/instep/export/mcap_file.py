"""MCAP: one channel a stream, one protobuf message a frame.

The topic is the stream's name; the channel's metadata has `stream_id`, so two openings of one name are two channels of
one topic. The schema is embedded:

    syntax = "proto3";
    package instep;
    message Frame { uint64 seq = 1; repeated float x = 2; repeated float y = 3; }

A message's log time and publish time are its frame's, and its sequence is the frame's seq (its last 32 bits).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, BinaryIO, Final

from instep.export.errors import CannotExport, optional_libraries
from instep.export.table import FrameTable

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

MOST_CHANNELS: Final = 2**16 - 1
"""MCAP numbers channels with 16 bits, and the writer counts from 1."""
SCHEMA_NAME: Final = "instep.Frame"
_LOW_32_BITS: Final = 2**32 - 1


def write(table: FrameTable, file: BinaryIO) -> None:
    """Write the whole table.

    Raises:
        CannotExport: when mcap or protobuf is not installed, or there are more streams than MCAP has channels.
        OSError: when it cannot be written.
        RecordingError: when the recording is damaged.
    """
    with optional_libraries("mcap"):
        from google.protobuf import descriptor_pool, message_factory
        from mcap.writer import Writer
    if len(table.names) > MOST_CHANNELS:
        raise CannotExport(
            f"an MCAP file has at most {MOST_CHANNELS:,} channels, and these are {len(table.names):,} streams: name "
            "some with --stream, or export to another format"
        )
    described = _schema()
    pool = descriptor_pool.DescriptorPool()
    pool.Add(described.file[0])
    frame_class = message_factory.GetMessageClass(pool.FindMessageTypeByName(SCHEMA_NAME))
    writer = Writer(file)
    writer.start()
    schema = writer.register_schema(SCHEMA_NAME, "protobuf", described.SerializeToString())
    channels = [
        writer.register_channel(name, "protobuf", schema, {"stream_id": str(stream_id)})
        for name, stream_id in zip(table.names, table.stream_ids, strict=True)
    ]
    for chunk in table.chunks():
        labels = (chunk.names.tolist(), chunk.seqs.tolist(), chunk.times_ns.tolist())
        for at, seq, time_ns, x, y in zip(*labels, chunk.x, chunk.y, strict=True):
            data = frame_class(seq=seq, x=x.tolist(), y=y.tolist()).SerializeToString()
            writer.add_message(channels[at], time_ns, data, time_ns, seq & _LOW_32_BITS)
    writer.finish()


def _schema() -> FileDescriptorSet:
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet

    described = FileDescriptorSet()
    file = described.file.add(name="instep/frame.proto", package="instep", syntax="proto3")
    fields = file.message_type.add(name="Frame").field
    optional, repeated = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED
    fields.add(name="seq", number=1, label=optional, type=FieldDescriptorProto.TYPE_UINT64)
    fields.add(name="x", number=2, label=repeated, type=FieldDescriptorProto.TYPE_FLOAT)
    fields.add(name="y", number=3, label=repeated, type=FieldDescriptorProto.TYPE_FLOAT)
    return described
