"""MCAP: one channel a stream, one message a frame, as written here or by others (a ROS 2 bag, for example).

What is written here is protobuf; the schema is embedded:

    syntax = "proto3";
    package instep;
    message Frame { uint64 seq = 1; repeated float x = 2; repeated float y = 3; }

The topic is the stream's name, and the channel's metadata has `stream_id`: two openings of one name are two channels of
one topic. Log time and publish time are the frame's, the sequence is its seq (the last 32 bits). A metadata record
called `instep` holds what is known about the model.
"""

from __future__ import annotations

from collections import defaultdict
from fnmatch import fnmatchcase
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import numpy as np

from instep_client.protocol.wire import F32
from instep_tools.formats.columns import Choice, chosen_columns, no_such_column
from instep_tools.formats.grouping import sequences_of
from instep_tools.formats.messages import Decoder, decoder, flatten
from instep_tools.formats.table import TableHeader, TableRows, TableWriter, optional_libraries
from instep_tools.problems import BadFile, CommandProblem
from instep_tools.sequences import RecordedSequences

if TYPE_CHECKING:
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

MOST_CHANNELS: Final = 2**16 - 1
"""MCAP numbers channels with 16 bits, and the writer counts from 1."""
SCHEMA_NAME: Final = "instep.Frame"
METADATA: Final = "instep"
_LOW_32_BITS: Final = 2**32 - 1
_TOPICS_NAMED: Final = 8


def read_mcap(path: Path, choice: Choice) -> RecordedSequences:
    """The messages of each topic as a stream, in order of log time, which is also the frames' time.

    A frame is the numbers of a message one after another, as `flatten` gives them, or those of the chosen columns: a
    field's name stands for all that is below it.

    Raises:
        BadFile: when it is damaged, or no topic holds numbers, or their messages have different counts of them.
        CommandProblem: when there is no such topic or column, or a library is missing.
    """
    with optional_libraries("MCAP"):
        from mcap.reader import make_reader
    try:
        with path.open("rb") as file:
            reader = make_reader(file, validate_crcs=True)
            own = next((record.metadata for record in reader.iter_metadata() if record.name == METADATA), {})
            file.seek(0)
            found = _Messages(path, choice)
            reader = make_reader(file, validate_crcs=True)
            for schema, channel, message in reader.iter_messages(log_time_order=False):  # sorting takes it longer
                if fnmatchcase(channel.topic, choice.only):
                    found.add(schema, channel, message)
    except (CommandProblem, OSError):
        raise
    except Exception as error:  # of a damaged file, the libraries for its parts raise errors of many kinds
        raise BadFile(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return found.sequences(TableHeader.from_metadata(own))


class _Messages:
    """Messages of the chosen topics, decoded."""

    def __init__(self, path: Path, choice: Choice) -> None:
        self._path = path
        self._choice = choice
        self._decoders: dict[int, Decoder | None] = {}
        self._kinds: dict[str, str] = {}
        """By topic, of those that cannot be read."""
        self._picked: dict[tuple[int, int], list[int]] = {}
        """By channel and count of numbers, where the chosen ones are."""
        self._widths: dict[int, dict[str, int]] = defaultdict(dict)
        """By count of numbers, the topics that have so many; values are those of outputs."""
        self._rows: list[tuple[str, int, int, int, F32, F32]] = []
        """Each has a stream, its number, a seq (-1 for none), a time, x and y."""

    def add(self, schema: Any, channel: Any, message: Any) -> None:
        number = channel.id
        if number not in self._decoders:
            self._decoders[number] = decoder(schema, channel.message_encoding)
        decode = self._decoders[number]
        if decode is None:
            self._kinds[channel.topic] = f"{channel.message_encoding} {getattr(schema, 'name', '')}".strip()
            return
        try:
            value = decode(message.data)
        except (ValueError, LookupError, TypeError) as error:
            raise BadFile(f"{self._path}: a message of {channel.topic!r} cannot be decoded: {error}") from None
        if getattr(schema, "name", "") == SCHEMA_NAME:
            x, y, seq = value["x"], value["y"], int(value["seq"])
        else:
            x, y, seq = self._numbers(number, value), [], -1
        if not len(x):
            self._kinds[channel.topic] = "no numbers"
            return
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            frame = np.asarray(x, np.float64).astype(np.float32)
        stream_id, output = int(channel.metadata.get("stream_id", 0)), np.asarray(y, np.float32)
        self._rows.append((channel.topic, stream_id, seq, message.log_time, frame, output))
        self._widths[len(x)][channel.topic] = len(y)

    def _numbers(self, channel: int, value: Any) -> list[float]:
        names, numbers = flatten(value)
        if not self._choice.columns:
            return numbers
        picked = self._picked.get((channel, len(names)))
        if picked is None:
            picked = self._picked[channel, len(names)] = _picked(names, self._choice)
        return [numbers[at] for at in picked]

    def sequences(self, header: TableHeader) -> RecordedSequences:
        if not self._rows:
            kinds = ", ".join(f"{topic} ({kind})" for topic, kind in list(self._kinds.items())[:_TOPICS_NAMED])
            hint = f": {kinds}" if kinds else f" that fits {self._choice.only!r}"
            raise BadFile(f"{self._path} has no topic with numbers{hint}")
        if len(self._widths) > 1 or len({*next(iter(self._widths.values())).values()}) > 1:
            widths = [f"{topic} {width}" for width, topics in self._widths.items() for topic in topics]
            raise BadFile(
                f"{self._path}: messages have different counts of numbers ({', '.join(widths[:_TOPICS_NAMED])}): "
                "choose topics with --only, and fields with --columns"
            )
        names, ids, all_seqs, times, x, y = zip(*sorted(self._rows, key=itemgetter(3)), strict=True)
        seqs, times_ns = np.array(all_seqs, np.int64), np.array(times, np.int64)
        is_own = seqs[0] >= 0
        sequences = sequences_of(
            self._path,
            names,
            ids,
            seqs if is_own else None,
            times_ns if times_ns.any() else None,
            np.stack(x),
            np.stack(y),
            header,
        )
        return chosen_columns(sequences, self._choice, header) if is_own else sequences


def _picked(names: list[str], choice: Choice) -> list[int]:
    """Where the chosen columns are among the numbers of a message."""
    places: list[int] = []
    for column in choice.columns:
        found = [at for at, name in enumerate(names) if name == column or name.startswith((f"{column}.", f"{column}["))]
        if not found:
            raise CommandProblem(no_such_column(column, names))
        places += found
    return places


class McapWriter(TableWriter):
    """The table as messages, see above, of `most_channels` streams at most."""

    def __init__(self, file: BinaryIO, header: TableHeader, most_channels: int = MOST_CHANNELS) -> None:
        self._most_channels = most_channels
        with optional_libraries("MCAP"):
            from google.protobuf import descriptor_pool, message_factory
            from mcap.writer import Writer
        described = frame_schema()
        pool = descriptor_pool.DescriptorPool()
        pool.Add(described.file[0])
        self._frame_class = message_factory.GetMessageClass(pool.FindMessageTypeByName(SCHEMA_NAME))
        self._writer = Writer(file)
        self._writer.start()
        self._writer.add_metadata(METADATA, header.metadata)
        self._schema = self._writer.register_schema(SCHEMA_NAME, "protobuf", described.SerializeToString())
        self._channels: dict[tuple[str, int], int] = {}

    def add(self, rows: TableRows) -> None:
        """Write their messages; where there are no times, the log time is 0."""
        times_ns = [0] * len(rows) if rows.times_ns is None else rows.times_ns.tolist()
        labels = (rows.names.tolist(), rows.stream_ids.tolist(), rows.seqs.tolist(), times_ns)
        for name, stream_id, seq, time_ns, x, y in zip(*labels, rows.x, rows.y, strict=True):
            data = self._frame_class(seq=seq, x=x.tolist(), y=y.tolist()).SerializeToString()
            channel = self._channels.get((name, stream_id)) or self._new_channel(name, stream_id)
            self._writer.add_message(channel, time_ns, data, time_ns, seq & _LOW_32_BITS)

    def close(self) -> None:
        """Write the summary at the end."""
        self._writer.finish()

    def _new_channel(self, name: str, stream_id: int) -> int:
        if len(self._channels) == self._most_channels:
            raise CommandProblem(
                f"an MCAP file has at most {self._most_channels:,} channels, and there are more streams: choose "
                "some of them, or use another format"
            )
        number: int = self._writer.register_channel(name, "protobuf", self._schema, {"stream_id": str(stream_id)})
        self._channels[name, stream_id] = number
        return number


def frame_schema() -> FileDescriptorSet:
    """The description of a message as it is written here."""
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorSet

    described = FileDescriptorSet()
    file = described.file.add(name="instep/frame.proto", package="instep", syntax="proto3")
    fields = file.message_type.add(name="Frame").field
    optional, repeated = FieldDescriptorProto.LABEL_OPTIONAL, FieldDescriptorProto.LABEL_REPEATED
    fields.add(name="seq", number=1, label=optional, type=FieldDescriptorProto.TYPE_UINT64)
    fields.add(name="x", number=2, label=repeated, type=FieldDescriptorProto.TYPE_FLOAT)
    fields.add(name="y", number=3, label=repeated, type=FieldDescriptorProto.TYPE_FLOAT)
    return described
