"""The demo as a picture: how the decision settles frame by frame, and how long answers took."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from instep.core.typing import F32, I32, I64, Bool
from instep.demo.producers import F64, SPEAKERS, Heard, right_after
from instep_tools.pictures import save

BLUE: Final = "#2b6cb0"
RED: Final = "#c53030"
GREY: Final = "#718096"


def draw(heard: Heard, speakers: I32, path: Path, title: str) -> None:
    """Write a PNG; an existing file is replaced. `speakers`, int32 [recordings], are the true ones."""
    right = right_after(heard.outputs, speakers)
    settled = settled_after(right)
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    above, below = figure.subfigures(2, 1, squeeze=False).flat
    above.suptitle(
        "Who is speaking? The probability of each speaker after each frame (dots: decision; red: true speaker)",
        fontsize=11,
    )
    maps = above.subplots(1, 4, sharey=True)
    for axes, row in zip(maps, examples(settled), strict=True):
        _settling(axes, heard.outputs[row], int(speakers[row]))
        when = f"correct from frame {settled[row]:.0f} on" if np.isfinite(settled[row]) else "wrong at the end"
        axes.set_title(f"recording {row + 1}: {when}", fontsize=10)
    maps[0].set_ylabel("speaker")
    accuracy, latency = below.subplots(1, 2)
    _accuracy(accuracy, right, heard.lengths)
    _latency(latency, np.concatenate(heard.latency_s) * 1000)
    save(figure, path, ".png")


def settled_after(right: Bool) -> F64:
    """After how many frames the decision is right and stays so; infinite where it is wrong at the end.

    `right` is bool [recordings, T], see `right_after`.
    """
    since = right.shape[1] - np.argmin(right[:, ::-1], axis=1) + 1
    settled: F64 = np.where(right.all(axis=1), 1.0, np.where(right[:, -1], since, np.inf))
    return settled


def examples(settled: F64) -> list[int]:
    """Four recordings whose decision settled at once, later, last of all, and never, where there are such."""
    order = np.argsort(settled, kind="stable")
    values = settled[order]
    later, never = np.searchsorted(values, values[0], side="right"), np.searchsorted(values, np.inf)
    places = [0, (later + never) // 2, never - 1, len(order) - 1]
    return [int(order[np.clip(place, 0, len(order) - 1)]) for place in places]


def _settling(axes: Axes, outputs: F32, speaker: int) -> None:
    raised = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    extent = (0.5, len(outputs) + 0.5, 0.5, SPEAKERS + 0.5)
    shares = (raised / raised.sum(axis=1, keepdims=True)).T
    axes.imshow(shares, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, extent=extent)
    heard = np.arange(1, len(outputs) + 1)
    axes.plot(heard, outputs.argmax(axis=1) + 1, "o", color="black", markeredgecolor="white", markersize=4.5)
    axes.axhspan(speaker + 0.5, speaker + 1.5, fill=False, edgecolor=RED, linewidth=2)
    axes.set(xlabel="frames heard", yticks=range(1, SPEAKERS + 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def _accuracy(axes: Axes, right: Bool, lengths: I64) -> None:
    heard = np.arange(1, right.shape[1] + 1)
    share, still = right.mean(axis=0), (lengths[:, None] >= heard).mean(axis=0)
    axes.fill_between(heard, still, color=GREY, alpha=0.15, step="mid", label="recordings still running")
    axes.plot(heard, share, color=BLUE, marker=".", label="correct decisions")
    axes.axhline(1 / SPEAKERS, color=GREY, linestyle=":", label="chance")
    axes.set(
        xlabel="frames heard (finished recordings keep their last decision)",
        ylim=(0, 1.02),
        xlim=(1, heard[-1]),
        title=f"Accuracy over all {len(lengths)} recordings: {share[0]:.1%} after a frame, {share[-1]:.1%} at the end",
    )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)


def _latency(axes: Axes, latency_ms: F64) -> None:
    edges = np.geomspace(latency_ms.min() * 0.99, latency_ms.max() * 1.01, 60).tolist()
    axes.hist(latency_ms, edges, color=BLUE)
    for percentage, line in ((50, "-"), (99, "--")):
        value = float(np.percentile(latency_ms, percentage))
        axes.axvline(value, color=RED, linestyle=line, label=f"p{percentage}: {value:.1f} ms")
    axes.set(xscale="log", xlabel="ms from the time a frame was due to its output", ylabel="frames")
    axes.set_title(f"Latency of all {len(latency_ms):,} frames")
    axes.legend()
    axes.grid(alpha=0.3)
