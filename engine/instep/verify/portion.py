"""Frames that a follower has read and not checked yet, by the parts of streams that they belong to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.recording.frames import Sequences
from instep.recording.records import RecordedBatch

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


class Portion:
    """Takes frames in as they were stepped, and gives them out part by part."""

    def __init__(self) -> None:
        self.parts: list[FollowedPart] = []
        self.bytes = self.frames = 0
        self._places: list[I64] = []
        """[B], of each frame, its part."""
        self._batches: list[RecordedBatch] = []

    def add(self, batch: RecordedBatch, parts: list[FollowedPart | None]) -> None:
        """A batch, and the part that each of its frames belongs to; None for frames that are left out."""
        for part in parts:
            if part is not None and part.place == _NOWHERE:
                part.place = len(self.parts)
                self.parts.append(part)
        places = np.array([_NOWHERE if part is None else part.place for part in parts], np.int64)
        self._add(batch, places, places != _NOWHERE)

    def _add(self, batch: RecordedBatch, places: I64, wanted: Bool) -> None:
        if not wanted.any():
            return
        if not wanted.all():
            x, y = batch.x[wanted], None if batch.y is None else batch.y[wanted]
            batch = replace(batch, streams=batch.streams[wanted], seqs=batch.seqs[wanted], x=x, y=y)
        self._places.append(places[wanted])
        self._batches.append(batch)
        self.frames += len(batch.seqs)
        self.bytes += batch.x.nbytes + (0 if batch.y is None else batch.y.nbytes)

    def sequences(self, outputs: int, *, up_to_anchors: bool) -> tuple[Sequences, list[Defect]]:
        """The frames that can be compared, one sequence for each of `parts`, from its `next_seq` on.

        Args:
            outputs: values of an output.
            up_to_anchors: give out those of a part only as far as they reach its anchor, or all if it is over.
        """
        batches = self._batches
        places = np.concatenate(self._places)
        seqs: I64 = np.concatenate([batch.seqs for batch in batches]).astype(np.int64)
        sizes = [len(batch.seqs) for batch in batches]
        positions = np.repeat(np.array([batch.position for batch in batches], np.int64), sizes)
        answered: Bool = np.repeat(np.array([batch.y is not None for batch in batches], np.bool_), sizes)
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
        x: F32 = np.concatenate([batch.x for batch in batches])
        ys = [np.zeros((len(batch.x), outputs), np.float32) if batch.y is None else batch.y for batch in batches]
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
        """What was not compared of the parts that are still followed; this one is not used any more."""
        rest = Portion()
        next_seqs: I64 = np.array([part.next_seq for part in self.parts], np.int64)
        next_seqs[~np.array(are_followed, np.bool_)] = _ALL
        for part in self.parts:
            part.place = _NOWHERE
        for places, batch in zip(self._places, self._batches, strict=True) if any(are_followed) else ():
            wanted = batch.seqs.astype(np.int64) >= next_seqs[places]
            if wanted.any():
                rest.add(batch, [self.parts[at] if keep else None for at, keep in zip(places, wanted, strict=True)])
        return rest
