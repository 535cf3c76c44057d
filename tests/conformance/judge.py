"""A server of two shards that tries a client of another language, and says which rules of docs/protocol.md it broke.

Each server answers by `FakeRules`, after it has checked what came, and disturbs some of its answers on purpose. A check
says nothing of a message that a correct client may have sent before it read what it would have obeyed.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import numpy as np

from instep_client.protocol.codes import HAVE_ALL, Code
from instep_client.protocol.wire import Kind
from tests.support.fake_server import (
    RING_INFO,
    FakeServer,
    FakeStream,
    Message,
    error,
    goodbye,
    pack,
    welcome,
)
from tests.support.step_messages import parts

Addressed: TypeAlias = list[tuple[bytes, Message]]

RULES: Final = {
    "hello": "a connection begins with HELLO, of version 9",
    "layout": "every message has the elements, frames and sizes of its kind",
    "requests": "unanswered requests have different numbers, from 1",
    "integers": "integers above 2^53 come back as they were",
    "pong": "each PING of the server gets a PONG of its number",
    "shard": "a stream is opened at the shard of its name",
    "seq": "the frames of a stream follow one another",
    "acked": "nothing is acknowledged whose answer has not come",
    "window": "window, credit and block size are kept",
    "same frames": "a seq that is sent again has the same bytes",
    "busy": "after BUSY the block waits, and comes again",
    "resume": "a lost connection is replaced, with the last epoch and without taking over",
    "send again": "after RESUMED a stream continues from its `have`",
    "term": "a shard's server of a lower term is left",
    "hibernated": "no frame of a stream that hibernates is sent before WOKEN or RESUME",
    "fenced": "a stream that another has taken over is left to it, or taken over",
    "close": "CLOSE has the seq of the last output",
}
SCRIPT: Final = {4: "ping", 8: "busy", 12: "unasked", 16: "lose", 22: "late", 26: "goodbye", 32: "hibernate"}
"""What happens at which STEP of a server."""
MOVE_AT: Final = 38
STEPS_NEEDED: Final = 50
_WAIT_S: Final = 0.3
"""The time after a BUSY, before an answer that is late, and until a stream is awake."""
_GRACE_S: Final = 1.0
"""A client that was told of a higher term has left the former server by then."""
_FENCED: Final = "fenced-"
"""Streams of such names are taken over after 3 frames."""
_FORMS: Final = {
    kind: (elements, frames)
    for elements, frames, kinds in (
        (2, 1, (Kind.PING, Kind.PONG, Kind.STATS, Kind.MODELS, Kind.SHARDS)),
        (3, 2, (Kind.CLOSE,)),
        (3, 3, (Kind.FORK,)),
        (4, 2, (Kind.READ_STATE, Kind.REMOVE)),
        (4, 3, (Kind.RESUME, Kind.RESET)),
        (5, 1, (Kind.HELLO,)),
        (5, 2, (Kind.LIST,)),
        (5, 4, (Kind.OPEN,)),
    )
    for kind in kinds
}
"""The elements of the header and the frames of each kind but STEP."""


class Verdict:
    """Which rules were tried, and the first breach of each."""

    def __init__(self) -> None:
        self.tried: set[str] = set()
        self.broken: dict[str, str] = {}

    def check(self, rule: str, kept: bool, breach: str) -> None:
        """Note that a rule was tried."""
        self.tried.add(rule)
        if not kept:
            self.broken.setdefault(rule, breach)

    def lines(self) -> list[str]:
        """One line for each rule."""
        result = {rule: "kept" if rule in self.tried else "not tried" for rule in RULES}
        result |= dict.fromkeys(self.broken, "BROKEN")
        why = {rule: f"\n{'':24}{breach}" for rule, breach in self.broken.items()}
        return [f"{result[rule]:10} {rule:12} {RULES[rule]}{why.get(rule, '')}" for rule in RULES]


@dataclass
class Followed:
    """What the client knows of one stream."""

    have: int = 0
    """The answers of all seqs below it were sent to the client."""
    epoch: int = 0
    """That of the last grant that was sent."""
    grant_was_lost: bool = False
    first: int | None = None
    """The seq of the next frame, where a RESUME has said it."""
    again_until: int = 0
    """Seqs below it may be sent again."""
    refused_seq: int | None = None
    """The seq of a frame that was refused by the rule `refused_by` until `again_at`."""
    refused_by: str = ""
    again_at: float = 0.0
    was_told_fenced: bool = False

    def refuse(self, seq: int, rule: str, again_at: float) -> None:
        """Have a frame sent again, not before that time."""
        self.refused_seq, self.refused_by, self.again_at = seq, rule, again_at


@dataclass
class Client:
    """What all servers know of the client."""

    verdict: Verdict
    streams: dict[str, Followed] = field(default_factory=dict)
    open: set[str] = field(default_factory=set)
    lost: set[str] = field(default_factory=set)
    """Streams whose connection was ended, until they are resumed."""
    knew_term_at: float = float("inf")
    """When it was told of the second term of shard 1."""

    def finish(self) -> None:
        """Judge what is known at the end only."""
        if self.lost:
            self.verdict.check("resume", False, f"{sorted(self.lost)[0]!r} was never resumed")


class Judge(FakeServer):
    """One server. `successor` is the one that takes its shard over, if any does."""

    def __init__(self, client: Client, shard: int, endpoint: str, successor: Judge | None = None) -> None:
        super().__init__(replace(RING_INFO, shard=shard, shards=2, term=1), self._judge, endpoint)
        self._successor = successor
        self.rules.last_number = 2**53 + random.randrange(0, 1000, 2)  # the next one is no double
        self._client = client
        self._check = client.verdict.check
        self._script = SCRIPT | ({MOVE_AT: "move"} if successor else {})
        self._steps = 0
        self._greeted: set[bytes] = set()
        self._pings: dict[int, tuple[str, int]] = {}
        """The stream and the seq whose acknowledgement shows that this PING was read."""
        self._late: dict[bytes, dict[int, int]] = {}
        """Of requests whose answers are held back, the frames."""
        self._loses_resumed = False
        self._was_left = False
        self._timers: list[threading.Timer] = []

    def __exit__(self, *told: Any) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()
        super().__exit__(*told)

    def _later(self, seconds: float, what: Callable[[], Addressed]) -> None:
        self._timers.append(timer := threading.Timer(seconds, self._order, (what,)))
        timer.start()

    def _judge(self, peer: bytes, frames: list[bytes]) -> Addressed:
        try:
            header, arrays = parts(frames)
            kind = Kind(header[0])
            self._check("layout", _has_its_form(kind, header, arrays), f"{kind.name} {header[1:]}")
        except Exception as unreadable:  # whatever a client sends
            self._check("layout", False, repr(unreadable))
            return [(peer, error(0, Code.MALFORMED))]
        if kind is Kind.PONG:
            self._on_pong(header[1])
            return []
        what = self._look(kind, peer, header, arrays)
        if self._was_left and kind not in (Kind.HELLO, Kind.PING):
            return [(peer, error(header[1], Code.SHUTTING_DOWN))]
        if what in ("busy", "goodbye", "move"):
            answer: Addressed = getattr(self, f"_{what}")(peer, header, arrays)
            return answer
        if what == "hibernate":
            self._hibernate(peer, arrays[0])
        notices = self._take_over(peer)
        answers = self._answers_to(peer, frames)
        if what in ("unasked", "late"):
            self._late.setdefault(peer, {})[header[1]] = header[2] * header[3]
            self._later(_WAIT_S, lambda: self._deliver(kind, peer, header, arrays, answers))
            moved = [pack(Kind.MOVED, 0, 0, self.rules.info.fingerprint), b"", b""]
            return [(peer, welcome(0, self.rules.info)), (peer, moved)] if what == "unasked" else []
        if what == "lose":
            self._loses_resumed = True
            return self._lose(peer)
        if kind is Kind.RESUME and self._loses_resumed:
            self._loses_resumed = False
            for name in arrays[0].decode().split("\n"):
                self._client.streams[name].grant_was_lost = True
            return self._lose(peer)
        ping = self._ping(peer, header, arrays) if what == "ping" else []
        return [*notices, *ping, *self._deliver(kind, peer, header, arrays, answers)]

    def _answers_to(self, peer: bytes, frames: list[bytes]) -> Addressed:
        try:
            return self.rules.handle(peer, frames)
        except Exception as unreadable:
            self._check("layout", bool(self._client.verdict.broken), repr(unreadable))
            return [(peer, error(0, Code.MALFORMED))]

    # What is checked.

    def _look(self, kind: Kind, peer: bytes, header: Sequence[Any], arrays: Sequence[bytes]) -> str:
        """Check a message before it is processed; return what is to happen to it."""
        is_first = kind is Kind.HELLO or kind is Kind.PING or peer in self._greeted
        self._check("hello", is_first and (kind is not Kind.HELLO or header[2] == 9), f"{kind.name} {header[1:]}")
        is_new = header[1] >= 1 and header[1] not in self._late.get(peer, {})
        self._check("requests", is_new, f"{kind.name} with number {header[1]}")
        self._greeted.add(peer)
        if kind is Kind.OPEN:
            self._on_open(arrays[0].decode().split("\n"))
        elif kind is Kind.RESUME:
            self._on_resume(header, arrays)
        elif kind is Kind.CLOSE:
            self._on_close(peer, arrays[0])
        elif kind is Kind.STEP:
            self._on_step(peer, header, arrays)
            self._steps += 1
            return self._script.get(self._steps, "")
        return ""

    def _of(self, peer: bytes, handle: int) -> FakeStream | None:
        """The stream of a handle of this connection."""
        mine = {each.handle: each for each in self.rules.streams.values() if each.owner == peer}
        rounded = handle not in mine and any(handle == int(float(each)) for each in mine)
        self._check("integers", not rounded, f"handle {handle}")
        return mine.get(handle)

    def _on_pong(self, number: int) -> None:
        if self._pings.pop(number, None) is None:
            rounded = any(number == int(float(each)) for each in self._pings)
            self._check("integers" if rounded else "pong", False, f"PONG {number}, asked for {list(self._pings)}")

    def _on_open(self, names: Sequence[str]) -> None:
        for name in names:
            wanted = zlib.crc32(name.encode()) % 2
            self._check("shard", wanted == self.rules.info.shard, f"{name!r} belongs to shard {wanted}")
            if name in self._client.lost:
                self._check("resume", False, f"{name!r} was opened again")
            self._client.streams[name] = Followed()

    def _on_step(self, peer: bytes, header: Sequence[Any], arrays: Sequence[bytes]) -> None:
        timesteps, width, features = header[2:5]
        info = self.rules.info
        x = np.frombuffer(arrays[1], "<f4").reshape(timesteps, width, features)
        unanswered = sum(self._late.get(peer, {}).values())
        fits = timesteps * width <= info.max_block_frames and unanswered + timesteps * width <= info.credit_frames
        self._check("window", fits, f"a block of {timesteps} × {width}, with {unanswered} frames unanswered")
        for column, (handle, seq, acked) in enumerate(np.frombuffer(arrays[0], "<u8").reshape(-1, 3).tolist()):
            stream = self._of(peer, handle)
            if stream is None:
                continue
            name, known = stream.name, self._client.streams[stream.name]
            where = f"{name!r}, seq {seq}, acked {acked}"
            self._check("acked", acked <= known.have, f"{where}: the answers before {known.have} were sent")
            ignored = [number for number, (who, until) in self._pings.items() if who == name and acked >= until]
            self._check("pong", not ignored, f"{where}: no PONG for {ignored}")
            self._check("window", seq + timesteps <= acked + info.window_frames, f"{where}, {timesteps} timesteps")
            if known.refused_seq == seq:
                self._check(known.refused_by, time.monotonic() >= known.again_at, f"{where}: sent again too soon")
                known.refused_seq = None
            if known.first is not None:
                self._check("send again", seq == known.first, f"{where}: resumed with {known.first}")
                known.first = None
            elif known.refused_seq is None:
                follows = seq <= stream.next_seq and (seq == stream.next_seq or seq < known.again_until)
                self._check("seq", follows, f"{where}: {stream.next_seq} comes next")
            for t in range(timesteps):
                held = stream.ring.get(seq + t)
                if held is not None:
                    self._check("same frames", held[0] == x[t, column].tobytes(), f"{where}, timestep {t}")

    def _on_resume(self, header: Sequence[Any], arrays: Sequence[bytes]) -> None:
        if self._was_left or self.rules.info.term == 2:
            knows = time.monotonic() > self._client.knew_term_at + _GRACE_S
            self._check("term", not (self._was_left and knows), "RESUME at the former server")
        claims = np.frombuffer(arrays[1], "<u8").reshape(-1, 2).tolist()
        for name, (have, epoch) in zip(arrays[0].decode().split("\n"), claims, strict=True):
            stream, known = self.rules.streams.get(name), self._client.streams.get(name)
            if stream is None or known is None:
                continue
            where = f"{name!r}, have {have}, epoch {epoch}, take_over {header[3]}"
            rounded = epoch != known.epoch and epoch == int(float(known.epoch))
            self._check("integers", not rounded, where)
            if known.was_told_fenced:
                self._check("fenced", bool(header[3]), where)
            elif not rounded:
                is_owner = epoch == known.epoch and not header[3]
                self._check("resume", is_owner or known.grant_was_lost, f"{where}: the last epoch is {known.epoch}")
            known.first = stream.next_seq if have == HAVE_ALL else have
            self._check("acked", known.first <= known.have, f"{where}: the answers before {known.have} were sent")
            known.again_until = stream.next_seq
            known.refused_seq = None

    def _on_close(self, peer: bytes, closings: bytes) -> None:
        for handle, have in np.frombuffer(closings, "<u8").reshape(-1, 2).tolist():
            stream = self._of(peer, handle)
            if stream is not None:
                claimed = stream.next_seq if have == HAVE_ALL else have
                self._check("close", claimed == self._client.streams[stream.name].have, f"{stream.name!r}, have {have}")

    # What is answered and disturbed.

    def _deliver(
        self, kind: Kind, peer: bytes, header: Sequence[Any], arrays: Sequence[bytes], answers: Addressed
    ) -> Addressed:
        """Note what the client knows when it has these answers."""
        self._late.get(peer, {}).pop(header[1], None)
        if kind is Kind.STEP:
            for handle, seq, _ in np.frombuffer(arrays[0], "<u8").reshape(-1, 3).tolist():
                stream = next((each for each in self.rules.streams.values() if each.handle == handle), None)
                if stream is not None and stream.next_seq >= seq + header[2]:
                    known = self._client.streams[stream.name]
                    known.have = max(known.have, seq + header[2])
        elif kind in (Kind.OPEN, Kind.RESUME):
            for name in arrays[0].decode().split("\n"):
                stream = self.rules.streams.get(name)
                if stream is not None and stream.owner == peer:
                    self._client.streams[name].epoch = stream.epoch
                    self._client.streams[name].grant_was_lost = False
                    self._client.open.add(name)
                    self._client.lost.discard(name)
                elif stream is not None and stream.owner == b"other":
                    self._client.streams[name].was_told_fenced = True
        elif kind is Kind.CLOSE:
            self._client.open -= self._client.open & self.rules.closed.keys()
        elif kind is Kind.SHARDS and self.rules.table[1][0] == 2:
            self._client.knew_term_at = min(self._client.knew_term_at, time.monotonic())
        return answers

    def _ping(self, peer: bytes, header: Sequence[Any], arrays: Sequence[bytes]) -> Addressed:
        handle, seq, _ = np.frombuffer(arrays[0][:24], "<u8").tolist()
        stream = self._of(peer, handle)
        if stream is None:
            return []
        number = 2**53 + 1 + 2 * random.randrange(2**52)
        self._pings[number] = stream.name, seq + header[2]
        return [(peer, [pack(Kind.PING, number)])]

    def _lose(self, peer: bytes) -> Addressed:
        self._client.lost |= {each.name for each in self.rules.streams.values() if each.owner == peer}
        self._pings.clear()
        self.rules.drop(peer)
        return []

    def _busy(self, peer: bytes, header: Sequence[Any], arrays: Sequence[bytes]) -> Addressed:
        for handle, seq, _ in np.frombuffer(arrays[0], "<u8").reshape(-1, 3).tolist():
            stream = self._of(peer, handle)
            if stream is not None:
                self._client.streams[stream.name].refuse(seq, "busy", time.monotonic() + _WAIT_S)
        return [(peer, error(header[1], Code.BUSY, int(_WAIT_S * 1e6)))]

    def _goodbye(self, peer: bytes, header: Sequence[Any], arrays: Sequence[bytes]) -> Addressed:
        self._lose(peer)
        return [(peer, goodbye())]

    def _move(self, peer: bytes, header: Sequence[Any], arrays: Sequence[bytes]) -> Addressed:
        """Another server takes the shard over, with the term 2."""
        assert self._successor is not None
        self._lose(peer)
        taking = self._successor.rules
        taking.info = replace(taking.info, term=2)
        taking.take_over_from(self.rules)
        self.rules.streams, self._was_left = {}, True
        self.rules.table[1] = (2, self._successor.endpoint)  # it is everybody's
        return []

    def _hibernate(self, peer: bytes, columns: bytes) -> None:
        handle, seq, _ = np.frombuffer(columns[:24], "<u8").tolist()
        stream = self._of(peer, handle)
        if stream is None:
            return
        self._check("hibernated", True, "")
        known = self._client.streams[stream.name]
        known.refuse(seq, "hibernated", math.inf)
        self.rules.hibernate(stream.name)

        def wake() -> Addressed:
            known.again_at = 0.0
            return self.rules.wake()

        self._later(_WAIT_S, wake)

    def _take_over(self, peer: bytes) -> Addressed:
        """Take a stream over once, as another client would."""
        told: Addressed = []
        for stream in list(self.rules.streams.values()):
            if stream.name.startswith(_FENCED) and stream.owner == peer and stream.next_seq >= 3:
                self._check("fenced", True, "")
                told += self.rules.take_over(stream.name)
                self._client.open.discard(stream.name)
        return told


def _has_its_form(kind: Kind, header: Sequence[Any], arrays: Sequence[bytes]) -> bool:
    if kind is Kind.STEP:
        _, _, timesteps, width, features, dtype = header
        sizes = [24 * width, 4 * timesteps * width * features]
        return (features, dtype) == (RING_INFO.features, 1) and [len(each) for each in arrays] == sizes
    if (len(header), 1 + len(arrays)) != _FORMS[kind]:
        return False
    if kind in (Kind.OPEN, Kind.RESUME) and len(arrays[0].split(b"\n")) != header[2]:
        return False
    return kind not in (Kind.RESUME, Kind.CLOSE) or len(arrays[-1]) == 16 * header[2]


@contextlib.contextmanager
def judges(client: Client, endpoint: Callable[[int], str]) -> Iterator[list[Judge]]:
    """Servers of shard 0, of shard 1, and the one that takes shard 1 over."""
    with contextlib.ExitStack() as stack:
        last = stack.enter_context(Judge(client, 1, endpoint(2)))
        former = stack.enter_context(Judge(client, 1, endpoint(1), last))
        first = stack.enter_context(Judge(client, 0, endpoint(0)))
        table = [(1, first.endpoint), (1, former.endpoint)]
        for judge in (first, former, last):
            judge.rules.table = table
        yield [first, former, last]
