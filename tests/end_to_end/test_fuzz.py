"""Damaged messages by the hundred thousand: no crash, no growth, documented answers, the neighbours' bits as ever."""

from __future__ import annotations

import asyncio
import itertools
import random
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgpack
import numpy as np
import psutil
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.models.folder import write_model
from instep_client.protocol import wire
from instep_client.protocol.wire import PROTOCOL_VERSION, Code, Kind
from tests.support.models import SMALL, whole
from tests.support.raw import RawClient, Reply
from tests.support.running import running
from tests.support.served import WarmServer
from tests.support.step_messages import STEP, apart, step_header, stepped_header
from tests.support.threaded import ThreadedServer
from tests.support.traffic import assert_same_bits, neighbours

pytestmark = pytest.mark.heavy

T = TypeVar("T")

REFUSALS = frozenset(
    {
        *(Code.MALFORMED, Code.TOO_LARGE, Code.WRONG_VERSION, Code.HELLO_FIRST, Code.WRONG_SHAPE, Code.WRONG_DTYPE),
        *(Code.REPEATED_STREAM, Code.BUSY),
    }
)
"""Why a whole message may be refused by a healthy server."""
FAILURES = frozenset(
    {
        *(Code.BAD_NAME, Code.NOT_FINITE, Code.SEQ_GAP, Code.SEQ_REPEATED, Code.UNKNOWN_STREAM, Code.FOREIGN_STREAM),
        *(Code.NAME_IN_USE, Code.TOO_MANY_STREAMS, Code.FENCED, Code.DATA_LOSS, Code.CONFLICT, Code.WINDOW_FULL),
        *(Code.OUTPUTS_GONE, Code.ACK_AHEAD, Code.FRAMES_PENDING, Code.EXPIRED),
    }
)
"""Why one column may be."""
ANSWERS = {
    Kind.WELCOME: 23,
    Kind.OPENED: 5,
    Kind.CLOSED: 4,
    Kind.PING: 2,
    Kind.PONG: 2,
    Kind.STATISTICS: 3,
    Kind.ERROR: 5,
    Kind.RESUMED: 5,
    Kind.STATE_READ: 4,
    Kind.CHANGED: 4,
    Kind.SERVED: 3,
    Kind.SHARDED: 3,
}
"""What a healthy server says beside STEPPED, and how many elements its header has."""
WITH_FAILURES = (Kind.OPENED, Kind.RESUMED, Kind.STEPPED, Kind.CLOSED, Kind.STATE_READ, Kind.CHANGED)

INTERESTING_BYTES = bytes([0x00, 0x01, 0x7F, 0x80, 0x90, 0x93, 0xC0, 0xC1, 0xC6, 0xD9, 0xDC, 0xDD, 0xFF])
INTERESTING_NUMBERS = (0, 1, 2, 3, 5, 255, 65_535, 65_536, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
STEP_FIELDS = ((1, 2), (2, 4), (4, 8), (8, 12), (12, 16), (16, 24))
"""Where the fields of a STEP header begin and end, behind its kind."""
INTERESTING_VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 3, 5, 255, 65_535, 65_536, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1),
    *(1.0, float("nan"), "", "f4", "f8", "5", "x" * 300, b"", b"f4", [], [1], [[[]]], {}, {1: 2}),
]


def is_answered(frames: Sequence[bytes]) -> bool:
    """Whether a message gets a reply: every one does but a valid PONG."""
    if len(frames) != 1:
        return True
    try:
        header = msgpack.unpackb(frames[0], strict_map_key=False)
    except Exception:  # msgpack raises many types
        return True
    if type(header) is not list or [type(each) for each in header] != [int, int]:
        return True
    kind, request = header
    return not (kind == Kind.PONG and 0 <= request < 2**63)


class AnswerCheck:
    """Holds every answer against the protocol, and counts what came.

    Args:
        answer: sends the answer to a PING of the server.
        learn: told of every answer that has failures, an array of handles, or could have them.
    """

    def __init__(
        self,
        answer: Callable[[bytes], object],
        learn: Callable[[Reply], None] = lambda _: None,
    ) -> None:
        self.answered = 0
        self.seen: Counter[Code] = Counter()
        self._answer = answer
        self._learn = learn

    def take(self, frames: list[bytes]) -> None:
        """One message from the server."""
        reply = Reply(frames)
        alone = [reply]
        if reply.kind is Kind.STEPPED:
            assert len(frames) == 2, reply.header
            alone = [Reply(message) for message in apart(frames)]
        else:
            assert len(reply.header) == ANSWERS.get(reply.kind), reply.header
            assert len(frames) == reply.kind.frames, reply.header
        if reply.kind is Kind.PING:
            self._answer(msgpack.packb([Kind.PONG, reply.request]))
            return
        self.answered += len(alone)
        if reply.kind is Kind.ERROR:
            code = reply.code
            assert code in REFUSALS, reply.header
            assert reply.sentence, reply.header
            assert (reply.header[4] > 0) == (code is Code.BUSY), reply.header
            self.seen[code] += 1
        elif reply.kind in WITH_FAILURES:
            codes = {code for _, _, code, _ in reply.failures()}
            assert codes <= FAILURES, reply.header
            if reply.kind is not Kind.STEPPED:
                assert {code for code, _ in reply.header[-1]} == codes, reply.header
            self.seen.update(codes)
            for one in alone:
                self._learn(one)


class MessageMaker:
    """Makes valid messages of every kind, and damages most of them.

    Args:
        seed: decides everything.
        features: of the model that is served.
        state_size: floats of a stream's state.
        foreign: handles of other connections' streams.
    """

    def __init__(self, seed: int, features: int, state_size: int, foreign: Sequence[int]) -> None:
        self._random = random.Random(seed)
        self._features = features
        self._state_size = state_size
        self._foreign = list(foreign)
        self._own: list[int] = []
        self._seqs: dict[int, int] = {}
        self._former: list[int] = []
        """Handles of streams that were resumed under others since."""
        self._handle_of: dict[str, int] = {}
        self._epochs: dict[str, int] = {}
        """Of every stream that was ever granted, parked and expired ones included."""
        self._asked: dict[int, list[int]] = {}
        self._named: dict[int, list[str]] = {}
        self._kinds = [
            *(self._hello, self._open, self._open, *[self._step] * 8, self._close, self._ping, self._servers_own),
            *(self._resume, self._resume, self._read_state, self._read_named, self._reset, self._fork),
        ]
        self._damages = [
            *(self._change_byte, self._change_byte, self._cut, self._extend, self._drop, self._double, self._insert),
            *(self._swap, self._change_field, self._change_field, self._change_field),
        ]
        values = np.random.default_rng(seed).standard_normal(4096).astype("<f4")
        self._floats = values.tobytes()
        values[::7] = np.nan
        self._wild_floats = values.tobytes()

    def learn(self, reply: Reply) -> None:
        """Take from an answer which streams are the sender's own, and which seqs they expect."""
        if reply.kind in (Kind.OPENED, Kind.RESUMED):
            self._granted(reply)
            return
        if reply.kind not in (Kind.STEPPED, Kind.CLOSED):
            return
        handles = self._asked.pop(reply.request, [])
        ended = set(handles) if reply.kind is Kind.CLOSED else set()
        for column, _, code, expected in reply.failures():
            if column < len(handles):
                self._seqs[handles[column]] = expected
                if code in (Code.UNKNOWN_STREAM, Code.FENCED):
                    ended.add(handles[column])
        if ended:
            self._own = [handle for handle in self._own if handle not in ended]

    def _granted(self, reply: Reply) -> None:
        names = self._named.pop(reply.request, [])
        for name, grant in zip(names, reply.grants().tolist(), strict=False):  # damage may have changed the number
            handle, epoch, next_seq = grant
            if handle:
                former = self._handle_of.get(name)
                if former in self._own:
                    self._own.remove(former)
                    self._former = [*self._former[-19:], former]
                self._own = [*self._own[-299:], handle]
                self._handle_of[name], self._epochs[name], self._seqs[handle] = handle, epoch, next_seq

    def connected(self) -> None:
        """A new connection: nothing is the sender's own."""
        self._own.clear()
        self._former.clear()
        self._seqs.clear()
        self._handle_of.clear()
        self._asked.clear()
        self._named.clear()

    def make(self) -> list[bytes]:
        """The next message."""
        if self._random.random() < 0.1:
            return [self._random.randbytes(self._below(60)) for _ in range(1 + self._below(7))]
        frames = self._one_of(self._kinds)()
        for _ in range(self._one_of((0, 0, 1, 1, 1, 2, 4))):
            self._one_of(self._damages)(frames)
        return frames or [b""]

    def _below(self, bound: int) -> int:
        return int(self._random.random() * bound)  # a quarter of the time that `randrange` takes

    def _one_of(self, choices: Sequence[T]) -> T:
        return choices[self._below(len(choices))]

    # ── Valid messages ─────────────────────────────────────────────────────────────────────────────────────────────

    def _header(self, kind: Kind, *fields: Any) -> bytes:
        return msgpack.packb([int(kind), 1 + self._below(2**31), *fields])

    def _handles(self, count: int) -> list[int]:
        if len(self._own) >= count and self._random.random() < 0.8:
            return self._random.sample(self._own, count)
        known = [*self._own, *self._former, *self._foreign, 0, 1, self._below(2**64)]
        return [self._one_of(known) for _ in range(count)]

    def _hello(self) -> list[bytes]:
        return [self._header(Kind.HELLO, PROTOCOL_VERSION, "fuzzer", "")]

    def _open(self) -> list[bytes]:
        count = 1 + self._below(3)
        has_states = self._below(2)
        request, names = self._names_for(count)
        states = self._some_floats(count * self._state_size) if has_states else b""
        seqs = struct.pack(f"<{count}Q", *[self._below(2**40)] * count) if (has_seqs := self._below(2)) else b""
        return [msgpack.packb([Kind.OPEN, request, count, has_states, has_seqs]), names, states, seqs]

    def _names_for(self, count: int) -> tuple[int, bytes]:
        """A request number, and names whose grants it will bring."""
        request = 1 + self._below(2**31)
        names = [f"fuzzed-{self._below(400)}" for _ in range(count)]
        if len(self._named) < 1000:  # what damage leaves without an answer is let go
            self._named[request] = names
        else:
            self._named.clear()
        return request, "\n".join(names).encode()

    def _resume(self) -> list[bytes]:
        request = 1 + self._below(2**31)
        name = self._one_of(list(self._epochs) or ["fuzzed-0"]) if self._below(4) else f"fuzzed-{self._below(400)}"
        self._named[request] = [name]
        epoch = max(0, self._epochs.get(name, 0) + self._one_of((-1, 0, 0, 0, 1)))
        seq = self._seqs.get(self._handle_of.get(name, 0), 0)
        have = self._one_of((0, seq, seq, seq + 5, wire.HAVE_ALL))
        take_over = int(self._below(5) == 0)
        header = msgpack.packb([Kind.RESUME, request, 1, take_over])
        return [header, name.encode(), struct.pack("<2Q", have, epoch)]

    def _read_state(self) -> list[bytes]:
        count = 1 + self._below(2)
        return [self._header(Kind.READ_STATE, count, 0), struct.pack(f"<{count}Q", *self._handles(count))]

    def _read_named(self) -> list[bytes]:
        names = [f"fuzzed-{self._below(400)}", self._one_of(list(self._epochs) or ["fuzzed-0"])][: 1 + self._below(2)]
        return [self._header(Kind.READ_STATE, len(names), 1), "\n".join(names).encode()]

    def _reset(self) -> list[bytes]:
        has_states = self._below(2)
        states = self._some_floats(self._state_size) if has_states else b""
        return [self._header(Kind.RESET, 1, has_states), struct.pack("<Q", *self._handles(1)), states]

    def _fork(self) -> list[bytes]:
        request, names = self._names_for(1)
        return [msgpack.packb([Kind.FORK, request, 1]), struct.pack("<Q", *self._handles(1)), names]

    def _step(self) -> list[bytes]:
        timesteps, columns = 1 + self._below(3), 1 + self._below(3)
        handles = self._handles(columns)
        words = []
        for handle in handles:
            seq = self._seqs.get(handle, 0)
            words += [handle, self._one_of((0, seq, seq, seq, seq, max(0, seq - 1), 2**64 - 1))]
            words.append(self._one_of((0, seq, max(0, seq - 3), max(0, seq - 20), max(0, seq - 20), 2**64 - 1)))
            self._seqs[handle] = seq + timesteps  # if all goes well; a failure says otherwise
        request = 1 + self._below(2**31)
        self._asked[request] = handles
        header = step_header(request, timesteps, columns, self._features)
        x = self._some_floats(timesteps * columns * self._features)
        return [header + struct.pack(f"<{3 * columns}Q", *words), x]

    def _close(self) -> list[bytes]:
        count = 1 + self._below(2)
        request = 1 + self._below(2**31)
        self._asked[request] = handles = self._handles(count)
        have = self._one_of((0, 2**64 - 1))
        closings = [value for handle in handles for value in (handle, have)]
        return [msgpack.packb([Kind.CLOSE, request, count]), np.array(closings, "<u8").tobytes()]

    def _ping(self) -> list[bytes]:
        return [self._header(self._one_of((Kind.PING, Kind.PING, Kind.STATS, Kind.MODELS)))]

    def _servers_own(self) -> list[bytes]:
        kind = self._one_of((Kind.WELCOME, Kind.OPENED, Kind.STEPPED, Kind.PONG, Kind.ERROR, Kind.GOODBYE))
        if kind is Kind.STEPPED:
            return [stepped_header([(1 + self._below(2**31), 1)], 1, 0), self._some_floats(1)]
        fields = [0] * (kind.elements - 2)
        return [self._header(kind, *fields), *[b""] * (kind.frames - 1)]

    def _some_floats(self, count: int) -> bytes:
        start = 4 * self._below(1024)
        source = self._wild_floats if self._random.random() < 0.2 else self._floats
        return source[start : start + 4 * count]

    # ── Damage ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _change_byte(self, frames: list[bytes]) -> None:
        at = self._below(len(frames)) if frames else 0
        if frames and frames[at]:
            frame = bytearray(frames[at])
            place = self._below(min(len(frame), 24))
            frame[place] = self._one_of((*INTERESTING_BYTES, self._below(256)))
            frames[at] = bytes(frame)

    def _cut(self, frames: list[bytes]) -> None:
        if frames:
            at = self._below(len(frames))
            frames[at] = frames[at][: self._below(len(frames[at]) + 1)]

    def _extend(self, frames: list[bytes]) -> None:
        if frames:
            at = self._below(len(frames))
            frames[at] += self._random.randbytes(self._one_of((1, 4, 8, 24)))

    def _drop(self, frames: list[bytes]) -> None:
        if frames:
            del frames[self._below(len(frames))]

    def _double(self, frames: list[bytes]) -> None:
        if frames:
            frames.append(self._one_of(frames))

    def _insert(self, frames: list[bytes]) -> None:
        frames.insert(self._below(len(frames) + 1), self._random.randbytes(self._below(20)))

    def _swap(self, frames: list[bytes]) -> None:
        self._random.shuffle(frames)

    def _change_field(self, frames: list[bytes]) -> None:
        """Another value in the header, which stays msgpack or keeps its layout."""
        if frames and frames[0][:1] == bytes([STEP]) and len(frames[0]) >= 24:
            start, end = self._one_of(STEP_FIELDS)
            value = self._one_of(INTERESTING_NUMBERS) % 256 ** (end - start)
            frames[0] = frames[0][:start] + value.to_bytes(end - start, "little") + frames[0][end:]
            return
        try:
            header = msgpack.unpackb(frames[0], strict_map_key=False)
        except Exception:  # damaged before
            return
        if type(header) is list and header:
            header[self._below(len(header))] = self._one_of(INTERESTING_VALUES)
            frames[0] = msgpack.packb(header)


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
        self._send(msgpack.packb([Kind.HELLO, 2, PROTOCOL_VERSION, "fuzzer", ""]))
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
async def test_a_deeply_nested_header_is_refused(place: str) -> None:
    header = NESTED[place].replace(b"{}", b"\x91" * 1000 + b"\x01")
    frames = 4 if place == "N" else 1
    async with running(SMALL) as server, RawClient(server.endpoint) as client:
        await client.hello()
        reply = await client.ask(header, *[b"\0" * 20] * (frames - 1))
        assert reply.code in (Code.MALFORMED, Code.WRONG_VERSION)
