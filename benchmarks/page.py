"""The results of a run as the content of a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.measurement import Row
from benchmarks.report import number, threshold, value
from instep_tools.machine import typed_command
from instep_tools.page import BAD, GOOD, SOFT, Cell, Chart, Marked, Page, PageSection, Part, Table

MOST_RATIO = 3.0
"""Longer bars would flatten all others."""


def benchmark_page(result: Mapping[str, Any], rows: Sequence[Row]) -> Page:
    """The page."""
    table = Table(
        ("row", "what is compared", "measured", "threshold", "verdict"),
        [[row.name, row.what, value(row.value, row.unit), threshold(row), _mark(row, result)] for row in rows],
        ("measured", "threshold"),
    )
    parts: list[Part] = [table]
    judged = [row for row in rows if row.threshold]
    if judged:
        parts.insert(0, _bars(judged, not result["quick"]))
    sections = [PageSection("Rows", parts), PageSection("Medians of the rounds", [_samples(rows)])]
    if left_out := result["left_out"]:
        sections.append(PageSection("Left out", [Table(("row", "why"), list(left_out.items()))]))
    threads, load = result["machine"]["threads"], result["load_average"]
    return Page(
        program="python -m benchmarks",
        title=f"What serving costs: {', '.join(dict.fromkeys(row.model for row in rows))}",
        verdict=_verdict(result, len(judged)),
        summary="Each figure is a median of rounds in which both sides of a comparison take turns.",
        sections=sections,
        conditions={
            "command": typed_command("python -m benchmarks"),
            "started": result["started"],
            "CPU": f"{result['machine']['cores_usable']} cores usable, {result['machine']['cpu_capability']}",
            "torch threads": f"{threads['torch_of_engine']} in the engine, {threads['torch_of_bare_loops']} in loops",
            "load average": f"{load['before']} before, {load['after']} after",
        },
    )


def _verdict(result: Mapping[str, Any], judged: int) -> Marked:
    if result["passed"] is None or not judged:
        return Marked("no verdict" if not result["quick"] else "no verdict: --quick is too short for one", "doubt")
    if missed := result["missed"]:
        return Marked(f"{len(missed)} of {judged} thresholds missed", "bad")
    return Marked(f"all {judged} thresholds reached", "good")


def _mark(row: Row, result: Mapping[str, Any]) -> Cell:
    if row.reached is None:
        return "information"
    if result["quick"]:
        return Marked("no verdict", "doubt")
    return Marked("reached", "good") if row.reached else Marked("missed", "bad")


def _bars(rows: Sequence[Row], judged: bool) -> Chart:
    """The distance of each row from its threshold, whatever its unit: beyond 1 it is reached."""
    figure = Figure(figsize=(9.6, 0.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    ratios = [
        row.value / row.threshold if row.direction == "at least" else row.threshold / row.value
        for row in rows
        if row.threshold
    ]
    colours = [SOFT if not judged else GOOD if row.reached else BAD for row in rows]
    ratios = [min(ratio, MOST_RATIO) for ratio in ratios]
    axes.barh(places, ratios, color=colours, height=0.62)
    for place, ratio, row in zip(places, ratios, rows, strict=True):
        said = f"{value(row.value, row.unit)}, {threshold(row)}"
        axes.annotate(said, (max(ratio, 1.0), place), (5, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(1, linestyle="--", linewidth=1.2, color="#000000")
    axes.set_yticks(places, [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(*ratios, 1.0))
    axes.set_xlabel("share of the threshold (dashed: reached)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return Chart(
        figure, "How far each row is from its threshold: longer is better, also where the threshold is a maximum"
    )


def _samples(rows: Sequence[Row]) -> Table:
    headings = ("row", "side", "median", "least", "most", "rounds")
    lines = [
        (row.name, side, *map(number, (median(values), min(values), max(values))), str(len(values)))
        for row in rows
        for side, values in row.samples.items()
    ]
    return Table(headings, lines, headings[2:])
