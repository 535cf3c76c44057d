"""Frames that a follower reads and does not compare, by the reason."""

from __future__ import annotations

from collections import Counter
from enum import StrEnum


class Reason(StrEnum):
    """Why a frame is not compared. Where too many were counted, those of the reason named first are taken off first."""

    NOT_SAMPLED = "not_sampled"
    """Its stream is not among the share that is followed."""
    STATE_TOO_OLD = "state_too_old"
    """The newest recorded state of its stream was too old when the stream was met."""
    BEHIND = "behind"
    """It was left out to catch up with the writer."""
    DIFFERS = "differs"
    """A mismatch was found in its stream before."""
    CLOSED = "closed"
    """Its stream had closed when it was met, and a closed one has no recorded state."""
    NO_OUTPUT = "no_output"
    """The server was killed before it had computed the output."""
    UNCHECKED = "unchecked"
    """The history was trimmed before the frame was read: nobody can check it any more."""
    OTHER = "other"
    """A state behind it is the first that is known of its stream; or the checkpoint that it waited for never came."""


def by_reason(counts: Counter[Reason], skipped: int) -> dict[str, int]:
    """Frames counted as they were read first, adjusted so that they add up to all that were not compared, `skipped`.

    Some frames were counted and compared after all, once more streams were followed; for others the reason was not
    known when they were read.
    """
    found, surplus = dict[str, int](), counts.total() - skipped
    for reason in Reason:
        taken = min(max(0, surplus), counts[reason])
        surplus -= taken
        found[str(reason)] = counts[reason] - taken
    found[Reason.OTHER] += max(0, -surplus)
    return {reason: frames for reason, frames in found.items() if frames}
