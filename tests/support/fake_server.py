"""A small server that speaks the protocol, with a recurrence one can compute by hand, and faults to order.

`FakeRules` is the protocol without sockets: it keeps streams, their epochs and their last outputs while connections and
the server itself come and go. `FakeServer` runs it behind a real ROUTER in a thread. Nothing is taken from the engine.
The network:

    state' = 0.5 * state + sum(x)            for every element of the state
    y[o]   = state'[0] + o

It reads headers without the client's functions, so that it does not share the client's reading of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt
import zmq

from instep_client.protocol.codes import HAVE_ALL, Code
from instep_client.protocol.wire import (
    CLAIM,
    CLOSING,
    COLUMN,
    FAILURE,
    GRANT,
    LISTING,
    MODEL,
    PROTOCOL_VERSION,
    Kind,
    Place,
    ServerInfo,
)
from tests.support.states import gru_state
from tests.support.step_messages import parts, stepped_header

F32: TypeAlias = npt.NDArray[np.float32]
Message: TypeAlias = list[bytes]
Handler: TypeAlias = Callable[[bytes, list[bytes]], list[tuple[bytes, Message]]]
Fault: TypeAlias = Callable[[list[Any], list[bytes]], list[Message] | None]

INFO = ServerInfo(
    protocol_version=PROTOCOL_VERSION,
    boot_id="boot 0",
    model="halving",
    fingerprint="00",
    features=3,
    outputs=2,
    state=gru_state(2, 2),
    device="none",
    exactness="exact",
    arithmetic="portable-1",
    max_streams=100_000,
    max_message_bytes=16 * 2**20,
    max_block_frames=16_384,
    credit_frames=16_384,
    max_idle_s=0.0,
    window_frames=32_768,
    durability="memory",
    park_s=300.0,
)
RING_INFO = replace(INFO, window_frames=8, credit_frames=64)
"""Limits that tests reach with a few frames."""


def pack(kind: Kind, request: int, *fields: Any) -> bytes:
    """A header."""
    packed: bytes = msgpack.packb([int(kind), request, *fields])
    return packed


def error(request: int, code: Code, retry_after_us: int = 0) -> Message:
    """ERROR."""
    return [pack(Kind.ERROR, request, int(code), code.sentence, retry_after_us)]


def evicted(handles: Sequence[int], code: Code = Code.IDLE) -> Message:
    """EVICTED."""
    return [pack(Kind.EVICTED, 0, len(handles), int(code), code.sentence), np.array(handles, "<u8").tobytes()]


def woken(former: Sequence[int], handles: Sequence[int]) -> Message:
    """WOKEN."""
    arrays = [np.array(each, "<u8").tobytes() for each in (former, handles)]
    return [pack(Kind.WOKEN, 0, len(handles)), *arrays]


def goodbye() -> Message:
    """GOODBYE."""
    return [pack(Kind.GOODBYE, 0, "the server is shutting down: it was asked to")]


def welcome(request: int, info: ServerInfo) -> Message:
    """WELCOME."""
    fields = {name: getattr(info, name) for name in ServerInfo.__dataclass_fields__}
    *values, names = (fields | {"state": info.state.encode()}).values()
    return [pack(Kind.WELCOME, request, *values), "\n".join(names).encode()]


def stepped(
    request: int, y: F32, failures: Sequence[tuple[int, int, int, int]] = (), times: Sequence[int] = (7, 8, 9)
) -> Message:
    """STEPPED; a failure is (column, timestep, code, expected seq)."""
    entries = np.array([(column, t, int(code), 0, seq) for column, t, code, seq in failures], FAILURE)
    header = stepped_header([(request, y.shape[1])], len(y), len(entries), times)
    return [header + entries.tobytes(), y.astype("<f4").tobytes()]


def granted(kind: Kind, request: int, grants: npt.NDArray[np.void], refused: Sequence[Any] = ()) -> Message:
    """OPENED or RESUMED; a refusal is (column, 0, code, 0, expected seq)."""
    said = [[code, Code(code).sentence] for code in sorted({entry[2] for entry in refused})]
    entries = np.array(list(refused), FAILURE)
    return [pack(kind, request, len(grants), "memory", said), grants.tobytes(), entries.tobytes()]


def reference(x: F32, state: F32 | None = None, info: ServerInfo = INFO) -> tuple[F32, F32]:
    """Outputs [T, outputs] and the final state [L, H] of one stream's frames [T, features]."""
    now = np.zeros(info.state.leaves[0].shape, np.float32) if state is None else state.copy()
    outputs = np.zeros((len(x), info.outputs), np.float32)
    for t, frame in enumerate(x):
        now = np.float32(0.5) * now + frame.sum(dtype=np.float32)
        outputs[t] = now.flat[0] + np.arange(info.outputs, dtype=np.float32)
    return outputs, now


@dataclass
class FakeStream:
    """One stream, and all that was ever applied to it."""

    name: str
    owner: bytes | None
    handle: int
    epoch: int
    next_seq: int
    acked: int
    state: F32
    former_epoch: int = 0
    """Also accepted from later connections until the owner uses its handle: it may never have learned its epoch. A
    claim of an earlier connection that arrives late is fenced."""
    is_asleep: bool = False
    hello: int = 0
    """The number of the owner's connection, in the order of their HELLOs."""
    ring: dict[int, tuple[bytes, F32]] = field(default_factory=dict)
    applied: list[F32] = field(default_factory=list)


class FakeRules:
    """What a server answers; `handle` is to be given every message. Handles count from 1 and are never used again."""

    def __init__(self, info: ServerInfo = INFO) -> None:
        self.info = info
        self.streams: dict[str, FakeStream] = {}
        self.closed: dict[str, FakeStream] = {}
        """The last stream of each name that a client closed."""
        self.expired: set[str] = set()
        self.fault: Fault | None = None
        """Called first with (header, frames): its messages are the answer, None leaves it to the rules. The header is
        that of `parts`; the frames are the message as it came."""
        self.holding = False
        """Whether answers to OPEN and STEP are kept in `held`."""
        self.held: list[tuple[bytes, Message]] = []
        self.busy: list[bool] = []
        """Whether to refuse the next STEPs with BUSY, last first."""
        self.refuses: Code | None = None
        """The code of every stream that is resumed."""
        self.draining = False
        self.ready = 1.0
        """What STATS says of it."""
        self.numbers: dict[str, float] = {}
        """More of what STATS says."""
        self.table: list[tuple[int, str]] = []
        """The term and endpoint of each shard, for SHARDS."""
        self.boots = 0
        self.blocks: list[tuple[int, int]] = []
        """(T, N) of every STEP seen."""
        self.kinds: list[Kind] = []
        """The kind of every message seen."""
        self.failures: list[Code] = []
        """Every code that answered frames."""
        self.wanted: dict[str, None] = {}
        """Streams that hibernate and that frames have come for; `wake` wakes them."""
        self._peers: dict[bytes, int] = {}
        self._hellos = 0
        self.last_number = 0
        """The last handle and epoch given."""
        self.notices: list[tuple[bytes, Message]] = []
        """What goes out before the answer."""

    @property
    def names(self) -> dict[str, int]:
        """The handles of the streams."""
        return {name: stream.handle for name, stream in self.streams.items()}

    def handle(self, peer: bytes, frames: list[bytes]) -> list[tuple[bytes, Message]]:
        """One message; what goes out because of it."""
        if frames == [b""]:  # what ZeroMQ sends when it has made a connection
            return [(peer, error(0, Code.HELLO_FIRST))]
        header, arrays = parts(frames)
        kind = Kind(header[0])
        self.kinds.append(kind)
        if kind is Kind.STEP:
            self.blocks.append((header[2], header[3]))
        self.notices = []
        answers = self.fault(header, frames) if self.fault is not None else None
        if answers is None:
            answer = self._answer_to(kind, peer, header, [frames[0], *arrays])
            addressed = [*self.notices, (peer, answer)]
        else:
            addressed = [(peer, answer) for answer in answers]
        if kind in (Kind.OPEN, Kind.STEP) and self.holding:
            self.held += addressed
            return []
        return addressed

    def _answer_to(self, kind: Kind, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        if kind is not Kind.HELLO and peer not in self._peers:
            return error(header[1], Code.HELLO_FIRST)
        if self.draining and kind not in (Kind.HELLO, Kind.PING, Kind.STATS, Kind.CLOSE):
            return error(header[1], Code.SHUTTING_DOWN)
        if kind is Kind.STEP and self.busy and self.busy.pop():
            return error(header[1], Code.BUSY, 1000)
        answer: Message = getattr(self, f"_{kind.name.lower()}")(peer, header, frames)
        return answer

    def release(self) -> list[tuple[bytes, Message]]:
        """Stop holding; what was held."""
        held, self.held, self.holding = self.held, [], False
        return held

    def end(self, handles: Sequence[int]) -> None:
        """Forget streams, as an eviction does."""
        self.streams = {name: stream for name, stream in self.streams.items() if stream.handle not in handles}

    def evict(self, handles: Sequence[int], code: Code) -> list[tuple[bytes, Message]]:
        """End streams; what tells every client."""
        self.end(handles)
        return [(peer, evicted(handles, code)) for peer in self._peers]

    def occupy(self, name: str) -> None:
        """Another client opens a stream."""
        self._new(b"other", [name], [0], np.zeros((1, self.info.state.row_bytes // 4), np.float32))

    def drop(self, peer: bytes) -> None:
        """The server notices that a connection is gone."""
        self._peers.pop(peer, None)
        for stream in self.streams.values():
            if stream.owner == peer:
                stream.owner = None

    def restart(self) -> None:
        """It forgets every connection and nothing else."""
        self.boots += 1
        self.draining = False
        for peer in list(self._peers):
            self.drop(peer)

    def take_over_from(self, former: FakeRules) -> None:
        """Continue the streams of another server, which nobody uses any more."""
        self.streams, self.last_number = former.streams, former.last_number
        self.restart()

    def shut_down(self) -> list[tuple[bytes, Message]]:
        """Say GOODBYE and take nothing until the restart."""
        self.draining = True
        return [(peer, goodbye()) for peer in self._peers]

    def forget(self, name: str, frames: int) -> None:
        """Lose the last frames of a stream, as a server does that had not made them durable."""
        stream = self.streams[name]
        kept = stream.applied[: len(stream.applied) - frames]
        stream.next_seq -= frames
        stream.applied, stream.state = [], np.zeros_like(stream.state)
        for x in kept:
            self._apply(stream, x)
        stream.ring = {seq: held for seq, held in stream.ring.items() if seq < stream.next_seq}

    def expire(self, name: str) -> None:
        """A stream was parked for too long."""
        del self.streams[name]
        self.expired.add(name)

    def hibernate(self, name: str) -> None:
        """A stream leaves memory."""
        self.streams[name].is_asleep = True

    def wake(self, refused: Code | None = None) -> list[tuple[bytes, Message]]:
        """Wake what frames have come for, or say why that cannot be done now."""
        self.notices = []
        wanted, self.wanted = self.wanted, {}
        for stream in (self.streams[name] for name in wanted if name in self.streams):
            if stream.is_asleep and refused is None:
                self._wake(stream)
            elif stream.is_asleep and stream.owner in self._peers:
                self.notices.append((stream.owner, evicted([stream.handle], refused or Code.BUSY)))
        return self.notices

    def _wake(self, stream: FakeStream) -> None:
        self.last_number += 1
        if stream.owner in self._peers:
            self.notices.append((stream.owner, woken([stream.handle], [self.last_number])))
        stream.is_asleep, stream.handle = False, self.last_number

    def take_over(self, name: str) -> list[tuple[bytes, Message]]:
        """Another client takes a stream."""
        stream = self.streams[name]
        owner, handle = stream.owner, stream.handle
        self.last_number += 1
        stream.owner, stream.handle, stream.epoch, stream.former_epoch = b"other", self.last_number, self.last_number, 0
        return [(owner, evicted([handle], Code.FENCED))] if owner in self._peers else []

    def _hello(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        self._hellos += 1
        self._peers.setdefault(peer, self._hellos)
        return welcome(header[1], replace(self.info, boot_id=f"boot {self.boots}"))

    def _grants(self, streams: Sequence[FakeStream | None]) -> Any:
        grants = np.zeros(len(streams), GRANT)
        for index, stream in enumerate(streams):
            if stream is not None:
                grants[index] = (stream.handle, stream.epoch, stream.next_seq)
        return grants

    def _new(self, peer: bytes, names: list[str], seqs: Any, states: F32) -> tuple[Any, list[Any]]:
        made: list[FakeStream | None] = []
        refused: list[Any] = []
        for index, name in enumerate(names):
            if name in self.streams:
                made.append(None)
                refused.append((index, 0, int(Code.NAME_IN_USE), 0, 0))
                continue
            self.last_number += 1
            seq = int(seqs[index])
            stream = FakeStream(name, peer, self.last_number, self.last_number, seq, seq, states[index].copy())
            self.streams[name] = stream
            made.append(stream)
        return self._grants(made), refused

    def _open(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        names = frames[1].decode().split("\n")
        states = np.zeros((len(names), self.info.state.row_bytes // 4), np.float32)
        if header[3]:
            states[:] = np.frombuffer(frames[2], "<f4").reshape(states.shape)
        seqs = np.frombuffer(frames[3], "<u8") if header[4] else np.zeros(len(names), np.uint64)
        return granted(Kind.OPENED, header[1], *self._new(peer, names, seqs, states))

    def _fork(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        found, missing = self._find(peer, frames[1])
        names = frames[2].decode().split("\n")
        there = [index for index, stream in enumerate(found) if stream is not None]
        sources = [stream for stream in found if stream is not None]
        seqs, states = [stream.next_seq for stream in sources], np.array([stream.state for stream in sources])
        made, refused = self._new(peer, [names[index] for index in there], seqs, states)
        grants = np.zeros(len(found), GRANT)
        grants[there] = made
        refused = [(there[entry[0]], *entry[1:]) for entry in refused]
        return granted(Kind.OPENED, header[1], grants, sorted([*missing, *refused]))

    def _resume(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        names, take_over = frames[1].decode().split("\n"), bool(header[3])
        given: list[FakeStream | None] = []
        refused: list[Any] = []
        for index, (name, (have, epoch)) in enumerate(
            zip(names, np.frombuffer(frames[2], CLAIM).tolist(), strict=True)
        ):
            stream = self.streams.get(name)
            code = self._judge(peer, stream, name, have, epoch, take_over)
            if code or stream is None:
                given.append(None)
                refused.append((index, 0, int(code), 0, stream.next_seq if stream else 0))
                continue
            if stream.is_asleep:
                self._wake(stream)
            if stream.owner not in (None, peer) and stream.owner in self._peers:
                self.notices.append((stream.owner, evicted([stream.handle], Code.FENCED)))
            self.last_number += 1
            stream.owner, stream.handle, stream.hello = peer, self.last_number, self._peers[peer]
            stream.epoch, stream.former_epoch = self.last_number, 0 if take_over else epoch
            stream.acked = max(stream.acked, min(have, stream.next_seq))
            given.append(stream)
        return granted(Kind.RESUMED, header[1], self._grants(given), refused)

    def _judge(self, peer: bytes, stream: FakeStream | None, name: str, have: int, epoch: int, take_over: bool) -> int:
        if stream is None:
            return Code.EXPIRED if name in self.expired else Code.UNKNOWN_STREAM
        if self.refuses:
            return self.refuses
        is_former = 0 < epoch == stream.former_epoch and self._peers[peer] >= stream.hello
        if epoch < stream.epoch and not take_over and not is_former:
            return Code.FENCED
        claimed = stream.next_seq if have == HAVE_ALL else have
        if claimed > stream.next_seq and not take_over:
            return Code.DATA_LOSS
        return Code.OUTPUTS_GONE if claimed < stream.next_seq - self.info.window_frames else 0

    def _find(self, peer: bytes, frame: bytes, *, wakes: bool = True) -> tuple[list[FakeStream | None], list[Any]]:
        found: list[FakeStream | None] = []
        refused: list[Any] = []
        by_handle = {stream.handle: stream for stream in self.streams.values()}
        for index, handle in enumerate(np.frombuffer(frame, "<u8").tolist()):
            stream = by_handle.get(handle)
            if stream is None or stream.owner != peer:
                found.append(None)
                refused.append((index, 0, int(Code.UNKNOWN_STREAM), 0, 0))
                continue
            stream.former_epoch = 0
            if stream.is_asleep and wakes:
                self._wake(stream)
            found.append(stream)
        return found, refused

    def _find_named(self, header: list[Any], frame: bytes) -> tuple[list[FakeStream | None], list[Any]]:
        names = frame.decode().split("\n")
        assert len(names) == header[2]
        found = [self.streams.get(name) for name in names]
        missing = (Code.EXPIRED if name in self.expired else Code.UNKNOWN_STREAM for name in names)
        return found, [(i, 0, int(code), 0, 0) for i, code in enumerate(missing) if found[i] is None]

    def _states(self, found: Sequence[FakeStream | None]) -> F32:
        nan = np.full(self.info.state.row_bytes // 4, np.nan, np.float32)
        return np.array([nan if stream is None else stream.state for stream in found], np.float32)

    def _answer(self, kind: Kind, request: int, count: int, arrays: list[bytes], refused: list[Any]) -> Message:
        said = [[code, Code(code).sentence] for code in sorted({entry[2] for entry in refused})]
        return [pack(kind, request, count, said), *arrays, np.array(refused, FAILURE).tobytes()]

    def _close(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        closings = np.frombuffer(frames[1], CLOSING)
        found, refused = self._find(peer, closings["handle"].tobytes(), wakes=False)
        for index, stream in enumerate(found):
            if stream is not None and closings["have"][index] < stream.next_seq:
                found[index] = None
                refused.append((index, 0, int(Code.FRAMES_PENDING), 0, 0))
        states = self._states(found)
        for stream in found:
            if stream is not None:
                self.closed[stream.name] = self.streams.pop(stream.name)
        return self._answer(Kind.CLOSED, header[1], len(found), [states.tobytes()], sorted(refused))

    def _read_state(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        found, refused = self._find_named(header, frames[1]) if header[3] else self._find(peer, frames[1])
        seqs = np.array([0 if stream is None else stream.next_seq for stream in found], "<u8")
        arrays = [seqs.tobytes(), self._states(found).tobytes()]
        return self._answer(Kind.STATE_READ, header[1], len(found), arrays, refused)

    def _reset(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        found, refused = self._find(peer, frames[1])
        states = np.zeros((len(found), self.info.state.row_bytes // 4), np.float32)
        if header[3]:
            states[:] = np.frombuffer(frames[2], "<f4").reshape(states.shape)
        for stream, state in zip(found, states, strict=True):
            if stream is not None:
                stream.state = state.copy()
        return self._answer(Kind.CHANGED, header[1], len(found), [], refused)

    def _ping(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        return [pack(Kind.PONG, header[1])]

    def _shards(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        terms, endpoints = zip(*self.table, strict=True)
        return [
            pack(Kind.SHARDED, header[1], len(terms)),
            np.array(terms, "<u8").tobytes(),
            "\n".join(endpoints).encode(),
        ]

    def _list(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        found = [
            (each.next_seq, 0, 0, Place.CONNECTED if each.owner in self._peers else Place.PARKED, 0)
            for each in self.streams.values()
        ]
        return [
            pack(Kind.LISTED, header[1], len(found), 0),
            "\n".join(self.streams).encode(),
            np.array(found, LISTING).tobytes(),
        ]

    def _stats(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        values = {"ready": self.ready, "streams_open": float(len(self.streams)), "blocks": len(self.blocks)}
        values |= self.numbers
        return [pack(Kind.STATISTICS, header[1], list(values.items()))]

    def _models(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        record = np.array([(0, len(self.streams), 1, self.info.features, self.info.outputs)], MODEL)
        return [pack(Kind.SERVED, header[1], 1), self.info.model.encode(), record.tobytes()]

    def _step(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        _, request, steps, columns, features, dtype = header
        assert (features, dtype) == (self.info.features, 1)
        x = np.frombuffer(frames[2], "<f4").reshape(steps, columns, features)
        y = np.full((steps, columns, self.info.outputs), np.nan, np.float32)
        by_handle = {stream.handle: stream for stream in self.streams.values()}
        failures: list[tuple[int, int, Code, int]] = []
        for column, (handle, seq, acked) in enumerate(np.frombuffer(frames[1], COLUMN).tolist()):
            stream = by_handle.get(handle)
            if stream is None or stream.owner != peer:
                failures.append((column, 0, Code.UNKNOWN_STREAM if stream is None else Code.FOREIGN_STREAM, 0))
                continue
            if stream.is_asleep:
                self.wanted[stream.name] = None
                self.notices.append((peer, evicted([handle], Code.HIBERNATED)))
                failures.append((column, 0, Code.UNKNOWN_STREAM, 0))
                continue
            stream.former_epoch = 0
            for t in range(steps):
                code = self._frame(stream, seq + t, acked, x[t, column], y[t, column])
                if code:
                    failures.append((column, t, Code(code), stream.next_seq))
                    break
        self.failures += [failure[2] for failure in failures]
        return stepped(request, y, failures)

    def _frame(self, stream: FakeStream, seq: int, acked: int, x: F32, y: F32) -> int:
        assert seq < acked + self.info.window_frames, "the client sent beyond the window"
        if acked > stream.next_seq:
            return Code.ACK_AHEAD
        stream.acked = max(stream.acked, acked)
        if seq > stream.next_seq:
            return Code.SEQ_GAP
        if seq < stream.next_seq:
            if seq < stream.acked or seq not in stream.ring:
                return Code.SEQ_REPEATED
            held, outputs = stream.ring[seq]
            y[:] = outputs
            return 0 if held == x.tobytes() else Code.CONFLICT
        if not np.isfinite(x).all():
            return Code.NOT_FINITE
        self._apply(stream, x)
        y[:] = stream.state[0] + np.arange(self.info.outputs, dtype=np.float32)
        stream.ring[seq] = (x.tobytes(), y.copy())
        stream.ring.pop(seq - self.info.window_frames, None)
        stream.next_seq += 1
        return 0

    def _apply(self, stream: FakeStream, x: F32) -> None:
        stream.state = np.float32(0.5) * stream.state + x.sum(dtype=np.float32)
        stream.applied.append(x.copy())


class FakeServer:
    """`FakeRules` behind a ROUTER on loopback, in a thread; `with FakeServer() as server`. Other rules may be given."""

    def __init__(
        self, info: ServerInfo = INFO, handle: Handler | None = None, endpoint: str = "tcp://127.0.0.1:*"
    ) -> None:
        self.rules = FakeRules(info)
        self._handle = handle or self.rules.handle
        self.endpoint = endpoint
        self._orders: SimpleQueue[Callable[[], list[tuple[bytes, Message]]] | None] = SimpleQueue()
        self._context = zmq.Context()
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._is_up = threading.Event()
        self._peers: dict[bytes, None] = {}
        self._thread = threading.Thread(target=self._serve, name="fake-server")

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_up.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._order(None)
        self._thread.join()
        self._bell.close(linger=0)
        self._context.term()

    def push(self, *messages: Message) -> None:
        """Send messages to every client that was heard."""
        self._order(lambda: [(peer, message) for message in messages for peer in self._peers])

    def do(self, what: Callable[[], object]) -> None:
        """Have something done between two messages."""

        def done() -> list[tuple[bytes, Message]]:
            what()
            return []

        self._order(done)

    def release(self) -> None:
        """Send what was held."""
        self._order(self.rules.release)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Read nothing while the block runs."""
        stands, goes_on = threading.Event(), threading.Event()

        def stand() -> list[tuple[bytes, Message]]:
            stands.set()
            goes_on.wait()
            return []

        self._order(stand)
        stands.wait()
        try:
            yield
        finally:
            goes_on.set()

    def evict(self, names: Sequence[str], code: Code = Code.IDLE) -> None:
        """End streams and tell every client."""

        def end() -> list[tuple[bytes, Message]]:
            return self.rules.evict([self.rules.names[name] for name in names], code)

        self._order(end)

    def _order(self, order: Callable[[], list[tuple[bytes, Message]]] | None) -> None:
        self._orders.put(order)
        self._bell.send(b"")

    def _serve(self) -> None:
        router = self._context.socket(zmq.ROUTER)
        router.setsockopt(zmq.LINGER, 0)
        router.bind(self.endpoint)
        self.endpoint = str(router.get_string(zmq.LAST_ENDPOINT))
        bell = self._context.socket(zmq.PAIR)
        bell.connect("inproc://bell")
        self._is_up.set()
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(bell, zmq.POLLIN)
        while True:
            ready = dict(poller.poll())
            outgoing: list[tuple[bytes, Message]] = []
            if bell in ready:
                bell.recv()
                order = self._orders.get()
                if order is None:
                    break
                outgoing += order()
            if router in ready:
                peer, *frames = router.recv_multipart()
                self._peers[peer] = None
                outgoing += (self._handle if frames != [b""] else self.rules.handle)(peer, frames)
            for peer, message in outgoing:
                router.send_multipart([peer, *message])
        router.close()
        bell.close()


@contextlib.contextmanager
def fake_shards(*places: tuple[int, int]) -> Iterator[list[FakeServer]]:
    """Servers of a cluster of two shards, each with its (shard, term). The first ones are in everybody's table."""
    with contextlib.ExitStack() as stack:
        infos = [replace(RING_INFO, shard=shard, shards=2, term=term) for shard, term in places]
        made = [stack.enter_context(FakeServer(info)) for info in infos]
        for server in made:
            first = (next(each for each in made if each.rules.info.shard == shard) for shard in (0, 1))
            server.rules.table = [(each.rules.info.term, each.endpoint) for each in first]
        yield made
