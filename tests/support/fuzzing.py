"""Messages that are valid, damaged or nonsense, and the rules that every answer must keep."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgpack
import numpy as np

from instep_client.protocol import wire
from instep_client.protocol.wire import Code, Kind
from tests.support.raw import Reply
from tests.support.step_messages import STEP, apart, step_header, stepped_header

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
    Kind.WELCOME: 20,
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
            assert len(frames) == wire.FRAME_COUNT[reply.kind], reply.header
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
        return [self._header(Kind.HELLO, 6, "fuzzer", "")]

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
        fields = [0] * (wire.HEADER_LENGTH[kind] - 2)
        return [self._header(kind, *fields), *[b""] * (wire.FRAME_COUNT[kind] - 1)]

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
