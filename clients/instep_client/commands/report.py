"""What a load test found: as numbers, as a table, as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final

import numpy as np
from rich.table import Table

from instep_client.commands.load import Mode, PartResult
from instep_client.commands.load_plan import LoadPlan
from instep_client.commands.samples import Distribution, SampleArray, distribution
from instep_client.protocol.wire import ServerInfo

ROWS: Final = {
    "latency_us": "latency, from when it was due",
    "late_us": "  sent late by this side",
    "queue_us": "  server: queue",
    "compute_us": "  server: compute",
    "send_us": "  server: send",
    "rest_us": "  wire and client",
}
"""The parts of a latency and what the table calls them."""

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

    @property
    def whole(self) -> bool:
        """Whether every frame that was due was answered."""
        return not self.refused and not self.unanswered and len(self.samples) > 0

    @property
    def p99_ms(self) -> float:
        """99 % of all frames were answered within this time of being due."""
        return self.latencies["latency_us"].p99 / 1000


def measured(plan: LoadPlan, result: PartResult) -> Measured:
    """Boil a result down."""
    samples = result.samples
    answered = samples[~np.isnan(samples["compute_us"])]
    seconds = plan.duration_s
    if result.stopped:
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
    )


def table(result: Measured) -> Table:
    """Latencies in milliseconds."""
    rows = Table("ms", "p50", "p90", "p99", "p99.9", "max", box=None, pad_edge=False)
    for column in rows.columns[1:]:
        column.justify = "right"
    rows_of = ROWS if result.plan.mode is Mode.OPEN else CLOSED_ROWS
    for name, title in rows_of.items():
        values = asdict(result.latencies[name]).values()
        rows.add_row(title, *(f"{value / 1000:.3f}" for value in values))
    return rows


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
            f"{trial.frames_s:,.0f}",
            f"{latency.p50 / 1000:.2f}",
            f"{latency.p99 / 1000:.2f}",
            f"{late.p99 / 1000:.2f}",
            "met" if meets(trial, slo_ms) else "[red]not met[/]",
        )
    return rows


def meets(result: Measured, slo_ms: float) -> bool:
    """Whether every frame was answered, and 99 % of them within the service level."""
    return result.whole and result.p99_ms <= slo_ms


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
    }


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON knows no NaN."""
    return {name: None if np.isnan(value) else value for name, value in values.items()}
