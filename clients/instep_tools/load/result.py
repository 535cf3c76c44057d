"""What a load test found: as numbers, as a verdict, as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from instep_client.protocol.wire import ServerInfo
from instep_tools.load.generator import PartResult
from instep_tools.load.plan import LoadPlan, Mode
from instep_tools.load.samples import F64, Distribution, SampleArray, distribution
from instep_tools.words import finite

PARTS: Final = ("late_us", "away_us", "queue_us", "compute_us", "send_us", "rest_us")
"""The parts of a latency, as they are called in `SAMPLE`."""
TOLERATED_LATE_US: Final = 1000.0
"""At the 99th percentile; beyond it, a load generator that causes half of the latency by itself is too slow."""

Verdict: TypeAlias = Literal["met", "not met", "invalid"]


@dataclass(frozen=True)
class Measured:
    """One load and what came of it."""

    plan: LoadPlan
    found: PartResult
    seconds: float
    """How long frames were counted."""
    frames_s: float
    """Frames a second that were answered in this time."""
    answers_s: float
    """Blocks a second that were answered in this time."""
    latency: Distribution
    """In µs; frames that were due but not answered count with the time they waited."""
    parts: Mapping[str, Distribution]
    """By `PARTS`, in µs."""

    @property
    def shown(self) -> list[str]:
        """The parts that this load has: in a closed loop nothing is due, so nothing is late."""
        missing = {"late_us"} if self.plan.mode is Mode.CLOSED else set()
        if not (self.samples["away_us"] > 0).any():
            missing.add("away_us")
        return [name for name in PARTS if name not in missing]

    @property
    def samples(self) -> SampleArray:
        """One for each block."""
        return self.found.samples

    @property
    def answered(self) -> SampleArray:
        """Those of the blocks that were answered."""
        answered: SampleArray = self.samples[~np.isnan(self.samples["rest_us"])]
        return answered

    @property
    def whole(self) -> bool:
        """Whether every frame that was due was answered."""
        found = self.found
        missing = found.unanswered or found.unsent or found.gave_up or found.lost
        return not found.refused and not missing and len(self.samples) > 0

    @property
    def due_frames(self) -> int:
        """How many frames were due by the end of the test, or sent in a closed loop."""
        return int(self.samples["frames"].sum()) + self.found.refused.total()

    @property
    def measured_itself(self) -> bool:
        """Whether this side could not keep up: what it found says nothing about the server."""
        late_us = self.parts["late_us"].p99
        return self.found.unsent > 0 or late_us > max(TOLERATED_LATE_US, self.latency.p99 / 2)

    @property
    def sent_share(self) -> float:
        """The share of the frames due that this side sent, late or not."""
        found = self.samples
        was_answered, had_time = ~np.isnan(found["rest_us"]), found["late_us"] < found["latency_us"]
        due = found["frames"].sum()
        return float(found["frames"][was_answered | had_time].sum() / due) if due else 0.0

    @property
    def own_us(self) -> F64:
        """This side's own share of each latency: the time until it sent, and the time it stood still afterwards."""
        own_us: F64 = self.samples["late_us"] + self.samples["held_up_us"]
        return own_us

    @property
    def own_p99_us(self) -> float:
        """99 % of the frames have a smaller share of this side's in their latency."""
        return distribution(self.own_us, self.samples["frames"]).p99

    def verdict(self, slo_ms: float) -> Verdict:
        """Whether every frame was answered, and 99 % of them in time; `invalid` where this side may be the cause.

        It may be when it was late by half of the level, or when the level would have been met without its own share of
        each latency: the time until it sent, and the time in which it stood still afterwards. That counts twice: the
        threads that send and receive below the event loop wait for the processor as well.
        """
        found, slo_us = self.found, 1000 * slo_ms
        if self.whole and self.latency.p99 <= slo_us:
            return "met"
        if found.unsent or self.parts["late_us"].p99 > max(TOLERATED_LATE_US, slo_us / 2):
            return "invalid"
        if found.refused or found.unanswered or found.lost:
            return "not met"
        own_us = self.own_us
        own_us[own_us <= min(TOLERATED_LATE_US, slo_us / 10)] = 0
        served_us = self.samples["latency_us"] - 2 * own_us
        return "invalid" if distribution(served_us, self.samples["frames"]).p99 <= slo_us else "not met"

    @property
    def longest_silence_s(self) -> float:
        """The longest time in which nothing was answered."""
        at_s = np.sort(self.answered["at_s"])
        end = max(self.seconds, float(at_s.max(initial=0.0)), *(end for _, end in self.found.gaps))
        return float(np.diff(at_s, prepend=0.0, append=end).max())

    @property
    def gaps(self) -> list[tuple[float, float]]:
        """When at least one connection was lost, in seconds after the warm-up: gaps that overlap are one."""
        merged: list[tuple[float, float]] = []
        for start, end in sorted(self.found.gaps):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            else:
                merged.append((start, end))
        return merged

    @property
    def shown_s(self) -> float:
        """How much time a picture shows: the planned one where the server went away before."""
        return self.plan.duration_s if self.found.lost else self.seconds

    @property
    def reconnections(self) -> int:
        """How many connections were lost and came back."""
        return len(self.found.gaps) - self.found.gone

    @property
    def away_s(self) -> float:
        """How long at least one connection was lost."""
        return math.fsum(end - start for start, end in self.gaps)

    def as_json(self) -> dict[str, Any]:
        """All that was found, as JSON values; latencies in microseconds."""
        latencies = {"latency": self.latency} | {name.removesuffix("_us"): part for name, part in self.parts.items()}
        is_open = self.plan.mode is Mode.OPEN
        return {
            "load": {**asdict(self.plan), "rate_hz": self.plan.rate_hz if is_open else None},
            "seconds": self.seconds,
            "samples": len(self.samples),
            "frames_per_second": self.frames_s,
            "answers_per_second": self.answers_s,
            "latency_us": {name: finite(asdict(part)) for name, part in latencies.items()},
            "refused_frames": dict(self.found.refused),
            "unanswered_frames": self.found.unanswered,
            "unsent_frames": self.found.unsent,
            "measured_itself": self.measured_itself,
            "reconnections": self.reconnections,
            "without_connection_s": self.away_s,
            "longest_silence_s": self.longest_silence_s,
            "error": self.found.lost or None,
        }


def measured(plan: LoadPlan, found: PartResult) -> Measured:
    """Boil a result down."""
    samples = found.samples
    answered = samples[~np.isnan(samples["rest_us"])]
    seconds = plan.duration_s
    if found.stopped or found.gave_up or found.lost:
        seconds = min(seconds, float(answered["at_s"].max(initial=0.0)))
    in_time = answered[answered["at_s"] <= seconds]
    return Measured(
        plan=plan,
        found=found,
        seconds=seconds,
        frames_s=float(in_time["frames"].sum()) / seconds if seconds else 0.0,
        answers_s=len(in_time) / seconds if seconds else 0.0,
        latency=distribution(samples["latency_us"], samples["frames"]),
        parts={name: distribution(samples[name], samples["frames"]) for name in PARTS},
    )


def search_as_json(
    trials: Sequence[Measured], slo_ms: float, best: Measured | None, limited: bool, ended: str
) -> dict[str, Any]:
    """All tries of a search."""
    return {
        "slo_ms": slo_ms,
        "streams": 0 if best is None else best.plan.streams,
        "limited_by_server": limited,
        "ended": ended or None,
        "best": None if best is None else best.as_json(),
        "trials": [trial.as_json() | {"verdict": trial.verdict(slo_ms)} for trial in trials],
    }


def server_as_json(info: ServerInfo) -> dict[str, Any]:
    """What was measured."""
    names = ("model", "fingerprint", "features", "outputs", "device", "exactness", "arithmetic")
    return {name: getattr(info, name) for name in names}
