"""The result of a verification as values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np

from instep_tools.words import counted

Verdict: TypeAlias = Literal["exact", "within tolerance", "not checked", "mismatch", "empty"]
Checker: TypeAlias = Literal["stepped", "definition", "torch", "float64 reference"]
"""The compiled step, the definition of its arithmetic, torch's module over whole sequences, or the reference."""
ReferenceKind: TypeAlias = Literal["independent", "same graph", "none"]
"""Whether the float64 reference was written from the equations, or is the served graph in float64."""
Place: TypeAlias = Literal["output", "final state", "checkpoint", "state"]

WORST_FIRST: Final[tuple[Verdict, ...]] = ("mismatch", "not checked", "within tolerance", "exact", "empty")


class CannotVerify(Exception):
    """The check cannot be made; the message gives the reason and what to do."""


class NoFrames(CannotVerify):
    """The recording has no frames, which is not a failure for one recording among several."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A recorded element that differs from the one computed again."""

    checker: Checker
    place: Place
    frame: int
    """The frame's seq; for a state, the seq of the frame that follows it."""
    element: int
    """The index in the output or, for a state, among the values of all leaves."""
    recorded: float
    replayed: float
    """The computed value; from the float64 reference with its full precision."""

    def sentence(self) -> str:
        """A sentence that describes it."""
        where = f"frame {self.frame}" if self.place == "output" else f"{self.place} before frame {self.frame}"
        recorded = str(np.float32(self.recorded))  # the fewest digits that name this float32
        other = str(self.replayed if self.checker == "float64 reference" else np.float32(self.replayed))
        return f"{where}, element {self.element}: recorded {recorded}, {self.checker} {other}"

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON, which has no NaN: values that are not finite become strings."""
        return asdict(self) | {"recorded": _json_number(self.recorded), "replayed": _json_number(self.replayed)}


@dataclass(slots=True)
class StreamReport:
    """The result for one stream."""

    stream: int
    name: str
    frames: int = 0
    """The number of checked frames."""
    not_compared: int = 0
    """The number of frames without recorded outputs, because the engine was killed while computing them."""
    verdict: Verdict = "empty"
    problems: list[str] = field(default_factory=list)
    """Sentences that explain a mismatch or an incomplete check."""
    divergence: Divergence | None = None
    """The first wrong value."""
    max_difference: float = 0.0
    """The largest distance from the compiled step."""
    max_distance: float = 0.0
    """The largest distance from torch's module, up to `lossy_from`."""
    max_error: float = 0.0
    """The largest distance from the float64 reference, up to `lossy_from`."""
    lossy_from: int | None = None
    """The seq from which the float64 reference gives no bound and outputs are beyond it: frames or states are too large
    for float32, or there is no reference.
    """

    def worsen(self, verdict: Verdict) -> None:
        """Set the verdict, unless the present one is worse."""
        self.verdict = min(self.verdict, verdict, key=WORST_FIRST.index)

    def add_problem(self, sentence: str) -> None:
        """Add the description of a mismatch."""
        self.problems.append(sentence)
        self.worsen("mismatch")

    def add_mismatch(self, divergence: Divergence) -> None:
        """Add a wrong value."""
        self.divergence = self.divergence or divergence
        self.add_problem(divergence.sentence())

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        distances = ("max_difference", "max_distance", "max_error")
        fields = asdict(self) | {name: _json_number(getattr(self, name)) for name in distances}
        del fields["divergence"]
        return fields | {"first_divergence": None if self.divergence is None else self.divergence.as_json()}


class Coverage(NamedTuple):
    """How much a checker compared that need not compare everything."""

    streams: int = 0
    frames: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """The result for a recording."""

    file: Path
    model_name: str
    fingerprint: str
    streams: Sequence[StreamReport]
    finished: bool
    """Whether the recording was closed cleanly; otherwise it was checked up to its last commit."""
    notes: tuple[str, ...]
    """The reasons why bits were not required to be equal; empty if they were."""
    seconds: float
    ending: str = ""
    """A phrase about the end of the recording."""
    lost: str = ""
    """A sentence about losses of the WAL; empty if nothing is missing."""
    trimmed: str = ""
    """A phrase about the beginning, such as "begins at position 1,201 (…)"; empty if no history was trimmed."""
    elements: dict[Checker, int] = field(default_factory=dict)
    """The number of output and state elements that each checker compared."""
    definition: Coverage = field(default_factory=Coverage)
    """The coverage of the definition."""
    reference: ReferenceKind = "independent"

    @property
    def frames(self) -> int:
        """The number of checked frames."""
        return sum(stream.frames for stream in self.streams)

    @property
    def not_compared(self) -> int:
        """The number of frames without recorded outputs, because the engine was killed while computing them."""
        return sum(stream.not_compared for stream in self.streams)

    @property
    def mismatches(self) -> int:
        """The number of streams with a mismatch."""
        return sum(stream.verdict == "mismatch" for stream in self.streams)

    @property
    def unchecked(self) -> int:
        """Streams whose outputs could be neither confirmed nor refuted."""
        return sum(stream.verdict == "not checked" for stream in self.streams)

    def largest(self, distance: Literal["max_difference", "max_distance", "max_error"]) -> float:
        """The largest value of any stream."""
        return max((getattr(stream, distance) for stream in self.streams), default=0.0)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict of any stream."""
        found = {stream.verdict for stream in self.streams}
        return next((verdict for verdict in WORST_FIRST[:3] if verdict in found), "exact")

    @property
    def verified(self) -> bool:
        """Whether everything was checked and matched."""
        return self.verdict not in ("mismatch", "not checked") and not self.lost

    def summary(self) -> str:
        """A summary in one line."""
        checked = f"{counted(len(self.streams), 'stream')}, {counted(self.frames, 'frame')}"
        mismatches = counted(self.mismatches, "mismatch", "mismatches")
        if not self.verified:
            unchecked = f", {counted(self.unchecked, 'stream')} not checked" if self.unchecked else ""
            lost = f", {self.lost}" if self.lost else ""
            return f"not verified: {checked}, {mismatches}{unchecked}{lost}"
        return f"verified: {checked}, {self.verdict}, {mismatches}"

    def checkers(self) -> str:
        """A description of the checks in one line."""
        are_equal = not self.notes and not self.mismatches
        stepped = "bit for bit" if are_equal else f"at most {self.largest('max_difference'):.1e} away"
        found = [f"compiled step: every frame, {stepped}"]
        if not self.notes:
            found.append(f"definition: {self.by_definition}{', bit for bit' if are_equal else ''}")
        if self.elements.get("torch"):
            explained = "" if self.mismatches or self.reference == "none" else ", as rounding explains"
            found.append(f"torch's own module: at most {self.largest('max_distance'):.1e} away{explained}")
        if self.reference != "none":
            truth = "float64" if self.reference == "independent" else "the same graph in float64"
            found.append(f"{truth}: at most {self.largest('max_error'):.1e} away")
        return "; ".join(found)

    @property
    def by_definition(self) -> str:
        """A phrase about the coverage of the definition."""
        streams, frames = self.definition
        if frames == self.frames:
            return "every frame"
        with_frames = sum(stream.frames > 0 for stream in self.streams)
        return f"{frames:,} of {counted(self.frames, 'frame')} in {streams:,} of {counted(with_frames, 'stream')}"

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "file": str(self.file),
            "verified": self.verified,
            "verdict": self.verdict,
            "summary": self.summary(),
            "model": self.model_name,
            "fingerprint": self.fingerprint,
            "ending": self.ending,
            "finished": self.finished,
            "trimmed": self.trimmed,
            "frames": self.frames,
            "not_compared": self.not_compared,
            "mismatches": self.mismatches,
            "unchecked": self.unchecked,
            "max_difference": _json_number(self.largest("max_difference")),
            "max_distance": _json_number(self.largest("max_distance")) if self.elements.get("torch") else None,
            "max_error": None if self.reference == "none" else _json_number(self.largest("max_error")),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
            "elements": self.elements,
            "definition": self.definition._asdict(),
            "reference": self.reference,
            "streams": [stream.as_json() for stream in self.streams],
        }


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
