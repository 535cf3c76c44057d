"""Outputs and latencies as the producers received them, and how often the decision is right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from instep.core.typing import F32, I32, I64, Bool
from instep.demo.timetable import F64


class Heard:
    """Outputs so far, a row for each recording; producers fill it, anybody may look.

    Args:
        lengths: frames of each recording.
        outputs: values of an output.

    Attributes:
        lengths: int64 [recordings].
        outputs: one float32 [T, speakers] a recording, NaN where nothing came yet.
        latency_s: one float64 [T] a recording: from when a frame was due to be sent until its output was there.
        answered: int64 [recordings]: how many frames came back.
    """

    def __init__(self, lengths: Sequence[int], outputs: int) -> None:
        self.lengths: I64 = np.array(lengths, np.int64)
        self.outputs: list[F32] = [np.full((length, outputs), np.nan, np.float32) for length in lengths]
        self.latency_s: list[F64] = [np.full(length, np.nan) for length in lengths]
        self.answered: I64 = np.zeros(len(lengths), np.int64)
        self._decisions: I64 = np.full(len(lengths), -1, np.int64)

    def add(self, row: int, y: F32, latency_s: F64) -> None:
        """The next frames of a recording came back: y [T, speakers], latency_s [T]."""
        first = int(self.answered[row])
        last = first + len(y)
        self.outputs[row][first:last] = y
        self.latency_s[row][first:last] = latency_s
        self.answered[row] = last
        self._decisions[row] = y[-1].argmax()

    @property
    def frames(self) -> int:
        """Frames that came back."""
        return int(self.answered.sum())

    @property
    def finished(self) -> int:
        """Recordings of which every frame came back."""
        return int((self.answered == self.lengths).sum())

    def accuracy_now(self, speakers: I32) -> float:
        """Of the recordings heard at all, the share whose newest decision is right; 0 before the first."""
        begun = self.answered > 0
        return float((self._decisions == speakers)[begun].mean()) if begun.any() else 0.0


def right_after(outputs: Sequence[F32], speakers: I32) -> Bool:
    """Whether the decision is right after each number of frames.

    Args:
        outputs: one [T, speakers] a recording.
        speakers: who it is, int32 [recordings].

    Returns:
        bool [recordings, longest T]; column k is after k + 1 frames. A recording that is shorter counts with the
        decision at its end.
    """
    longest = max(len(each) for each in outputs)
    decisions = [each.argmax(axis=1) for each in outputs]
    padded = np.array([np.pad(each, (0, longest - len(each)), mode="edge") for each in decisions])
    right: Bool = padded == speakers[:, None]
    return right


def probabilities(outputs: F32) -> F32:
    """Softmax over the last axis."""
    raised = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
    shares: F32 = raised / raised.sum(axis=-1, keepdims=True)
    return shares
