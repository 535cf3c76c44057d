"""Committed frames of a recording that is being written, stepped again and compared.

A frame is wrong when any bit of its output differs. Engines that promise no bits are refused: `instep verify` compares
their recordings within its bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from instep.core.typing import F32
from instep.models.base import RecurrentModel
from instep.recording.portions import Portion
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint
from instep.recording.schema import read_checkpoint_frames
from instep.replay.following import Follower
from instep.replay.recorded_model import recorded_model, recorded_network, why_not_bits
from instep.replay.replay import StateTable, differ
from instep.replay.report import CannotVerify

LATE_S: Final = 15.0
"""Behind the newest commit by more than this, everything up to the newest checkpoint is left out."""
_MOST_KEPT: Final = 1024
"""Mismatches that are reported with their values; a broken model has one for each stream."""
_NOTHING: Final[F32] = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class WrongOutput:
    """A frame whose recorded output is not the one that was computed again."""

    stream: str
    seq: int
    position: int
    expected: list[float]
    """The output as computed again; empty where the frame itself is out of order."""
    got: list[float]
    """The recorded output."""
    sentence: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; values that are not finite become strings."""
        finite = [[each if isfinite(each) else str(each) for each in values] for values in (self.expected, self.got)]
        return asdict(self) | dict(zip(("expected", "got"), finite, strict=True))


class LiveCheck(Follower):
    """Compares committed outputs with the results of stepping again.

    Args:
        path: the recording.
        network: the recorded one.
        position: everything up to here was checked before; it begins at the newest checkpoint, and does not count
            frames up to here again.
        applied: how many frames were applied up to there since the recording began; None for the count in the
            checkpoint.

    Attributes:
        frames: how many frames were compared.
        skipped: how many others were committed and read, or left out.
        mismatches: the first wrong frame of each stream that has one; of many only the first ones.
        mismatches_total: how many there are.
    """

    def __init__(self, path: Path, network: RecurrentModel, position: int, applied: int | None) -> None:
        super().__init__(path, StateTable(network), position=None if position else 0)
        self.applied = applied if position else 0
        self.frames = self.skipped = self.mismatches_total = 0
        self.mismatches: list[WrongOutput] = []
        self.has_trimmed = False
        self._told_until = self._counted = position
        self._compared_from = 0
        """Frames up to here were computed by another engine, and stepped again by this one as it started."""
        self._wrong = set[int]()
        """Streams that did not match and are not followed any more."""

    @classmethod
    def of(cls, path: Path, position: int, applied: int | None) -> Self:
        """Check a recording with the model that it names.

        Raises:
            RecordingError: when the recording cannot be read.
            CannotVerify: when the model cannot be found or computed here, or bits were not promised.
        """
        with RecordingReader(path) as reader:
            model, engine = recorded_model(reader.header, None), reader.engines[-1]
        if notes := why_not_bits([engine.header]):
            raise CannotVerify(f"{notes[0]}: `instep verify` compares the recording within a tolerance")
        check = cls(path, recorded_network(model), position, applied)  # the file is closed by now: compiling takes long
        check._compared_from = engine.position
        return check

    def is_to_begin(self, reader: RecordingReader, checkpoint: Checkpoint) -> bool:
        """Also where it is late."""
        if super().is_to_begin(reader, checkpoint):
            self.has_trimmed = True
            return True
        return checkpoint.position > (self.position or 0) and self.lag_s > LATE_S

    def begin(self, reader: RecordingReader, checkpoint: Checkpoint) -> int:
        """Count skipped frames; frames that are read again do not count twice."""
        self._counted = max(self._counted, self.position or 0)
        rows = reader.rows("events", checkpoint.completed, checkpoint.completed)
        applied = sum(read_checkpoint_frames(row[5]) for row in rows)
        if self.applied is None:
            self.applied = applied
        elif checkpoint.position > self._counted:
            self.skipped += max(0, applied - self.applied)
            self.applied = max(applied, self.applied)
        return checkpoint.position

    def meet(self, numbers: Sequence[int]) -> None:
        """But for streams that are wrong."""
        super().meet([number for number in numbers if number not in self._wrong])

    def take(self, portion: Portion) -> None:
        """Step a portion and compare."""
        stretches = self.plan(portion)
        y, _ = self.step(stretches)
        frames = stretches.frames
        is_applied = np.zeros(len(frames), np.bool_)
        is_applied[stretches.applied()] = True
        compared = is_applied & frames.answered & (frames.positions > self._compared_from)
        for at in np.flatnonzero(compared & differ(y, frames.y)).tolist():
            where = int(frames.streams[at]), int(frames.seqs[at]), int(frames.positions[at])
            self._tell(*where, y[at], frames.y[at])
        for defect in stretches.defects:
            self._tell(defect.stream, defect.seq, defect.position, sentence=defect.sentence)
        is_new = frames.positions > self._counted
        self.applied = (self.applied or 0) + int(is_new.sum())
        self.frames += int((compared & is_new).sum())
        self.skipped += int((~compared & is_new).sum())

    def _tell(
        self, number: int, seq: int, position: int, expected: F32 = _NOTHING, got: F32 = _NOTHING, sentence: str = ""
    ) -> None:
        """A frame is wrong: report it, unless the stream was wrong before, and follow the stream no further."""
        if number in self._wrong:
            return
        self._wrong.add(number)
        if number in self:
            self.drop(number)
        if position <= self._told_until:  # a former process has reported it
            return
        self.mismatches_total += 1
        if len(self.mismatches) < _MOST_KEPT:
            opening = self.reader.newest_row("openings", "stream = ?", number)
            name = f"number {number}" if opening is None else opening[3]
            if not sentence:
                at = int(np.argmax(differ(expected[:, None], got[:, None])))
                sentence = f"frame {seq}, element {at}: recorded {got[at]}, computed again {expected[at]}"
            wrong = WrongOutput(name, seq, position, expected.tolist(), got.tolist(), sentence)
            self.mismatches.append(wrong)
