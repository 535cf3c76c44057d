"""How a comparison is measured, and the row that comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, Protocol, TypeAlias, TypeVar

import psutil

from instep.demo.child_server import ChildServer

Direction: TypeAlias = Literal["at least", "at most"]
Samples: TypeAlias = dict[str, list[float]]
"""One value for each round, by what was measured; the name ends in the unit."""


class Server(Protocol):
    """A running server."""

    @property
    def endpoint(self) -> str:
        """Where it listens."""
        ...

    @property
    def pid(self) -> int:
        """The process id."""
        ...


def _on_cpu(model: Path, arguments: Sequence[str]) -> ChildServer:
    return ChildServer(model, ["--device", "cpu", *arguments])


@dataclass(frozen=True, slots=True)
class Bench:
    """The settings that all rows of one run share.

    Attributes:
        folder: for models and recordings; empty at first and removed afterwards.
        rounds: how many count.
        warm_up: how many come before them and do not count, 1 or 0.
        seconds: how long each side of a comparison is measured in each round.
        scale: divides the streams and frames of the large loads.
        model: the user's model folder, to be measured instead of the benchmark's own.
        serve: starts a server for a model folder and arguments of `instep serve`.
    """

    folder: Path
    rounds: int = 7
    seconds: float = 1.5
    scale: int = 1
    warm_up: int = 1
    model: Path | None = None
    serve: Callable[[Path, Sequence[str]], AbstractContextManager[Server]] = _on_cpu

    def scaled(self, number: int, least: int) -> int:
        """The size of a load in this run."""
        return max(least, number // self.scale)


T = TypeVar("T")


def interleave(bench: Bench, sides: Mapping[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Measure every side once in each round, in alternating order; a warm-up before the first does not count.

    Interleaved rounds expose both sides to the same changes of the machine: its heat, its clocks, its other work.
    """
    samples: dict[str, list[T]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(1 - bench.warm_up, bench.rounds + 1):
        for name in names if number % 2 else reversed(names):
            value = sides[name]()
            if number:
                samples[name].append(value)
    return samples


@dataclass(frozen=True, slots=True)
class Row:
    """One result and the threshold that it is held against."""

    name: str
    what: str
    """The comparison in words."""
    model: str
    unit: str
    """`×` for a ratio."""
    value: float
    threshold: float | None
    """None for information that is not judged."""
    samples: Samples
    direction: Direction = "at least"

    @property
    def reached(self) -> bool | None:
        """Whether the value is good enough; None where nothing is required."""
        if self.threshold is None:
            return None
        return self.value >= self.threshold if self.direction == "at least" else self.value <= self.threshold

    def as_json(self) -> dict[str, Any]:
        """All fields, with floats cut to significant digits."""
        return {
            **asdict(self),
            "value": _short(self.value),
            "samples": {name: [_short(value) for value in values] for name, values in self.samples.items()},
            "medians": {name: _short(median(values)) for name, values in self.samples.items()},
            "reached": self.reached,
        }


def compared(
    name: str,
    what: str,
    model: str,
    samples: Samples,
    of: str,
    over: str,
    threshold: float | None,
    direction: Direction = "at least",
    beside: Sequence[str] = (),
) -> Row:
    """The row of the median of one side over the median of another; `beside` are other sides to be shown."""
    shown = {side: samples[side] for side in (of, over, *beside)}
    return Row(name, what, model, "×", ratio(samples, of, over), threshold, shown, direction)


def ratio(samples: Samples, of: str, over: str) -> float:
    """The median of one side over the median of another."""
    return median(samples[of]) / median(samples[over])


def cpu_s(pid: int) -> float:
    """The seconds of CPU that a process has used, with all of its threads and children."""
    process = psutil.Process(pid)
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def _short(value: float) -> float:
    return float(f"{value:.5g}")
