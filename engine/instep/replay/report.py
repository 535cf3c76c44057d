"""The result of a verification as values: for the terminal, for JSON, for tests."""

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
"""The compiled step, the definition of its arithmetic, torch's own module over whole sequences, or the reference."""
ReferenceKind: TypeAlias = Literal["independent", "same graph", "none"]
"""Whether the float64 reference is written again from the equations, or is the served graph in float64."""
Place: TypeAlias = Literal["output", "final state", "checkpoint", "state"]

WORST_FIRST: Final[tuple[Verdict, ...]] = ("mismatch", "not checked", "within tolerance", "exact", "empty")


class CannotVerify(Exception):
    """The check could not be made; the message is a sentence saying why and what to do."""


class NoFrames(CannotVerify):
    """The recording holds no frames, which is no fault of one among several."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """A recorded element that differs from the one computed again."""

    checker: Checker
    place: Place
    frame: int
    """The frame's seq; for a state, that of the frame that would come next."""
    element: int
    """Index in the output, or among all values of the state, leaf by leaf."""
    recorded: float
    replayed: float
    """The value of the float64 reference, with its full precision."""

    def sentence(self) -> str:
        """Describe the divergence."""
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
    """Frames that were checked."""
    not_compared: int = 0
    """Frames whose outputs were not recorded, because the engine was killed as it computed them."""
    verdict: Verdict = "empty"
    problems: list[str] = field(default_factory=list)
    """Why it is a mismatch or not checked, as sentences."""
    divergence: Divergence | None = None
    """The first wrong value."""
    max_difference: float = 0.0
    """Largest distance from the compiled step."""
    max_distance: float = 0.0
    """Largest distance from torch's own module, up to `lossy_from`."""
    max_error: float = 0.0
    """Largest distance from the float64 reference, up to `lossy_from`."""
    lossy_from: int | None = None
    """The seq from which the float64 reference bounds nothing, because frames or states are too large for float32 or
    there is no reference, and outputs are beyond the bound."""

    def worsen(self, verdict: Verdict) -> None:
        """Take this verdict, unless the one before is worse."""
        self.verdict = min(self.verdict, verdict, key=WORST_FIRST.index)

    def add_problem(self, sentence: str, verdict: Verdict = "mismatch") -> None:
        """Add a problem."""
        self.problems.append(sentence)
        self.worsen(verdict)

    def add_mismatch(self, divergence: Divergence) -> None:
        """A value is wrong."""
        self.divergence = self.divergence or divergence
        self.add_problem(divergence.sentence())

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        distances = ("max_difference", "max_distance", "max_error")
        fields = asdict(self) | {name: _json_number(getattr(self, name)) for name in distances}
        del fields["divergence"]
        return fields | {"first_divergence": None if self.divergence is None else self.divergence.as_json()}


class Coverage(NamedTuple):
    """The coverage of a checker that need not compare everything."""

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
    """Whether the recording was closed in order; otherwise it was checked up to its last commit."""
    notes: tuple[str, ...]
    """Why bits were not required to be equal, where they were not."""
    seconds: float
    ending: str = ""
    """The end of the recording in words."""
    lost: str = ""
    """The losses of the WAL in words; empty if nothing is missing."""
    trimmed: str = ""
    """The beginning of the recording, such as "begins at position 1,201 (…)"; empty where no history was trimmed."""
    elements: dict[Checker, int] = field(default_factory=dict)
    """The count of output and state elements that each checker compared."""
    definition: Coverage = field(default_factory=Coverage)
    """The coverage of the definition."""
    reference: ReferenceKind = "independent"

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
        """Streams with a mismatch."""
        return sum(stream.verdict == "mismatch" for stream in self.streams)

    @property
    def unchecked(self) -> int:
        """Streams whose outputs could be neither confirmed nor refuted."""
        return sum(stream.verdict == "not checked" for stream in self.streams)

    def largest(self, distance: Literal["max_difference", "max_distance", "max_error"]) -> float:
        """The largest of any stream."""
        return max((getattr(stream, distance) for stream in self.streams), default=0.0)

    @property
    def verdict(self) -> Verdict:
        """The worst of any stream."""
        found = {stream.verdict for stream in self.streams}
        return next((verdict for verdict in WORST_FIRST[:3] if verdict in found), "exact")

    @property
    def verified(self) -> bool:
        """Whether everything was checked and matched."""
        return self.verdict not in ("mismatch", "not checked") and not self.lost

    def summary(self) -> str:
        """One line."""
        checked = f"{counted(len(self.streams), 'stream')}, {counted(self.frames, 'frame')}"
        mismatches = counted(self.mismatches, "mismatch", "mismatches")
        if not self.verified:
            unchecked = f", {counted(self.unchecked, 'stream')} not checked" if self.unchecked else ""
            lost = f", {self.lost}" if self.lost else ""
            return f"not verified: {checked}, {mismatches}{unchecked}{lost}"
        return f"verified: {checked}, {self.verdict}, {mismatches}"

    def checkers(self) -> str:
        """Describe the checks in one line."""
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
        """The coverage of the definition in words."""
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
