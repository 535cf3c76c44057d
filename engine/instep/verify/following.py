"""Checking a recording while it is written: committed frames of sampled streams are stepped again and compared.

A stream is followed from where its state is known: its opening, a reset, or a state that a checkpoint holds. From there
on the follower carries the state itself. It reads in short transactions, some rows at a time, and opens the file anew
for each portion, so that it never keeps the writer from reusing its WAL, trimming, or closing in order.

Where the engine computes in `portable-1`, a frame is wrong when any bit of its output differs. Elsewhere the states
drift apart, so each part of a stream is compared from one recorded state to the next, within the verifier's bound; its
frames wait for the next checkpoint. A wrong stream is reported once, and followed again only when it is opened anew.
"""

from __future__ import annotations

import time
import zlib
from bisect import bisect
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Final

import numpy as np

from instep.core.typing import I64, U8
from instep.models.model import Model
from instep.recording.errors import RecordingError, TrimmedMeanwhile
from instep.recording.records import BatchGroup, RecordedEvent, StreamInfo
from instep.recording.schema import CHECKPOINT_EVENT, ENGINE_EVENT, RESET_EVENT
from instep.recording.tail import Closed, Item, Opened, RecordingTail
from instep.verify.checkers import Task, step_again, step_with_bound
from instep.verify.chunks import Chunk, plan_chunks
from instep.verify.left_out import Reason, by_reason
from instep.verify.mismatches import Mismatches, WrongOutput, wrong_output
from instep.verify.portion import FOLLOW_LIMITS, FollowedPart, FollowLimits, Portion
from instep.verify.recorded_model import recorded_model, why_not_bits
from instep.verify.stream_checks import StreamCheck
from instep.verify.verifier import make_checkers

_MOST_AT_FIRST: Final = 2**14
"""Open streams whose states are read at the start; those of others are when they have a frame."""
_ALL: Final = 2**62
_SPAN_FRAMES: Final = 2**24
"""More than a portion has: each chunk is one span."""


class Follower:
    """Checks what is committed to a recording, a portion at a time.

    Args:
        path: the recording.
        model: the recorded one.
        start: a position of its past to begin after, as far as states are known there; None for the newest checkpoint.
            Frames up to there do not count, though some are stepped again.
        waiting: of these frames, how many were read and neither compared nor left out; that many count.
        applied: how many frames were applied up to `start` since the recording began; None where it is a checkpoint's.
        told: streams that were told of before as wrong, as `StreamNumbers.pairs`; they are not followed.
        limits: of the memory for frames and mismatches.

    Attributes:
        share: the share (0 to 1) of streams that are followed, by a hash of their names.
        frames: how many frames were compared.
        frames_seen: how many frames were committed since the start, up to `seen`.
        applied: how many were applied since the recording began.
        position: everything in the recording up to here was read.
        seen: the newest position that was ever read; beyond `position` where some is read again.
        lag_s: seconds since everything that is not read yet was committed.
        mismatches: all that were found.
        differs: whether any bit differed.

    Raises:
        RecordingError: from every method, when the recording cannot be read or is damaged.
    """

    def __init__(
        self,
        path: Path,
        model: Model,
        start: int | None = None,
        waiting: int = 0,
        applied: int | None = None,
        told: Sequence[tuple[int, int]] = (),
        limits: FollowLimits = FOLLOW_LIMITS,
    ) -> None:
        self.path = path
        self.share = 1.0
        self.frames = 0
        self.frames_seen = waiting
        self.lag_s = 0.0
        self.mismatches = Mismatches(told, limits.most_kept)
        self.differs = False
        self._limits = limits
        self._known: dict[int, FollowedPart | Reason] = {}
        """By number, open streams that were met, or why they are not followed."""
        self._late = set[int]()
        """Of these, the ones whose recorded state was too old when they were met."""
        self._portion = Portion()
        self._left_out = Counter[Reason]()
        with RecordingTail(path, limits=limits.reading) as tail:
            newest = tail.newest_checkpoint
            self.position = max(newest if start is None else min(start, newest), tail.trimmed.position)
            if self.position:  # later ones would have newer states, further behind the frames that are read
                for number in tail.newest_open(_MOST_AT_FIRST):
                    self._known[number] = self._joined(number, 0, tail)
            self.seen = self.position if start is None else start
            self.applied = tail.frames_until(self.position) if applied is None else applied
            self._note_trimmed(tail)
        self._tail = tail
        self._checkers = make_checkers(model, _notes(tail, self.position), Event())  # the file is closed by now
        self._start = self.seen = max(self.position, self.seen)
        self._uncounted = waiting
        """Of the frames up to `_start`, how many may still count."""
        self._newest_ns = time.time_ns()
        """When the newest batch that was read was committed."""
        self._former_share = 0.0
        """The share with which everything up to `seen` was checked already."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Why bits need not be equal; empty where they must."""
        return self._checkers.notes

    @property
    def skipped(self) -> int:
        """Count of frames that were committed and not compared, those left out that wait for a checkpoint."""
        return max(0, self.frames_seen - self.frames - self.waiting)

    @property
    def skipped_by(self) -> dict[str, int]:
        """`skipped` by the reason."""
        return by_reason(self._left_out, self.skipped)

    @property
    def waiting(self) -> int:
        """Count of frames that were read and wait for a checkpoint, or to be read again."""
        return self._uncounted if self.position < self._start else self._portion.frames

    @property
    def streams(self) -> int:
        """Count of open streams that are followed."""
        return sum(isinstance(part, FollowedPart) for part in self._known.values())

    def advance(self) -> bool:
        """Check the next portion; whether that was everything that is committed."""
        began = time.time()
        with RecordingTail(self.path, self._tail) as tail:
            if tail.header.created_ns != self._tail.header.created_ns:
                raise RecordingError(f"{self.path} was replaced by another recording: follow it anew")
            self._tail = tail
            if tail.trimmed.position > self.position:
                self._note_trimmed(tail)
                self._skip_to(tail.trimmed.position, tail)
            is_all = self._read(tail)
            tail.forget(min(self.position, tail.newest_checkpoint))
        self._check()
        self.lag_s = max(0.0, time.time() - (began if is_all else min(began, self._newest_ns / 1e9)))
        return is_all

    def lower_share(self) -> None:
        """Follow half as many streams from now on."""
        self.share /= 2
        for number, part in self._known.items():
            if isinstance(part, FollowedPart) and not _is_sampled(part.name, self.share):
                self._known[number] = Reason.NOT_SAMPLED

    def raise_share(self) -> None:
        """Follow twice as many streams, those that are new from their states in the newest checkpoint."""
        if self.share == 1:
            return
        self._former_share, self.share = self.share, min(1.0, 2 * self.share)
        self._known = {number: part for number, part in self._known.items() if isinstance(part, FollowedPart)}
        if not self._checkers.bits_required:  # all begin again from there
            self._known, self._portion, self._former_share = {}, Portion(), 0.0
        self._late.clear()
        with RecordingTail(self.path, self._tail) as tail:
            self.position = min(self.position, tail.newest_checkpoint)

    def skip(self) -> None:
        """Leave out everything up to the newest checkpoint, and begin there with all streams."""
        with RecordingTail(self.path, self._tail) as tail:
            first, newest = self.seen + 1, tail.newest_checkpoint
            if newest >= first:
                self._note_trimmed(tail)
                applied = tail.frames_until(newest)  # unlike `totals` without those whose step failed
                frames = max(0, applied - self.applied) if applied else tail.totals(first, newest)[1]
                self._leave_out(frames, Reason.BEHIND)
                self._skip_to(newest, tail)

    def _note_trimmed(self, tail: RecordingTail) -> None:
        """Count the frames that were trimmed before they were read, of which only the checkpoint behind them tells."""
        if tail.trimmed.position > self.seen:
            self._leave_out(max(0, tail.frames_until(tail.trimmed.position) - self.applied), Reason.UNCHECKED)

    def _leave_out(self, frames: int, reason: Reason) -> None:
        """Frames behind `seen` are not read at all."""
        self.frames_seen += frames
        self.applied += frames
        self._left_out[reason] += frames

    def _skip_to(self, position: int, tail: RecordingTail) -> None:
        # The closings of others may be among what is left out.
        self.mismatches.streams.keep(set(tail.newest_open(_ALL)))
        self._left_out[Reason.BEHIND] += self.waiting
        self._known, self._portion, self.position, self.seen = {}, Portion(), position, max(self.seen, position)
        self._late.clear()

    # ── Reading ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, tail: RecordingTail) -> bool:
        """Fill the portion; whether that was everything there is."""
        waiting = self._portion.bytes
        try:
            for item in tail.history(self.position + 1):
                self._take(item, tail)
                self.position = item.position
                if self._portion.bytes >= waiting + self._limits.portion_bytes:
                    return False
        except TrimmedMeanwhile:
            return False
        finally:
            self.seen = max(self.seen, self.position)
        return True

    def _take(self, item: Item, tail: RecordingTail) -> None:
        if isinstance(item, BatchGroup):
            self._newest_ns = item.times_ns[-1]
            numbers, known = item.streams.tolist(), self._known
            for number in set(numbers).difference(known):
                known[number] = self._joined(number, int(item.seqs[numbers.index(number)]), tail)
            parts, unseen = [known[number] for number in numbers], int(item.starts[bisect(item.positions, self.seen)])
            self.frames_seen += len(parts) - unseen
            self.applied += len(parts) - unseen
            self._left_out.update(part for part in parts[unseen:] if isinstance(part, Reason))
            for at in range(int(item.starts[bisect(item.positions, self._start)])):
                if isinstance(part := parts[at], FollowedPart):
                    part.counts_from = int(item.seqs[at]) + 1
            self._portion.add(item, [None if isinstance(part, Reason) else part for part in parts])
        elif isinstance(item, Opened):
            if item.stream not in self._known:
                # What is read again was checked before, if it was sampled then, and has ended since.
                was_checked = item.position <= self.seen and _is_sampled(item.name, self._former_share)
                part = self._part(item.stream, item.name, item.first_seq, item.state)
                has_ended = was_checked and isinstance(part, FollowedPart)
                self._known[item.stream] = Reason.CLOSED if has_ended else part
        elif isinstance(item, Closed):
            self.mismatches.streams.close(item.stream, item.position)
            if isinstance(ended := self._known.pop(item.stream, None), FollowedPart):
                ended.is_over = True
        elif item.kind == RESET_EVENT:
            self._reset(item, tail)
        elif item.kind == CHECKPOINT_EVENT:
            self.mismatches.streams.forget(item.seq or 0)
            self._anchor(tail)
        elif item.kind == ENGINE_EVENT:
            self._check()
            drifted = not self._checkers.bits_required
            self._checkers = replace(self._checkers, notes=_notes(tail, item.position))
            if drifted and self._checkers.bits_required:
                self._known, self._portion = {}, Portion()

    def _joined(self, number: int, seq: int, tail: RecordingTail) -> FollowedPart | Reason:
        """A stream that is met with this frame, from its newest state, or why it is not followed."""
        found = tail.newest_state(number)
        if found is None:
            return Reason.CLOSED
        if found.seq < seq:
            self._late.add(number)
            return Reason.STATE_TOO_OLD
        return self._part(number, found.name, found.seq, found.state)

    def _reset(self, event: RecordedEvent, tail: RecordingTail) -> None:
        assert event.stream is not None
        assert event.seq is not None
        number, part = event.stream, self._known.get(event.stream)
        if isinstance(part, FollowedPart):
            if event.position > part.through and event.seq >= part.next_seq:  # else the part began later
                part.is_over = True
                self._known[number] = FollowedPart(number, part.name, event.state, event.seq)
        elif number not in self._known or number in self._late:
            found = tail.newest_state(number)
            self._late.discard(number)
            self._known[number] = self._part(number, found.name, event.seq, event.state) if found else Reason.CLOSED

    def _anchor(self, tail: RecordingTail) -> None:
        """A checkpoint is complete: its states are newer than those that were known."""
        for number in self._late:
            self._known.pop(number, None)
        self._late.clear()
        if not self._checkers.bits_required:
            for part in self._portion.parts:
                found = tail.newest_state(part.number) if part.anchor is None and not part.is_over else None
                if found is not None and found.seq > part.next_seq:
                    part.anchor = found.seq, found.state

    def _part(self, number: int, name: str, seq: int, state: U8 | None) -> FollowedPart | Reason:
        if number in self.mismatches.streams:
            return Reason.DIFFERS
        if not _is_sampled(name, self.share):
            return Reason.NOT_SAMPLED
        return FollowedPart(number, name, state, seq)

    # ── Checking ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _check(self) -> None:
        """Compare the frames of the portion that can be compared."""
        portion, bits_required = self._portion, self._checkers.bits_required
        if portion.parts:
            sequences, defects = portion.sequences(self._tail.header.outputs, up_to_anchors=not bits_required)
            for part, seq, expected_seq in defects:
                sentence = f"frame {seq} was recorded where frame {expected_seq} belongs"
                self._tell(WrongOutput(part.name, part.number, seq, [], [], sentence), part)
            first_seqs: I64 = np.array([part.next_seq for part in portion.parts], np.int64)
            for rows in plan_chunks(sequences.lengths):
                parts = [portion.parts[row] for row in rows.tolist()]
                places = zip(parts, sequences.starts[rows].tolist(), sequences.lengths[rows].tolist(), strict=True)
                checks = [self._stream_check(part, start, frames) for part, start, frames in places]
                self._compare(Task(self._checkers, Chunk(sequences, first_seqs, rows, _SPAN_FRAMES), checks), parts)
        self._portion = portion.rest([self._is_waiting(part) for part in portion.parts])
        if self._portion.bytes > self._limits.most_waiting_bytes:
            self.lower_share()

    def _is_waiting(self, part: FollowedPart) -> bool:
        """Whether frames of a part that were not compared can be later."""
        return not self._checkers.bits_required and self._known.get(part.number) is part

    def _compare(self, task: Task, parts: list[FollowedPart]) -> None:
        found, states = step_again(task)
        if not found.bits_required and (rows := np.flatnonzero(found.wrong).astype(np.int64)).size:
            again = Task(self._checkers, task.chunk.only(rows), [task.checks[row] for row in rows.tolist()])
            found.replace(rows, step_with_bound(again))
        self.differs |= bool(found.differs.any())
        for row, (part, check) in enumerate(zip(parts, task.checks, strict=True)):
            part.next_seq, part.state = check.next_seq, states[row].copy()
            if part.anchor is not None and part.anchor[0] == part.next_seq:
                (_, part.state), part.anchor = part.anchor, None
            if found.wrong[row]:
                self._tell(wrong_output(task, row, found.first[row]), part)
        counts_from: I64 = np.array([part.counts_from for part in parts], np.int64)
        for span in task.spans():
            seqs = span.starts + np.arange(len(span))[:, None]
            is_new = seqs >= counts_from
            self._left_out[Reason.NO_OUTPUT] += int((span.valid & ~span.answered & is_new).sum())
            counts = span.answered.copy()
            counts[:, list(found.undecided)] = False
            before = int((counts & ~is_new).sum())
            uncounted = min(before, self._uncounted)
            self._uncounted -= uncounted
            self.frames += int(counts.sum()) - before + uncounted

    def _stream_check(self, part: FollowedPart, start: int, frames: int) -> StreamCheck:
        info = StreamInfo(part.number, part.name, 0, part.next_seq, 0, 0, part.state)
        initial = self._checkers.network.state.initial(1)[0] if part.state is None else part.state
        return StreamCheck(info, 0, start, part.next_seq, frames, initial, None)

    def _tell(self, wrong: WrongOutput, part: FollowedPart) -> None:
        """A part is wrong: tell of its stream, unless another part of it was wrong, and follow it no more."""
        self.mismatches.add(wrong)
        if part.number in self._known:
            self._known[part.number] = Reason.DIFFERS
        else:  # it has closed, before it was found to be wrong
            self.mismatches.streams.close(part.number, self.position)


def model_of(path: Path, folder: Path | None) -> Model:
    """The model of a recording, from `folder` or from where the recording says.

    Raises:
        RecordingError: when the recording cannot be read.
        CannotVerify: when the model cannot be found.
    """
    with RecordingTail(path) as tail:
        return recorded_model(tail.header, folder)


def _notes(tail: RecordingTail, position: int) -> tuple[str, ...]:
    """Why the bits of the engine that wrote the row at a position need not be equal."""
    return why_not_bits([engine.header for engine in tail.engines if engine.position <= position][-1:])


def _is_sampled(name: str, share: float) -> bool:
    """Whether a stream belongs to the share; a smaller share is part of every larger one."""
    return zlib.crc32(name.encode()) < share * 2**32
