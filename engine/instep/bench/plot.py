"""The suite's results as a picture: how far every row is from its bar, and what every round gave."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from instep.bench.result import Row
from instep.bench.show import bar, value

COLUMNS: Final = 3
GREEN, RED, GREY = "#2f855a", "#c53030", "#4a5568"


def plot(rows: Sequence[Row], path: Path, title: str, *, is_judged: bool = True) -> None:
    """Write a PNG: on top a bar a row, below what was measured in each round of each row."""
    below = math.ceil(len(rows) / COLUMNS)
    figure = Figure(figsize=(14, 2 + 0.4 * len(rows) + 2.6 * below), layout="constrained")
    figure.suptitle(title, fontsize=11)
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[1 + 0.4 * len(rows), 2.6 * below])[:, 0]
    _bars(top.subplots(), rows, is_judged)
    grid = bottom.subplots(below, COLUMNS, squeeze=False).flat
    for axes, row in zip(grid, rows, strict=False):
        _rounds(axes, row)
    for axes in list(grid)[len(rows) :]:
        axes.set_axis_off()
    figure.savefig(path, format="png", dpi=110)


def _bars(axes: Axes, rows: Sequence[Row], is_judged: bool) -> None:
    places = range(len(rows))
    colors = [(GREEN if row.reached else RED) if is_judged else GREY for row in rows]
    axes.barh(places, [row.over_bar for row in rows], color=colors)
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_yticks(places, [f"{row.name}: {value(row.value, row.unit)} ({bar(row)})" for row in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel="how far above the bar (1: just reached)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _rounds(axes: Axes, row: Row) -> None:
    for name, values in row.samples.items():
        axes.plot(range(1, len(values) + 1), values, marker=".", linewidth=1, label=name)
    axes.set_title(row.name, fontsize=9)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(1, max(map(len, row.samples.values())) + 1))
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6)
