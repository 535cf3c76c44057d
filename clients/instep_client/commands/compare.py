"""Comparing answers with a recording, bit for bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from instep_client.commands.sequences import Sequences
from instep_client.commands.words import counted


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
class Comparison:
    """Answers beside a recording."""

    frames: int
    """Frames compared."""
    different: int
    """Frames with at least one bit that differs."""
    streams_different: int
    first: Difference | None
    """In the order of the sequences."""

    def sentence(self, exactness: str) -> str:
        """How much differs, as the end of a sentence."""
        if not self.frames:
            return "there was nothing to compare"
        if not self.different:
            return f"all {self.frames:,} equal the recording, bit for bit"
        note = "" if exactness == "exact" else f" (the server is not exact but {exactness!r})"
        return (
            f"{self.different:,} of {self.frames:,} frames differ from the recording, "
            f"in {counted(self.streams_different, 'stream')}{note}"
        )

    def as_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def compare(recorded: Sequences, now: Sequences) -> Comparison:
    """Compare the outputs of the same sequences as bits: NaN equals only the same NaN, and -0 is not 0."""
    if recorded.outputs is None or now.outputs is None:
        raise ValueError("both must have outputs")
    bits_differ = recorded.outputs.view(np.uint32) != now.outputs.view(np.uint32)
    frames = np.flatnonzero(bits_differ.any(axis=1))
    if not len(frames):
        return Comparison(len(bits_differ), 0, 0, None)
    rows = np.searchsorted(recorded.starts, frames, side="right") - 1
    flat, row = int(frames[0]), int(rows[0])
    element = int(np.argmax(bits_differ[flat]))
    first = Difference(
        stream=recorded.names[row],
        frame=flat - int(recorded.starts[row]),
        element=element,
        recorded=float(recorded.outputs[flat, element]),
        now=float(now.outputs[flat, element]),
    )
    return Comparison(len(bits_differ), len(frames), len(np.unique(rows)), first)
