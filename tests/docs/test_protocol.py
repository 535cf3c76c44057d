"""docs/protocol.md against the code, a running server, and nn.GRU."""

from __future__ import annotations

import ast
import asyncio
import re
import struct
import sys
from asyncio.subprocess import Process
from dataclasses import replace
from pathlib import Path

import msgpack
import numpy as np
import pytest
import zmq.asyncio

from instep.config import Config
from instep.core.typing import F32, I32, I64, U64
from instep.frontends.zmq import encode
from instep.models.folder import make_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep.streaming.api import Grants, Refusal, Reply, StatesRead, StreamEvent
from instep.streaming.listing import ListedPage, StreamStatus
from instep_client import replies as readers
from instep_client.protocol import step_messages, wire
from instep_client.protocol.errors import MalformedMessage
from instep_client.protocol.wire import Code, Kind, Message, ServerInfo
from tests.docs.support.page import Page
from tests.docs.support.proxy import Proxy
from tests.support import raw
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import plain, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.states import gru_state, rows_of
from tests.support.step_messages import step_header

PAGE = Page("protocol.md")
SEED = replace(
    make_model(
        GruDescription(features=3, gru=GruLayers(hidden_size=4)), init="constant", weight=0.5, bias=0.0, name="seed"
    ),
    output_names=("left", "right", "up", "down"),
)
MIC_1, MIC_2, MIC_3, MIC_4 = 0x1_0000_0001, 0x1_0000_0002, 0x1_0000_0003, 0x1_0000_0004
RESUMED_1, RESUMED_2 = 0x2_0000_0001, 0x2_0000_0002
EPOCH = 0x187B_0000_0000_0000
"""The page's epochs are this and those after it."""
INFO = ServerInfo(
    protocol_version=5,
    boot_id="5f1d0c9a3b7e2468",
    model="seed",
    fingerprint=SEED.fingerprint,
    features=3,
    outputs=4,
    state=gru_state(1, 4),
    device="cpu",
    exactness="exact",
    buckets=(4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256),
    max_streams=4096,
    max_message_bytes=16 * 2**20,
    max_block_frames=16_384,
    credit_frames=16_384,
    max_idle_s=3600.0,
    window_frames=32,
    durability="memory",
    park_s=300.0,
    output_names=SEED.output_names,
)
INITIAL: F32 = np.array([[0, 0, 0, 0], [0.5, 0.5, -0.5, -0.5]], np.float32)
FIRST: F32 = np.array([[[1, 0.5, 0], [0, 0, -1]]], np.float32)
SECOND: F32 = np.array([[[0, 1, 0], [0.25, 0.25, 0.5]], [[-1, 0, 2], [np.nan, 0, 0]]], np.float32)


def floats(label: str) -> F32:
    return np.frombuffer(PAGE.examples[label].frames[1], "<f4")


def u64(*values: int) -> U64:
    return np.array(values, np.uint64)


def i32(*values: int) -> I32:
    return np.array(values, np.int32)


def i64(*values: int) -> I64:
    return np.array(values, np.int64)


def step(request: int, seq: int, x: F32, first: int = MIC_1, second: int = MIC_2) -> Message:
    columns = np.array([(first, seq, seq), (second, seq, seq)], wire.COLUMN)
    return [step_messages.pack_step(request, len(x), x.shape[2], columns.tobytes()), x.tobytes()]


def stepped(label: str, messages: I64, shape: tuple[int, int], times_us: I64, failures: I64 | None = None) -> Message:
    return encode.stepped(Reply(messages, floats(label).reshape(*shape, 4), failures, 0, *(1000 * times_us).tolist()))


def granted(kind: Kind, request: int, *entries: tuple[int, int, int, int, int]) -> Message:
    """Handle, epoch, next seq, code and expected seq of each stream."""
    handles, epochs, next_seqs, codes, expected_seqs = zip(*entries, strict=True)
    return encode.granted(
        kind, request, Grants(u64(*handles), u64(*epochs), i64(*next_seqs), i32(*codes), i64(*expected_seqs)), "memory"
    )


WHAT_THE_CODE_SAYS: dict[str, Message] = {
    "HELLO": [wire.pack_header(Kind.HELLO, 1, wire.PROTOCOL_VERSION, "demo", "")],
    "WELCOME": encode.welcome(1, INFO),
    "OPEN": [wire.pack_header(Kind.OPEN, 2, 2, 0, 0), wire.pack_names(["mic-1", "mic-2"]), b"", b""],
    "OPENED": granted(Kind.OPENED, 2, (MIC_1, EPOCH + 1, 0, 0, 0), (MIC_2, EPOCH + 2, 0, 0, 0)),
    "OPEN-states": [
        wire.pack_header(Kind.OPEN, 3, 2, 1, 1),
        wire.pack_names(["mic-1", "mic-3"]),
        INITIAL.tobytes(),
        u64(0, 100).tobytes(),
    ],
    "OPENED-refused": granted(Kind.OPENED, 3, (0, 0, 0, Code.NAME_IN_USE, 0), (MIC_3, EPOCH + 3, 100, 0, 0)),
    "STEP": step(4, 0, FIRST),
    "STEPPED": stepped("STEPPED", np.array([[4], [2]]), (1, 2), i64(120, 480, 60)),
    "STEPPED-several": stepped("STEPPED", np.array([[16, 17], [1, 1]]), (1, 2), i64(120, 480, 60)),
    "STEP-partial": step(5, 1, SECOND),
    "STEPPED-partial": stepped(
        "STEPPED-partial",
        np.array([[5], [2]]),
        (2, 2),
        i64(95, 455, 40),
        np.array([[0, Code.NOT_FINITE], [2, 1], [3, 2]], np.int64),
    ),
    "PING": [wire.pack_header(Kind.PING, 6)],
    "PONG": encode.pong(6),
    "STATS": [wire.pack_header(Kind.STATS, 7)],
    "STATISTICS": encode.statistics(7, {"frames_total": 5.0, "streams_open": 3.0}),
    "READ_STATE": [wire.pack_header(Kind.READ_STATE, 8, 2, 0), u64(MIC_1, MIC_2).tobytes()],
    "STATE_READ": encode.state_read(8, StatesRead(i64(3, 2), rows_of(floats("CLOSED").reshape(2, 1, 4)), i32(0, 0))),
    "FORK": [wire.pack_header(Kind.FORK, 9, 1), u64(MIC_1).tobytes(), b"mic-4"],
    "OPENED-fork": granted(Kind.OPENED, 9, (MIC_4, EPOCH + 4, 3, 0, 0)),
    "RESET": [wire.pack_header(Kind.RESET, 10, 1, 0), u64(MIC_4).tobytes(), b""],
    "CHANGED": encode.changed(10, i32(0)),
    "RESUME": [
        wire.pack_header(Kind.RESUME, 11, 3, 0),
        wire.pack_names(["mic-1", "mic-2", "mic-9"]),
        np.array([(1, EPOCH + 1), (1, EPOCH + 2), (7, EPOCH)], wire.CLAIM).tobytes(),
    ],
    "RESUMED": granted(
        Kind.RESUMED,
        11,
        (RESUMED_1, EPOCH + 5, 3, 0, 3),
        (RESUMED_2, EPOCH + 6, 2, 0, 2),
        (0, 0, 0, Code.UNKNOWN_STREAM, 0),
    ),
    "STEP-again": step(12, 1, SECOND, RESUMED_1, RESUMED_2),
    "CLOSE": [wire.pack_header(Kind.CLOSE, 13, 2), u64(RESUMED_1, 3, RESUMED_2, 2).tobytes()],
    "CLOSED": encode.closed(13, rows_of(floats("CLOSED").reshape(2, 1, 4)), i32(0, 0)),
    "READ_STATE-names": [wire.pack_header(Kind.READ_STATE, 14, 1, 1), b"mic-4"],
    "STATE_READ-names": encode.state_read(14, StatesRead(i64(3), rows_of(np.zeros((1, 1, 4))), i32(0))),
    "LIST": [wire.pack_header(Kind.LIST, 18, 0, 100, 0), b"mic-"],
    "LISTED": encode.listed(
        18,
        ListedPage(
            [
                ("mic-4", StreamStatus(wire.Place.CONNECTED, 1, 3, 0, 2_000_000_000, 3_598_000_000_000)),
                ("mic-5", StreamStatus(wire.Place.HIBERNATING, 2, None, 0, 9_000_000_000, None)),
            ],
            cursor=0,
        ),
    ),
    "MODELS": [wire.pack_header(Kind.MODELS, 19)],
    "LOAD": [wire.pack_header(Kind.LOAD, 20, "ears", "/m/ears")],
    "UNLOAD": [wire.pack_header(Kind.UNLOAD, 21, "ears", 0)],
    "SWAP": [wire.pack_header(Kind.SWAP, 22, "ears", "/m/ears-2", 1, 0)],
    "SERVED": encode.served(19, {"seed": (5, 3, 2, 3, 4), "ears": (0, 0, 0, 40, 128)}),
    "EVICTED": encode.evicted(StreamEvent(Code.FENCED, u64(MIC_1, MIC_2))),
    "MOVED": encode.moved(u64(MIC_1, MIC_2), i64(3, 2), "90c2"),
    "ERROR": encode.error(15, Refusal(Code.BUSY, retry_after_us=2000)),
    "GOODBYE": encode.goodbye("the server is shutting down: it was asked to"),
}


# ── The bytes ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_kind_has_an_example_and_every_example_is_checked() -> None:
    assert {label.partition("-")[0] for label in PAGE.examples} == {kind.name for kind in Kind}
    assert PAGE.examples.keys() == WHAT_THE_CODE_SAYS.keys()


@pytest.mark.parametrize("label", WHAT_THE_CODE_SAYS)
def test_an_example_is_what_the_code_writes_and_reads(label: str) -> None:
    example = PAGE.examples[label]
    assert [frame.hex(" ") for frame in example.frames] == [
        bytes(frame).hex(" ") for frame in WHAT_THE_CODE_SAYS[label]
    ]
    if label.startswith("STEP"):
        layout = "<BBH7I" if example.said[0] == Kind.STEPPED else "<BBHIIIQ"
        assert list(struct.unpack_from(layout, example.frames[0])) == example.said
        assert Kind(example.frames[0][0]).name == label.partition("-")[0]
        return
    assert msgpack.unpackb(example.frames[0]) == example.said
    header = wire.unpack_header(example.frames)
    assert header.kind.name == label.partition("-")[0]
    assert wire.pack_header(header.kind, header.request, *header.fields) == example.frames[0]


def test_the_client_reads_what_the_examples_of_the_server_say() -> None:
    read = {
        label: (wire.unpack_header(example.frames), example.frames)
        for label, example in PAGE.examples.items()
        if not label.startswith("STEP")
    }
    assert readers.welcome(*read["WELCOME"]) == INFO
    given, failures = readers.granted(*read["OPENED-refused"], 2)
    assert given.tolist() == [(0, 0, 0), (MIC_3, EPOCH + 3, 100)]
    assert [failure[:3] for failure in failures] == [(0, 0, Code.NAME_IN_USE)]
    given, failures = readers.granted(*read["RESUMED"], 3)
    assert given.tolist() == [(RESUMED_1, EPOCH + 5, 3), (RESUMED_2, EPOCH + 6, 2), (0, 0, 0)]
    assert [failure[:3] for failure in failures] == [(2, 0, Code.UNKNOWN_STREAM)]
    (answer,) = readers.stepped(PAGE.examples["STEPPED-partial"].frames)
    assert answer.times == (95, 455, 40)
    assert answer.failures == [(1, 1, Code.NOT_FINITE, wire.SENTENCES[Code.NOT_FINITE], 2)]
    assert np.isnan(answer.outputs).tolist() == [[[False] * 4, [False] * 4], [[False] * 4, [True] * 4]]
    alone = readers.stepped(PAGE.examples["STEPPED-several"].frames)
    (both,) = readers.stepped(PAGE.examples["STEPPED"].frames)
    assert [reply.request for reply in alone] == [16, 17]
    assert np.concatenate([reply.outputs for reply in alone], axis=1).tolist() == both.outputs.tolist()
    finals, failures = readers.closed(*read["CLOSED"], 2, 16)
    assert (finals.shape, failures) == ((2, 16), [])
    assert readers.statistics(*read["STATISTICS"]) == {"frames_total": 5.0, "streams_open": 3.0}
    assert readers.error(read["ERROR"][0]) == (Code.BUSY, wire.SENTENCES[Code.BUSY], 0.002)
    streams, cursor = readers.listed(*read["LISTED"])
    assert streams == [
        ("mic-4", "connected", 3, 0, 2.0, 3598.0),
        ("mic-5", "hibernating", None, 0, 9.0, None),
    ]
    assert cursor == 0
    assert readers.served(*read["SERVED"]) == [("seed", 3, 4, 3, 2, 5), ("ears", 40, 128, 0, 0, 0)]
    handles, code, _ = readers.evicted(*read["EVICTED"])
    assert (handles.tolist(), code) == ([MIC_1, MIC_2], Code.FENCED)
    assert "shutting down" in readers.goodbye(read["GOODBYE"][0])


# ── The tables ─────────────────────────────────────────────────────────────────────────────────────────────────────


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


# ── The examples as one conversation with a server ─────────────────────────────────────────────────────────────────


class Translated:
    """A connection whose peer has other handles than the page: 64-bit words are translated both ways."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, words: dict[int, int]) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._words = words
        """Handles of the server, by those of the page."""

    async def ask(self, label: str) -> list[bytes]:
        """Send an example; the reply, its handles not translated yet."""
        await self._socket.send_multipart([_translated(frame, self._words) for frame in PAGE.examples[label].frames])
        return await self.receive()

    async def grants(self, label: str, reply: str) -> list[bytes]:
        """Send an example that is answered with grants, and learn their handles; the reply."""
        frames = await self.ask(label)
        handles = np.frombuffer(frames[1], wire.GRANT)["handle"].tolist()
        shown = np.frombuffer(PAGE.examples[reply].frames[1], wire.GRANT)["handle"].tolist()
        assert [bool(handle) for handle in handles] == [bool(handle) for handle in shown]
        self._words.update(pair for pair in zip(shown, handles, strict=True) if pair[0])
        return self.told(frames)

    def told(self, frames: list[bytes]) -> list[bytes]:
        """A message with the handles of the page."""
        return [_translated(frame, {theirs: shown for shown, theirs in self._words.items()}) for frame in frames]

    async def receive(self) -> list[bytes]:
        """The next message."""
        frames: list[bytes] = await self._socket.recv_multipart()
        return frames

    def close(self) -> None:
        self._socket.close()


def _translated(frame: bytes, words: dict[int, int]) -> bytes:
    if len(frame) % 8:
        return frame
    values = np.frombuffer(frame, "<u8").tolist()
    return np.array([words.get(value, value) for value in values], "<u8").tobytes()


async def test_the_examples_are_one_conversation() -> None:
    context = zmq.asyncio.Context()
    words: dict[int, int] = {}

    def expected(label: str) -> list[bytes]:
        return PAGE.examples[label].frames

    try:
        async with running(SEED, transport={"heartbeat_s": 600}) as server:  # no PING, however slow the machine
            server.default.engine.table.last_epoch = EPOCH
            first, second = (Translated(context, server.endpoint, words) for _ in range(2))
            ask = first.ask
            welcome = msgpack.unpackb((await ask("HELLO"))[0])
            varying = {"boot_id", "device", "exactness", "buckets"}
            for name, said, shown in zip(
                ("kind", "request", *ServerInfo.__slots__[:-1]), welcome, PAGE.examples["WELCOME"].said, strict=True
            ):
                assert type(said) is type(shown)
                assert said == shown or name in varying, name
            assert await first.grants("OPEN", "OPENED") == expected("OPENED")
            assert await first.grants("OPEN-states", "OPENED-refused") == expected("OPENED-refused")
            y = b""
            for question, answer in (("STEP", "STEPPED"), ("STEP-partial", "STEPPED-partial")):
                header, y = await ask(question)
                assert header[:12] + header[24:] == expected(answer)[0][:12] + expected(answer)[0][24:]
                np.testing.assert_allclose(np.frombuffer(y, "<f4"), floats(answer), rtol=1e-5)
            assert await ask("PING") == expected("PONG")
            pairs = msgpack.unpackb((await ask("STATS"))[0])[2]
            of_codes = {f"refused_{code.name.lower()}_total" for code in Code}
            names = [name for name, _ in pairs if name not in of_codes and not name.startswith("recent_")]
            assert names == PAGE.table("STATISTICS (70)", "statistic").column("statistic")
            assert {name: value for name, value in pairs if name in ("frames_total", "streams_open")} == dict(
                PAGE.examples["STATISTICS"].said[2]
            )
            header, seqs, states, failures = await ask("READ_STATE")
            assert [header, seqs, failures] == [expected("STATE_READ")[index] for index in (0, 1, 3)]
            np.testing.assert_allclose(np.frombuffer(states, "<f4"), floats("CLOSED"), rtol=1e-5)
            assert await first.grants("FORK", "OPENED-fork") == expected("OPENED-fork")
            assert await ask("RESET") == expected("CHANGED")

            await second.ask("HELLO")
            assert await second.grants("RESUME", "RESUMED") == expected("RESUMED")
            assert first.told(await first.receive()) == expected("EVICTED")
            header, again = await second.ask("STEP-again")
            shown = expected("STEPPED-partial")[0]
            assert header == shown[:12] + bytes(12) + shown[24:32] + struct.pack("<Q", 12) + shown[40:]
            assert again == y
            header, states, failures = await second.ask("CLOSE")
            assert [header, failures] == [expected("CLOSED")[0], expected("CLOSED")[2]]
            np.testing.assert_allclose(np.frombuffer(states, "<f4"), floats("CLOSED"), rtol=1e-5)
            assert await second.ask("READ_STATE-names") == expected("STATE_READ-names")
            server.stop()
            assert await first.receive() == await second.receive() == expected("GOODBYE")
            first.close()
            second.close()
    finally:
        context.destroy(linger=0)


def test_the_numbers_in_the_examples_are_those_of_the_network() -> None:
    first, second = floats("STEPPED").reshape(1, 2, 4), floats("STEPPED-partial").reshape(2, 2, 4)
    for column, length in enumerate((2, 1)):
        y, state = whole(SEED, np.concatenate([FIRST[:, column], SECOND[:length, column]]))
        served = np.concatenate([first[:, column], second[:length, column]])
        np.testing.assert_allclose(served, y, rtol=1e-5)
        np.testing.assert_allclose(floats("CLOSED").reshape(2, 1, 4)[column], state, rtol=1e-5)


# ── BUSY ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_busy_and_going_back_are_as_the_page_says(rng: np.random.Generator) -> None:
    a = rng.standard_normal((8, 1, 3)).astype(np.float32)
    b = rng.standard_normal((1, 1, 3)).astype(np.float32)
    a[0, 0, 0] = GATE_VALUE
    gate = Gate()
    limits = {"max_block_frames": 6, "credit_frames": 6, "max_pending_frames": 6}
    async with running(SEED, stepper=gate.stepper, limits=limits) as server, RawClient(server.endpoint) as client:
        try:
            await client.hello()
            handles = (await client.open("a", "b")).handles()
            await client.send(*client.step_message(handles[:1], [0], a[:4]))
            over = client.step_message(handles[:1], [4], a[4:7])
            await client.send(step_header(15, 3, 1, 3) + over[0][24:], over[1])
            assert await client.socket.recv_multipart() == PAGE.examples["ERROR"].frames
            await client.send(*client.step_message(handles, [7, 0], np.concatenate([a[7:], b], axis=1)))
            assert (await client.ask(wire.pack_header(Kind.PING, 16))).kind is Kind.PONG  # overtakes both blocks
        finally:
            gate.open()
        answers = sorted([await client.receive(), await client.receive()], key=lambda reply: reply.request)
        assert [answer.failures() for answer in answers] == [[], [(0, 0, Code.SEQ_GAP, 4)]]
        answers += [await client.step(handles[:1], [4], a[4:7]), await client.step(handles[:1], [7], a[7:])]
        y = np.concatenate([outputs(answers[index], 1) for index in (0, 2, 3)])
        np.testing.assert_array_equal(y[:, 0], whole(SEED, a[:, 0])[0])
        np.testing.assert_array_equal(outputs(answers[1], 2)[:, 1], whole(SEED, b[:, 0])[0])


def outputs(reply: raw.Reply, columns: int) -> F32:
    assert reply.kind is Kind.STEPPED
    return reply.floats().reshape(-1, columns, 4)


# ── The complete client ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def script(tmp_path: Path) -> Path:
    ((_, text),) = PAGE.blocks("python")
    path = tmp_path / "minimal.py"
    path.write_text(text, encoding="utf-8")
    return path


async def start(script: Path, endpoint: str, count: int) -> Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        str(script),
        endpoint,
        str(count),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def feed(process: Process, x: F32) -> tuple[int | None, bytes, str]:
    """Exit status, standard output and standard error."""
    said, complained = await process.communicate(x.tobytes())
    return process.returncode, said, complained.decode()


def test_the_complete_client_needs_neither_numpy_nor_instep(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert imported == {"msgpack", "struct", "sys", "time", "zmq"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))


async def test_the_complete_client_gets_what_the_gru_computes(script: Path, rng: np.random.Generator) -> None:
    model = plain(5, 8, layers=2)
    x = rng.standard_normal((40, 3, 5)).astype(np.float32)
    async with running(model) as server:
        status, said, complained = await feed(await start(script, server.endpoint, 3), x)
        assert (status, complained) == (0, "")
        assert server.default.engine.table.open_count == 0
    values = np.frombuffer(said, "<f4")
    y, states = values[: 40 * 3 * 8].reshape(40, 3, 8), values[40 * 3 * 8 :].reshape(3, 2, 8)
    for column in range(3):
        truth, final = whole(model, x[:, column])
        np.testing.assert_array_equal(y[:, column], truth)
        np.testing.assert_array_equal(states[column], final)


async def test_the_complete_client_waits_while_the_server_is_busy(script: Path, rng: np.random.Generator) -> None:
    x = rng.standard_normal((5, 1, 3)).astype(np.float32)
    gate = Gate()
    limits = {"max_block_frames": 4, "credit_frames": 4, "max_pending_frames": 4}
    async with running(SEED, stepper=gate.stepper, limits=limits) as server, RawClient(server.endpoint) as other:
        await other.hello()
        handles = (await other.open("other")).handles()
        process = await start(script, server.endpoint, 1)
        while server.default.engine.table.open_count < 2:  # it has opened its stream, and waits for frames to send
            await asyncio.sleep(0.005)
        await other.send(*other.step_message(handles, [0], np.full((4, 1, 3), GATE_VALUE, np.float32)))
        while server.default.engine.pending_frames < 4:
            await asyncio.sleep(0.005)
        fed = asyncio.create_task(feed(process, x))
        try:
            while server.default.engine.stats.busy_total < 3 and not fed.done():
                await asyncio.sleep(0.005)
        finally:
            gate.open()
        status, said, complained = await fed
        assert server.default.engine.stats.busy_total >= 3
    assert (status, complained) == (0, "")
    truth, final = whole(SEED, x[:, 0])
    np.testing.assert_array_equal(np.frombuffer(said, "<f4"), np.concatenate([truth.ravel(), final.ravel()]))


async def test_the_complete_client_tells_what_was_refused(script: Path) -> None:
    x = np.zeros((2, 2, 3), np.float32)
    x[1, 1, 0] = np.nan
    async with running(SEED) as server:
        status, said, complained = await feed(await start(script, server.endpoint, 2), x)
    assert status == 1
    assert complained == "column 1, timestep 0: code 100, expected seq 1\n"
    assert len(said) == struct.calcsize("<8f")


async def test_the_complete_client_loses_and_doubles_nothing_when_its_connection_breaks(
    script: Path, rng: np.random.Generator
) -> None:
    model = plain(5, 8, layers=2)
    x = rng.standard_normal((30, 3, 5)).astype(np.float32)
    async with running(model) as server:
        counted = server.default.engine.stats
        breaks = (
            lambda: counted.frames_total >= 5 * 3,  # a STEPPED is lost,
            lambda: counted.resumed_streams_total >= 3,  # the RESUMED after it,
            lambda: counted.frames_total >= 20 * 3,  # and another STEPPED
        )
        async with Proxy(server.endpoint, *breaks) as proxy:
            status, said, complained = await feed(await start(script, proxy.endpoint, 3), x)
        assert (status, complained, proxy.breaks) == (0, "", [])
        assert (counted.frames_total, counted.resumed_streams_total) == (30 * 3, 3 * 3)
        assert server.default.engine.table.open_count == 0
    values = np.frombuffer(said, "<f4")
    y, states = values[: 30 * 3 * 8].reshape(30, 3, 8), values[30 * 3 * 8 :].reshape(3, 2, 8)
    for column in range(3):
        truth, final = whole(model, x[:, column])
        np.testing.assert_array_equal(y[:, column], truth)
        np.testing.assert_array_equal(states[column], final)


@pytest.mark.parametrize(
    ("is_known", "sentence"),
    [
        (False, "column 0, timestep 0: code 103, expected seq 0\n"),  # UNKNOWN_STREAM
        (True, "column 0, timestep 0: code 110, expected seq 0\n"),  # DATA_LOSS
    ],
)
async def test_the_complete_client_says_that_a_restarted_server_lost_its_streams(
    script: Path, is_known: bool, sentence: str
) -> None:
    x = np.zeros((8, 1, 3), np.float32)
    async with running(SEED) as server, running(SEED) as restarted, RawClient(restarted.endpoint) as former:
        if is_known:
            restarted.default.engine.table.last_epoch = 0
            await former.hello()
            await former.open("minimal-0")
        async with Proxy(server.endpoint, lambda: server.default.engine.stats.frames_total >= 5) as proxy:
            process = await start(script, proxy.endpoint, 1)
            while server.default.engine.table.open_count == 0:
                await asyncio.sleep(0.005)
            proxy.target = restarted.endpoint
            status, said, complained = await feed(process, x)
    assert (status, complained) == (1, sentence)
    assert len(said) == 4 * struct.calcsize("<4f")
