"""The messages of docs/protocol.md: what the code writes and reads, and one conversation with a running server."""

from __future__ import annotations

import asyncio
import struct

import msgpack
import numpy as np
import pytest
import zmq.asyncio

from instep.core.typing import F32
from instep_client import replies as readers
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind, ServerInfo
from tests.docs.support.protocol_examples import (
    EPOCH,
    FIRST,
    INFO,
    MIC_1,
    MIC_2,
    MIC_3,
    PAGE,
    RESUMED_1,
    RESUMED_2,
    SECOND,
    SEED,
    WHAT_THE_CODE_SAYS,
    floats,
)
from tests.support import raw
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.step_messages import step_header


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

    async def last(self) -> list[bytes]:
        """The last message; the server asks before it whether everything was read."""
        while msgpack.unpackb((frames := await self.receive())[0])[0] == Kind.PING:
            (ping,) = frames
            await self._socket.send(msgpack.packb([Kind.PONG, msgpack.unpackb(ping)[1]]))
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
            varying = {"boot_id", "device"}
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
            for last in await asyncio.gather(first.last(), second.last()):
                assert last == expected("GOODBYE")
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
