"""Compares outputs with those in a file, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from instep_client.protocol.wire import F32
from instep_tools.sequences import RecordedSequences
from instep_tools.words import counted


@dataclass(frozen=True, slots=True)
class Difference:
    """The first value that differs."""

    stream: str
    frame: int
    element: int
    recorded: float
    now: float

    def sentence(self) -> str:
        """Both values with all their digits."""
        return (
            f"first difference: stream {self.stream!r}, frame {self.frame}, element {self.element}: "
            f"recorded {np.float32(self.recorded)!s}, now {np.float32(self.now)!s}"
        )


@dataclass(frozen=True, slots=True)
class ReplayComparison:
    """The comparison of answers with a recording."""

    total: int
    """Frames in the file."""
    frames: int
    """Frames compared: those that have an output in the file and were answered now."""
    unrecorded: int
    """Frames that have no output in the file."""
    different: int
    """Frames with at least one bit that differs."""
    streams_different: int
    first: Difference | None
    """The first difference in the order of the sequences."""

    @property
    def complete(self) -> bool:
        """Whether every frame in the file was compared."""
        return self.frames == self.total

    def sentence(self, exactness: str) -> str:
        """Summarize the differences, as the end of a sentence."""
        if not self.frames:
            return "there was nothing to compare"
        compared = "" if self.complete else f"{self.frames:,} of {counted(self.total, 'frame')} were compared: "
        if not self.different:
            return f"{compared}all {self.frames:,} equal those in the file, bit for bit"
        note = "" if exactness == "exact" else " (the server is not exact)"
        return (
            f"{compared}{self.different:,} of {self.frames:,} frames differ from those in the file, "
            f"in {counted(self.streams_different, 'stream')}{note}"
        )


def compare(recorded: RecordedSequences, outputs: F32, which: npt.NDArray[np.bool_]) -> ReplayComparison:
    """Compare outputs with the recorded ones as bits: NaN equals only the same NaN, and -0 is not 0.

    Args:
        recorded: the recorded outputs.
        outputs: the present outputs, float32 [sum, outputs].
        which: bool [sum], the frames that were answered now. Frames without a recorded output are skipped, too.
    """
    if recorded.outputs is None:
        raise ValueError("there must be recorded outputs")
    comparable = np.ones_like(which) if recorded.answered is None else recorded.answered
    unrecorded = int((~comparable & np.isnan(recorded.outputs).all(axis=1)).sum())
    both = which & comparable
    bits_differ = (recorded.outputs.view(np.uint32) != outputs.view(np.uint32)) & both[:, None]
    compared = int(both.sum())
    frames = np.flatnonzero(bits_differ.any(axis=1))
    if not len(frames):
        return ReplayComparison(len(which), compared, unrecorded, 0, 0, None)
    rows = np.searchsorted(recorded.starts, frames, side="right") - 1
    flat, row = int(frames[0]), int(rows[0])
    element = int(np.argmax(bits_differ[flat]))
    first = Difference(
        stream=recorded.names[row],
        frame=flat - int(recorded.starts[row]),
        element=element,
        recorded=float(recorded.outputs[flat, element]),
        now=float(outputs[flat, element]),
    )
    return ReplayComparison(len(which), compared, unrecorded, len(frames), len(np.unique(rows)), first)
