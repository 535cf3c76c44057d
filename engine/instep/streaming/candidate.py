"""Findings of a candidate that shadows a model: the record that the server's numbers and views read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(slots=True)
class CandidateStatus:
    """Counts since the candidate began to shadow the model, over all processes that have stepped it."""

    folder: Path
    fingerprint: str
    share: float
    """Of the streams."""
    reason: str = ""
    """Why nothing is compared any more; empty while it is."""
    pid: int | None = None
    """Of the process that steps it."""
    reported_s: float = 0.0
    """When that process has said something last, of the monotonic clock; 0 before it has."""
    streams: int = 0
    """Open streams that are followed."""
    dropped: int = 0
    """Streams that were given up or left out, because the candidate could not keep up."""
    frames: int = 0
    """Frames that were compared."""
    equal: int = 0
    """Frames whose outputs have the same bits."""
    largest: float = 0.0
    """The largest absolute difference of one value; infinity where one is not finite and the other differs."""
    mean: float = 0.0
    """The mean absolute difference of all values."""
    quiet_s: float = 10.0
    """A process that says nothing for longer is late."""

    @property
    def state(self) -> Literal["starting", "following", "late", "ended"]:
        """What becomes of it.

        `starting`: a process loads it, or is about to. `following`: it is compared. `late`: that process says nothing.
        `ended`: nothing is compared any more, and `reason` says why.
        """
        if self.reason:
            return "ended"
        if not self.reported_s:
            return "starting"
        return "following" if time.monotonic() - self.reported_s < self.quiet_s else "late"

    @property
    def is_following(self) -> bool:
        """Whether it is compared now."""
        return self.state == "following"

    @property
    def key(self) -> tuple[Path, str, float]:
        """What is compared, and on which streams."""
        return self.folder, self.fingerprint, self.share

    def as_json(self) -> dict[str, Any]:
        """Plain values; `folder` has none above it."""
        return {
            "state": self.state,
            "reason": self.reason,
            "folder": self.folder.name,
            "fingerprint": self.fingerprint,
            "share": self.share,
            "streams": self.streams,
            "dropped": self.dropped,
            "frames": self.frames,
            "equal": self.equal,
            "largest": self.largest,
            "mean": self.mean,
        }

    def numbers(self) -> dict[str, float]:
        """Everything that can be counted, by name."""
        return {
            "shadow_following": float(self.is_following),
            "shadow_share": self.share,
            "shadow_streams": float(self.streams),
            "shadow_dropped_streams_total": float(self.dropped),
            "shadow_frames_total": float(self.frames),
            "shadow_equal_frames_total": float(self.equal),
            "shadow_largest_difference": self.largest,
            "shadow_mean_difference": self.mean,
        }
