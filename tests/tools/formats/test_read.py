"""Files of every kind, written by others' code or by hand, as sequences."""

from __future__ import annotations

import gzip
import os
import pickle
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.duration_pb2 import DESCRIPTOR, Duration
from mcap.writer import Writer as McapWriter
from mcap_ros2.writer import Writer as Ros2Writer
from pyarrow import parquet
from safetensors.torch import save_file

from instep_tools.formats.columns import Choice, find_roles
from instep_tools.formats.read import read_sequences
from instep_tools.formats.write import check_output_path
from instep_tools.problems import BadFile, CommandProblem
from instep_tools.sequences import RecordedSequences

F32 = np.zeros((3, 2), np.float32)
TABLE = {"stream": np.array(["a"] * 3), "x": F32}


def parts(sequences: RecordedSequences) -> dict[str, list[list[float]]]:
    split = np.split(sequences.frames, sequences.starts[1:])
    return {name: part.tolist() for name, part in zip(sequences.names, split, strict=True)}


def text(path: Path, content: str, **choice: Any) -> RecordedSequences:
    path.write_text(content, encoding="utf-8")
    return read_sequences(path, Choice(**choice))


@pytest.mark.parametrize(
    "content",
    [
        "1,2.5,-3e2\n0,0,1\n",
        "1;2.5;-3e2\n0;0;1\n",
        "1 2.5   -300\n\n  0 0  1  \n",
        "\ufeff# by hand\na,b,c\n1,2.5,-300\n0,0,1\n",
    ],
)
def test_numbers_are_separated_by_commas_semicolons_or_white_space(tmp_path: Path, content: str) -> None:
    assert parts(text(tmp_path / "mic.txt", content)) == {"mic": [[1, 2.5, -300], [0, 0, 1]]}


@pytest.mark.parametrize(
    ("header", "choice", "frame", "output"),
    [
        ("seq,stream,left,time_s,right", Choice(), ["left", "right"], []),
        ("stream,x1,x0,time_s,y0", Choice(), ["x0", "x1"], ["y0"]),
        ("stream,x0,time_s,speech,noise", Choice(), ["x0"], ["speech", "noise"]),
        ("stream,a,b,time_s,y0", Choice(columns=("b",)), ["b"], ["y0"]),
        ("stream,a,b,c,at", Choice(time="at"), ["a", "b", "c"], []),
        ("who,a,b,time_s,c", Choice(named=True), ["a", "b", "c"], []),
        ("mfcc0,mfcc1,pitch,mfcc2", Choice(columns=("mfcc*",)), ["mfcc0", "mfcc1", "mfcc2"], []),
    ],
)
def test_what_columns_are_for(header: str, choice: Choice, frame: list[str], output: list[str]) -> None:
    names = header.split(",")
    roles = find_roles(names, choice)
    assert (list(roles.inputs), list(roles.outputs)) == (frame, output)
    assert roles.time == (choice.time or ("time_s" if "time_s" in names else None))
    assert roles.stream == ("who" if choice.named else "stream" if "stream" in names else None)
    for absent in (Choice(columns=("zz",)), Choice(columns=("zz*",)), Choice(time="zz")):
        with pytest.raises(CommandProblem, match="zz"):
            find_roles(names, absent)


@pytest.mark.parametrize(
    ("column", "field", "ns"),
    [
        ("time_ns", "1700000000123456789", 1_700_000_000_123_456_789),
        ("time_ms", "2", 2_000_000),
        ("time", "1e3", 10**12),
        ("time", "1970-01-01T00:00:01.123456789Z", 1_123_456_789),
    ],
)
def test_times(tmp_path: Path, column: str, field: str, ns: int) -> None:
    read = text(tmp_path / "a.csv", f"{column},x0\n{field},1\n", time=column)
    assert read.times_ns is not None
    assert read.times_ns.tolist() == [ns]


def test_streams_of_a_text(tmp_path: Path) -> None:
    many = text(tmp_path / "many.txt", "stream,time_s,seq,x\na,0,5,1\nb,0.5,0,2\na,1,6,3\n")
    assert parts(many) == {"a": [[1], [3]], "b": [[2]]}
    assert many.times_ns is not None
    assert many.times_ns.tolist() == [0, 10**9, 5 * 10**8]
    named = text(tmp_path / "named.csv", '007,1,2\n"a, b",3,4\n007,5,6\n', named=True, streams="0*")
    assert parts(named) == {"007": [[1, 2], [5, 6]]}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a,b\n", "holds no frames"),
        ("a,b\n1,2\n3\n", "Row #3"),
        ("mic,1,2\nmic,3,4\n", "--columns.*--named.*'mic'"),
        ("a,b\n1,2\n3,\n", "frame 1 of 'a'"),
        ("time_s,x\n2,0\n1,0\n", "times"),
        ("time,x\nsoon,0\n", "'time'"),
        ("seq,x\n0,0\n2,0\n", "frame 2 where frame 1"),
        ('{"stream": "a", "x": [1]}\n{"stream": "a"}\n', "cannot be read"),
    ],
)
def test_bad_text_is_refused_with_one_sentence(tmp_path: Path, content: str, why: str) -> None:
    with pytest.raises(BadFile, match=why) as failure:
        text(tmp_path / "a.csv", content)
    assert str(failure.value).count(str(tmp_path / "a.csv")) == 1
    assert "\n" not in str(failure.value)


def test_arrays_of_any_name_are_a_stream_each(tmp_path: Path) -> None:
    block = np.arange(12, dtype=np.float64).reshape(2, 3, 2)
    np.savez(tmp_path / "a.npz", left=np.arange(4).reshape(2, 2), right=np.arange(6.0).reshape(3, 2))
    np.save(tmp_path / "b.npy", block)
    np.save(tmp_path / "c.npy", np.asfortranarray(block[1]))
    (tmp_path / "c.npy").rename(tmp_path / "c.csv")  # the name does not matter
    assert parts(read_sequences(tmp_path / "a.npz")) == {"left": [[0, 1], [2, 3]], "right": [[0, 1], [2, 3], [4, 5]]}
    assert parts(read_sequences(tmp_path / "b.npy")) == {"b-0": block[0].tolist(), "b-1": block[1].tolist()}
    whole = read_sequences(tmp_path / "c.csv", Choice(columns=("x1",)))
    assert parts(whole) == {"c": block[1, :, 1:].tolist()}
    assert whole.frames.flags.c_contiguous


def test_a_table_in_an_npz(tmp_path: Path) -> None:
    stream, x = np.array(["b", "a", "b"]), np.array([[1], [2], [3]])
    y = np.array([[5, 6], [7, 8], [np.nan, np.nan]], np.float32)
    np.savez(tmp_path / "u.npz", stream=stream, x=x, y=y, seq=[1, 0, 0], stream_id=[3, 3, 3], time_ns=[9, 0, 8])
    read = read_sequences(tmp_path / "u.npz")
    assert parts(read) == {"b": [[3], [1]], "a": [[2]]}
    assert read.answered is not None
    assert read.times_ns is not None
    assert (read.answered.tolist(), read.times_ns.tolist()) == ([False, True, True], [8, 9, 0])
    swapped = read_sequences(tmp_path / "u.npz", Choice(columns=("y1", "x0"), streams="a"))
    assert parts(swapped) == {"a": [[8, 2]]}


@pytest.mark.parametrize(
    ("arrays", "why"),
    [
        ({"a": np.zeros((0, 2))}, "holds no frames"),
        ({"a": np.zeros((2, 2)), "b": np.zeros((2, 3))}, "different widths"),
        ({"a": np.array([[None]])}, "allow_pickle"),
        ({**TABLE, "stream": np.array(["a", "b"])}, "different lengths"),
        ({**TABLE, "metadata": np.array(b'{"states": "[[0, 0, \\"AA==\\"]]"}')}, "damaged"),
    ],
)
def test_bad_arrays_are_refused_with_one_sentence(tmp_path: Path, arrays: dict[str, Any], why: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BadFile, match=f"{tmp_path / 'bad.npz'}.*{why}"):
        read_sequences(tmp_path / "bad.npz")


def test_parquet_of_other_programs(tmp_path: Path) -> None:
    columns = {
        "stream": pa.array(["b", "a", "b"]).dictionary_encode(),
        "left": pa.array([1, 2, 3], pa.int16()),
        "right": pa.array([0.5, 0.25, 1.0], pa.float64()),
        "time": pa.array([1, 2, 3], pa.timestamp("us")),
        "label": pa.array(["x", "y", "z"]),
        "gaps": pa.array([1.0, None, 3.0]),
    }
    parquet.write_table(pa.table(columns), tmp_path / "p.parquet")
    read = read_sequences(tmp_path / "p.parquet", Choice(columns=("right", "left")))
    assert parts(read) == {"b": [[0.5, 1], [1, 3]], "a": [[0.25, 2]]}
    assert read.times_ns is not None
    assert read.times_ns.tolist() == [1000, 3000, 2000]
    for choice, named in (
        (Choice(), "'label'"),
        (Choice(columns=("gaps",)), "frame 0 of 'a'"),
        (Choice(columns=("left",), time="label"), "'label'"),
    ):
        with pytest.raises(CommandProblem, match=named):
            read_sequences(tmp_path / "p.parquet", choice)
    devices = pa.table({"device": pa.array(["left", "right", "left"]), "stream": [7, 8, 9], "f0": [1, 2, 3]})
    parquet.write_table(devices, tmp_path / "d.parquet")
    assert parts(read_sequences(tmp_path / "d.parquet", Choice(named=True))) == {"left": [[1], [3]], "right": [[2]]}


def write_ros2(path: Path) -> None:
    """Two messages of `/imu` and one of `/note`, as a robot would record them."""
    vector = "=" * 80 + "\nMSG: geometry_msgs/Vector3\nfloat64 x\nfloat64 y\nfloat64 z\n"
    with path.open("wb") as file:
        writer = Ros2Writer(file)
        imu = writer.register_msgdef(
            "test_msgs/Imu", f"string frame\ngeometry_msgs/Vector3 rate\nfloat32[2] data\n{vector}"
        )
        note = writer.register_msgdef("test_msgs/Note", "string data\n")
        for at in (2, 1):
            rate = {"x": at, "y": 10.0 * at, "z": 100.0 * at}
            writer.write_message("/imu", imu, {"frame": "base", "rate": rate, "data": [at, -at]}, log_time=at)
        writer.write_message("/note", note, {"data": "hello"}, log_time=3)
        writer.finish()  # type: ignore[no-untyped-call]


def test_topics_of_a_ros2_bag(tmp_path: Path) -> None:
    write_ros2(tmp_path / "bag.mcap")
    shares: list[float] = []
    read = read_sequences(tmp_path / "bag.mcap", Choice(streams="/imu"), shares.append)
    assert 0 < shares[0] <= shares[-1] <= 1
    assert parts(read) == {"/imu": [[1, 10, 100, 1, -1], [2, 20, 200, 2, -2]]}
    assert read.times_ns is not None
    assert read.times_ns.tolist() == [1, 2]
    chosen = Choice(streams="/imu", columns=("data1", "rate.x"))
    assert parts(read_sequences(tmp_path / "bag.mcap", chosen)) == {"/imu": [[-1, 1], [-2, 2]]}
    for choice, named in ((Choice(), "--streams"), (Choice(streams="/note"), "/note"), (Choice(streams="/x"), "'/x'")):
        with pytest.raises(BadFile, match=named):
            read_sequences(tmp_path / "bag.mcap", choice)


def test_topics_of_json_and_protobuf(tmp_path: Path) -> None:
    described = FileDescriptorSet()
    DESCRIPTOR.CopyToProto(described.file.add())
    text = b'{"a": {"b": 1, "on": true}, "c": [2, 3], "text": "x"}'
    with (tmp_path / "a.mcap").open("wb") as file:
        writer = McapWriter(file)
        writer.start()
        for topic, encoding, schema, message in (
            ("/json", "json", ("Any", "jsonschema", b"{}"), text),
            (
                "/pb",
                "protobuf",
                ("google.protobuf.Duration", "protobuf", described.SerializeToString()),
                Duration(nanos=7).SerializeToString(),
            ),
            ("/other", "cbor", ("Any", "", b""), b"?"),
        ):
            channel = writer.register_channel(topic, encoding, writer.register_schema(*schema))
            writer.add_message(channel, 1, message, 1)
        writer.finish()
    for only, columns, frame in (("/json", (), [1, 2, 3]), ("/json", ("a.b",), [1]), ("/pb", (), [0, 7])):
        assert parts(read_sequences(tmp_path / "a.mcap", Choice(streams=only, columns=columns))) == {only: [frame]}
    with pytest.raises(BadFile, match="cbor"):
        read_sequences(tmp_path / "a.mcap", Choice(streams="/other"))


STRANGERS: dict[str, Callable[[Path], object]] = {
    "net.safetensors": lambda path: save_file({"w": torch.zeros(2)}, path),
    "x.pkl": lambda path: path.write_bytes(pickle.dumps([1, 2])),
    "x.csv.gz": lambda path: path.write_bytes(gzip.compress(b"1 2")),
    "utf16.csv": lambda path: path.write_text("1 2", encoding="utf-16"),
    "cut.npz": lambda path: path.write_bytes(b"PK\x03\x04 cut off"),
    "cut.parquet": lambda path: path.write_bytes(b"PAR1 cut off"),
    "cut.mcap": lambda path: path.write_bytes(b"\x89MCAP0\r\n\x01 cut off"),
    "cut.instep": lambda path: path.write_bytes(b"SQLite format 3\0 and then nonsense" * 100),
    "bag.db3": lambda path: sqlite3.connect(path).execute("CREATE TABLE topics (id)").connection.close(),
    "folder": lambda path: path.mkdir(),
    "absent.csv": lambda path: None,
}


@pytest.mark.parametrize("name", STRANGERS)
def test_files_that_cannot_be_read_are_a_sentence_each(tmp_path: Path, name: str) -> None:
    STRANGERS[name](tmp_path / name)
    with pytest.raises(BadFile) as failure:
        read_sequences(tmp_path / name)
    assert str(failure.value).startswith(f"{tmp_path / name} ")
    assert len(str(failure.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("choice", "named"), [(Choice(named=True), "--named"), (Choice(time="t"), "'t'"), (Choice(streams="b*"), r"'b\*'")]
)
def test_choices_that_arrays_do_not_have(tmp_path: Path, choice: Choice, named: str) -> None:
    np.save(tmp_path / "a.npy", F32)
    with pytest.raises(CommandProblem, match=named):
        read_sequences(tmp_path / "a.npy", choice)


def test_where_nothing_can_be_written_is_found_out_before_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check_output_path(tmp_path / "y.CSV") == "csv"
    (tmp_path / "folder.csv").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for name in ("y.txt", "absent/y.npz", "folder.csv", f"{'y' * 300}.csv", "no-permission.csv"):
        with pytest.raises(BadFile, match=name.split("/")[0]):
            check_output_path(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.csv"]
