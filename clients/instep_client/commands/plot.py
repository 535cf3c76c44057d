"""A load test as a picture: how latencies are distributed, and how they went over time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from instep_client.commands.problems import BadFile
from instep_client.commands.report import Measured
from instep_client.commands.samples import F64, percentiles

TIME_BINS: Final = 60
LATENCY_BINS: Final = 80
BLUE: Final = "#2b6cb0"
RED: Final = "#c53030"
GREY: Final = "#718096"


def plot(result: Measured, path: Path, title: str) -> None:
    """Write a PNG: a histogram of latencies, the share of frames above each latency, and both over time.

    Raises:
        BadFile: when it cannot be written.
    """
    figure = Figure(figsize=(12, 8), layout="constrained")
    histogram, tail, timeline, rate = figure.subplots(2, 2).flat
    figure.suptitle(title, fontsize=11)
    latency_ms = np.maximum(result.samples["latency_us"] / 1000, 1e-3)
    frames = result.samples["frames"]
    _histogram(histogram, result, latency_ms)
    _tail(tail, latency_ms, frames)
    _timeline(timeline, rate, result, latency_ms)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        raise BadFile(f"{path} cannot be written: {error.strerror}") from None


def _histogram(axes: Axes, result: Measured, latency_ms: F64) -> None:
    edges = np.geomspace(latency_ms.min() * 0.99, latency_ms.max() * 1.01, LATENCY_BINS).tolist()
    axes.hist(latency_ms, edges, weights=result.samples["frames"], color=BLUE)
    latency = result.latencies["latency_us"]
    for height, name, value in ((0.9, "p50", latency.p50), (0.8, "p99", latency.p99), (0.7, "p99.9", latency.p999)):
        axes.axvline(value / 1000, color=RED, linewidth=1)
        axes.text(
            value / 1000, height, f" {name}\n {value / 1000:.2f}", transform=axes.get_xaxis_transform(), fontsize=8
        )
    axes.set(xscale="log", xlabel="latency, ms", ylabel="frames", title="Latency")
    _plain_numbers(axes.xaxis)


def _tail(axes: Axes, latency_ms: F64, frames: F64) -> None:
    order = np.argsort(latency_ms)
    above = 1 - np.cumsum(frames[order]) / frames.sum()
    axes.plot(latency_ms[order], np.maximum(above, 1 / frames.sum()) * 100, color=BLUE, drawstyle="steps-post")
    axes.set(
        xscale="log", yscale="log", xlabel="latency, ms", ylabel="% of frames slower", title="The tail of the latency"
    )
    axes.grid(alpha=0.3)
    _plain_numbers(axes.xaxis)


def _timeline(axes: Axes, rate: Axes, result: Measured, latency_ms: F64) -> None:
    at_s, frames = result.samples["at_s"], result.samples["frames"]
    edges = np.linspace(0, max(result.seconds, float(at_s.max())), TIME_BINS + 1)
    middles = (edges[:-1] + edges[1:]) / 2
    bins = np.clip(np.digitize(at_s, edges) - 1, 0, TIME_BINS - 1)
    curves = np.array(
        [percentiles(latency_ms[bins == b], frames[bins == b], (50.0, 99.0, 100.0)) for b in range(TIME_BINS)]
    )
    for curve, name, color in zip(curves.T[::-1], ("max", "p99", "p50"), (GREY, RED, BLUE), strict=True):
        axes.plot(middles, curve, label=name, color=color, marker=".", linewidth=1)
    axes.set(yscale="log", xlabel="s", ylabel="latency, ms", title="Latency over time")
    axes.legend()
    _plain_numbers(axes.yaxis)
    per_bin = np.bincount(bins, frames, TIME_BINS)
    rate.step(middles, per_bin / (edges[1] - edges[0]), color=BLUE, where="mid")
    rate.set(xlabel="s", ylabel="frames/s", title="Frames answered over time")
    rate.set_ylim(bottom=0)


def _plain_numbers(axis: Axis) -> None:
    """0.5, 1, 2, 5, 10 and so on along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
