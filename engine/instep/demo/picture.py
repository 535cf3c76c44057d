"""The demo as a picture: how decisions settle frame by frame, and the latencies of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from instep.core.typing import F32, I32
from instep.demo.producers import SPEAKERS, Heard, right_after

BLUE: Final = "#2b6cb0"
RED: Final = "#c53030"
_SHOWN: Final = (0.0, 0.9, 0.97, 1.0)
"""The number of recordings shown, from the one that settles first to the one that settles last or never."""


def draw(heard: Heard, speakers: I32, path: Path, title: str) -> None:
    """Write a PNG; an existing file is replaced. `speakers`, int32 [recordings], are the true ones."""
    right = right_after(heard.outputs, speakers)
    wrong_at = np.where(right, 0, np.arange(1, right.shape[1] + 1)).max(axis=1)  # the last frame with a wrong decision
    order = np.argsort(wrong_at, kind="stable")
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    figure.suptitle(title, fontsize=14)
    above, below = figure.subfigures(2, 1, squeeze=False).flat
    above.suptitle(
        "Who is speaking? The probability of each speaker after each frame (dots: decision; red: true speaker)",
        fontsize=11,
    )
    for axes, share in zip(above.subplots(1, len(_SHOWN), sharey=True), _SHOWN, strict=True):
        row = int(order[int(share * (len(order) - 1))])
        _settling(axes, heard.outputs[row], int(speakers[row]))
        when = f"correct from frame {wrong_at[row] + 1} on" if right[row, -1] else "wrong at the end"
        axes.set_title(f"recording {row + 1}: {when}", fontsize=10)
    accuracy, latency = below.subplots(1, 2)
    accuracy.plot(np.arange(1, right.shape[1] + 1), right.mean(axis=0), color=BLUE, marker=".")
    accuracy.set(xlabel="frames heard (finished recordings keep their last decision)", ylim=(0, 1.02))
    accuracy.set_title(f"Correct decisions in all {len(right)} recordings")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0))
    latency_ms = np.concatenate(heard.latency_s) * 1000
    latency.hist(latency_ms, np.geomspace(latency_ms.min() * 0.99, latency_ms.max() * 1.01, 60).tolist(), color=BLUE)
    latency.set(xscale="log", xlabel="ms from the time a frame was due to its output", ylabel="frames")
    latency.set_title(f"Latency of all {len(latency_ms):,} frames")
    figure.savefig(path, dpi=110)


def _settling(axes: Axes, outputs: F32, speaker: int) -> None:
    raised = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    extent = (0.5, len(outputs) + 0.5, 0.5, SPEAKERS + 0.5)
    shares = (raised / raised.sum(axis=1, keepdims=True)).T
    axes.imshow(shares, aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=1, extent=extent)
    heard = np.arange(1, len(outputs) + 1)
    axes.plot(heard, outputs.argmax(axis=1) + 1, "o", color="black", markeredgecolor="white", markersize=4.5)
    axes.axhspan(speaker + 0.5, speaker + 1.5, fill=False, edgecolor=RED, linewidth=2)
    axes.set(xlabel="frames heard", ylabel="speaker", yticks=range(1, SPEAKERS + 1))
