"""A small server that speaks the protocol, with a recurrence one can compute by hand, and faults to order.

`FakeRules` is the protocol without sockets; `FakeServer` runs it behind a real ROUTER in a thread. The network:

    state' = 0.5 * state + sum(x)            for every element of the state
    y[o]   = state'[0] + o

It reads headers without the client's functions, so that it does not share the client's reading of them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from types import TracebackType
from typing import Any, TypeAlias

import msgpack
import numpy as np
import numpy.typing as npt
import zmq

from instep_client.protocol.codes import SENTENCES, Code
from instep_client.protocol.wire import (
    CLOSING,
    COLUMN,
    FAILURE,
    GRANT,
    LISTING,
    MODEL,
    PROTOCOL_VERSION,
    UNKNOWN,
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
    boot_id="boot",
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


def pack(kind: Kind, request: int, *fields: Any) -> bytes:
    """A header."""
    packed: bytes = msgpack.packb([int(kind), request, *fields])
    return packed


def error(request: int, code: Code, retry_after_us: int = 0) -> Message:
    """ERROR."""
    return [pack(Kind.ERROR, request, int(code), SENTENCES[code], retry_after_us)]


def evicted(handles: Sequence[int], code: Code = Code.IDLE) -> Message:
    """EVICTED."""
    return [pack(Kind.EVICTED, 0, len(handles), int(code), SENTENCES[code]), np.array(handles, "<u8").tobytes()]


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
    said = [[code, SENTENCES[Code(code)]] for code in sorted({entry[2] for entry in refused})]
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


class FakeRules:
    """What a server answers. Handles count from 1 and are never used again."""

    def __init__(self, info: ServerInfo = INFO) -> None:
        self.info = info
        self.fault: Fault | None = None
        """Called first with (header, frames): its messages are the answer, None leaves it to the rules. The header is
        that of `parts`; the frames are the message as it came."""
        self.holding = False
        """Whether answers to OPEN and STEP are kept in `held`."""
        self.held: list[tuple[bytes, Message]] = []
        self.ready = 1.0
        """What STATS says of it."""
        self.blocks: list[tuple[int, int]] = []
        """(T, N) of every STEP seen."""
        self.kinds: list[Kind] = []
        """The kind of every message seen."""
        self.names: dict[str, int] = {}
        """Open streams: name and handle."""
        self._expected = np.zeros(1024, np.int64)
        self._state = np.zeros((1024, info.state.row_bytes // 4), np.float32)
        self._is_open = np.zeros(1024, np.bool_)
        self._next_handle = 1

    def handle(self, peer: bytes, frames: list[bytes]) -> list[tuple[bytes, Message]]:
        """One message; what goes out because of it."""
        header, arrays = parts(frames)
        kind = Kind(header[0])
        self.kinds.append(kind)
        if kind is Kind.STEP:
            self.blocks.append((header[2], header[3]))
        answers = self.fault(header, frames) if self.fault is not None else None
        if answers is None:
            answers = [getattr(self, f"_{kind.name.lower()}")(header, [frames[0], *arrays])]
        addressed = [(peer, answer) for answer in answers]
        if kind in (Kind.OPEN, Kind.STEP) and self.holding:
            self.held += addressed
            return []
        return addressed

    def release(self) -> list[tuple[bytes, Message]]:
        """Stop holding; what was held."""
        held, self.held, self.holding = self.held, [], False
        return held

    def end(self, handles: Sequence[int]) -> None:
        """Forget streams, as an eviction does."""
        self._is_open[list(handles)] = False
        self.names = {name: handle for name, handle in self.names.items() if handle not in handles}

    def _hello(self, header: list[Any], frames: list[bytes]) -> Message:
        return welcome(header[1], self.info)

    def _open(self, header: list[Any], frames: list[bytes]) -> Message:
        names = frames[1].decode().split("\n")
        assert len(names) == header[2]
        while self._next_handle + len(names) > len(self._expected):
            self._expected = np.concatenate([self._expected, np.zeros_like(self._expected)])
            self._state = np.concatenate([self._state, np.zeros_like(self._state)])
            self._is_open = np.concatenate([self._is_open, np.zeros_like(self._is_open)])
        handles = np.zeros(len(names), "<u8")
        refused: list[tuple[int, int, int, int, int]] = []
        for index, name in enumerate(names):
            if name in self.names:
                refused.append((index, 0, int(Code.NAME_IN_USE), 0, 0))
                continue
            handles[index] = self.names[name] = self._next_handle
            self._is_open[self._next_handle] = True
            self._next_handle += 1
        if header[4]:
            self._expected[handles.astype(int)] = np.frombuffer(frames[3], "<u8")
        if header[3]:
            given = np.frombuffer(frames[2], "<f4").reshape(len(names), -1)
            self._state[handles.astype(int)] = given
        else:
            assert frames[2] == b""
        grants = np.zeros(len(names), GRANT)
        grants["handle"], grants["epoch"] = handles, handles + 1000
        grants["next_seq"] = self._expected[handles.astype(int)]
        return granted(Kind.OPENED, header[1], grants, refused)

    def _step(self, header: list[Any], frames: list[bytes]) -> Message:
        _, request, steps, columns, features, dtype = header
        assert (features, dtype) == (self.info.features, 1)
        column = np.frombuffer(frames[1], COLUMN)
        assert (column["acked"] <= column["seq"]).all()
        assert (column["seq"] + steps <= column["acked"] + self.info.window_frames).all()
        x = np.frombuffer(frames[2], "<f4").reshape(steps, columns, features)
        slots = column["handle"].astype(np.int64)
        seqs = column["seq"].astype(np.int64)
        finite = np.isfinite(x).all(axis=2)
        good = steps - np.logical_or.accumulate(~finite, axis=0).sum(axis=0)
        in_order = seqs == self._expected[slots]
        is_open = self._is_open[slots]
        good[~in_order | ~is_open] = 0
        y = np.full((steps, columns, self.info.outputs), np.nan, np.float32)
        state = self._state[slots]
        for t in range(steps):
            lives = t < good
            state[lives] = np.float32(0.5) * state[lives] + x[t, lives].sum(axis=1, dtype=np.float32)[:, None]
            y[t, lives] = state[lives, :1] + np.arange(self.info.outputs, dtype=np.float32)
        self._state[slots] = state
        self._expected[slots] += good
        failures: list[tuple[int, int, Code, int]] = []
        for index in np.flatnonzero(good < steps).tolist():
            code = Code.NOT_FINITE
            if not is_open[index]:
                code = Code.UNKNOWN_STREAM
            elif not in_order[index]:
                code = Code.SEQ_GAP if seqs[index] > self._expected[slots[index]] else Code.SEQ_REPEATED
            failures.append((index, int(good[index]), code, int(self._expected[slots[index]])))
        return stepped(request, y, failures)

    def _close(self, header: list[Any], frames: list[bytes]) -> Message:
        handles = np.frombuffer(frames[1], CLOSING)["handle"].astype(np.int64)
        assert len(handles) == header[2]
        finals = self._state[handles]
        refused = [(i, 0, int(Code.UNKNOWN_STREAM), 0, 0) for i in np.flatnonzero(~self._is_open[handles]).tolist()]
        finals[~self._is_open[handles]] = np.nan
        self.end(handles.tolist())
        said = [[int(Code.UNKNOWN_STREAM), SENTENCES[Code.UNKNOWN_STREAM]]] if refused else []
        return [
            pack(Kind.CLOSED, header[1], len(handles), said),
            finals.tobytes(),
            np.array(refused, FAILURE).tobytes(),
        ]

    def _ping(self, header: list[Any], frames: list[bytes]) -> Message:
        return [pack(Kind.PONG, header[1])]

    def _stats(self, header: list[Any], frames: list[bytes]) -> Message:
        return [
            pack(
                Kind.STATISTICS,
                header[1],
                [["ready", self.ready], ["streams_open", float(len(self.names))], ["blocks", len(self.blocks)]],
            ),
            b"",
            b"",
        ]

    def _models(self, header: list[Any], frames: list[bytes]) -> Message:
        record = np.array([(0, len(self.names), 1, self.info.features, self.info.outputs)], MODEL)
        return [pack(Kind.SERVED, header[1], 1), self.info.model.encode(), record.tobytes()]

    def _list(self, header: list[Any], frames: list[bytes]) -> Message:
        streams = np.array([(5, 0, UNKNOWN, int(Place.CONNECTED), 0) for _ in self.names], LISTING)
        return [pack(Kind.LISTED, header[1], len(streams), 0), "\n".join(self.names).encode(), streams.tobytes()]


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

    def __enter__(self) -> FakeServer:
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
            handles = [self.rules.names[name] for name in names]
            self.rules.end(handles)
            return [(peer, evicted(handles, code)) for peer in self._peers]

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
                if frames == [b""]:  # what ZeroMQ sends when it has made a connection
                    outgoing.append((peer, error(0, Code.HELLO_FIRST)))
                else:
                    outgoing += self._handle(peer, frames)
            for peer, message in outgoing:
                router.send_multipart([peer, *message])
        router.close()
        bell.close()
