"""A load test as a picture: how latencies are distributed, and how they went over time."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from instep_tools.load import Mode
from instep_tools.problems import BadFile
from instep_tools.report import Measured
from instep_tools.samples import F64, percentiles

TIME_BINS: Final = 60
"""About so many."""
LATENCY_BINS: Final = 80
BLUE: Final = "#2b6cb0"
RED: Final = "#c53030"
BLACK: Final = "#1a202c"


def plot(result: Measured, path: Path, title: str) -> None:
    """Write a PNG, SVG or PDF: a histogram of latencies, the share of frames above each latency, and both over time.

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
        figure.savefig(path, format=path.suffix[1:].lower(), dpi=120)
    except OSError as error:
        raise BadFile(f"{path} cannot be written: {error.strerror}") from None


def _histogram(axes: Axes, result: Measured, latency_ms: F64) -> None:
    edges = np.geomspace(latency_ms.min() * 0.99, latency_ms.max() * 1.01, LATENCY_BINS).tolist()
    axes.hist(latency_ms, edges, weights=result.samples["frames"], color=BLUE)
    latency = result.latencies["latency_us"]
    for height, name, value in ((0.9, "p50", latency.p50), (0.8, "p99", latency.p99), (0.7, "p99.9", latency.p999)):
        axes.axvline(value / 1000, color=RED, linewidth=1)
        beyond_the_middle = value / 1000 > np.sqrt(edges[0] * edges[-1])
        axes.text(
            value / 1000,
            height,
            f" {name} \n {value / 1000:.2f} ",
            transform=axes.get_xaxis_transform(),
            fontsize=8,
            ha="right" if beyond_the_middle else "left",  # into the picture
        )
    axes.set(xscale="log", xlabel="latency, ms", ylabel="frames", title="Latency")
    _plain_numbers(axes.xaxis)


def _tail(axes: Axes, latency_ms: F64, frames: F64) -> None:
    order = np.argsort(latency_ms)
    above = 1 - np.cumsum(frames[order]) / frames.sum()
    axes.plot(latency_ms[order], np.maximum(above, 1 / frames.sum()) * 100, color=BLUE, drawstyle="steps-post")
    axes.set(xscale="log", yscale="log", xlabel="latency, ms", ylabel="frames slower", title="The tail of the latency")
    axes.grid(alpha=0.3)
    _plain_numbers(axes.xaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))


def _timeline(axes: Axes, rate: Axes, result: Measured, latency_ms: F64) -> None:
    at_s, frames = result.samples["at_s"], result.samples["frames"]
    width = bin_width_s(result)
    count = int(max(result.seconds, float(at_s.max())) / width) + 1
    middles = (np.arange(count) + 0.5) * width
    bins = np.minimum((at_s / width).astype(np.int64), count - 1)
    curves = np.array(
        [percentiles(latency_ms[bins == b], frames[bins == b], (50.0, 99.0, 100.0)) for b in range(count)]
    )
    styles = (("p50", BLUE, "-"), ("p99", RED, "-"), ("max", BLACK, ":"))  # where two are equal, both are seen
    for curve, (name, color, line) in zip(curves.T, styles, strict=True):
        axes.plot(middles, curve, label=name, color=color, linestyle=line, marker=".", linewidth=1)
    axes.set(yscale="log", xlabel="s", ylabel="latency, ms", title="Latency over time")
    axes.legend()
    _plain_numbers(axes.yaxis)
    whole = max(1, int(result.seconds / width + 1e-9))  # what only began before the end looks like a drop
    rate.step(middles[:whole], np.bincount(bins, frames, count)[:whole] / width, color=BLUE, where="mid")
    rate.set(xlabel="s", ylabel="frames/s", title="Frames answered over time")
    rate.set_ylim(bottom=0)


def bin_width_s(result: Measured) -> float:
    """The width of a bin in time: whole periods of an open loop, so that a steady load looks steady."""
    plan = result.plan
    width = max(result.seconds, 1e-3) / TIME_BINS
    if plan.mode is not Mode.OPEN:
        return width
    period = plan.steps / plan.rate_hz
    return max(1, round(width / period)) * period


def _plain_numbers(axis: Axis) -> None:
    """0.5, 1, 2, 5, 10 and so on along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
