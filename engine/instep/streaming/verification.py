"""Findings of a model's live verification, from which the server's numbers and views are made."""

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
    """A frame whose served output differs from the one computed again."""

    stream: str
    seq: int
    position: int
    """The position of its batch in the recording."""
    expected: list[float | str]
    """The output computed again, with non-finite values as text; empty if the frame is out of order."""
    got: list[float | str]
    """The served output."""
    sentence: str
    """A sentence about the first difference."""


@dataclass(slots=True)
class Verification:
    """Counts since the server started, over all processes that have checked."""

    is_off: bool = False
    reason: str = ""
    """The reason that it is off, or that the recording cannot be read at the moment."""
    pid: int | None = None
    frames_total: int = 0
    """The number of compared frames."""
    mismatches_total: int = 0
    """The number of streams with a mismatch."""
    skipped: int = 0
    """The number of recorded frames that were not compared."""
    has_trimmed: bool = False
    """Whether some of the skipped frames were trimmed before they were read."""
    mismatch: WrongFrame | None = None
    """The last mismatch."""
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
        """Whether the process has reported nothing for a while: it is stopped, hangs, or is starting."""
        return self._silent_s > _QUIET_S

    @property
    def lag_s(self) -> float:
        """Seconds since the commit of the oldest unchecked frame, as far as is known."""
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
