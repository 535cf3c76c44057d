"""The wire's bytes, written out by hand from the msgpack specification, and what happens to bytes that are not so."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep_client.protocol import wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Kind

HEADERS: list[tuple[Kind, int, tuple[Any, ...], str]] = [
    (Kind.HELLO, 1, (3, "abc", "ears"), "95 01 01 03 a3 616263 a4 65617273"),
    (Kind.OPEN, 2, (3, 1, 0), "95 02 02 03 01 00"),
    (Kind.CLOSE, 128, (65_535,), "93 04 cc80 cdffff"),
    (Kind.PING, 1, (), "92 05 01"),
    (Kind.LIST, 7, (0, 100, 2), "95 0b 07 00 64 02"),
    (Kind.STATS, 2**32, (), "92 06 cf0000000100000000"),
    (Kind.RESUME, 4, (2, 1), "94 07 04 02 01"),
    (Kind.READ_STATE, 5, (1, 0), "94 08 05 01 00"),
    (Kind.RESET, 6, (2, 0), "94 09 06 02 00"),
    (Kind.FORK, 8, (1,), "93 0a 08 01"),
    (Kind.OPENED, 2, (1, "fsync", ((105, "no"),)), "95 42 02 01 a5 6673796e63 91 92 69 a2 6e6f"),
    (Kind.CLOSED, 9, (1, ()), "94 44 09 01 90"),
    (Kind.PONG, 0, (), "92 45 00"),
    (Kind.STATISTICS, 3, ((("a", 1.5),),), "93 46 03 91 92 a1 61 cb3ff8000000000000"),
    (Kind.EVICTED, 0, (2, 106, "x"), "95 47 00 02 6a a1 78"),
    (Kind.ERROR, 5, (200, "x", 2000), "95 48 05 ccc8 a1 78 cd07d0"),
    (Kind.GOODBYE, 0, ("x",), "93 49 00 a1 78"),
    (Kind.RESUMED, 4, (2, "memory", ()), "95 4a 04 02 a6 6d656d6f7279 90"),
    (Kind.STATE_READ, 5, (1, ()), "94 4b 05 01 90"),
    (Kind.CHANGED, 6, (2, ()), "94 4c 06 02 90"),
    (Kind.LISTED, 7, (2, 300), "94 4d 07 02 cd012c"),
    (Kind.MODELS, 8, (), "92 0c 08"),
    (Kind.SERVED, 8, (2,), "93 4e 08 02"),
    (Kind.MOVED, 0, (1, "ab"), "94 4f 00 01 a2 6162"),
    (Kind.WOKEN, 0, (1,), "93 50 00 01"),
    (Kind.REMOVE, 9, (3, 1), "94 0d 09 03 01"),
]


def with_frames(kind: Kind, header: bytes) -> list[bytes]:
    return [header, *[b""] * (wire.FRAME_COUNT[kind] - 1)]


@pytest.mark.parametrize(("kind", "request_number", "fields", "expected"), HEADERS)
def test_headers_are_these_bytes(kind: Kind, request_number: int, fields: tuple[Any, ...], expected: str) -> None:
    header = bytes.fromhex(expected)
    assert wire.pack_header(kind, request_number, *fields) == header
    read = wire.unpack_header(with_frames(kind, header))
    assert (read.kind, read.request, read.fields) == (kind, request_number, fields)


def test_every_kind_with_such_a_header_but_welcome_is_in_the_table_and_welcome_has_every_field_of_server_info() -> None:
    assert {row[0] for row in HEADERS} | {Kind.WELCOME} == set(Kind) - {Kind.STEP, Kind.STEPPED}
    assert wire.HEADER_LENGTH[Kind.WELCOME] == 2 + len(wire.ServerInfo.__dataclass_fields__) - 1  # names
    assert set(wire.HEADER_LENGTH) == set(wire.FRAME_COUNT) == set(Kind) - {Kind.STEP, Kind.STEPPED}


def test_a_column_is_a_handle_a_seq_and_what_is_acknowledged() -> None:
    columns = np.array([(0x0102030405060708, 255, 3)], wire.COLUMN)
    assert columns.tobytes().hex(" ", 8) == "0807060504030201 ff00000000000000 0300000000000000"


def test_a_grant_is_handle_epoch_next_seq_and_a_claim_have_and_epoch() -> None:
    grant = np.array([(1, 2, 0x0102030405060708)], wire.GRANT)
    assert grant.tobytes().hex(" ", 8) == "0100000000000000 0200000000000000 0807060504030201"
    claim = np.array([(wire.HAVE_ALL, 2)], wire.CLAIM)
    assert claim.tobytes().hex(" ", 8) == "ffffffffffffffff 0200000000000000"


def test_a_model_is_frames_streams_connections_features_outputs() -> None:
    model = np.array([(0x0102030405060708, 2, 3, 4, 5)], wire.MODEL)
    assert model.tobytes().hex(" ", 4) == "08070605 04030201 02000000 03000000 04000000 05000000"


def test_a_failure_is_column_timestep_code_zero_expected_seq() -> None:
    failure = np.array([(1, 2, 101, 0, 0x0102030405060708)], wire.FAILURE)
    assert failure.tobytes().hex(" ", 4) == "01000000 02000000 65000000 00000000 08070605 04030201"


GOOD = bytes.fromhex("95 02 02 03 01 00")


@pytest.mark.parametrize(
    ("frames", "complaint"),
    [
        ([], "1 to 4096 bytes"),
        ([b"\x94\x02\x02\x03"], "not msgpack"),
        ([b"\x81\x01\x02"], "not msgpack"),
        ([b"\x92\x05\xdc\x01\x01" + b"\xc0" * 257], "not msgpack"),
        ([b"\x05"], "array of at least"),
        ([b"\x92\x03\x01"], "unknown message kind 3"),
        ([b"\x92\x05\xff"], "request number"),
        ([b"\x92\x05\xcb\x3f\xf0" + b"\x00" * 6], "request number"),
        ([GOOD, b"", b""], "an? OPEN message has 4 frames, this one 3"),
    ],
)
def test_what_is_no_message_is_refused_by_name(frames: list[bytes], complaint: str) -> None:
    with pytest.raises(MalformedMessage, match=complaint):
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


TEXT = st.text(st.characters(exclude_categories=["Cs"]))
"""Of all characters that UTF-8 has; without this, Hypothesis tries for 2 s which those are."""


@settings(deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | TEXT | st.binary(),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=3),
        max_leaves=10,
    )
)
def test_any_msgpack_value_is_a_header_or_malformed(value: Any) -> None:
    read_or_malformed([msgpack.packb(value)])


def read_or_malformed(frames: list[bytes]) -> None:
    try:
        read = wire.unpack_header(frames)
    except MalformedMessage:
        return
    assert len(frames) == wire.FRAME_COUNT[read.kind]
    assert len(read.fields) == wire.HEADER_LENGTH[read.kind] - 2
    assert 0 <= read.request < 2**63


@pytest.mark.parametrize(
    "value",
    [
        0,
        1.0,
        (1,),
    ],
)
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
    ("frame", "count", "complaint"),
    [(b"a\nb", 1, "holds 2"), (b"a", 2, "holds 1"), (b"\xff", 1, "not UTF-8"), (b"a" * 900, 1, "too long")],
)
def test_names_that_are_not_lines_are_refused(frame: bytes, count: int, complaint: str) -> None:
    with pytest.raises(MalformedMessage, match=complaint):
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
