"""Frames that a follower has read and not checked yet, by the parts of streams that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.recording.frames import Sequences
from instep.recording.reader import READ_LIMITS, ReadLimits
from instep.recording.records import BatchGroup


@dataclass(frozen=True, slots=True)
class FollowLimits:
    """How much a follower holds."""

    portion_bytes: int = 4 * 2**20
    """Of frames that are read before they are checked, about."""
    most_waiting_bytes: int = 64 * 2**20
    """Where more frames wait for a checkpoint, fewer streams are followed."""
    most_kept: int = 1024
    """Mismatches whose values are kept: a broken model has one for each stream."""
    reading: ReadLimits = READ_LIMITS


FOLLOW_LIMITS: Final = FollowLimits()
_NOWHERE: Final = -1
_ALL: Final = 2**62


@dataclass(slots=True, eq=False)
class FollowedPart:
    """A stream from where its state is known."""

    number: int
    name: str
    state: U8 | None
    """Before the frame `next_seq`; None for the model's initial state."""
    next_seq: int
    """The next frame to compare."""
    counts_from: int = 0
    """The frames before this one were counted by a former follower."""
    through: int = 0
    """The position of the newest frame that was compared; 0 for none."""
    anchor: tuple[int, U8 | None] | None = None
    """A recorded state further on, and the frame before which it is."""
    is_over: bool = False
    """Whether the stream was reset or closed: no more frames belong to it."""
    place: int = _NOWHERE
    """Its index in the portion."""


class Defect(NamedTuple):
    """A frame that does not follow the one before."""

    part: FollowedPart
    seq: int
    expected_seq: int


class _FramesOfParts(NamedTuple):
    """Frames in the order in which they were stepped, all with outputs or all without."""

    positions: I64
    seqs: I64
    x: F32
    y: F32 | None

    def only(self, wanted: Bool) -> _FramesOfParts:
        y = None if self.y is None else self.y[wanted]
        return _FramesOfParts(self.positions[wanted], self.seqs[wanted], self.x[wanted], y)


class Portion:
    """Takes frames in as they were stepped, and gives them out part by part."""

    def __init__(self) -> None:
        self.parts: list[FollowedPart] = []
        self.bytes = self.frames = 0
        self._places: list[I64] = []
        """[N], of each of the frames, its part."""
        self._frames: list[_FramesOfParts] = []

    def add(self, group: BatchGroup, parts: list[FollowedPart | None]) -> None:
        """Batches, and the part that each of their frames belongs to; None for frames that are left out."""
        positions = np.repeat(np.array(group.positions, np.int64), np.diff(group.starts))
        self._add(_FramesOfParts(positions, group.seqs.astype(np.int64), group.x, group.y), parts)

    def _add(self, frames: _FramesOfParts, parts: Sequence[FollowedPart | None]) -> None:
        for part in dict.fromkeys(parts):
            if part is not None and part.place == _NOWHERE:
                part.place = len(self.parts)
                self.parts.append(part)
        places = np.array([_NOWHERE if part is None else part.place for part in parts], np.int64)
        wanted = places != _NOWHERE
        if not wanted.all():
            places, frames = places[wanted], frames.only(wanted)
        if len(places):
            self._places.append(places)
            self._frames.append(frames)
            self.frames += len(places)
            self.bytes += frames.x.nbytes + (0 if frames.y is None else frames.y.nbytes)

    def sequences(self, outputs: int, *, up_to_anchors: bool) -> tuple[Sequences, list[Defect]]:
        """The frames that can be compared, one sequence for each of `parts`, from its `next_seq` on.

        Args:
            outputs: values of an output.
            up_to_anchors: give out those of a part only as far as they reach its anchor, or all if it is over.
        """
        places = np.concatenate(self._places)
        positions, seqs = (np.concatenate([frames[at] for frames in self._frames]) for at in (0, 1))
        answered: Bool = np.concatenate([np.full(len(frames.x), frames.y is not None) for frames in self._frames])
        next_seqs: I64 = np.array([part.next_seq for part in self.parts], np.int64)
        through: I64 = np.array([part.through for part in self.parts], np.int64)
        # A part that is new may begin with a state that frames before it have led to.
        wanted = (positions > through[places]) & ((seqs >= next_seqs[places]) | (through[places] > 0))
        if up_to_anchors:
            wanted &= seqs < self._limits(places, seqs)[places]
        order: I64 = np.flatnonzero(wanted).astype(np.int64)
        order = order[np.argsort(places[order], kind="stable")]
        lengths: I64 = np.bincount(places[order], minlength=len(self.parts)).astype(np.int64)
        starts: I64 = np.cumsum(lengths) - lengths
        expected = next_seqs[places[order]] + np.arange(len(order)) - starts[places[order]]
        defects: dict[int, Defect] = {}
        for at in np.flatnonzero(seqs[order] != expected).tolist():
            place = int(places[order[at]])
            lengths[place] = 0
            defects.setdefault(place, Defect(self.parts[place], int(seqs[order[at]]), int(expected[at])))
        x: F32 = np.concatenate([frames.x for frames in self._frames])
        ys = [np.zeros((len(each.x), outputs), np.float32) if each.y is None else each.y for each in self._frames]
        for place in np.flatnonzero(lengths).tolist():
            self.parts[place].through = int(positions[order[starts[place] + lengths[place] - 1]])
        rows = np.arange(len(self.parts))
        return Sequences(rows, starts, lengths, order, x, np.concatenate(ys), answered), list(defects.values())

    def _limits(self, places: I64, seqs: I64) -> I64:
        """By part, the seq up to which its frames can be compared."""
        ends: I64 = np.zeros(len(self.parts), np.int64)
        np.maximum.at(ends, places, seqs + 1)
        limits = [
            _ALL if part.is_over else 0 if part.anchor is None or part.anchor[0] > end else part.anchor[0]
            for part, end in zip(self.parts, ends.tolist(), strict=True)
        ]
        return np.array(limits, np.int64)

    def rest(self, are_followed: list[bool]) -> Portion:
        """A portion of the frames that are left of the parts still followed; this one is not used any more."""
        rest = Portion()
        next_seqs: I64 = np.array([part.next_seq for part in self.parts], np.int64)
        next_seqs[~np.array(are_followed, np.bool_)] = _ALL
        for part in self.parts:
            part.place = _NOWHERE
        for places, frames in zip(self._places, self._frames, strict=True) if any(are_followed) else ():
            wanted = frames.seqs >= next_seqs[places]
            rest._add(frames.only(wanted), [self.parts[at] for at in places[wanted].tolist()])
        return rest
