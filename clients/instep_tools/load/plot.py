"""Load tests as pictures: one load over time and by percentiles, or the latency of a search over streams."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, Final, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from instep_client.protocol.wire import ServerInfo
from instep_tools.load.plan import Mode
from instep_tools.load.report import ROWS, early_end, numbers
from instep_tools.load.result import PARTS, Measured, Verdict
from instep_tools.load.samples import F64, SampleArray, percentiles
from instep_tools.load.search import FAILURES_TO_BELIEVE
from instep_tools.words import counted, three_digits

MOST_BINS: Final = 60
FEW_ANSWERS: Final = 2000
"""Up to here, every answer is a dot of its own: of few answers in a bin, the 99th percentile is the largest."""
TITLE_LETTERS: Final = 110
"""The most in a line above a picture."""
LEAST_MS: Final = 1e-3
"""Nothing is faster on a logarithmic axis."""
BLUE, ORANGE, GREY, BLACK = "#2b6cb0", "#dd6b20", "#a0aec0", "#1a202c"
COLOURS: Final = dict(zip(PARTS, (ORANGE, GREY, "#90cdf4", BLUE, "#9ae6b4", "#d6bcfa"), strict=True))
NINES: Final = {2: "50 %", 10: "90 %", 100: "99 %", 10**3: "99.9 %", 10**4: "99.99 %", 10**5: "99.999 %"}
DrawPanel: TypeAlias = Callable[[Axes, Measured], None]
VERDICTS: Final[dict[Verdict, tuple[str, str, str]]] = {
    "met": ("o", BLUE, "met"),
    "not met": ("X", ORANGE, "not met"),
    "invalid": ("^", GREY, "invalid: the load generator was late"),
}
"""Marker, colour and what the legend says."""


def run(trials: Sequence[Measured], info: ServerInfo) -> Figure:
    """One load: latency over time, its mean split, latency by percentile, and throughput."""
    [result] = trials
    plan = result.plan
    loop = f"open loop at {plan.rate_hz:g} Hz" if plan.mode is Mode.OPEN else "closed loop"
    too_slow = "the load generator could not keep up; this says nothing about the server"
    lines = [too_slow] if result.measured_itself else []
    lines += [*textwrap.wrap(early_end(result), TITLE_LETTERS), numbers(result)]
    subtitle = "\n".join(filter(None, lines))
    figure = _figure(
        f"{info.model} · {counted(plan.streams, 'stream')}, {counted(plan.connections, 'connection')}, {loop}",
        subtitle,
        info,
    )
    for axes, draw in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        draw(axes, result)
    return figure


def search(trials: Sequence[Measured], info: ServerInfo) -> Figure:
    """A search: the 99th percentile over the number of streams, and the service level as a line."""
    plan = trials[0].plan
    slo_ms = plan.slo_ms or 0.0
    points = _points(trials, slo_ms)
    most = max((streams for streams, _, verdict in points if verdict == "met"), default=0)
    above = min((streams for streams, _, _ in points if streams > most), default=0)
    failures = sum(streams == above and verdict == "not met" for streams, _, verdict in points)
    least = "" if failures >= FAILURES_TO_BELIEVE else "at least "
    found = f"{least}{counted(most, 'stream')}" if most else "no number of streams"
    figure = _figure(
        f"{info.model} · open loop at {plan.rate_hz:g} Hz a stream, {counted(plan.steps, 'timestep')} a block",
        f"{found} within {slo_ms:g} ms at the 99th percentile",
        info,
    )
    draw_trials(figure.subplots(), trials, slo_ms)
    return figure


def _points(trials: Sequence[Measured], slo_ms: float) -> list[tuple[int, float, Verdict]]:
    return [(trial.plan.streams, max(trial.latency.p99 / 1000, LEAST_MS), trial.verdict(slo_ms)) for trial in trials]


def draw_trials(axes: Axes, trials: Sequence[Measured], slo_ms: float) -> None:
    """The 99th percentile of each try of a search."""
    points = _points(trials, slo_ms)
    valid: dict[int, float] = {}
    for streams, p99_ms, verdict in sorted(points):
        if verdict != "invalid":
            valid.setdefault(streams, p99_ms)  # the better one of two tries
    axes.plot(list(valid), list(valid.values()), color=BLACK, linewidth=1, zorder=1)
    for verdict, (marker, colour, label) in VERDICTS.items():
        chosen = np.array([point[:2] for point in points if point[2] == verdict])
        if len(chosen):
            axes.scatter(chosen[:, 0], chosen[:, 1], marker=marker, color=colour, s=60, label=label, zorder=2)
    axes.axhline(slo_ms, color=BLACK, linestyle="--", linewidth=1)
    axes.text(0, slo_ms, f" {slo_ms:g} ms", va="bottom", transform=axes.get_yaxis_transform())
    axes.set(xscale="log", yscale="log", xlabel="streams", ylabel="latency at the 99th percentile, ms")
    is_narrow = max(points)[0] < 10 * min(points)[0]
    _plain_numbers(axes.xaxis, range(1, 10) if is_narrow else (1, 2, 5))
    _plain_numbers(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.set_ylim(top=3 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper left")


def _figure(title: str, subtitle: str, info: ServerInfo) -> Figure:
    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=12)
    today = datetime.datetime.now().astimezone().date()
    figure.supxlabel(
        f"instep {version('instep')}, {today}; model of {info.features} to {info.outputs} on {info.device}, "
        f"{info.exactness}",
        fontsize=8,
        color="#718096",
    )
    return figure


def _bins(result: Measured, answers: int) -> F64:
    """The edges of bins of at least so many answers each, on average.

    Of an open loop they are whole periods wide, so that a steady load looks steady.
    """
    plan, seconds = result.plan, max(result.shown_s, 1e-3)
    width = seconds / min(MOST_BINS, max(1, len(result.samples) // answers))
    if plan.mode is Mode.OPEN:
        period = plan.steps / plan.rate_hz
        width = max(1, round(width / period)) * period
    edges: F64 = width * np.arange(max(1, int(seconds / width + 1e-6)) + 1, dtype=np.float64)
    return edges


def _in_bins(samples: SampleArray, edges: F64) -> list[SampleArray]:
    places = np.searchsorted(edges, samples["at_s"], "right") - 1
    return [samples[places == number] for number in range(len(edges) - 1)]


def _along_time(axes: Axes, result: Measured) -> None:
    """The axis of seconds, with the gaps in which a connection was lost."""
    upright: dict[str, Any] = {"rotation": 90, "ha": "center", "va": "center", "transform": axes.get_xaxis_transform()}
    shown_s, gaps = result.shown_s, result.gaps
    if result.found.gone:  # the last gap ends with the test
        gaps[-1] = gaps[-1][0], shown_s
    for start, end in gaps:
        if start < shown_s:
            end = min(end, shown_s)
            axes.axvspan(start, end, color=GREY, alpha=0.3, linewidth=0)
            axes.text((start + end) / 2, 0.5, "no connection", fontsize=8, **upright)
    axes.set_xlim(0, max(shown_s, 1e-3))
    axes.set_xlabel("s")
    axes.grid(alpha=0.3)


def _latency_over_time(axes: Axes, result: Measured) -> None:
    samples, latency_ms = result.samples, np.maximum(result.samples["latency_us"] / 1000, LEAST_MS)
    if len(samples) <= FEW_ANSWERS:
        axes.plot(samples["at_s"], latency_ms, ".", color=BLUE, markersize=4)
    else:
        edges = _bins(result, 200)
        parts = [(np.maximum(part["latency_us"] / 1000, LEAST_MS), part["frames"]) for part in _in_bins(samples, edges)]
        curves = np.array([percentiles(*part, (50, 99, 100)) for part in parts]).T
        styles = (("p50", BLUE, "-"), ("p99", ORANGE, "-"), ("max", BLACK, ":"))
        for curve, (name, color, line) in zip(curves, styles, strict=True):
            axes.plot((edges[1:] + edges[:-1]) / 2, curve, label=name, color=color, linestyle=line, linewidth=1.2)
        axes.legend(loc="upper right", ncols=3, fontsize=8)
    axes.set(yscale="log", ylabel="ms", title="Latency over time")
    axes.set_ylim(latency_ms.min() / 1.5, latency_ms.max() * 3)  # room for the legend
    _plain_numbers(axes.yaxis)
    _along_time(axes, result)


def _split_over_time(axes: Axes, result: Measured) -> None:
    """The means of the answers that no lost connection has delayed."""
    edges = _bins(result, 20)
    names = [name for name in result.shown if name != "away_us"]
    means = np.zeros((len(names), len(edges)))
    for number, part in enumerate(_in_bins(result.answered[result.answered["away_us"] == 0], edges)):
        if len(part):
            means[:, number] = [np.average(part[name], weights=part["frames"]) / 1000 for name in names]
    means[:, -1] = means[:, -2]
    labels, colors = [ROWS[name].strip() for name in names], [COLOURS[name] for name in names]
    axes.stackplot(edges, np.maximum(means, 0), labels=labels, colors=colors, step="post")
    axes.set(ylabel="ms", title="Where the time goes, on average")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.set_ylim(0, 1.4 * max(1e-3, means.sum(axis=0).max()))  # room for the legend
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="upper right", ncols=2, fontsize=8)  # in the order of the stack
    _along_time(axes, result)


def _rate_over_time(axes: Axes, result: Measured) -> None:
    edges, answered = _bins(result, 20), result.answered
    frames, _ = np.histogram(answered["at_s"], edges, weights=answered["frames"])
    axes.stairs(frames / np.diff(edges), edges, baseline=None, color=BLUE)
    is_open = result.plan.mode is Mode.OPEN
    if is_open:
        axes.axhline(result.plan.offered_frames_s, color=BLACK, linestyle="--", linewidth=1)
    axes.set(ylabel="frames/s", title="Frames answered" + (" (dashed: due)" if is_open else ""))
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _along_time(axes, result)


def _latency_by_percentile(axes: Axes, result: Measured) -> None:
    """Over 1 / (1 - percentile), so that each further nine takes the same width."""
    latency_ms, frames = np.maximum(result.samples["latency_us"] / 1000, LEAST_MS), result.samples["frames"]
    most = max(10.0, float(len(latency_ms)))
    levels = np.geomspace(1, most, 400)
    axes.plot(levels, percentiles(latency_ms, frames, 100 * (1 - 1 / levels)), color=BLUE)
    ticks = {level: name for level, name in NINES.items() if level <= most}
    axes.set(xscale="log", yscale="log", ylabel="ms", xlabel="of the frames are at least as fast")
    axes.set_title(f"Latency by percentile, n = {len(latency_ms):,}")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: ticks.get(round(value), "")))
    axes.xaxis.set_minor_locator(NullLocator())
    for level, value in zip((2, 100), percentiles(latency_ms, frames, (50, 99)).tolist(), strict=True):
        if level <= most:
            axes.plot(level, value, "o", color=ORANGE)
            axes.annotate(f"{three_digits(value)} ms", (level, value), (6, -14), textcoords="offset points")
    _plain_numbers(axes.yaxis)
    axes.grid(alpha=0.3)


def _plain_numbers(axis: Axis, subs: Sequence[int] = (1, 2, 5)) -> None:
    """0.5, 1, 2, 5, 10 and so on along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


PANELS: Final[Sequence[DrawPanel]] = (_latency_over_time, _latency_by_percentile, _split_over_time, _rate_over_time)
"""The pictures of one load."""
