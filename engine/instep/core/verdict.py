"""What was decided about the frames of a block, or of several beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from instep.core.typing import I32, I64


@dataclass(slots=True)
class Admission:
    """The verdict on T × N frames, one entry a column: on a block, or on several beside each other."""

    slots: I64
    rows: I64
    """int64 [T, N], where the frames lie in the rings; counts only as far as `lengths` says."""
    skipped: I64
    """How many leading timesteps were applied before, and are only answered: 0 … `lengths`."""
    lengths: I64
    """How many leading timesteps of the column are answered with outputs: 0 … T; fewer when a step fails later."""
    codes: I32
    """Why timestep `lengths[n]` of the column is refused; 0 where all T are admitted."""
    expected_seq: I64
    """What the column's stream expects after the admitted frames; 0 where the stream is not the sender's."""
    fresh: I64
    """How many timesteps of the column were admitted to be computed."""
    is_whole: bool
    """Whether all frames were admitted to be computed, and none has failed since: as nearly always."""

    @property
    def admitted(self) -> tuple[I64, I64]:
        """The slots with timesteps to compute, which are distinct, and how many of each: int64 [≤ N] both."""
        if self.is_whole:
            return self.slots, self.fresh
        some = self.fresh > 0  # an old handle may have named the slot of a good one
        return self.slots[some], self.fresh[some]

    def of(self, columns: slice) -> Admission:
        """The verdict on some of the columns, in the same memory."""
        return Admission(
            self.slots[columns],
            self.rows[:, columns],
            self.skipped[columns],
            self.lengths[columns],
            self.codes[columns],
            self.expected_seq[columns],
            self.fresh[columns],
            self.is_whole,
        )

    @classmethod
    def beside(cls, verdicts: Sequence[Admission]) -> Admission:
        """Verdicts on equally many timesteps beside each other, copied."""
        return cls(
            np.concatenate([verdict.slots for verdict in verdicts]),
            np.concatenate([verdict.rows for verdict in verdicts], axis=1),
            np.concatenate([verdict.skipped for verdict in verdicts]),
            np.concatenate([verdict.lengths for verdict in verdicts]),
            np.concatenate([verdict.codes for verdict in verdicts]),
            np.concatenate([verdict.expected_seq for verdict in verdicts]),
            np.concatenate([verdict.fresh for verdict in verdicts]),
            all(verdict.is_whole for verdict in verdicts),
        )
