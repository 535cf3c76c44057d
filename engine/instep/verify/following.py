"""Checking a recording while it is written: committed frames of sampled streams are stepped again and compared.

A stream is followed from where its state is known: its opening, a reset, or a state that a checkpoint holds. From there
on the follower carries the state itself. It reads in short transactions, some rows at a time, and opens the file anew
for each portion, so that it never keeps the writer from reusing its WAL, trimming, or closing in order.

Where bits must be equal (see `conditions`), a frame is wrong when any bit of its output differs. A stream that is wrong
is told of once and followed no further, until it is opened again.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Final

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.models.model import Model
from instep.recording.errors import RecordingError, TrimmedMeanwhile
from instep.recording.frames import Sequences
from instep.recording.records import RecordedBatch, RecordedEvent, StreamInfo
from instep.recording.schema import ENGINE_EVENT, RESET_EVENT, RecordingHeader
from instep.recording.tail import Closed, Item, Opened, RecordingTail
from instep.verify.checkers import Checkers, Task, step_again
from instep.verify.chunks import Chunk, plan_chunks
from instep.verify.conditions import find_conditions, recorded_model
from instep.verify.replay import replay_stepped
from instep.verify.report import Divergence
from instep.verify.stream_checks import StreamCheck
from instep.verify.verifier import Certify, make_checkers

PORTION_BYTES: Final = 4 * 2**20
"""Of frames that are read before they are checked, about."""
_SPAN_FRAMES: Final = 2**24
"""More than a portion has: each chunk is one span."""
_NOBODY: Final = -1


@dataclass(frozen=True, slots=True)
class WrongOutput:
    """A frame whose recorded output is not the one that was computed again."""

    stream: str
    number: int
    """Of the opening, in the recording."""
    seq: int
    expected: list[float]
    """The output as computed again; empty where the frame itself is out of order."""
    got: list[float]
    """The recorded output."""
    sentence: str
    """The first difference, in words."""


@dataclass(slots=True, eq=False)
class _Part:
    """A stream from where its state is known."""

    number: int
    name: str
    state: U8 | None
    """Before the frame `next_seq`; None for the model's initial state."""
    next_seq: int
    through: int = 0
    """The position up to which its frames are checked."""
    place: int = _NOBODY
    """Its index among the parts of the portion that is being read; `_NOBODY` where it has no frame there."""


@dataclass(slots=True)
class _Portion:
    """Frames that were read and are not checked yet, as columns of batches."""

    parts: list[_Part] = field(default_factory=list)
    places: list[I64] = field(default_factory=list)
    """[B], of each frame, its part; `_NOBODY` for frames of streams that are not followed."""
    batches: list[RecordedBatch] = field(default_factory=list)
    bytes: int = 0

    def add(self, batch: RecordedBatch, parts: list[_Part | None]) -> None:
        """A batch, and the part that each of its frames belongs to."""
        for part in parts:
            if part is not None and part.place == _NOBODY:
                part.place = len(self.parts)
                self.parts.append(part)
        places = np.array([_NOBODY if part is None else part.place for part in parts], np.int64)
        if (places != _NOBODY).any():
            self.places.append(places)
            self.batches.append(batch)
            self.bytes += batch.x.nbytes + (0 if batch.y is None else batch.y.nbytes)


class Follower:
    """Checks what is committed to a recording, a portion at a time.

    Args:
        path: the recording.
        model: the recorded one.
        start: a position of its past to begin after, as far as states are known there; None for the newest checkpoint.
        certify: finds out whether bits must be equal on this machine.

    Attributes:
        share: the share (0 to 1) of streams that are followed, by a hash of their names.
        frames: how many frames were compared.
        frames_seen: how many frames were committed since the start.
        streams_total: how many streams were followed at some time.
        position: everything in the recording up to here was read.
        lag_s: seconds since everything that is not checked yet was committed.
        mismatches: all that were found.

    Raises:
        RecordingError: from every method, when the recording cannot be read or is damaged.
    """

    def __init__(self, path: Path, model: Model, start: int | None = None, certify: Certify = find_conditions) -> None:
        self.path = path
        self.share = 1.0
        self.frames = self.frames_seen = self.streams_total = 0
        self.lag_s = 0.0
        self.mismatches: list[WrongOutput] = []
        self._model = model
        self._certify = certify
        self._known: dict[int, _Part | None] = {}
        """By number, open streams that were met; None for those that are not followed."""
        self._portion = _Portion()
        with RecordingTail(path) as tail:
            newest = tail.checkpoint().position
            self.position = max(newest if start is None else min(start, newest), tail.trimmed.position)
            self._checkers = self._make_checkers(tail)
        self._tail = tail
        self._seen = self.position
        """The newest position that was read; beyond `_position` where some is read again."""
        self._newest_ns = time.time_ns()
        """When the newest batch that was read was committed."""
        self._former_share = 0.0
        """The share with which everything up to `_seen` was checked already."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Why bits need not be equal; empty where they must."""
        return self._checkers.conditions.step_notes

    @property
    def streams(self) -> int:
        """How many open streams are followed."""
        return sum(part is not None for part in self._known.values())

    def advance(self) -> bool:
        """Check the next portion; whether that was everything that is committed."""
        began = time.time()
        with RecordingTail(self.path, self._tail) as tail:
            if tail.header.created_ns != self._tail.header.created_ns:
                raise RecordingError(f"{self.path} was replaced by another recording: follow it anew")
            self._tail = tail
            if tail.trimmed.position > self.position:
                self._skip_to(tail.trimmed.position)
            is_all = self._read(tail)
            self._check()
        self.lag_s = max(0.0, time.time() - (began if is_all else min(began, self._newest_ns / 1e9)))
        return is_all

    def lower_share(self) -> None:
        """Follow half as many streams from now on."""
        self.share /= 2
        for number, part in self._known.items():
            if part is not None and not _is_sampled(part.name, self.share):
                self._known[number] = None

    def raise_share(self) -> None:
        """Follow twice as many streams, those that are new from their states in the newest checkpoint."""
        if self.share == 1:
            return
        self._former_share, self.share = self.share, min(1.0, 2 * self.share)
        self._known = {number: part for number, part in self._known.items() if part is not None}
        with RecordingTail(self.path, self._tail) as tail:
            self.position = min(self.position, max(tail.checkpoint().position, tail.trimmed.position))

    def skip(self) -> None:
        """Leave out everything up to the newest checkpoint, and begin there with all streams."""
        with RecordingTail(self.path, self._tail) as tail:
            first, newest = max(self._seen, self.position) + 1, tail.checkpoint().position
            if newest >= first:
                self.frames_seen += tail.totals(first, newest)[1]
                self._skip_to(newest)

    def _skip_to(self, position: int) -> None:
        self._known, self.position, self._seen = {}, position, max(self._seen, position)

    def _make_checkers(self, tail: RecordingTail, position: int | None = None) -> Checkers:
        """For the engine that wrote the row at a position."""
        at = self.position if position is None else position
        engine = [engine for engine in tail.engines if engine.position <= at][-1]
        return make_checkers(self._model, [engine.header], self._certify, Event())

    # ── Reading ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, tail: RecordingTail) -> bool:
        """Fill the portion; whether that was everything there is."""
        try:
            for item in tail.history(self.position + 1):
                self._take(item, tail)
                self.position = item.position
                if self._portion.bytes >= PORTION_BYTES:
                    return False
        except TrimmedMeanwhile:
            return False
        finally:
            self._seen = max(self._seen, self.position)
        return True

    def _take(self, item: Item, tail: RecordingTail) -> None:
        if isinstance(item, RecordedBatch):
            self._newest_ns = item.time_ns
            if item.position > self._seen:
                self.frames_seen += len(item.streams)
            numbers, known = item.streams.tolist(), self._known
            for number, seq in zip(numbers, item.seqs.tolist(), strict=True):
                if number not in known:
                    known[number] = self._joined(number, seq, tail)
            self._portion.add(item, [known[number] for number in numbers])
        elif isinstance(item, Opened):
            if item.stream not in self._known:
                # What is read again was checked before, if it was sampled then.
                was_checked = item.position <= self._seen and _is_sampled(item.name, self._former_share)
                part = None if was_checked else self._part(item.stream, item.name, item.first_seq, item.state)
                self._known[item.stream] = part
        elif isinstance(item, Closed):
            self._known.pop(item.stream, None)
        elif item.kind == RESET_EVENT:
            self._reset(item, tail)
        elif item.kind == ENGINE_EVENT:
            self._check()
            self._checkers = self._make_checkers(tail, item.position)

    def _joined(self, number: int, seq: int, tail: RecordingTail) -> _Part | None:
        """A stream that is met with this frame, from its newest state; None where it is not followed."""
        found = tail.newest_state(number)
        if found is None or found.seq < seq:
            return None
        return self._part(number, found.name, found.seq, found.state)

    def _reset(self, event: RecordedEvent, tail: RecordingTail) -> None:
        assert event.stream is not None
        assert event.seq is not None
        number, name = event.stream, ""
        if number not in self._known:
            found = tail.newest_state(number)
            name = "" if found is None else found.name
        elif (part := self._known[number]) is not None and event.position > part.through and event.seq >= part.next_seq:
            name = part.name
        if name:
            self._known[number] = self._part(number, name, event.seq, event.state, is_new=number not in self._known)

    def _part(self, number: int, name: str, seq: int, state: U8 | None, *, is_new: bool = True) -> _Part | None:
        if not _is_sampled(name, self.share):
            return None
        self.streams_total += is_new
        return _Part(number, name, state, seq)

    # ── Checking ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        """Compare the frames of the portion."""
        portion, self._portion = self._portion, _Portion()
        for part in portion.parts:
            part.place = _NOBODY
        if not portion.parts:
            return
        sequences, first_seqs = self._in_order(portion)
        lengths, buckets = sequences.lengths, self._checkers.conditions.buckets
        for rows in plan_chunks(lengths, buckets[-1], buckets[0]):
            parts = [portion.parts[row] for row in rows.tolist()]
            places = zip(parts, sequences.starts[rows].tolist(), lengths[rows].tolist(), strict=True)
            checks = [_stream_check(part, start, frames) for part, start, frames in places]
            self._compare(Task(self._checkers, Chunk(sequences, first_seqs, rows, _SPAN_FRAMES), checks), parts)

    def _in_order(self, portion: _Portion) -> tuple[Sequences, I64]:
        """The frames that follow each other from the known state of each part, and the seqs of the first."""
        parts, batches = portion.parts, portion.batches
        places = np.concatenate(portion.places)
        seqs: I64 = np.concatenate([batch.seqs for batch in batches]).astype(np.int64)
        sizes = [len(batch.seqs) for batch in batches]
        positions = np.repeat(np.array([batch.position for batch in batches], np.int64), sizes)
        answered: Bool = np.repeat(np.array([batch.y is not None for batch in batches], np.bool_), sizes)
        next_seqs: I64 = np.array([part.next_seq for part in parts], np.int64)
        through: I64 = np.array([part.through for part in parts], np.int64)
        counts_here = (places != _NOBODY) & (positions > through[places]) & (seqs >= next_seqs[places])
        order: I64 = np.flatnonzero(counts_here)
        order = order[np.argsort(places[order], kind="stable")]
        lengths: I64 = np.bincount(places[order], minlength=len(parts)).astype(np.int64)
        starts: I64 = np.cumsum(lengths) - lengths
        expected = next_seqs[places[order]] + np.arange(len(order)) - starts[places[order]]
        defects: dict[int, tuple[int, int]] = {}
        for at in np.flatnonzero(seqs[order] != expected).tolist()[::-1]:  # so that the first of each part is the last
            defects[int(places[order[at]])] = int(expected[at]), int(seqs[order[at]])
        for place, (belongs, seq) in defects.items():
            part, lengths[place] = parts[place], 0
            sentence = f"frame {seq} was recorded where frame {belongs} belongs"
            self._tell(WrongOutput(part.name, part.number, seq, [], [], sentence), part)
        x: F32 = np.concatenate([batch.x for batch in batches])
        width = self._tail.header.outputs
        ys = [np.zeros((len(batch.x), width), np.float32) if batch.y is None else batch.y for batch in batches]
        return Sequences(np.arange(len(parts)), starts, lengths, order, x, np.concatenate(ys), answered), next_seqs

    def _compare(self, task: Task, parts: list[_Part]) -> None:
        found, states = step_again(task)
        self.frames += sum(int(span.answered.sum()) for span in task.spans())
        for row, (part, check) in enumerate(zip(parts, task.checks, strict=True)):
            if found.wrong[row]:
                self._tell(self._mismatch(task, row, found.first[row]), part)
            part.next_seq, part.state, part.through = check.next_seq, states[row].copy(), self.position

    def _tell(self, mismatch: WrongOutput, part: _Part) -> None:
        """A part is wrong: follow it no more."""
        self.mismatches.append(mismatch)
        if self._known.get(part.number) is part:
            self._known[part.number] = None

    def _mismatch(self, task: Task, row: int, divergence: Divergence) -> WrongOutput:
        check, frames = task.checks[row], divergence.frame - task.checks[row].first_seq + 1
        span = next(task.chunk.only(np.array([row])).spans())
        network, buckets = self._checkers.network, self._checkers.conditions.buckets
        state, alone = task.initial_states()[[row]], np.ones(frames, np.int64)
        y, _ = replay_stepped(network, buckets, span.x[:frames], state, alone)
        expected, got = y[-1, 0].tolist(), span.y[frames - 1, 0].tolist()
        return WrongOutput(check.info.name, check.info.stream, divergence.frame, expected, got, divergence.sentence())


def model_of(path: Path, folder: Path | None) -> tuple[RecordingHeader, Model]:
    """The header of a recording, and its model, from `folder` or from where the recording says.

    Raises:
        RecordingError: when the recording cannot be read.
        CannotVerify: when the model cannot be found.
    """
    with RecordingTail(path) as tail:
        return tail.header, recorded_model(tail.header, folder)


def _is_sampled(name: str, share: float) -> bool:
    """Whether a stream belongs to the share; a smaller share is part of every larger one."""
    return zlib.crc32(name.encode()) < share * 2**32


def _stream_check(part: _Part, start: int, frames: int) -> StreamCheck:
    nothing = (None, None, None, None, None)
    info = StreamInfo(part.number, part.name, 0, part.next_seq, 0, 0, part.state, *nothing)
    return StreamCheck(info, 0, start, part.next_seq, frames, part.state, None)
