"""MCAP files with a channel per stream and a message per frame, written here or elsewhere (a ROS 2 bag, for example).

Files are written as JSON with a JSON schema: `{"seq": 0, "x": [0.5, 1.0], "y": [0.25]}`. The topic is the stream's
name, and the channel's metadata has `stream_id`, so two openings of one name are two channels of one topic. Log time
and publish time are the frame's time, and the sequence is the last 32 bits of its seq. A metadata record called
`instep` has the table's metadata.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from instep_tools.formats.columns import Choice, Roles, find_roles
from instep_tools.formats.grouping import Columns
from instep_tools.formats.table import TableHeader, TableRows, json_numbers
from instep_tools.problems import BadFile, CommandProblem

MOST_CHANNELS: Final = 2**16 - 1
"""The most channels: MCAP numbers them with 16 bits, and the writer counts from 1."""
METADATA: Final = "instep"
_NUMBERS: Final = {"type": "array", "items": {"type": ["number", "null"]}}
_SCHEMA: Final = {"type": "object", "properties": {"seq": {"type": "integer"}, "x": _NUMBERS, "y": _NUMBERS}}
_LOW_32_BITS: Final = 2**32 - 1


def check_installed() -> None:
    """Raise CommandProblem if the packages for MCAP are not installed."""
    for package in ("mcap", "mcap_protobuf", "mcap_ros2"):
        if find_spec(package) is None:
            raise CommandProblem(
                f"MCAP needs the package {package!r}, which is not installed: "
                'pip install "instep[export]", or pip install -e ".[export]" in a checkout'
            )


def read_mcap(path: Path, choice: Choice, on_progress: Callable[[float], None]) -> tuple[Columns, Roles, TableHeader]:
    """Read the messages of each topic as the rows of a stream, in the order of log time.

    The columns are the numbers of a message: `angular_velocity.x`, `data2`.
    """
    check_installed()
    from mcap.decoder import DecoderFactory
    from mcap.reader import make_reader
    from mcap_protobuf.decoder import DecoderFactory as ProtobufDecoders
    from mcap_ros2.decoder import DecoderFactory as Ros2Decoders

    class JsonDecoders(DecoderFactory):
        def decoder_for(self, message_encoding: str, schema: object) -> Any:
            return json.loads if message_encoding == "json" else None

    names: list[str] = []
    rows: list[list[float]] = []
    labels: list[tuple[str, int, int]] = []
    size = path.stat().st_size
    with path.open("rb") as file:
        reader = make_reader(file, True, decoder_factories=[JsonDecoders(), Ros2Decoders(), ProtobufDecoders()])
        own = next((record.metadata for record in reader.iter_metadata() if record.name == METADATA), {})
        summary = reader.get_summary()
        topics = [] if summary is None else sorted({channel.topic for channel in summary.channels.values()})
        chosen = [topic for topic in topics if fnmatchcase(topic, choice.streams)]
        for _, channel, message, value in reader.iter_decoded_messages(chosen):
            found = dict(_numbers(value))
            names = names or list(found)
            if list(found) != names:
                raise BadFile(
                    f"{path}: choose topics with --streams: messages have different numbers ({', '.join(topics)})"
                )
            rows.append(list(found.values()))
            labels.append((channel.topic, int(channel.metadata.get("stream_id", 0)), message.log_time))
            on_progress(file.tell() / size)
    if not names:
        raise BadFile(f"{path} has no messages of numbers in a topic that fits {choice.streams!r}: {', '.join(topics)}")
    streams, ids, times = zip(*labels, strict=True)
    columns = dict(zip(names, np.array(rows, np.float64).T, strict=True))
    if "seq" in columns:
        columns["seq"] = columns["seq"].astype(np.int64)
    columns |= {"stream": np.array(streams, np.object_), "stream_id": np.array(ids)}
    columns |= {"time_ns": np.array(times)} if any(times) else {}
    header = TableHeader.from_metadata(own)
    return columns, find_roles(list(columns), choice, header), header


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """All numbers of a decoded message in order, with their names; text and booleans are skipped."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield name, np.nan if value is None else float(value)
    elif isinstance(value, Sequence | array) and not isinstance(value, str | bytes):
        for at, part in enumerate(value):
            yield from _numbers(part, f"{name}{at}")
    elif not isinstance(value, str | bytes | bool):
        if not isinstance(value, Mapping):  # a message of protobuf, or of ROS 2
            described = getattr(value, "DESCRIPTOR", None)
            fields = value.__slots__ if described is None else [field.name for field in described.fields]
            value = {field: getattr(value, field) for field in fields}
        for key, part in value.items():
            yield from _numbers(part, f"{name}.{key}" if name else str(key))


class McapWriter:
    """Writes the table as messages."""

    def __init__(self, file: BinaryIO, header: TableHeader) -> None:
        from mcap.writer import Writer

        self._writer = Writer(file)
        self._writer.start()
        self._writer.add_metadata(METADATA, header.metadata)
        self._schema = self._writer.register_schema("instep.Frame", "jsonschema", json.dumps(_SCHEMA).encode())
        self._channels: dict[tuple[str, int], int] = {}

    def write(self, rows: TableRows) -> None:
        """Write a message for each row; without times, the log time is 0."""
        times_ns = [0] * len(rows) if rows.times_ns is None else rows.times_ns.tolist()
        labels = (rows.names.tolist(), rows.stream_ids.tolist(), rows.seqs.tolist(), times_ns)
        for name, stream_id, seq, time_ns, x, y in zip(*labels, rows.x, rows.y, strict=True):
            data = f'{{"seq": {seq}, "x": {json_numbers(x)}, "y": {json_numbers(y)}}}'.encode()
            channel = self._channels.get((name, stream_id)) or self._new_channel(name, stream_id)
            self._writer.add_message(channel, time_ns, data, time_ns, seq & _LOW_32_BITS)

    def close(self) -> None:
        """Write the summary at the end."""
        self._writer.finish()

    def _new_channel(self, name: str, stream_id: int) -> int:
        if len(self._channels) == MOST_CHANNELS:
            raise CommandProblem(
                f"an MCAP file has at most {MOST_CHANNELS:,} channels, and there are more streams: choose some of "
                "them, or use another format"
            )
        number: int = self._writer.register_channel(name, "json", self._schema, {"stream_id": str(stream_id)})
        self._channels[name, stream_id] = number
        return number
