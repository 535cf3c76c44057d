"""Damaged messages by the hundred thousand: no crash, no growth, documented answers, the neighbours' bits as ever."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from functools import partial
from pathlib import Path

import msgpack
import numpy as np
import psutil
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.models.folder import write_model
from instep_client.protocol.wire import Code, Kind
from tests.support.fuzzing import FAILURES, INTERESTING_VALUES, REFUSALS, AnswerCheck, MessageMaker, is_answered
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient
from tests.support.running import running
from tests.support.served import WarmServer
from tests.support.step_messages import step_header
from tests.support.threaded import ThreadedServer
from tests.support.traffic import assert_same_bits, neighbours

pytestmark = pytest.mark.heavy

F, H = 5, 8
MESSAGES = 1_000_000
WARM_UP = 50_000
A_CONNECTION = 50_000
"""Messages that one connection of the fuzzer sends before it is replaced by another."""
WINDOW = 900
"""Messages sent and not answered yet; below the server's `HIGH_WATER_MARK`, so that no answer may be dropped."""
BURST = 500
NEIGHBOURS = 4
A_BLOCK = 200
"""Messages that the fuzzer sends for each block of its neighbours, however slow the machine is."""
MORE = int(zmq.SNDMORE)
"""As a plain number: pyzmq's `send_multipart` combines flags of an enum, which takes longer than to send a frame."""
PATIENCE_S = 30
"""How long nothing may be answered."""


class Fuzzer(threading.Thread):
    """Sends the messages through raw DEALERs and checks what comes back; `failure` says what was wrong."""

    def __init__(self, endpoint: str, messages: int, foreign: list[int], server: psutil.Process) -> None:
        super().__init__(name="fuzzer")
        self._messages = messages
        self.failure: BaseException | None = None
        self.sent = 0
        self.grown_bytes = 0
        self._endpoint = endpoint
        self._server = server
        self._maker = MessageMaker(1, F, H, foreign)
        self._check = AnswerCheck(self._send, self._maker.learn)
        self._due = 0

    @property
    def seen(self) -> set[Code]:
        """Codes that came back."""
        return set(self._check.seen)

    async def send_a_few(self) -> None:
        """Wait until it has sent some messages more, or ends."""
        next_block = self.sent + A_BLOCK
        while self.is_alive() and self.sent < next_block:
            await asyncio.sleep(0.01)

    def run(self) -> None:
        try:
            with zmq.Context() as context:
                self._warm_bytes = 0
                while self.sent < self._messages:
                    with context.socket(zmq.DEALER) as self._socket:
                        self._socket.setsockopt(zmq.LINGER, 0)
                        self._socket.connect(self._endpoint)
                        self._send_some()
                    if self.sent == WARM_UP:
                        self._warm_bytes = self._server.memory_info().rss
            self.grown_bytes = self._server.memory_info().rss - self._warm_bytes
        except BaseException as error:
            self.failure = error

    def _send(self, *frames: bytes) -> None:
        for frame in frames[:-1]:
            self._socket.send(frame, MORE)
        self._socket.send(frames[-1])

    def _send_some(self) -> None:
        self._send(msgpack.packb([Kind.PING, 1]))  # the server does not know the connection yet
        self._send(msgpack.packb([Kind.HELLO, 2, 6, "fuzzer", ""]))
        self._due += 2
        self._maker.connected()
        for _ in range(A_CONNECTION // BURST):
            for _ in range(BURST):
                frames = self._maker.make()
                self._due += is_answered(frames)
                self._send(*frames)
                self.sent += 1
            self._drain(self._due - WINDOW)
        self._drain(self._due)

    def _drain(self, at_least: int) -> None:
        """Take what is there, and wait until so many messages were answered."""
        answered, since = self._check.answered, time.monotonic()
        while True:
            try:
                self._check.take(self._socket.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                if self._check.answered >= at_least:
                    break
                if self._check.answered > answered:
                    answered, since = self._check.answered, time.monotonic()
                # Heartbeats arrive all the time.
                assert time.monotonic() - since < PATIENCE_S, f"{self._due - answered} messages were never answered"
                self._socket.poll(1000)
        assert self._check.answered <= self._due, "more answers than messages"


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_a_million_damaged_messages(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    settings = ["engine.max_streams=300", "transport.heartbeat_s=2", "limits.park_s=1"]
    arguments = [part for setting in settings for part in ("--set", setting)]
    with WarmServer(tmp_path / "model", arguments) as server:
        async with neighbours(server.endpoint, SMALL, NEIGHBOURS) as others:
            fuzzer = Fuzzer(server.endpoint, MESSAGES, others.handles, psutil.Process(server.pid))
            fuzzer.start()
            before, others.pause = others.blocks, fuzzer.send_a_few
            while fuzzer.is_alive():
                await asyncio.sleep(0.05)
            fuzzer.join()
            blocks = others.blocks - before
            if fuzzer.failure is not None:
                raise fuzzer.failure
            others.pause = partial(asyncio.sleep, 0.01)
            await others.progress()
            await only_the_neighbours_are_left(server.endpoint)
    assert fuzzer.sent == MESSAGES
    assert blocks > MESSAGES / A_BLOCK / 10
    # After the warm-up, 18 bytes a message: less than any one object.
    assert fuzzer.grown_bytes < 16 * 2**20
    # The fuzzer came far enough to be refused for every reason that it can give.
    assert fuzzer.seen >= (REFUSALS | FAILURES) - {Code.BUSY}


async def only_the_neighbours_are_left(endpoint: str) -> None:
    """Wait until the server has noticed that the fuzzer is gone, and released every stream it had opened."""
    async with RawClient(endpoint) as client:
        await client.hello()
        while True:
            statistics = await client.statistics()
            if statistics["streams_open"] == NEIGHBOURS and statistics["connections"] == 2:
                return
            await asyncio.sleep(0.1)


VALUES = st.one_of(
    st.sampled_from(INTERESTING_VALUES),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),  # else Hypothesis tries for 2 s what UTF-8 encodes
    st.binary(max_size=8),
    st.lists(st.integers(0, 3), max_size=3),
)
KINDS = st.sampled_from([int(kind) for kind in Kind])
HEADERS = st.one_of(
    st.binary(max_size=40),
    st.builds(lambda kind, fields: msgpack.packb([kind, *fields]), KINDS, st.lists(VALUES, max_size=7)),
    st.builds(
        lambda kind, request, fields: msgpack.packb([kind, request, *fields]),
        KINDS,
        st.integers(1, 2**63 - 1),
        st.lists(st.one_of(st.integers(0, 6), st.just("f4")), max_size=4),
    ),
    st.builds(
        lambda header, columns: header + bytes(columns),
        st.builds(
            step_header,
            st.integers(0, 2**64 - 1),
            st.sampled_from([0, 1, 2, 2**31, 2**32 - 1]),
            st.sampled_from([0, 1, 2, 65_535, 65_536, 2**32 - 1]),
            st.sampled_from([0, F, F + 1, 2**32 - 1]),
            st.integers(0, 2),
        ),
        st.sampled_from([0, 23, 24, 25, 48]),
    ),
)
MESSAGE_LISTS = st.lists(st.tuples(HEADERS, st.lists(st.binary(max_size=64), max_size=3)), min_size=1, max_size=12)


def test_any_message_is_answered_once_and_leaves_a_stream_alone(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    numbers = itertools.count()
    with ThreadedServer(tmp_path / "model", ["--set", "limits.park_s=0"]) as server:

        @settings(max_examples=250)
        @given(MESSAGE_LISTS)
        def any_message(messages: list[tuple[bytes, list[bytes]]]) -> None:
            sent = [[header, *frames] for header, frames in messages]
            asyncio.run(send_beside_a_stream(server.endpoint, f"beside-{next(numbers)}", sent))

        any_message()


async def send_beside_a_stream(endpoint: str, name: str, messages: list[list[bytes]]) -> None:
    x = np.random.default_rng(0).standard_normal((4, 1, F)).astype(np.float32)
    async with RawClient(endpoint) as client, RawClient(endpoint) as other:
        check = AnswerCheck(client.socket.send)
        await other.hello()
        handles = (await other.open(name)).handles()
        before = await other.step(handles, [0], x[:2])
        await client.hello()
        for message in messages:
            await client.send(*message)
        while check.answered < sum(map(is_answered, messages)):
            check.take(await client.socket.recv_multipart())
        after = await other.step(handles, [2], x[2:])
        served = np.concatenate([before.floats(), after.floats()]).reshape(4, H)
        assert_same_bits(served, whole(SMALL, x[:, 0])[0], "the stream beside")


NESTED = {
    "kind": b"\x92{}\x01",
    "version": b"\x94\x01\x01{}\xa1x",
    "N": b"\x95\x02\x01{}\x00\x00",
}
"""Headers with room for a value that is nested far too deep."""


@pytest.mark.parametrize("place", NESTED)
@pytest.mark.parametrize("depth", [500, 1000, 1020])
async def test_a_deeply_nested_header_is_refused(place: str, depth: int) -> None:
    header = NESTED[place].replace(b"{}", b"\x91" * depth + b"\x01")
    frames = 4 if place == "N" else 1
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        reply = await client.ask(header, *[b"\0" * 20] * (frames - 1))
        assert reply.code in (Code.MALFORMED, Code.WRONG_VERSION)
