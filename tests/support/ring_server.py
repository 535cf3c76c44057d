"""A server that keeps streams when connections and it itself go: rings, epochs, parking, resuming, frame by frame.

It has the network of `fake_server` and can stand behind its socket. Nothing it knows is taken from the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from instep_client.protocol.codes import HAVE_ALL, SENTENCES, Code
from instep_client.protocol.wire import CLAIM, CLOSING, COLUMN, FAILURE, GRANT, LISTING, Kind, Place, ServerInfo
from tests.support.fake_server import (
    F32,
    INFO,
    Message,
    error,
    evicted,
    goodbye,
    granted,
    pack,
    stepped,
    welcome,
    woken,
)
from tests.support.step_messages import parts

RING_INFO = replace(INFO, window_frames=8, credit_frames=64)


@dataclass
class RingStream:
    """One stream, and all that was ever applied to it."""

    name: str
    owner: bytes | None
    handle: int
    epoch: int
    next_seq: int
    acked: int
    state: F32
    former_epoch: int = 0
    """Good as long as the present owner has not used its handle, for later connections: its owner may never have been
    told of it, and claim it again. A claim of an earlier connection that comes late is fenced."""
    is_asleep: bool = False
    hello: int = 0
    """Which connection the present owner's is, in the order of their HELLOs."""
    ring: dict[int, tuple[bytes, F32]] = field(default_factory=dict)
    applied: list[F32] = field(default_factory=list)


class RingServer:
    """What a server answers; `handle` is to be given every message."""

    def __init__(self, info: ServerInfo = RING_INFO) -> None:
        self.info = info
        self.streams: dict[str, RingStream] = {}
        self.closed: dict[str, RingStream] = {}
        """The last stream of each name that a client closed."""
        self.expired: set[str] = set()
        self.peers: dict[bytes, int] = {}
        self.hellos = 0
        self.kinds: list[Kind] = []
        self.failures: list[Code] = []
        """Every code that answered frames."""
        self.busy: list[bool] = []
        """Whether to refuse the next STEPs with BUSY, last first."""
        self.wanted: dict[str, None] = {}
        """Streams that hibernate and that frames have come for; `wake` wakes them."""
        self._notices: list[tuple[bytes, Message]] = []
        """What goes out before the answer."""
        self.busy_resumes = 0
        """How many RESUMEs are still to be refused with BUSY."""
        self.refuses: dict[Kind, Code] = {}
        """Kinds of requests that are refused, and with what; of a RESUME, each stream."""
        self.draining = False
        self.refused_hellos = 0
        """How many HELLOs are still to be refused."""
        self.boots = 0
        self.numbers = 0
        """The last handle and epoch given."""

    def handle(self, peer: bytes, frames: list[bytes]) -> list[tuple[bytes, Message]]:
        """One message; what goes out because of it."""
        if frames == [b""]:  # what ZeroMQ sends when it has made a connection
            return [(peer, error(0, Code.HELLO_FIRST))]
        header, arrays = parts(frames)
        frames = [frames[0], *arrays]
        kind, request = Kind(header[0]), header[1]
        self.kinds.append(kind)
        self._notices = []
        if kind is Kind.HELLO:
            if self.refused_hellos:
                self.refused_hellos -= 1
                return [(peer, error(request, Code.SHUTTING_DOWN))]
            self.hellos += 1
            self.peers.setdefault(peer, self.hellos)
            return [(peer, welcome(request, replace(self.info, boot_id=f"boot {self.boots}")))]
        if peer not in self.peers:
            return [(peer, error(request, Code.HELLO_FIRST))]
        if self.draining and kind not in (Kind.PING, Kind.STATS, Kind.CLOSE):
            return [(peer, error(request, Code.SHUTTING_DOWN))]
        if kind is Kind.STEP and self.busy and self.busy.pop():
            return [(peer, error(request, Code.BUSY, 1000))]
        if kind is Kind.RESUME and self.busy_resumes:
            self.busy_resumes -= 1
            return [(peer, error(request, Code.BUSY, 1000))]
        if kind in self.refuses and kind is not Kind.RESUME:
            return [(peer, error(request, self.refuses[kind]))]
        answer: Message = getattr(self, f"_{kind.name.lower()}")(peer, header, frames)
        return [*self._notices, (peer, answer)]

    def drop(self, peer: bytes) -> None:
        """The server notices that a connection is gone."""
        self.peers.pop(peer, None)
        for stream in self.streams.values():
            if stream.owner == peer:
                stream.owner = None

    def restart(self) -> None:
        """It forgets every connection and nothing else."""
        self.boots += 1
        self.draining = False
        for peer in list(self.peers):
            self.drop(peer)

    def shut_down(self) -> list[tuple[bytes, Message]]:
        """Say GOODBYE and take nothing until the restart."""
        self.draining = True
        return [(peer, goodbye()) for peer in self.peers]

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
        self._notices = []
        wanted, self.wanted = self.wanted, {}
        for stream in (self.streams[name] for name in wanted if name in self.streams):
            if stream.is_asleep and refused is None:
                self._wake(stream)
            elif stream.is_asleep and stream.owner in self.peers:
                self._notices.append((stream.owner, evicted([stream.handle], refused or Code.BUSY)))
        return self._notices

    def _wake(self, stream: RingStream) -> None:
        self.numbers += 1
        if stream.owner in self.peers:
            self._notices.append((stream.owner, woken([stream.handle], [self.numbers])))
        stream.is_asleep, stream.handle = False, self.numbers

    def take_over(self, name: str) -> list[tuple[bytes, Message]]:
        """Another client takes a stream."""
        stream = self.streams[name]
        owner, handle = stream.owner, stream.handle
        self.numbers += 1
        stream.owner, stream.handle, stream.epoch, stream.former_epoch = b"other", self.numbers, self.numbers, 0
        return [(owner, evicted([handle], Code.FENCED))] if owner in self.peers else []

    def _grants(self, streams: Sequence[RingStream | None]) -> Any:
        grants = np.zeros(len(streams), GRANT)
        for index, stream in enumerate(streams):
            if stream is not None:
                grants[index] = (stream.handle, stream.epoch, stream.next_seq)
        return grants

    def _new(self, peer: bytes, names: list[str], seqs: Any, states: F32) -> tuple[Any, list[Any]]:
        made: list[RingStream | None] = []
        refused: list[Any] = []
        for index, name in enumerate(names):
            if name in self.streams:
                made.append(None)
                refused.append((index, 0, int(Code.NAME_IN_USE), 0, 0))
                continue
            self.numbers += 1
            seq = int(seqs[index])
            stream = RingStream(name, peer, self.numbers, self.numbers, seq, seq, states[index].copy())
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
        given: list[RingStream | None] = []
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
            if stream.owner not in (None, peer) and stream.owner in self.peers:
                self._notices.append((stream.owner, evicted([stream.handle], Code.FENCED)))
            self.numbers += 1
            stream.owner, stream.handle, stream.hello = peer, self.numbers, self.peers[peer]
            stream.epoch, stream.former_epoch = self.numbers, 0 if take_over else epoch
            stream.acked = max(stream.acked, min(have, stream.next_seq))
            given.append(stream)
        return granted(Kind.RESUMED, header[1], self._grants(given), refused)

    def _judge(self, peer: bytes, stream: RingStream | None, name: str, have: int, epoch: int, take_over: bool) -> int:
        if stream is None:
            return Code.EXPIRED if name in self.expired else Code.UNKNOWN_STREAM
        if Kind.RESUME in self.refuses:
            return self.refuses[Kind.RESUME]
        is_former = 0 < epoch == stream.former_epoch and self.peers[peer] >= stream.hello
        if epoch < stream.epoch and not take_over and not is_former:
            return Code.FENCED
        claimed = stream.next_seq if have == HAVE_ALL else have
        if claimed > stream.next_seq and not take_over:
            return Code.DATA_LOSS
        return Code.OUTPUTS_GONE if claimed < stream.next_seq - self.info.window_frames else 0

    def _find(self, peer: bytes, frame: bytes, *, wakes: bool = True) -> tuple[list[RingStream | None], list[Any]]:
        found: list[RingStream | None] = []
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

    def _find_named(self, header: list[Any], frame: bytes) -> tuple[list[RingStream | None], list[Any]]:
        names = frame.decode().split("\n")
        assert len(names) == header[2]
        found = [self.streams.get(name) for name in names]
        missing = (Code.EXPIRED if name in self.expired else Code.UNKNOWN_STREAM for name in names)
        return found, [(i, 0, int(code), 0, 0) for i, code in enumerate(missing) if found[i] is None]

    def _states(self, found: Sequence[RingStream | None]) -> F32:
        nan = np.full(self.info.state.row_bytes // 4, np.nan, np.float32)
        return np.array([nan if stream is None else stream.state for stream in found], np.float32)

    def _answer(self, kind: Kind, request: int, count: int, arrays: list[bytes], refused: list[Any]) -> Message:
        said = [[code, SENTENCES[Code(code)]] for code in sorted({entry[2] for entry in refused})]
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

    def _list(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        found = np.array([(each.next_seq, 0, 0, int(Place.PARKED), 0) for each in self.streams.values()], LISTING)
        return [pack(Kind.LISTED, header[1], len(found), 0), "\n".join(self.streams).encode(), found.tobytes()]

    def _stats(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        return [pack(Kind.STATISTICS, header[1], [["streams_open", float(len(self.streams))]]), b"", b""]

    def _step(self, peer: bytes, header: list[Any], frames: list[bytes]) -> Message:
        _, request, steps, columns, features, _ = header
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
                self._notices.append((peer, evicted([handle], Code.HIBERNATED)))
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

    def _frame(self, stream: RingStream, seq: int, acked: int, x: F32, y: F32) -> int:
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
        if seq >= acked + self.info.window_frames:
            return Code.WINDOW_FULL
        self._apply(stream, x)
        y[:] = stream.state[0] + np.arange(self.info.outputs, dtype=np.float32)
        stream.ring[seq] = (x.tobytes(), y.copy())
        stream.ring.pop(seq - self.info.window_frames, None)
        stream.next_seq += 1
        return 0

    def _apply(self, stream: RingStream, x: F32) -> None:
        stream.state = np.float32(0.5) * stream.state + x.sum(dtype=np.float32)
        stream.applied.append(x.copy())
