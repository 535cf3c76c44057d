"""What a load test found: as numbers, as a table, as JSON."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from rich.table import Table

from instep_client.protocol.wire import ServerInfo
from instep_tools.load import Mode, PartResult
from instep_tools.load_plan import LoadPlan
from instep_tools.samples import Distribution, SampleArray, distribution

ROWS: Final = {
    "latency_us": "latency, from when it was due",
    "late_us": "  sent late by this side",
    "queue_us": "  server: queue",
    "compute_us": "  server: compute",
    "send_us": "  server: send",
    "rest_us": "  wire and client",
}
"""The parts of a latency and what the table calls them."""

TOLERATED_LATE_US: Final = 1000.0
"""At the 99th percentile; beyond it, a load generator that causes half of the latency by itself is too slow."""
SAMPLES_OF_P999: Final = 1000
"""With fewer, 99.9 % is the largest of them all."""

CLOSED_ROWS: Final = {name: title for name, title in ROWS.items() if name != "late_us"} | {
    "latency_us": "latency, from when it was sent"
}
"""The same of a closed loop, in which nothing is due."""


@dataclass(frozen=True)
class Measured:
    """One load and what came of it."""

    plan: LoadPlan
    samples: SampleArray
    seconds: float
    """How long frames were counted."""
    frames_s: float
    """Frames a second that were answered in this time."""
    answers_s: float
    """Blocks a second that were answered in this time."""
    latencies: Mapping[str, Distribution]
    """By the keys of `ROWS`; frames that were due but not answered count with the time they waited."""
    refused: Mapping[str, int]
    """Frames refused, by code."""
    unanswered: int
    """Frames not answered when the test ended."""
    unsent: int
    """Frames that were due, and that this side was too late to send."""
    gave_up: bool
    """Whether it ended because the service level could not be met any more."""
    lost: str
    """Why it ended before its time: the server or its streams are gone."""

    @property
    def whole(self) -> bool:
        """Whether every frame that was due was answered."""
        missing = self.unanswered or self.unsent or self.gave_up or self.lost
        return not self.refused and not missing and len(self.samples) > 0

    @property
    def measured_itself(self) -> bool:
        """Whether this side could not keep up: what it found says nothing about the server."""
        late, latency = self.latencies["late_us"].p99, self.latencies["latency_us"].p99
        return self.unsent > 0 or late > max(TOLERATED_LATE_US, latency / 2)

    @property
    def gap_s(self) -> float:
        """The longest time in which nothing was answered."""
        at_s = np.sort(self.samples["at_s"][~np.isnan(self.samples["compute_us"])])
        end = max(self.seconds, float(at_s.max(initial=0.0)))
        return float(np.diff(at_s, prepend=0.0, append=end).max())

    @property
    def p99_ms(self) -> float:
        """99 % of all frames were answered within this time of being due."""
        return self.latencies["latency_us"].p99 / 1000


def measured(plan: LoadPlan, result: PartResult) -> Measured:
    """Boil a result down."""
    samples = result.samples
    answered = samples[~np.isnan(samples["compute_us"])]
    seconds = plan.duration_s
    if result.stopped or result.gave_up or result.lost:
        seconds = min(seconds, float(answered["at_s"].max(initial=0.0)))
    in_time = answered[answered["at_s"] <= seconds]
    known = {name: (samples[name], samples["frames"]) for name in ROWS if name != "rest_us"}
    split = sum(answered[name] for name in ("late_us", "queue_us", "compute_us", "send_us"))
    known["rest_us"] = (answered["latency_us"] - split, answered["frames"])
    return Measured(
        plan=plan,
        samples=samples,
        seconds=seconds,
        frames_s=float(in_time["frames"].sum()) / seconds if seconds else 0.0,
        answers_s=len(in_time) / seconds if seconds else 0.0,
        latencies={name: distribution(*known[name]) for name in ROWS},
        refused=dict(result.refused),
        unanswered=result.unanswered,
        unsent=result.unsent,
        gave_up=result.gave_up,
        lost=result.lost,
    )


def table(result: Measured) -> Table:
    """Latencies in milliseconds."""
    rows = Table("ms", "p50", "p90", "p99", "p99.9", "max", box=None, pad_edge=False)
    for column in rows.columns[1:]:
        column.justify = "right"
    rows_of = ROWS if result.plan.mode is Mode.OPEN else CLOSED_ROWS
    for name, title in rows_of.items():
        p50, p90, p99, p999, most = asdict(result.latencies[name]).values()
        rare = p999 if len(result.samples) >= SAMPLES_OF_P999 else math.nan
        rows.add_row(title, *(three_digits(value / 1000) for value in (p50, p90, p99, rare, most)))
    return rows


def three_digits(value: float) -> str:
    """With three significant digits; – for NaN."""
    if math.isnan(value):
        return "–"
    return f"{value:,.{max(0, 3 - len(str(int(value))))}f}" if value >= 1 else f"{value:.3f}"


def trials_table(trials: Sequence[Measured], slo_ms: float) -> Table:
    """The trials of a search for the largest load, in the order in which they were made."""
    titles = ("streams", "frames/s due", "answered", "p50 ms", "p99 ms", "sent late p99", "")
    rows = Table(*titles, box=None, pad_edge=False)
    for column in rows.columns[:-1]:
        column.justify = "right"
    for trial in trials:
        latency, late = trial.latencies["latency_us"], trial.latencies["late_us"]
        rows.add_row(
            f"{trial.plan.streams:,}",
            f"{trial.plan.offered_frames_s:,.0f}",
            "–" if trial.gave_up else f"{trial.frames_s:,.0f}",
            three_digits(latency.p50 / 1000),
            three_digits(latency.p99 / 1000),
            three_digits(late.p99 / 1000),
            {"met": "met", "not met": "[red]not met[/]", "invalid": "[yellow]invalid[/]"}[verdict(trial, slo_ms)],
        )
    return rows


Verdict: TypeAlias = Literal["met", "not met", "invalid"]


def verdict(result: Measured, slo_ms: float) -> Verdict:
    """Whether every frame was answered, and 99 % of them in time; `invalid` where this side was the cause."""
    if result.whole and result.p99_ms <= slo_ms:
        return "met"
    return "invalid" if result.measured_itself else "not met"


def setting(info: ServerInfo) -> str:
    """Machine and model in one line."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}; "
        f"model {info.model!r} ({info.features} to {info.outputs}) on {info.device}, {info.exactness}"
    )


def as_json(result: Measured) -> dict[str, Any]:
    """All that was found, as JSON values; latencies in microseconds."""
    plan = {field.name: getattr(result.plan, field.name) for field in fields(result.plan)}
    return {
        "load": {
            **plan,
            "mode": result.plan.mode.value,
            "rate_hz": result.plan.rate_hz if result.plan.mode is Mode.OPEN else None,
        },
        "seconds": result.seconds,
        "frames_per_second": result.frames_s,
        "answers_per_second": result.answers_s,
        "latency_us": {name.removesuffix("_us"): _finite(asdict(value)) for name, value in result.latencies.items()},
        "refused_frames": dict(result.refused),
        "unanswered_frames": result.unanswered,
        "unsent_frames": result.unsent,
        "measured_itself": result.measured_itself,
        "longest_gap_s": result.gap_s,
        "error": result.lost or None,
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: None if np.isnan(value) else value for name, value in values.items()}
