"""What a verification found, as values: for the terminal, for JSON, for tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from instep.core.typing import I64
from instep.models.ulp import NOT_COMPARABLE

Verdict: TypeAlias = Literal["exact", "within tolerance", "mismatch", "empty"]
Way: TypeAlias = Literal["stepped", "whole sequence", "float64 reference"]
Place: TypeAlias = Literal["output", "final state"]

_WORST_FIRST: Final[tuple[Verdict, ...]] = ("mismatch", "within tolerance", "exact", "empty")

ULP_BINS: Final = 35
"""Bin 0 counts equal bits, bin 1 a distance of 1, bin k distances above 2^(k-2) up to 2^(k-1), the last bin those
between a NaN and anything else."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """An element that is not what it should be."""

    way: Way
    place: Place
    frame: int
    """The frame's seq; for a state, that of the frame that would come next."""
    element: int
    """Index in the output, or in the state as one row [layers * hidden size]."""
    recorded: float
    replayed: float
    """In the float64 reference, with its full precision."""
    ulp: int
    """Distance of the two as float32, in units in the last place."""

    def sentence(self) -> str:
        """In words."""
        where = f"frame {self.frame}" if self.place == "output" else self.place
        apart = "one is not a number" if self.ulp >= NOT_COMPARABLE else f"{self.ulp:,} ULP apart"
        recorded = str(np.float32(self.recorded))  # the fewest digits that name this float32
        other = str(self.replayed if self.way == "float64 reference" else np.float32(self.replayed))
        return f"{where}, element {self.element}: recorded {recorded}, {self.way} {other} ({apart})"

    def as_json(self) -> dict[str, Any]:
        """For JSON, which knows no NaN: values that are not finite become strings."""
        return {
            "way": self.way,
            "place": self.place,
            "frame": self.frame,
            "element": self.element,
            "recorded": _json_number(self.recorded),
            "replayed": _json_number(self.replayed),
            "ulp": self.ulp,
        }


@dataclass(frozen=True, slots=True)
class StreamReport:
    """What was found in one stream."""

    stream: int
    name: str
    frames: int
    """Frames that were checked."""
    not_compared: int
    """Frames whose outputs were not recorded, because the engine was killed as it computed them."""
    verdict: Verdict
    problems: tuple[str, ...]
    """Why it is a mismatch, as sentences."""
    divergence: Divergence | None
    """The first one; also of a stream within tolerance, whose bits differ."""
    max_ulp: int
    """Largest distance between recorded and replayed outputs or states, over both replays."""
    max_error: float
    """Largest distance from the float64 reference."""

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "stream": self.stream,
            "name": self.name,
            "frames": self.frames,
            "not_compared": self.not_compared,
            "verdict": self.verdict,
            "problems": list(self.problems),
            "first_divergence": None if self.divergence is None else self.divergence.as_json(),
            "max_ulp": self.max_ulp,
            "max_error": _json_number(self.max_error),
        }


def joined(parts: Sequence[StreamReport]) -> StreamReport:
    """What was found in the stretches of one stream, in order, as one."""
    divergences = [part.divergence for part in parts if part.divergence is not None]
    wrong = [part.divergence for part in parts if part.divergence is not None and part.verdict == "mismatch"]
    verdicts = {part.verdict for part in parts}
    return StreamReport(
        stream=parts[0].stream,
        name=parts[0].name,
        frames=sum(part.frames for part in parts),
        not_compared=sum(part.not_compared for part in parts),
        verdict=next(verdict for verdict in _WORST_FIRST if verdict in verdicts),
        problems=tuple(problem for part in parts for problem in part.problems),
        divergence=next(iter((*wrong, *divergences)), None),
        max_ulp=max(part.max_ulp for part in parts),
        max_error=max(part.max_error for part in parts),
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What was found in a recording."""

    file: Path
    model_name: str
    fingerprint: str
    streams: tuple[StreamReport, ...]
    finished: bool
    """Whether the recording was closed in order; otherwise it was checked up to its last commit."""
    notes: tuple[str, ...]
    """Why bits were not required to be equal, where they were not."""
    buckets: tuple[int, ...]
    """Batch sizes the streams were stepped in."""
    seconds: float
    ulps: dict[Way, I64] = field(default_factory=dict)
    """Elements by their distance in ULP, for both replays; see `ULP_BINS`."""

    @property
    def frames(self) -> int:
        """Frames that were checked."""
        return sum(stream.frames for stream in self.streams)

    @property
    def not_compared(self) -> int:
        """Frames whose outputs were not recorded, because the engine was killed as it computed them."""
        return sum(stream.not_compared for stream in self.streams)

    @property
    def mismatches(self) -> int:
        """Streams that are not what they should be."""
        return sum(stream.verdict == "mismatch" for stream in self.streams)

    @property
    def max_error(self) -> float:
        """Largest distance from the float64 reference."""
        return max((stream.max_error for stream in self.streams), default=0.0)

    @property
    def verdict(self) -> Verdict:
        """The worst of any stream."""
        found = {stream.verdict for stream in self.streams}
        return next((verdict for verdict in _WORST_FIRST[:2] if verdict in found), "exact")

    def summary(self) -> str:
        """One line."""
        checked = f"{counted(len(self.streams), 'stream')}, {counted(self.frames, 'frame')}"
        mismatches = f"{self.mismatches:,} mismatch{'' if self.mismatches == 1 else 'es'}"
        ways = f"stepped, whole sequence; float64 reference: max error {self.max_error:.1e}"
        if self.verdict == "mismatch":
            return f"not verified: {checked}, {mismatches} ({ways})"
        return f"verified: {checked}, {self.verdict}, {mismatches} ({ways})"

    def as_json(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "file": str(self.file),
            "verified": self.verdict != "mismatch",
            "verdict": self.verdict,
            "summary": self.summary(),
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "finished": self.finished,
            "frames": self.frames,
            "not_compared": self.not_compared,
            "mismatches": self.mismatches,
            "max_error": _json_number(self.max_error),
            "notes": list(self.notes),
            "buckets": list(self.buckets),
            "seconds": round(self.seconds, 3),
            "ulp_histogram": {
                way: {ulp_label(at): int(count) for at, count in enumerate(counts) if count}
                for way, counts in self.ulps.items()
            },
            "streams": [stream.as_json() for stream in self.streams],
        }


def ulp_bins(distances: I64) -> I64:
    """Count distances in ULP by bin (see `ULP_BINS`)."""
    # The smallest k with distance <= 2^k; frexp is exact where log2 may round.
    exponents = np.frexp(np.maximum(distances, 1).astype(np.float64) - 0.5)[1]
    bins = np.where(distances == 0, 0, exponents + 1)
    bins[distances >= NOT_COMPARABLE] = ULP_BINS - 1
    counts: I64 = np.bincount(bins, minlength=ULP_BINS).astype(np.int64)
    return counts


def ulp_label(at: int) -> str:
    """What a bin counts, in words."""
    if at < 3:
        return str(at)
    if at == ULP_BINS - 1:
        return "NaN"
    return f"{2 ** (at - 2) + 1:,}–{2 ** (at - 1):,}"


def counted(number: int, noun: str) -> str:
    """A number of them, in words."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
