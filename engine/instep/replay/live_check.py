"""Steps committed frames of a recording that is being written again, and compares the outputs.

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
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint
from instep.recording.schema import read_checkpoint_frames
from instep.recording.segments import Segment
from instep.replay.following import Follower
from instep.replay.recorded_model import recorded_model, recorded_network, why_not_bits
from instep.replay.replay import StateTable, differ
from instep.replay.report import CannotVerify

LATE_S: Final = 15.0
"""If the check is further behind the newest commit than this, it skips to the newest checkpoint."""
_MOST_KEPT: Final = 1024
"""The most mismatches reported with their values; a broken model has one for each stream."""
_NOTHING: Final[F32] = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class WrongOutput:
    """A frame whose recorded output differs from the one computed again."""

    stream: str
    seq: int
    position: int
    expected: list[float]
    """The output computed again; empty if the frame itself is out of order."""
    got: list[float]
    """The recorded output."""
    sentence: str

    def as_json(self) -> dict[str, Any]:
        """Plain values; values that are not finite become strings."""
        finite = [[each if isfinite(each) else str(each) for each in values] for values in (self.expected, self.got)]
        return asdict(self) | dict(zip(("expected", "got"), finite, strict=True))


class LiveCheck(Follower):
    """Compares committed outputs with those computed again.

    Args:
        path: the recording.
        network: the recorded one.
        position: everything up to here was checked before. The check begins at the newest checkpoint and does not count
            those frames again.
        applied: the number of frames applied up to there since the recording began; None to use the checkpoint's.

    Attributes:
        frames: the number of compared frames.
        skipped: the number of committed frames that were not compared.
        mismatches: the first wrong frame of each stream, for a limited number of streams.
        mismatches_total: the number of streams with a wrong frame.
    """

    def __init__(self, path: Path, network: RecurrentModel, position: int, applied: int | None) -> None:
        super().__init__(path, StateTable(network), position=None if position else 0)
        self.applied = applied if position else 0
        self.frames = self.skipped = self.mismatches_total = 0
        self.mismatches: list[WrongOutput] = []
        self.has_trimmed = False
        self._told_until = self._counted = position
        self._compared_from = 0
        """Frames before this position were computed by another engine, and compared by this one at its start."""
        self._wrong = set[int]()
        """Streams with a mismatch, which are no longer followed."""

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
        """See `Follower`; also if the check is too far behind."""
        if super().is_to_begin(reader, checkpoint):
            self.has_trimmed = True
            return True
        return checkpoint.position > (self.position or 0) and self.lag_s > LATE_S

    def begin(self, reader: RecordingReader, checkpoint: Checkpoint) -> int:
        """See `Follower`. Skipped frames are counted, and frames that are read again are counted once."""
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
        """See `Follower`; streams with a mismatch are left out."""
        super().meet([number for number in numbers if number not in self._wrong])

    def take(self, segment: Segment) -> None:
        """Step a segment and compare its outputs."""
        stretches = self.plan(segment)
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
        """Report a wrong frame, unless its stream had one before, and stop following the stream."""
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
