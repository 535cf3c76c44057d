"""The wire's bytes, written out by hand from the msgpack specification, and what happens to bytes that are not so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Kind

HEADERS: list[tuple[Kind, int, tuple[Any, ...], str]] = [
    (Kind.HELLO, 1, (3, "abc", "ears"), "95 01 01 03 a3 616263 a4 65617273"),
    (Kind.CLOSE, 128, (65_535,), "93 04 cc80 cdffff"),
    (Kind.STATS, 2**32, (), "92 06 cf0000000100000000"),
    (Kind.RESUME, 4, (2, 1), "94 07 04 02 01"),
    (Kind.OPENED, 2, (1, "fsync", ((105, "no"),)), "95 42 02 01 a5 6673796e63 91 92 69 a2 6e6f"),
    (Kind.STATISTICS, 3, ((("a", 1.5),),), "93 46 03 91 92 a1 61 cb3ff8000000000000"),
    (Kind.ERROR, 5, (200, "x", 2000), "95 48 05 ccc8 a1 78 cd07d0"),
    (Kind.MOVED, 0, (1, "ab"), "94 4f 00 01 a2 6162"),
    (Kind.REMOVE, 9, (3, 1), "94 0d 09 03 01"),
    (Kind.SHARDS, 23, (), "92 10 17"),
    (Kind.SHARDED, 23, (3,), "93 50 17 03"),
]


def with_frames(kind: Kind, header: bytes) -> list[bytes]:
    return [header, *[b""] * (kind.frames - 1)]


@pytest.mark.parametrize(("kind", "request_number", "fields", "expected"), HEADERS)
def test_headers_are_these_bytes(kind: Kind, request_number: int, fields: tuple[Any, ...], expected: str) -> None:
    header = bytes.fromhex(expected)
    assert wire.pack_header(kind, request_number, *fields) == header
    read = wire.unpack_header(with_frames(kind, header))
    assert (read.kind, read.request, read.fields) == (kind, request_number, fields)


GOOD = bytes.fromhex("95 02 02 03 01 00")


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"\x94\x02\x02\x03"],  # cut
        [b"\x81\x01\x02"],  # a map
        [b"\x92\x05\xdc\x01\x01" + b"\xc0" * 257],  # too long a list
        [b"\x05"],
        [b"\x92\x03\x01"],  # an unknown kind
        [b"\x92\x05\xff"],  # request -1
        [b"\x92\x05\xcb\x3f\xf0" + b"\x00" * 6],  # request 1.0
        [GOOD, b"", b""],  # a frame too few
    ],
)
def test_what_is_no_message_is_refused(frames: list[bytes]) -> None:
    with pytest.raises(MalformedMessage):
        wire.unpack_header(frames)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4))
def test_garbage_is_a_header_or_malformed_and_nothing_else(frames: list[bytes]) -> None:
    read_or_malformed(frames)


@settings(deadline=None)
@given(
    st.sampled_from(HEADERS),
    st.lists(
        st.tuples(st.sampled_from(["flip", "cut", "insert"]), st.integers(0, 80), st.integers(0, 255)), max_size=4
    ),
)
def test_mutated_headers_are_headers_or_malformed(
    row: tuple[Kind, int, Any, str], edits: list[tuple[str, int, int]]
) -> None:
    header = bytearray.fromhex(row[3])
    for edit, at, value in edits:
        at %= len(header) + 1
        if edit == "flip" and at < len(header):
            header[at] ^= value
        elif edit == "cut":
            del header[at:]
        else:
            header.insert(at, value)
    read_or_malformed(with_frames(row[0], bytes(header)))


"""Of all characters that UTF-8 has; without this, Hypothesis tries for 2 s which those are."""


def read_or_malformed(frames: list[bytes]) -> None:
    try:
        read = wire.unpack_header(frames)
    except MalformedMessage:
        return
    assert len(frames) == read.kind.frames
    assert len(read.fields) == read.kind.elements - 2
    assert 0 <= read.request < 2**63


@pytest.mark.parametrize("value", [0, 1.0, (1,)])
def test_a_count_is_an_integer_within_its_bounds(value: Any) -> None:
    assert wire.count_field(10, "N", 10) == 10
    assert wire.count_field(0, "N", 10, at_least=0) == 0
    with pytest.raises(MalformedMessage):
        wire.count_field(value, "N", 10)


def test_an_array_frame_is_read_without_a_copy_and_only_at_its_exact_size() -> None:
    data = np.arange(6, dtype="<f4").tobytes()
    array = wire.array_frame(memoryview(data), "<f4", (2, 3), "x")
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not array.flags.writeable
    with pytest.raises(MalformedMessage):
        wire.array_frame(data, "<f4", (7,), "x")
    with pytest.raises(MalformedMessage):
        wire.array_frame(data, "<f4", (2**40, 2**40), "x")


def test_names_are_lines() -> None:
    assert wire.pack_names(["a", "é"]) == b"a\n\xc3\xa9"
    assert wire.unpack_names(b"a\n\xc3\xa9", 2) == ["a", "é"]
    assert wire.unpack_names(memoryview(b""), 1) == [""]


@pytest.mark.parametrize(
    ("frame", "count"),
    [(b"a\nb", 1), (b"a", 2), (b"\xff", 1), (b"a" * 900, 1)],
)
def test_names_that_are_not_lines_are_refused(frame: bytes, count: int) -> None:
    with pytest.raises(MalformedMessage):
        wire.unpack_names(frame, count)


@pytest.mark.parametrize(
    ("name", "is_good"),
    [
        ("a", True),
        ("é" * 101, False),
        ("", False),
        ("\ud800", False),
    ],
)
def test_a_good_name_is_printable_and_short(name: str, is_good: bool) -> None:
    assert wire.name_is_good(name) is is_good


@pytest.mark.parametrize(
    ("name", "crc", "shards"),
    [
        ("mic-1", 0xDACBD3C4, (0, 0, 0, 108)),
        ("mic-2", 0x43C2827E, (0, 2, 10, 862)),
        ("mic-3", 0x34C5B2E8, (0, 0, 8, 624)),
        ("mic-4", 0xAAA1274B, (1, 3, 7, 75)),
        ("straße/7", 0x10499E79, (1, 1, 5, 153)),
        ("😀", 0x054DB544, (0, 0, 4, 756)),
        ("stream-000123", 0x32634DDE, (0, 2, 10, 798)),
    ],
)
def test_the_shard_of_a_name_is_its_crc(name: str, crc: int, shards: tuple[int, ...]) -> None:
    assert wire.shard_of(name, 2**32) == crc
    assert tuple(wire.shard_of(name, count) for count in (2, 4, 12, 1000)) == shards


def test_a_table_of_shards_comes_back_as_it_was_sent() -> None:
    table = wire.ShardTable(np.array([1, 0], np.uint64), ("ipc:///tmp/a.0", ""))
    message = table.pack(7)
    found = wire.ShardTable.unpack(wire.unpack_header(message), message)
    assert (found.terms.tolist(), found.endpoints) == ([1, 0], table.endpoints)


@pytest.mark.parametrize("terms", [bytes(15), bytes(24)])
def test_a_table_of_another_number_of_shards_is_malformed(terms: bytes) -> None:
    message = wire.ShardTable(np.array([1, 0], np.uint64), ("", "")).pack(7)
    message[1] = terms
    with pytest.raises(MalformedMessage):
        wire.ShardTable.unpack(wire.unpack_header(message), message)
