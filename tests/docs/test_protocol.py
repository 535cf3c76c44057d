"""docs/protocol.md and its examples against the code, and one conversation with a running server."""

from __future__ import annotations

import asyncio
import re
import struct
import zlib
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq.asyncio

from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind, ServerInfo
from tests.docs.support.page import Page
from tests.docs.support.protocol_examples import EPOCH, EXAMPLES, SEED, TABLE, WHAT_THE_CODE_SAYS, floats
from tests.support.running import running

PAGE = Page("protocol.md")
FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
HEADERS = {"STEP": wire.STEP_HEADER, "STEPPED": wire.STEPPED_HEADER}
RECORDS = {
    "column": wire.COLUMN,
    "answered": wire.ANSWERED,
    "failure": wire.FAILURE,
    "grant": wire.GRANT,
    "claim": wire.CLAIM,
    "closing": wire.CLOSING,
    "listing": wire.LISTING,
    "model": wire.MODEL,
}


def test_the_table_of_kinds() -> None:
    rows = {Kind[kind.split()[1]]: (kind, header, frames) for kind, header, frames in PAGE.table("Kinds", "kind").rows}
    assert list(rows) == list(Kind)
    for kind, (name, header, frames) in rows.items():
        assert name == f"{kind.value} {kind.name}"
        if kind in (Kind.STEP, Kind.STEPPED):
            continue
        elements = 1 if kind is Kind.STATISTICS else len(header.split(", ")) if header else 0
        if kind is Kind.WELCOME:
            fields = PAGE.table("HELLO, WELCOME", "field").column("field")
            assert fields == list(ServerInfo.__slots__)[:-1]
            elements = len(fields)
        assert elements + 2 == kind.elements
        assert (len(frames.split("; ")) if frames else 0) + 1 == kind.frames


def test_the_table_of_records() -> None:
    table = PAGE.table("Messages", "record")
    for name, size, fields in table.rows:
        pairs = [field.split() for field in fields.split(", ")]
        layout = "<" + "".join(FORMATS[kind] for _, kind in pairs)
        assert struct.calcsize(layout) == int(size)
        if name in HEADERS:
            values = range(1, 1 + len(pairs))
            assert struct.pack(layout, *values) == HEADERS[name].pack(*values)
        else:
            dtype = np.dtype([(field, f"<u{int(kind[1:]) // 8}") for field, kind in pairs])
            assert dtype == RECORDS[name]
    assert set(table.column("record")) == HEADERS.keys() | RECORDS.keys()


def test_the_table_of_codes() -> None:
    assert PAGE.table("Codes", "code").column("code") == [f"{code.value} {code.name}" for code in Code]


def test_the_table_of_shards() -> None:
    table = PAGE.table("Clusters", "name")
    for name, crc, *shards in table.rows:
        assert int(crc, 16) == zlib.crc32(name.encode())
        for column, shard in zip(table.columns[2:], shards, strict=True):
            count = int(column.removeprefix("of "))
            assert wire.shard_of(name, count) == int(crc, 16) % count == int(shard)


def test_numbers_and_names_in_the_text() -> None:
    assert set(re.findall(r"ersion (?:is )?(\d+)|protocol_version \| integer \| (\d+)", PAGE.text)) == {
        (str(wire.PROTOCOL_VERSION), ""),
        ("", str(wire.PROTOCOL_VERSION)),
    }
    for limit in (
        f"{wire.MAX_HEADER_BYTES} bytes of a MessagePack header",
        f"{wire.MAX_BLOCK_STREAMS} streams (N)",
        f"{wire.MAX_NAME_BYTES} bytes of a stream's name",
        f"{wire.MAX_SHARDS} shards",
    ):
        assert limit in PAGE.sections["Messages"]
    assert str(wire.HAVE_ALL) in PAGE.sections["RESUME, RESUMED"]
    known = {entry.name: entry.value for entry in (*Kind, *Code)}
    assert all(known[name] == int(value) for value, name in re.findall(r"(\d+) \(`([A-Z_]+)`\)", PAGE.prose))
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", PAGE.prose))
    assert {name for name in named if not name.startswith("ZMQ_")} <= known.keys()
    assert all(hasattr(zmq, name.removeprefix("ZMQ_")) for name in named if name.startswith("ZMQ_"))


def test_every_kind_has_an_example() -> None:
    assert {label.partition("-")[0] for label in EXAMPLES} == {kind.name for kind in Kind}
    assert EXAMPLES.keys() == WHAT_THE_CODE_SAYS.keys()


@pytest.mark.parametrize("label", EXAMPLES)
def test_an_example_is_what_the_code_writes(label: str) -> None:
    example = EXAMPLES[label]
    assert [frame.hex() for frame in example.frames] == [bytes(frame).hex() for frame in WHAT_THE_CODE_SAYS[label]]
    name = label.partition("-")[0]
    header: Any = (
        HEADERS[name].unpack_from(example.frames[0]) if name in HEADERS else msgpack.unpackb(example.frames[0])
    )
    assert list(header) == example.header


class Translated:
    """A connection whose peer has other handles than the examples: 64-bit words are translated both ways."""

    def __init__(self, context: zmq.asyncio.Context, endpoint: str, words: dict[int, int]) -> None:
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)
        self._words = words
        """Handles of the server, by those of the examples."""

    async def ask(self, label: str) -> list[bytes]:
        """Send an example; the reply, its handles not translated yet."""
        await self._socket.send_multipart([_translated(frame, self._words) for frame in EXAMPLES[label].frames])
        return await self.receive()

    async def grants(self, label: str, reply: str) -> list[bytes]:
        """Send an example that is answered with grants, and learn their handles; the reply."""
        frames = await self.ask(label)
        handles = np.frombuffer(frames[1], wire.GRANT)["handle"].tolist()
        shown = np.frombuffer(EXAMPLES[reply].frames[1], wire.GRANT)["handle"].tolist()
        self._words.update(pair for pair in zip(shown, handles, strict=True) if pair[0])
        return self.as_shown(frames)

    def as_shown(self, frames: list[bytes]) -> list[bytes]:
        """A message with the handles of the examples."""
        return [_translated(frame, {theirs: shown for shown, theirs in self._words.items()}) for frame in frames]

    async def receive(self) -> list[bytes]:
        frames: list[bytes] = await self._socket.recv_multipart()
        return frames

    async def last(self) -> list[bytes]:
        """The last message; the server asks before it whether everything was read."""
        while msgpack.unpackb((frames := await self.receive())[0])[0] == Kind.PING:
            await self._socket.send(msgpack.packb([Kind.PONG, msgpack.unpackb(frames[0])[1]]))
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
        return EXAMPLES[label].frames

    try:
        async with running(SEED, transport={"heartbeat_s": 600}) as server:  # no PING, however slow the machine
            server.default.engine.table.last_epoch = EPOCH
            first, second = (Translated(context, server.endpoint, words) for _ in range(2))
            ask = first.ask
            welcome = msgpack.unpackb((await ask("HELLO"))[0])
            names = ("kind", "request", *ServerInfo.__slots__[:-1])
            for name, value, shown in zip(names, welcome, EXAMPLES["WELCOME"].header, strict=True):
                assert value == shown or name in ("boot_id", "device"), name
            assert await first.grants("OPEN", "OPENED") == expected("OPENED")
            assert await first.grants("OPEN-states", "OPENED-refused") == expected("OPENED-refused")
            y = b""
            for question, answer in (("STEP", "STEPPED"), ("STEP-partial", "STEPPED-partial")):
                header, y = await ask(question)
                assert header[:12] + header[24:] == expected(answer)[0][:12] + expected(answer)[0][24:]
                np.testing.assert_allclose(np.frombuffer(y, "<f4"), floats(answer), rtol=1e-5)
            assert await ask("PING") == expected("PONG")
            server.models.shard.table = TABLE
            assert await ask("SHARDS") == expected("SHARDED")
            statistics = dict(msgpack.unpackb((await ask("STATS"))[0])[2])
            assert dict(EXAMPLES["STATISTICS"].header[2]).items() <= statistics.items()
            header, seqs, states, failures = await ask("READ_STATE")
            assert [header, seqs, failures] == [expected("STATE_READ")[index] for index in (0, 1, 3)]
            np.testing.assert_allclose(np.frombuffer(states, "<f4"), floats("CLOSED"), rtol=1e-5)
            assert await first.grants("FORK", "OPENED-fork") == expected("OPENED-fork")
            assert await ask("RESET") == expected("CHANGED")

            await second.ask("HELLO")
            assert await second.grants("RESUME", "RESUMED") == expected("RESUMED")
            assert first.as_shown(await first.receive()) == expected("EVICTED")
            header, again = await second.ask("STEP-again")
            shown = expected("STEPPED-partial")[0]
            assert header == shown[:12] + bytes(12) + shown[24:32] + struct.pack("<Q", 12) + shown[40:]
            assert again == y
            header, states, failures = await second.ask("CLOSE")
            assert [header, failures] == [expected("CLOSED")[0], expected("CLOSED")[2]]
            np.testing.assert_allclose(np.frombuffer(states, "<f4"), floats("CLOSED"), rtol=1e-5)
            server.stop()
            for last in await asyncio.gather(first.last(), second.last()):
                assert last == expected("GOODBYE")
            first.close()
            second.close()
    finally:
        context.destroy(linger=0)
