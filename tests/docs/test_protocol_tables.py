"""The tables, numbers and links of docs/protocol.md against the code."""

from __future__ import annotations

import re
import struct

import msgpack
import numpy as np
import pytest
import zmq

from instep.config import Config
from instep_client.protocol import step_messages, wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Code, Kind, ServerInfo
from tests.docs.support.protocol_examples import PAGE


def test_the_table_of_kinds() -> None:
    table = PAGE.table("Messages", "number")
    kinds = [Kind[name] for name in table.column("kind")]
    assert dict(zip(kinds, table.numbers("number"), strict=True)) == {kind: kind.value for kind in Kind}
    binary = {Kind.STEP: "binary", Kind.STEPPED: "binary"}
    lengths = {kind: str(length) for kind, length in wire.HEADER_LENGTH.items()}
    assert dict(zip(kinds, table.column("header elements"), strict=True)) == lengths | binary
    two = {Kind.STEP: 2, Kind.STEPPED: 2}
    assert dict(zip(kinds, table.numbers("frames"), strict=True)) == wire.FRAME_COUNT | two
    senders = dict(zip(kinds, table.column("sent by"), strict=True))
    assert [kind for kind in kinds if senders[kind].startswith("client")] == [k for k in Kind if k < Kind.WELCOME]
    assert [kind for kind in kinds if "client" in senders[kind] and "server" in senders[kind]] == [Kind.PING, Kind.PONG]


@pytest.mark.parametrize("kind", wire.HEADER_LENGTH)
def test_the_section_of_a_kind_lists_its_header_and_frames(kind: Kind) -> None:
    section = f"{kind.name} ({kind.value})"
    header = PAGE.table(section, "header")
    assert len(header.rows) == wire.HEADER_LENGTH[kind]
    assert header.column("header")[:2] == ["kind", "request"]
    assert header.column("value")[0].isdigit()
    frames = [table for table in PAGE.tables(section) if table.columns[0] == "frame"]
    listed = frames[0].numbers("frame") if frames else []
    assert listed == list(range(1, wire.FRAME_COUNT[kind]))
    types = {"integer": int, "string": str, "float64": float}
    for shown, said, value in zip(
        PAGE.examples[kind.name].said, header.column("type"), header.column("value"), strict=True
    ):
        assert type(shown) is (list if said.startswith("array") else types[said])
        assert str(shown) == value or not value.isdigit()


def test_the_fields_of_welcome() -> None:
    assert PAGE.table("WELCOME (65)", "header").column("header")[2:] == list(ServerInfo.__slots__)[:-1]


def test_the_table_of_codes() -> None:
    table = PAGE.table("Codes", "code")
    pairs = dict(zip(table.column("name"), table.numbers("code"), strict=True))
    assert pairs == {code.name: code.value for code in Code}


def test_names_and_numbers_in_the_text_agree() -> None:
    known = {entry.name: entry.value for entry in (*Kind, *Code)}
    named = re.findall(r"(\d+) \(`([A-Z_]+)`\)|(\d+), `([A-Z_]+)`", PAGE.prose)
    assert len(named) >= 4
    for first, name, other, other_name in named:
        assert known[name or other_name] == int(first or other)
    words = set(re.findall(r"`([A-Z][A-Z_]+)`", PAGE.prose))
    assert {word for word in words if not word.startswith("ZMQ_")} <= known.keys()
    assert all(hasattr(zmq, word.removeprefix("ZMQ_")) for word in words if word.startswith("ZMQ_"))


@pytest.mark.parametrize(
    ("section", "name", "dtype"),
    [
        ("OPENED (66)", "grant", wire.GRANT),
        ("STEP (3)", "column", wire.COLUMN),
        ("RESUME (7)", "claim", wire.CLAIM),
        ("STEPPED (67)", "answered", step_messages.ANSWERED),
        ("LISTED (77)", "listing", wire.LISTING),
        ("SERVED (78)", "model", wire.MODEL),
        ("Failures", "failure", wire.FAILURE),
    ],
)
def test_the_tables_of_offsets(section: str, name: str, dtype: np.dtype[np.void]) -> None:
    (table,) = [table for table in PAGE.tables(section) if name in table.columns]
    rows = zip(table.column(name), table.numbers("offset"), table.numbers("bytes"), table.column("type"), strict=True)
    fields = dtype.fields
    assert fields is not None
    assert [(field, offset, size, kind) for field, offset, size, kind in rows] == [
        (field, fields[field][1], fields[field][0].itemsize, fields[field][0].name) for field in dtype.names or ()
    ]
    assert f"{dtype.itemsize} bytes" in PAGE.sections[section]


@pytest.mark.parametrize(
    ("section", "layout"), [("STEP (3)", step_messages.STEP_HEADER), ("STEPPED (67)", step_messages.STEPPED_HEADER)]
)
def test_the_binary_headers(section: str, layout: struct.Struct) -> None:
    (table,) = [table for table in PAGE.tables(section) if "header" in table.columns]
    formats = {"uint8": "B", "uint16": "H", "uint32": "I", "uint64": "Q"}
    fields = [formats[kind] for kind in table.column("type")]
    sizes = table.numbers("bytes")
    assert [struct.calcsize(field) for field in fields] == sizes
    assert table.numbers("offset") == [sum(sizes[:at]) for at in range(len(sizes))]
    values = range(1, 1 + len(fields))
    assert struct.pack("<" + "".join(fields), *values) == layout.pack(*values)
    assert f"a header of {layout.size} bytes" in PAGE.sections[section]
    assert int(table.column("value")[0]) == Kind[section.split()[0]]


def test_the_version_is_said_first() -> None:
    assert PAGE.text.startswith(f"# The protocol\n\nVersion {wire.PROTOCOL_VERSION}. ")


def test_the_limits_of_headers() -> None:
    bytes_most, string, array, request, streams, name, _ = PAGE.table("Messages", "rule").numbers("value")
    assert (bytes_most, streams, name) == (wire.MAX_HEADER_BYTES, wire.MAX_BLOCK_STREAMS, wire.MAX_NAME_BYTES)
    wire.unpack_header([wire.pack_header(Kind.HELLO, request, 1, "x" * string, "")])
    for header in (
        wire.pack_header(Kind.HELLO, request + 1, 1, "", ""),
        wire.pack_header(Kind.HELLO, 1, 1, "x" * (string + 1), ""),
        msgpack.packb([Kind.STATISTICS, 1, [0] * (array + 1)]),
    ):
        with pytest.raises(MalformedMessage):
            wire.unpack_header([header])
    wire.unpack_header([msgpack.packb([Kind.STATISTICS, 1, [0] * array])])


def test_the_defaults_of_the_limits() -> None:
    table = PAGE.table("Sizes", "in WELCOME")
    config = Config()
    assert dict(zip(table.column("in WELCOME"), table.numbers("default"), strict=True)) == {
        "max_streams": config.engine.max_streams,
        "max_message_bytes": config.transport.max_message_bytes,
        "max_block_frames": config.limits.max_block_frames,
        "credit_frames": config.limits.credit_frames,
        "max_idle_s": config.limits.max_idle_s,
        "window_frames": config.limits.window_frames,
        "park_s": config.limits.park_s,
    }
    assert str(wire.HAVE_ALL) in PAGE.sections["RESUME (7)"]


def test_links_within_the_page_lead_somewhere() -> None:
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in PAGE.sections}
    links = set(re.findall(r"\]\(#([\w-]+)\)", PAGE.text))
    assert len(links) > 5
    assert links <= anchors
