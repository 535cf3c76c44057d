"""The demo as a picture: how the decision settles frame by frame, and how long answers took."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from instep.core.typing import F32, I32, I64, Bool
from instep.demo.producers import F64, Heard, probabilities, right_after
from instep.demo.train import SPEAKERS
from instep_tools.pictures import save

BLUE: Final = "#2b6cb0"
RED: Final = "#c53030"
GREY: Final = "#718096"
LATENCY_BINS: Final = 60


def draw(heard: Heard, speakers: I32, path: Path, title: str) -> None:
    """Write a PNG.

    `speakers` says who it was, int32 [recordings]; an existing file is replaced.
    """
    right = right_after(heard.outputs, speakers)
    settled = settled_after(right)
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 1.1)).flat
    above.suptitle(
        "Who is speaking? The probability of each speaker after each frame (dots: decision; red: true speaker)",
        fontsize=11,
    )
    maps = above.subplots(1, 4, sharey=True)
    for axes, row in zip(maps, examples(settled, heard.lengths, speakers), strict=True):
        image = _settling(axes, heard.outputs[row], int(speakers[row]))
        when = f"correct from frame {settled[row]:.0f} on" if np.isfinite(settled[row]) else "wrong at the end"
        axes.set_title(f"recording {row + 1}: {when}", fontsize=10)
    maps[0].set_ylabel("speaker")
    above.colorbar(image, ax=maps, format=PercentFormatter(1.0), pad=0.01)
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


def examples(settled: F64, lengths: I64, speakers: I32) -> list[int]:
    """Four recordings: the decision settled at once, later, last of all, and never (or as near to it as there is).

    Of several alike, it is the longest of a speaker not shown yet.
    """
    in_order = np.sort(settled)
    later = in_order[np.isfinite(in_order)]
    later = later[later > later[0]] if len(later) and later[-1] > later[0] else in_order
    rows: list[int] = []
    for value in (in_order[0], later[len(later) // 2], later[-1], in_order[-1]):
        shown = set(speakers[rows].tolist())
        alike = np.flatnonzero(settled == value).tolist()
        rows.append(min(alike, key=lambda row: (row in rows, speakers[row] in shown, -lengths[row])))
    return rows


def _settling(axes: Axes, outputs: F32, speaker: int) -> AxesImage:
    image = axes.imshow(
        probabilities(outputs).T,
        aspect="auto",
        origin="lower",
        cmap="Blues",
        vmin=0,
        vmax=1,
        extent=(0.5, len(outputs) + 0.5, 0.5, SPEAKERS + 0.5),
    )
    heard = np.arange(1, len(outputs) + 1)
    axes.plot(heard, outputs.argmax(axis=1) + 1, "o", color="black", markeredgecolor="white", markersize=4.5)
    axes.axhspan(speaker + 0.5, speaker + 1.5, fill=False, edgecolor=RED, linewidth=2)
    axes.set(xlabel="frames heard", yticks=range(1, SPEAKERS + 1))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return image


def _accuracy(axes: Axes, right: Bool, lengths: I64) -> None:
    heard = np.arange(1, right.shape[1] + 1)
    share = right.mean(axis=0)
    still = (lengths[:, None] >= heard).mean(axis=0)
    axes.fill_between(heard, still, color=GREY, alpha=0.15, step="mid", label="recordings still running")
    axes.plot(heard, share, color=BLUE, marker=".", label="correct decisions")
    axes.axhline(1 / SPEAKERS, color=GREY, linestyle=":", label="chance")
    for at in (0, len(share) - 1):
        axes.annotate(
            f"{share[at]:.1%}",
            (float(heard[at]), float(share[at])),
            (4 if at == 0 else -2, -15),
            textcoords="offset points",
            ha="left" if at == 0 else "right",
        )
    axes.set(
        xlabel="frames heard (finished recordings keep their last decision)",
        ylim=(0, 1.02),
        xlim=(1, heard[-1]),
        title=f"Accuracy over all {len(lengths)} recordings",
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)


def _latency(axes: Axes, latency_ms: F64) -> None:
    edges = np.geomspace(latency_ms.min() * 0.99, latency_ms.max() * 1.01, LATENCY_BINS).tolist()
    axes.hist(latency_ms, edges, color=BLUE)
    for percentage, line in ((50, "-"), (99, "--")):
        value = float(np.percentile(latency_ms, percentage))
        axes.axvline(value, color=RED, linestyle=line, label=f"p{percentage}: {value:.1f} ms")
    axes.set(xscale="log", xlabel="ms from the time a frame was due to its output", ylabel="frames")
    axes.set_title(f"Latency of all {len(latency_ms):,} frames")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    axes.grid(alpha=0.3)
