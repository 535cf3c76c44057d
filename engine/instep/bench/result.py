"""What a row of the suite came to: a number, the bar that it is held against, and what it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, TypeAlias

Direction: TypeAlias = Literal["at least", "at most"]
Samples: TypeAlias = dict[str, list[float]]
"""By what was measured, with its unit in the name: one value a round."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row; `reached` and `verdict` follow from the rest."""

    name: str
    what: str
    """What is measured, or compared with what."""
    unit: str
    """`×` for a ratio."""
    value: float
    bar: float
    direction: Direction
    samples: Samples
    details: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""
    """Why the bar is not reached whatever the value is."""

    @property
    def reached(self) -> bool:
        """Whether the value is good enough, and counts."""
        is_good = self.value >= self.bar if self.direction == "at least" else self.value <= self.bar
        return is_good and not self.problem

    @property
    def verdict(self) -> str:
        """In words."""
        if self.problem:
            return f"NOT reached: {self.problem}"
        return "reached" if self.reached else "NOT reached"

    @property
    def over_bar(self) -> float:
        """How far above the bar it is, as a factor; below 1 it is not reached."""
        return self.value / self.bar if self.direction == "at least" else self.bar / max(self.value, 1e-12)

    def as_json(self) -> dict[str, Any]:
        """For JSON; floats are cut to what means anything."""
        fields = asdict(self)
        fields["value"] = _short(self.value)
        fields["samples"] = {name: [_short(value) for value in values] for name, values in self.samples.items()}
        fields["medians"] = {name: _short(median(values)) for name, values in self.samples.items()}
        return {**fields, "reached": self.reached, "verdict": self.verdict}


def ratio(samples: Samples, of: str, over: str) -> float:
    """The medians of two ways, one over the other."""
    return median(samples[of]) / median(samples[over])


def _short(value: float) -> float:
    return float(f"{value:.5g}")
