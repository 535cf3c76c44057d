"""What a load test found, for people, in 80 columns."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Final

from rich.text import Text

from instep_client.protocol.wire import ServerInfo
from instep_tools.load.generator import DRAIN_S
from instep_tools.load.plan import LoadPlan, Mode
from instep_tools.load.result import Measured
from instep_tools.load.search import advice, tries
from instep_tools.terminal import Terminal
from instep_tools.words import counted, three_digits

ROWS: Final = {
    "late_us": "  sent late (load generator)",
    "away_us": "  without a connection",
    "queue_us": "  server: queue",
    "compute_us": "  server: compute",
    "send_us": "  server: send",
    "rest_us": "  wire and client",
}
"""The parts of a latency and what the table calls them."""
PERCENTILE_NAMES: Final = ("p50", "p90", "p99", "p99.9", "max")
TRIAL_TITLES: Final = ("streams", "processes", "frames/s due", "answered", "p50 ms", "p99 ms", "late p99 ms", "")
LONG_SILENCE_S: Final = 1.0


def show_latencies(terminal: Terminal, result: Measured) -> None:
    """Print the latency and its parts in milliseconds."""
    headings = (f"ms, n = {len(result.samples):,}", *PERCENTILE_NAMES)
    terminal.table(headings, ((title, *values) for title, values in latency_rows(result)))


def latency_rows(result: Measured) -> list[tuple[str, list[str]]]:
    """The latency and its parts: what each is called, and its percentiles in milliseconds."""
    since = "due" if result.plan.mode is Mode.OPEN else "sent"
    titles = {"latency_us": f"latency, from when it was {since}"} | ROWS
    parts = {"latency_us": result.latency, **{name: result.parts[name] for name in result.shown}}
    return [
        (titles[name], [three_digits(each / 1000) for each in asdict(part).values()]) for name, part in parts.items()
    ]


def show_trials(terminal: Terminal, trials: Sequence[Measured], slo_ms: float) -> None:
    """Print the tries of a search, in the order in which they were made."""
    colours = {"met": "green", "not met": "red", "invalid": "yellow"}
    rows: list[list[str | Text]] = [
        [*cells, Text(verdict, colours[verdict])] for *cells, verdict in trial_rows(trials, slo_ms)
    ]
    terminal.table(TRIAL_TITLES, rows, slice(-1))


def trial_rows(trials: Sequence[Measured], slo_ms: float) -> list[list[str]]:
    """Cells under `TRIAL_TITLES`; the last one is the verdict."""
    return [
        [
            f"{trial.plan.streams:,}",
            f"{trial.plan.processes}",
            f"{trial.plan.offered_frames_s:,.0f}",
            "–" if trial.found.gave_up else f"{trial.frames_s:,.0f}",
            three_digits(trial.latency.p50 / 1000),
            three_digits(trial.latency.p99 / 1000),
            three_digits(trial.parts["late_us"].p99 / 1000),
            trial.verdict(slo_ms),
        ]
        for trial in trials
    ]


def early_end(result: Measured) -> str:
    """That it ended before its time, and why, as a part of a sentence; empty where it did not, or was stopped."""
    if not result.found.lost:
        return ""
    if not len(result.answered):
        return f"nothing was {'answered' if len(result.samples) else 'measured'}: {result.found.lost}"
    return f"ended after {result.seconds:.1f} of {result.plan.duration_s:g} s: {result.found.lost}"


def numbers(result: Measured) -> str:
    """Throughput and latency as a part of a sentence; empty where nothing was answered and `early_end` says why."""
    if not len(result.answered):
        if result.found.lost:
            return ""
        if result.found.stopped and not len(result.samples):
            return "nothing was measured"
        return "0 frames/s: nothing was answered"
    # A run that ended early is as long as until its last answer: its rate may be above that of the load.
    is_due = result.plan.mode is Mode.OPEN and result.seconds == result.plan.duration_s
    due = f" of {result.plan.offered_frames_s:,.0f} due" if is_due else ""
    p50_ms, p99_ms = (three_digits(value / 1000) for value in (result.latency.p50, result.latency.p99))
    answers = f"{result.answers_s:,.0f} answers/s"
    latency = f"p50 {p50_ms} ms, p99 {p99_ms} ms"
    if result.found.lost:
        included = ", unanswered frames included" if result.found.unanswered else ""
        return f"until then {result.frames_s:,.0f} frames/s{due}, {answers}; {latency}{included}"
    return f"{result.frames_s:,.0f} frames/s{due}, {answers}, {latency}"


def problems(result: Measured) -> str:
    """What went wrong, as the end of a sentence."""
    found, plan = result.found, result.plan
    parts = [f"{counted(frames, 'frame')} refused ({code})" for code, frames in found.refused.items()]
    if found.unanswered:
        due = f" of the {result.due_frames:,} due" if found.lost and plan.mode is Mode.OPEN else ""
        parts.append(f"{counted(found.unanswered, 'frame')}{due} unanswered")
    if found.unsent:
        parts.append(f"{counted(found.unsent, 'frame')} not sent")
    period_s = plan.steps / plan.rate_hz if plan.mode is Mode.OPEN else 0.0
    is_steady = len(result.answered) and not (found.gaps or found.gave_up or found.unsent)
    if result.reconnections:
        parts.append(f"{counted(result.reconnections, 'reconnection')}, {result.away_s:.1f} s without a connection")
    elif is_steady and result.longest_silence_s > max(LONG_SILENCE_S, 3 * period_s):
        parts.append(f"nothing was answered for {result.longest_silence_s:.1f} s")
    return "".join(f", {part}" for part in parts)


def blame(result: Measured) -> str:
    """That this side was too slow, and by how much."""
    due = result.plan.offered_frames_s * result.plan.duration_s
    sent = f"it sent {max(0.0, 1 - result.found.unsent / due):.0%} of the frames due, "
    late = f"{three_digits(result.parts['late_us'].p99 / 1000)} ms late at p99"
    return f"measured the load generator, not the server: {sent}{late}; {advice(result.plan.streams)}"


def effort(plan: LoadPlan, limit: int) -> str:
    """How long a search up to this number of streams takes, in one sentence."""
    fewest, most = tries(plan.streams, limit)
    seconds = plan.warmup_s + plan.duration_s
    at_most_s = most * (seconds + DRAIN_S)
    at_most = f"{at_most_s / 60:.0f} min" if at_most_s >= 120 else f"{at_most_s:.0f} s"
    number = f"{most}" if fewest == most else f"{fewest} to {most}"
    return (
        f"searching: {number} {'try' if most == 1 else 'tries'} of {seconds:g} s each, about {at_most} at the most; "
        "a size that is not met is tried once more, so that one stall does not decide; more tries only where the load "
        "generator itself is too slow"
    )


def setting(info: ServerInfo) -> str:
    """Model, machine and version in one sentence."""
    return (
        f"model {info.model!r} ({info.features} to {info.outputs}) on {info.device}, {info.exactness}; from "
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"instep {version('instep')}"
    )
