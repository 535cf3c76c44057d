"""Random traffic over raw connections, and everything that came of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import msgpack
import numpy as np

from instep.core.typing import F32
from instep.models.model import Model
from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind
from tests.support.models import whole
from tests.support.raw import RawClient, Reply
from tests.support.step_messages import parts

HOSTILE_VALUES = (np.nan, np.inf, -np.inf)
NO_STREAM = 12345
"""A handle that no slot has: its generation is 0."""


def assert_same_bits(one: F32, other: F32, what: str) -> None:
    """Equal shapes and equal bits; -0.0 is not 0.0."""
    assert one.shape == other.shape, what
    bits, expected = one.view(np.int32), other.view(np.int32)
    if not np.array_equal(bits, expected):
        differing = np.argwhere(bits != expected).tolist()
        raise AssertionError(f"{what}: {len(differing)} values differ, the first at {differing[0]}")


@dataclass(eq=False)
class Recorded:
    """One stream: what it sends, and what came back."""

    name: str
    x: F32
    """float32 [T, features]."""
    initial: F32 | None
    """float32 [layers, size], None for zeros."""
    y: F32
    """float32 [T, outputs], NaN where nothing came back yet."""
    pace: float
    """The chance that the stream takes part in a round."""
    is_hostile: bool
    """Whether it also sends NaN, infinities, wrong seqs and other frames under old seqs, all of which must be refused,
    and good frames again, which must be answered again."""
    lag: int
    """How many outputs that came back it leaves unacknowledged."""
    final: F32 | None = None
    handle: int = 0
    next_seq: int = 0
    acked: int = 0
    """The seq before which outputs are acknowledged by what it sends now."""
    told: int = 0
    """The seq before which they were acknowledged by what it has sent."""
    is_under_way: bool = False
    """Whether frames were sent that are not answered yet."""

    @property
    def remaining(self) -> int:
        """Frames that are still to be sent."""
        return len(self.x) - self.next_seq


def make_recordings(
    rng: np.random.Generator, model: Model, count: int, lengths: Sequence[int], hostile: float = 0.2
) -> list[Recorded]:
    """Streams of random frames and paces; a third of them with an initial state.

    Args:
        rng: decides everything.
        model: what will be served.
        count: how many streams.
        lengths: from which each stream's number of frames is drawn.
        hostile: the share of hostile ones.
    """
    description = model.description
    recordings = []
    for index in range(count):
        length = int(rng.choice(lengths))
        state_shape = description.state.leaves[0].shape
        recordings.append(
            Recorded(
                name=f"stream-{index}",
                x=(rng.choice([0.1, 1, 5]) * rng.standard_normal((length, description.features))).astype(np.float32),
                initial=rng.uniform(-1, 1, state_shape).astype(np.float32) if rng.random() < 1 / 3 else None,
                y=np.full((length, description.outputs), np.nan, np.float32),
                pace=float(rng.choice([0.2, 0.5, 1.0])),
                is_hostile=bool(rng.random() < hostile),
                lag=int(rng.integers(9)),
            )
        )
    return recordings


@dataclass
class _Column:
    """What one column of a block must come back as."""

    stream: Recorded | None
    seq: int
    applied: int
    code: Code | None
    expected_seq: int


@dataclass
class Producer:
    """One connection that carries its recordings at random, and checks every answer but the numbers.

    Streams join while others are under way and leave when they are through. A round takes some of the open streams,
    in blocks of several timesteps and streams, or frame by frame, with further blocks and the CLOSE pipelined behind.
    What is refused, and with which code, is known before it is sent and checked exactly.
    """

    client: RawClient
    recordings: Sequence[Recorded]
    model: Model
    rng: np.random.Generator
    at_once: int
    """How many of its streams may be open at the same time."""
    longest_block: int = 8
    """Three blocks and the longest lag fit into a stream's window."""
    refused: int = 0
    """Columns that were refused, as they had to be."""
    _waiting: list[Recorded] = field(init=False)
    _open: list[Recorded] = field(default_factory=list)
    _asked: dict[int, Callable[[Reply], None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = list(self.recordings)

    async def run(self) -> None:
        """Stream everything to its end."""
        await self.client.hello()
        while self._waiting or self._open:
            await self._join()
            messages = self._round()
            for message in messages:
                await self.client.send(*message)
            for _ in messages:
                reply = await self.client.receive()
                self._asked.pop(reply.request)(reply)
        assert not self._asked

    async def _join(self) -> None:
        room = min(self.at_once - len(self._open), len(self._waiting))
        count = room if not self._open else int(self.rng.integers(0, room + 1))
        if count == 0:
            return
        joining, self._waiting = self._waiting[:count], self._waiting[count:]
        states = None
        if any(stream.initial is not None for stream in joining):
            zeros = np.zeros(self.model.description.state.leaves[0].shape, np.float32)
            states = np.stack([zeros if stream.initial is None else stream.initial for stream in joining])
        reply = await self.client.open(*(stream.name for stream in joining), states=states)
        assert reply.failures() == []
        for stream, handle in zip(joining, reply.handles().tolist(), strict=True):
            stream.handle = handle
        self._open += joining

    def _round(self) -> list[list[bytes]]:
        """The messages of one round, in order."""
        for stream in self._open:
            stream.is_under_way = False
            stream.acked = max(0, stream.next_seq - stream.lag)
        chosen = [stream for stream in self._open if self.rng.random() < stream.pace] or self._open[:1]
        self.rng.shuffle(chosen)
        messages = []
        while chosen:
            largest = int(self.rng.choice([1, 3, len(chosen)]))
            group, chosen = chosen[:largest], chosen[largest:]
            for _ in range(int(self.rng.integers(1, 4))):
                group = [stream for stream in group if stream.remaining]
                if group:
                    messages.append(self._block(group))
        through = [stream for stream in self._open if not stream.remaining and self.rng.random() < 0.7]
        if through:
            self._open = [stream for stream in self._open if stream not in through]
            messages.append(self._close(through))
        return messages

    def _block(self, group: Sequence[Recorded]) -> list[bytes]:
        timesteps = min(int(self.rng.integers(1, self.longest_block + 1)), *(stream.remaining for stream in group))
        x = np.stack([stream.x[stream.next_seq :][:timesteps] for stream in group], axis=1)
        columns = [self._column(stream, x[:, index]) for index, stream in enumerate(group)]
        handles = [stream.handle for stream in group]
        acked = [stream.acked for stream in group]
        if self.rng.random() < 0.2:  # a neighbour in the same block that does not even exist
            columns.append(_Column(None, 0, 0, Code.UNKNOWN_STREAM, 0))
            handles.append(NO_STREAM)
            acked.append(0)
            wild = np.full((timesteps, 1, x.shape[2]), self.rng.choice([*HOSTILE_VALUES, 1e30]), np.float32)
            x = np.concatenate([x, wild], axis=1)
        message = self.client.step_message(handles, [column.seq for column in columns], x, acked)
        self._expect(message, lambda reply: self._stepped(reply, columns, timesteps))
        return message

    def _column(self, stream: Recorded, x: F32) -> _Column:
        """Decide what a stream sends, spoil `x` [T, features] if so decided, and say what must come of it."""
        seq, timesteps = stream.next_seq, len(x)
        told, stream.told = stream.told, stream.acked
        fault = self.rng.choice(["none", "value", "gap", "late", "again", "other"]) if stream.is_hostile else "none"
        if fault == "gap":
            return _Column(stream, seq + 1 + int(self.rng.integers(3)), 0, Code.SEQ_GAP, seq)
        if fault == "late" and told > 0:
            return _Column(stream, int(self.rng.integers(told)), 0, Code.SEQ_REPEATED, seq)
        if fault in ("again", "other") and stream.acked < seq and not stream.is_under_way:
            return self._repeat(stream, x, is_other=fault == "other")
        stream.is_under_way = True
        if fault == "value":
            applied = int(self.rng.integers(timesteps))
            x[applied, self.rng.integers(x.shape[1])] = self.rng.choice(HOSTILE_VALUES)
            stream.next_seq += applied
            return _Column(stream, seq, applied, Code.NOT_FINITE, stream.next_seq)
        stream.next_seq += timesteps
        return _Column(stream, seq, timesteps, None, 0)

    def _repeat(self, stream: Recorded, x: F32, *, is_other: bool) -> _Column:
        """Frames that were answered before and those after them, unless one of the former is another now."""
        due, timesteps = stream.next_seq, len(x)
        seq = int(self.rng.integers(stream.acked, due))
        x[:] = stream.x[seq:][:timesteps]
        if is_other:
            wrong = int(self.rng.integers(min(timesteps, due - seq)))
            x[wrong, self.rng.integers(x.shape[1])] += np.float32(0.5)
            return _Column(stream, seq, wrong, Code.CONFLICT, due)
        stream.is_under_way = seq + timesteps > due
        stream.next_seq = max(due, seq + timesteps)
        return _Column(stream, seq, timesteps, None, 0)

    def _stepped(self, reply: Reply, columns: Sequence[_Column], timesteps: int) -> None:
        assert reply.kind is Kind.STEPPED, reply.header
        failures = [
            (index, column.applied, column.code, column.expected_seq)
            for index, column in enumerate(columns)
            if column.code is not None
        ]
        assert reply.failures() == failures
        self.refused += len(failures)
        y = reply.floats().reshape(timesteps, len(columns), -1)
        for index, column in enumerate(columns):
            assert np.isnan(y[column.applied :, index]).all()
            if column.stream is not None:
                kept = column.stream.y[column.seq : column.seq + column.applied]
                known = ~np.isnan(kept).any(axis=1)
                answered = y[: column.applied, index]
                if known.any():
                    assert_same_bits(answered[known], kept[known], f"outputs of {column.stream.name}, answered again")
                kept[:] = answered

    def _close(self, streams: Sequence[Recorded]) -> list[bytes]:
        header = msgpack.packb([Kind.CLOSE, self.client.next_request(), len(streams)])
        closings = np.array([(stream.handle, wire.HAVE_ALL) for stream in streams], wire.CLOSING)
        message = [header, closings.tobytes()]
        self._expect(message, lambda reply: self._closed(reply, streams))
        return message

    def _closed(self, reply: Reply, streams: Sequence[Recorded]) -> None:
        assert reply.kind is Kind.CLOSED, reply.header
        assert reply.failures() == []
        description = self.model.description
        finals = reply.floats().reshape(len(streams), *description.state.leaves[0].shape)
        for stream, final in zip(streams, finals, strict=True):
            stream.final = final

    def _expect(self, message: list[bytes], check: Callable[[Reply], None]) -> None:
        (_, request, *_), _ = parts(message)
        self._asked[request] = check


class Neighbours:
    """Well-behaved streams on a connection of their own, kept stepping beside whatever a test does to the server.

    Args:
        client: a connection that said nothing yet.
        model: what is served, without dense layers.
        count: how many streams.
        seed: of what they send.
    """

    def __init__(self, client: RawClient, model: Model, count: int, seed: int) -> None:
        self._client = client
        self._model = model
        self._rng = np.random.default_rng(seed)
        self._x: list[list[F32]] = [[] for _ in range(count)]
        self._y: list[list[F32]] = [[] for _ in range(count)]
        self._seqs = np.zeros(count, np.int64)
        self._stopped = False
        self.handles: list[int] = []
        """Of the streams, once they are open."""
        self.blocks = 0
        """Answered so far."""
        self.pause: Callable[[], Awaitable[None]] = partial(asyncio.sleep, 0.002)
        """How they rest after each block."""

    async def run(self) -> None:
        """Step until `stop`, close, and compare everything with `nn.GRU`."""
        await self._client.hello()
        opened = await self._client.open(*(f"neighbour-{index}" for index in range(len(self._x))))
        handles = opened.handles()
        self.handles = handles.tolist()
        while not self._stopped:
            await self._round(handles)
            self.blocks += 1
            await self.pause()
        closed = await self._client.close(handles)
        finals = closed.floats().reshape(len(handles), *self._model.description.state.leaves[0].shape)
        for index, (x, y) in enumerate(zip(self._x, self._y, strict=True)):
            truth, final = whole(self._model, np.concatenate(x))
            assert_same_bits(np.concatenate(y), truth, f"outputs of neighbour {index}")
            assert_same_bits(finals[index], final, f"final state of neighbour {index}")

    async def _round(self, handles: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        chosen = self._rng.permutation(len(handles))[: self._rng.integers(1, len(handles) + 1)]
        timesteps = int(self._rng.integers(1, 4))
        shape = (timesteps, len(chosen), self._model.description.features)
        x = self._rng.standard_normal(shape).astype(np.float32)
        reply = await self._client.step(handles[chosen], (seqs := self._seqs[chosen].tolist()), x, seqs)
        assert reply.kind is Kind.STEPPED, reply.header
        assert reply.failures() == []
        y = reply.floats().reshape(timesteps, len(chosen), -1)
        self._seqs[chosen] += timesteps
        for column, index in enumerate(chosen.tolist()):
            self._x[index].append(x[:, column])
            self._y[index].append(y[:, column])

    async def progress(self, frames: int = 20) -> None:
        """Wait until every stream was served so many frames more."""
        target = self._seqs + frames
        while (self._seqs < target).any():
            await asyncio.sleep(0.005)

    def stop(self) -> None:
        """Let `run` come to its end."""
        self._stopped = True


@contextlib.asynccontextmanager
async def neighbours(endpoint: str, model: Model, count: int = 4, seed: int = 0) -> AsyncIterator[Neighbours]:
    """Keep streams stepping while the block runs; on leaving, check every output and final state bit for bit."""
    async with RawClient(endpoint) as client:
        streams = Neighbours(client, model, count, seed)
        async with asyncio.TaskGroup() as group:
            group.create_task(streams.run())
            await streams.progress()
            yield streams
            await streams.progress()
            streams.stop()
