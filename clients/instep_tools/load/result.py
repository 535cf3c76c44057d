"""The result of a load test as numbers, a verdict, text and JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np

from instep_client.protocol.wire import ServerInfo
from instep_tools.load.generator import F64, PartResult, SampleArray
from instep_tools.load.plan import LoadPlan
from instep_tools.words import counted, finite, three_digits

PERCENTILES: Final = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
P999_SAMPLES: Final = 1000
"""The fewest samples for which p99.9 is shown; with fewer it would be the maximum."""
ROWS: Final = {
    "latency_us": "latency, from when it was due",
    "late_us": "  sent late",
    "queue_us": "  server: queue (first block)",
    "compute_us": "  server: compute",
    "send_us": "  server: send",
    "rest_us": "  wire and client",
    "own_us": "own share of the load generator",
}
"""The rows of the table of latencies."""
TOLERATED_OWN_US: Final = 1000.0
"""The tolerated share of the load generator at the 99th percentile. If it is larger and causes half of the latency, the
load generator is too slow.
"""
ADVICE: Final = "use more --processes or a lower --rate, or run it on another machine"

Verdict: TypeAlias = Literal["met", "not met", "invalid"]
Percentiles: TypeAlias = dict[str, float]


def percentiles(values: F64, frames: F64) -> Percentiles:
    """Percentiles over all frames of values that belong to whole blocks; NaN values are left out."""
    known = ~np.isnan(values)
    if not known.any():
        return dict.fromkeys(PERCENTILES, math.nan)
    levels = list(PERCENTILES.values())
    found = np.quantile(values[known], levels, weights=frames[known], method="inverted_cdf").tolist()
    named = dict(zip(PERCENTILES, found, strict=True))
    return named if known.sum() >= P999_SAMPLES else named | {"p99.9": math.nan}


@dataclass(frozen=True)
class LoadResult:
    """The measurements of one load."""

    plan: LoadPlan
    found: PartResult

    @property
    def samples(self) -> SampleArray:
        """One sample for each sent block."""
        return self.found.samples

    @cached_property
    def answered(self) -> SampleArray:
        """The samples of answered blocks."""
        answered: SampleArray = self.samples[~np.isnan(self.samples["rest_us"])]
        return answered

    @cached_property
    def seconds(self) -> float:
        """The time in which frames were counted; a test that ended early ends with its last answer."""
        whole = not (self.found.stopped or self.found.lost)
        return self.plan.duration_s if whole else min(self.plan.duration_s, self.answered["at_s"].max(initial=0.0))

    @property
    def frames_s(self) -> float:
        """The frames per second that were answered before the end."""
        in_time = self.answered["at_s"] <= self.seconds
        return float(self.answered["frames"][in_time].sum()) / self.seconds if self.seconds else 0.0

    @cached_property
    def latencies(self) -> dict[str, Percentiles]:
        """Percentiles in µs by the names of `ROWS`. Unanswered frames count with the time they waited."""
        return {name: percentiles(self.samples[name], self.samples["frames"]) for name in ROWS}

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the latency."""
        return self.latencies["latency_us"]["p99"] / 1000

    @property
    def whole(self) -> bool:
        """Whether every due frame was answered."""
        found = self.found
        return not (found.refused or found.unanswered or found.unsent or found.lost) and len(self.samples) > 0

    @property
    def measured_itself(self) -> bool:
        """Whether the load generator could not keep up, so the result says nothing about the server."""
        own_us, latency_us = self.latencies["own_us"]["p99"], self.latencies["latency_us"]["p99"]
        is_open = self.plan.rate_hz is not None
        return is_open and (self.found.unsent > 0 or own_us > max(TOLERATED_OWN_US, latency_us / 2))

    def without_own_ms(self, slo_ms: float) -> float:
        """The 99th percentile of the latency minus twice the load generator's share, which decides on `invalid`.

        The share counts twice, because the threads that send and receive for the event loop also wait for the
        processor. A share below a tenth of the level is not subtracted.
        """
        own_us = np.where(self.samples["own_us"] > 100 * slo_ms, self.samples["own_us"], 0.0)
        return percentiles(self.samples["latency_us"] - 2 * own_us, self.samples["frames"])["p99"] / 1000

    def verdict(self, slo_ms: float) -> Verdict:
        """Whether every frame was answered, and 99 % of them in time.

        The verdict is `invalid` if the load generator may be the cause: it did not send all due frames, or every frame
        was answered and the level would be met without its share.
        """
        if self.whole and self.p99_ms <= slo_ms:
            return "met"
        if self.found.unsent or (self.whole and self.without_own_ms(slo_ms) <= slo_ms):
            return "invalid"
        return "not met"

    def sentence(self) -> str:
        """A sentence about the result. Latencies are those of answered frames; unanswered ones are counted apart."""
        found, plan = self.found, self.plan
        parts = []
        if found.lost:
            parts.append(f"ended after {self.seconds:.1f} of {plan.duration_s:g} s: {found.lost}")
        if len(self.answered):
            due = "" if plan.rate_hz is None or found.lost else f" of {plan.due_frames_s:,.0f} due"
            latency = percentiles(self.answered["latency_us"], self.answered["frames"])
            p50_ms, p99_ms = (three_digits(latency[name] / 1000) for name in ("p50", "p99"))
            parts.append(
                f"{int(self.answered['frames'].sum()):,} frames answered, {self.frames_s:,.0f} frames/s{due}, "
                f"p50 {p50_ms} ms, p99 {p99_ms} ms"
            )
        else:
            parts.append("nothing was answered" if len(self.samples) or found.refused else "nothing was measured")
        refused = {f"refused ({code})": frames for code, frames in found.refused.items()}
        for what, frames in (refused | {"unanswered": found.unanswered, "not sent": found.unsent}).items():
            if frames:
                parts.append(f"{counted(frames, 'frame')} {what}")
        return "; ".join(parts)

    def latency_rows(self) -> list[tuple[str, list[str]]]:
        """The latency and its parts: names, and percentiles in milliseconds."""
        titles = dict(ROWS)
        if self.plan.rate_hz is None:  # nothing is due, so nothing is late
            titles["latency_us"] = "latency, from when it was sent"
            del titles["late_us"], titles["own_us"]
        return [(titles[name], [three_digits(us / 1000) for us in self.latencies[name].values()]) for name in titles]

    def as_json(self) -> dict[str, Any]:
        """The result as JSON values; latencies in microseconds."""
        return {
            "load": asdict(self.plan),
            "seconds": self.seconds,
            "samples": len(self.samples),
            "frames_per_second": self.frames_s,
            "latency_us": {name.removesuffix("_us"): finite(levels) for name, levels in self.latencies.items()},
            "refused_frames": dict(self.found.refused),
            "unanswered_frames": self.found.unanswered,
            "unsent_frames": self.found.unsent,
            "measured_itself": self.measured_itself,
            "error": self.found.lost or None,
        }


TRIAL_TITLES: Final = ("streams", "processes", "frames/s due", "answered", "p50 ms", "p99 ms", "less own share", "")


def trial_rows(trials: Sequence[LoadResult], slo_ms: float) -> list[list[str]]:
    """Rows for the tries of a search, under `TRIAL_TITLES`; the last cell is the verdict."""
    return [
        [
            f"{trial.plan.streams:,}",
            f"{trial.plan.processes}",
            f"{trial.plan.due_frames_s:,.0f}",
            f"{trial.frames_s:,.0f}",
            three_digits(trial.latencies["latency_us"]["p50"] / 1000),
            three_digits(trial.p99_ms),
            three_digits(trial.without_own_ms(slo_ms)),
            trial.verdict(slo_ms),
        ]
        for trial in trials
    ]


def server_as_json(info: ServerInfo) -> dict[str, Any]:
    """The measured server as JSON values."""
    names = ("model", "fingerprint", "features", "outputs", "device", "exactness", "arithmetic", "durability")
    return {name: getattr(info, name) for name in names}
