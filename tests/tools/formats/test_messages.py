"""MCAP files as others write them: JSON, protobuf, and ROS 2 messages whose bytes are put together here by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from instep_tools.formats.columns import Choice
from instep_tools.formats.read import read_sequences
from instep_tools.problems import BadFile, CommandProblem

pytest.importorskip("mcap", reason="mcap is not installed")
pytest.importorskip("google.protobuf", reason="protobuf is not installed")

LINE = "=" * 80 + "\n"
MULTI_ARRAY = f"""# comment
std_msgs/MultiArrayLayout  layout        # specification of data layout
float32[]         data
{LINE}MSG: std_msgs/MultiArrayLayout
MultiArrayDimension[] dim # Array of dimension properties
uint32 data_offset        # padding bytes at front of data
{LINE}MSG: std_msgs/MultiArrayDimension
string label   # label of given dimension
uint32 size    # size of given dimension (in type units)
uint32 stride  # stride of given dimension
"""
IMU = f"""std_msgs/Header header
geometry_msgs/Quaternion orientation
float64[9] orientation_covariance
geometry_msgs/Vector3 angular_velocity
uint8 KIND=3
bool ok true
int16 level
{LINE}MSG: geometry_msgs/Quaternion
float64 x 0
float64 y 0
float64 z 0
float64 w 1
{LINE}MSG: geometry_msgs/Vector3
float64 x
float64 y
float64 z
{LINE}MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
{LINE}MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
"""


def multi_array(values: Sequence[float]) -> bytes:
    """`std_msgs/Float32MultiArray` with one dimension called "abcd", little-endian; each comment is an offset."""
    data = b"\0\1\0\0"
    data += struct.pack("<I", 1)  # 0: one dimension
    data += struct.pack("<I", 5) + b"abcd\0" + b"\0\0\0"  # 4: the label; padding from 13 to 16
    data += struct.pack("<II", len(values), len(values))  # 16: size, stride
    data += struct.pack("<I", 0)  # 24: data_offset
    return data + struct.pack(f"<I{len(values)}f", len(values), *values)  # 28


def imu(order: str, numbers: Iterable[float]) -> bytes:
    """What is like `sensor_msgs/Imu`: 16 numbers of 64 bits and one of 16."""
    data = b"\0\1\0\0" if order == "<" else b"\0\0\0\0"
    data += struct.pack(f"{order}iII", 7, 8, 4) + b"imu\0"  # 0: stamp, frame_id; 16 is a multiple of 8
    *wide, level = numbers
    data += struct.pack(f"{order}16d", *wide)
    return data + struct.pack(f"{order}?xh", True, int(level))


def write(
    path: Path, channels: dict[str, tuple[str, str, str, bytes]], messages: Sequence[tuple[str, int, bytes]]
) -> None:
    """Channels by topic: message encoding, and the schema's name, encoding and data."""
    from mcap.writer import Writer

    with path.open("wb") as file:
        writer = Writer(file)
        writer.start()
        ids = {}
        for topic, (encoding, name, kind, schema) in channels.items():
            number = writer.register_schema(name, kind, schema) if name else 0
            ids[topic] = writer.register_channel(topic, encoding, number)
        for topic, time_ns, data in messages:
            writer.add_message(ids[topic], time_ns, data, time_ns)
        writer.finish()


def protobuf_schema() -> tuple[bytes, Any]:
    """A message with a time, a nested message, a repeated one, an enumeration and text; and its class."""
    from google.protobuf import descriptor_pool, message_factory, timestamp_pb2
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto, FileDescriptorSet

    described = FileDescriptorSet()
    described.file.add().ParseFromString(timestamp_pb2.DESCRIPTOR.serialized_pb)
    file = described.file.add(
        name="t.proto", package="t", syntax="proto3", dependency=["google/protobuf/timestamp.proto"]
    )
    point = file.message_type.add(name="Point")
    point.field.add(name="x", number=1, label=1, type=FieldDescriptorProto.TYPE_DOUBLE)
    point.field.add(name="ok", number=2, label=1, type=FieldDescriptorProto.TYPE_BOOL)
    sample = file.message_type.add(name="Sample")
    for number, (name, label, kind, of) in enumerate(
        [
            ("at", 1, FieldDescriptorProto.TYPE_MESSAGE, ".google.protobuf.Timestamp"),
            ("level", 1, FieldDescriptorProto.TYPE_SINT32, None),
            ("name", 1, FieldDescriptorProto.TYPE_STRING, None),
            ("one", 1, FieldDescriptorProto.TYPE_MESSAGE, ".t.Point"),
            ("many", 3, FieldDescriptorProto.TYPE_MESSAGE, ".t.Point"),
            ("values", 3, FieldDescriptorProto.TYPE_FLOAT, None),
        ],
        1,
    ):
        sample.field.add(name=name, number=number, label=label, type=kind, type_name=of)
    pool = descriptor_pool.DescriptorPool()
    for each in described.file:
        pool.Add(FileDescriptorProto.FromString(each.SerializeToString()))
    return described.SerializeToString(), message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Sample"))


def test_a_topic_is_a_stream_and_log_time_its_time(tmp_path: Path) -> None:
    def message(time: int, *values: float) -> bytes:
        return json.dumps(
            {"note": "x", "on": True, "pose": {"x": values[0], "q": list(values[1:])}, "t": time}
        ).encode()

    path = tmp_path / "bag.mcap"
    channels = {"/b": ("json", "", "", b""), "/a": ("json", "Pose", "jsonschema", b"{}")}
    messages = [("/b", 6, message(6, 7, 8, 9)), ("/a", 7, message(7, 4, 5, 6)), ("/b", 5, message(5, 1, 2, 3))]
    write(path, channels, messages)
    read = read_sequences(path)
    assert (read.names, read.lengths.tolist()) == (("/b", "/a"), [2, 1])
    assert read.frames.tolist() == [[1, 2, 3, 5], [7, 8, 9, 6], [4, 5, 6, 7]]
    assert read.times_ns is not None
    assert (read.times_ns.tolist(), read.outputs) == ([5, 6, 7], None)
    for columns, frames in ((("pose.q[1]", "t"), [[6, 7]]), (("pose",), [[4, 5, 6]]), (("pose.q",), [[5, 6]])):
        assert read_sequences(path, Choice(columns=columns, only="/a")).frames.tolist() == frames
    longer = [*messages, ("/a", 9, message(9, 1, 2, 3, 4))]
    write(path, channels, longer)
    assert read_sequences(path, Choice(columns=("t",), only="/a")).frames.tolist() == [[7], [9]]
    with pytest.raises(CommandProblem, match=r"there is no column 'poze'; did you mean 'pose\.x'"):
        read_sequences(path, Choice(columns=("poze",)))


def test_protobuf_with_its_schema_in_the_file(tmp_path: Path) -> None:
    schema, sample = protobuf_schema()
    one = sample(level=-2, name="n", values=[0.5, 0.1], many=[{"x": 3}, {"x": 4, "ok": True}])
    one.at.seconds = 1_700_000_000
    two = sample(level=0, one={"x": 9.0}, values=[1, 2], many=[{}, {"x": 1}])
    channels = {"/s": ("protobuf", "t.Sample", "protobuf", schema)}
    write(tmp_path / "p.mcap", channels, [("/s", 1, one.SerializeToString()), ("/s", 2, two.SerializeToString())])
    expected = np.array([[-2, 0, 3, 4, 0.5, 0.1], [0, 9, 0, 1, 1, 2]], np.float32)
    np.testing.assert_array_equal(read_sequences(tmp_path / "p.mcap").frames, expected)
    chosen = read_sequences(tmp_path / "p.mcap", Choice(columns=("values", "many[1].x")))
    np.testing.assert_array_equal(chosen.frames, expected[:, [4, 5, 3]])


def test_ros_messages_in_cdr(tmp_path: Path) -> None:
    numbers = [float(number) for number in range(16)] + [-5.0]
    channels = {
        "/array": ("cdr", "std_msgs/msg/Float32MultiArray", "ros2msg", MULTI_ARRAY.encode()),
        "/imu": ("cdr", "sensor_msgs/msg/Imu", "ros2msg", IMU.encode()),
        "/camera": ("cdr", "sensor_msgs/msg/Image", "ros2idl", b"module sensor_msgs {};"),
    }
    messages = [
        ("/array", 1, multi_array([0.1, 2])),
        ("/imu", 2, imu("<", numbers)),
        ("/array", 3, multi_array([3, 4])),
        ("/imu", 4, imu(">", [-number for number in numbers])),
        ("/camera", 5, b"\0\1\0\0"),
    ]
    write(tmp_path / "bag.mcap", channels, messages)
    array = read_sequences(tmp_path / "bag.mcap", Choice(only="/array"))
    np.testing.assert_array_equal(array.frames, np.array([[0.1, 2], [3, 4]], np.float32))
    turning = read_sequences(tmp_path / "bag.mcap", Choice(only="/imu"))
    np.testing.assert_array_equal(turning.frames, np.array([numbers, [-number for number in numbers]], np.float32))
    few = read_sequences(tmp_path / "bag.mcap", Choice(columns=("angular_velocity", "orientation.w"), only="/imu"))
    assert few.frames.tolist() == [[13, 14, 15, 3], [-13, -14, -15, -3]]
    with pytest.raises(BadFile, match=r"different counts of numbers \(/array 2, /imu 17\): choose topics with --only"):
        read_sequences(tmp_path / "bag.mcap")
    with pytest.raises(BadFile, match=r"has no topic with numbers: /camera \(cdr sensor_msgs/msg/Image\)"):
        read_sequences(tmp_path / "bag.mcap", Choice(only="/cam*"))
    with pytest.raises(BadFile, match=r"has no topic with numbers that fits '/no'"):
        read_sequences(tmp_path / "bag.mcap", Choice(only="/no"))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (multi_array([1, 2])[:-1], "it ends too early"),
        (b"\0\1\0\0\xff\xff\xff\xff", "it ends too early"),
        (b"\0\7\0\0" + multi_array([1])[4:], r"it is not plain CDR \(its first bytes are 00070000\)"),
        (b"", "it is not plain CDR"),
    ],
)
def test_damaged_messages(tmp_path: Path, data: bytes, why: str) -> None:
    channels = {"/a": ("cdr", "std_msgs/msg/Float32MultiArray", "ros2msg", MULTI_ARRAY.encode())}
    write(tmp_path / "bag.mcap", channels, [("/a", 1, data)])
    with pytest.raises(BadFile, match=rf"a message of '/a' cannot be decoded: {why}"):
        read_sequences(tmp_path / "bag.mcap")
