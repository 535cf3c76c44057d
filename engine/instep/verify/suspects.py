"""What is to be checked, and what is wrong with it already."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from instep.core.typing import F32
from instep.recording.records import StreamInfo
from instep.recording.sequences import Stretch
from instep.verify.report import StreamReport


@dataclass(frozen=True, slots=True)
class Suspect:
    """A stretch of a stream to check and what the index found wrong with it, if anything."""

    info: StreamInfo
    stretch: Stretch
    unanswered: int
    """How many of its frames have no recorded outputs."""
    defect: str | None

    @property
    def final_state(self) -> F32 | None:
        """The recorded last state; None also after a defect, where it is not that of the frames before."""
        return None if self.defect is not None else self.stretch.final_state


def check_without_frames(suspect: Suspect) -> StreamReport:
    """A stretch without frames: its final state must be its initial one."""
    problems = [] if suspect.defect is None else [suspect.defect]
    final = suspect.final_state
    if final is not None:
        initial = np.zeros_like(final) if suspect.stretch.initial_state is None else suspect.stretch.initial_state
        if final.tobytes() != initial.tobytes():
            problems.append("it has no frames, but its final state is not its initial state")
    return StreamReport(
        stream=suspect.info.stream,
        name=suspect.info.name,
        frames=0,
        not_compared=0,
        verdict="mismatch" if problems else "empty",
        problems=tuple(problems),
        divergence=None,
        max_ulp=0,
        max_error=0.0,
    )
