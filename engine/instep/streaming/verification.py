"""Findings of the live verification of a model: the record that the server's numbers and views read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

VerificationState: TypeAlias = Literal["off", "checking", "verified", "mismatch"]
"""`off`: nothing is checked, for the `reason` given. `checking`: nothing was compared yet, or the checker is late.
`verified`: all compared frames matched. `mismatch`: some frame did not match since the start."""

_QUIET_S: Final = 2.0
_LATE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class WrongFrame:
    """A frame that was served with another output than it has when it is computed again."""

    stream: str
    seq: int
    position: int
    """The position of its batch in the recording."""
    expected: list[float | str]
    """The output as computed again, values that are not finite as text; empty where the frame is out of order."""
    got: list[float | str]
    """The output as served."""
    sentence: str
    """The first difference, in words."""


@dataclass(slots=True)
class Verification:
    """Counts since the server started, over all processes that have checked."""

    is_off: bool = False
    reason: str = ""
    """Why it is off, or the recording cannot be read for the time being."""
    pid: int | None = None
    frames_total: int = 0
    """Frames that were compared."""
    mismatches_total: int = 0
    """Streams with a frame that did not match; each counts once."""
    skipped: int = 0
    """Recorded frames that were not compared."""
    has_trimmed: bool = False
    """Whether some of these were trimmed before they were read."""
    mismatch: WrongFrame | None = None
    """The last one."""
    reported_lag_s: float = 0.0
    reported_s: float = 0.0
    """The monotonic time of the last report of the lag; 0 before the first."""
    began_s: float = 0.0
    """The monotonic time at which the first process began."""

    @property
    def _silent_s(self) -> float:
        heard_s = self.reported_s or self.began_s
        return time.monotonic() - heard_s if heard_s else 0.0

    @property
    def is_silent(self) -> bool:
        """Whether the process has not reported anything for a while: it was stopped, or hangs, or is starting."""
        return self._silent_s > _QUIET_S

    @property
    def lag_s(self) -> float:
        """Seconds since the oldest frame that is not checked yet was committed, as far as is known."""
        return self.reported_lag_s + (self._silent_s if self.is_silent else 0.0)

    @property
    def is_late(self) -> bool:
        """Whether checking is far behind serving, or off."""
        return self.is_off or self.lag_s >= _LATE_S

    @property
    def state(self) -> VerificationState:
        """See `VerificationState`."""
        if self.mismatches_total:
            return "mismatch"
        if self.is_off:
            return "off"
        return "verified" if self.frames_total and not self.is_late else "checking"

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        wrong = self.mismatch
        mismatch = wrong and {each: getattr(wrong, each) for each in ("stream", "seq", "position", "expected", "got")}
        return {
            "state": self.state,
            "reason": self.reason,
            "frames": self.frames_total,
            "skipped": self.skipped,
            "lag_s": self.lag_s,
            "mismatches": self.mismatches_total,
            "mismatch": mismatch,
        }

    def numbers(self) -> dict[str, float]:
        """All numbers by name."""
        return {
            "verified_frames_total": float(self.frames_total),
            "verify_mismatches_total": float(self.mismatches_total),
            "verify_skipped_frames_total": float(self.skipped),
            "verify_lag_s": self.lag_s,
        }
