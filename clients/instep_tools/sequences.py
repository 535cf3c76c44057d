"""Recorded sequences in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import F32
from instep_client.states import State

I64 = npt.NDArray[np.int64]
F64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RecordedSequences:
    """Sequences of frames, one after another in one array."""

    names: tuple[str, ...]
    """The names of the sequences, [R]."""
    lengths: I64
    """[R], the number of frames of each sequence, at least 1."""
    frames: F32
    """[sum(lengths), features], finite, C-contiguous."""
    outputs: F32 | None = None
    """[sum(lengths), outputs]: the recorded outputs."""
    answered: npt.NDArray[np.bool_] | None = None
    """[sum(lengths)], the frames whose `outputs` can be compared; None for all."""
    times_ns: I64 | None = None
    """[sum(lengths)], the send time of each frame in nanoseconds since any time, never decreasing in a sequence."""
    initial_states: Mapping[int, State] = field(default_factory=dict)
    """The initial states of sequences by row; missing ones begin in the model's initial state."""
    fingerprint: str | None = None
    """The fingerprint of the model that computed `outputs`, if known."""
    model: str | None = None
    """The model's name, if known."""

    @property
    def starts(self) -> I64:
        """[R], the index in `frames` at which each sequence begins."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def late(self) -> tuple[str, ...]:
        """The names of sequences whose outputs cannot be compared, because their first states are unknown."""
        if self.answered is None or self.outputs is None:
            return ()
        unknown = ~self.answered & ~np.isnan(self.outputs).all(axis=1)
        return tuple(self.names[row] for row in np.flatnonzero(np.logical_or.reduceat(unknown, self.starts)))

    @property
    def features(self) -> int:
        """The number of values in a frame."""
        return int(self.frames.shape[1])

    def keep(self, frames: npt.NDArray[np.bool_]) -> RecordedSequences:
        """Select frames [sum], and the sequences that have any of them."""
        lengths = np.add.reduceat(frames.astype(np.int64), self.starts)
        kept = replace(self, lengths=lengths, **self._frames(frames))
        return kept.select(np.flatnonzero(lengths).tolist())

    def _frames(self, which: npt.NDArray[np.bool_] | I64) -> dict[str, Any]:
        """Columns of the chosen frames by name; None for those that the sequences lack."""
        columns = ("frames", "outputs", "answered", "times_ns")
        return {name: None if getattr(self, name) is None else getattr(self, name)[which] for name in columns}

    def __len__(self) -> int:
        return len(self.names)

    def select(self, which: Sequence[int]) -> RecordedSequences:
        """Select sequences, in this order."""
        rows = np.asarray(which, np.int64)
        starts = self.starts
        parts = [np.arange(starts[row], starts[row] + self.lengths[row]) for row in rows]
        flat = np.concatenate([np.empty(0, np.int64), *parts])
        return replace(
            self,
            names=tuple(self.names[row] for row in rows),
            lengths=self.lengths[rows],
            initial_states={
                new: self.initial_states[old] for new, old in enumerate(rows) if old in self.initial_states
            },
            **self._frames(flat),
        )
