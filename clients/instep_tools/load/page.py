"""The result of a load test as an HTML page with tables, facts and charts."""

from __future__ import annotations

from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from instep_client.protocol.wire import ServerInfo
from instep_tools.load.plan import LoadPlan
from instep_tools.load.result import (
    PERCENTILES,
    TRIAL_TITLES,
    LoadResult,
    Verdict,
    percentiles,
    server_as_json,
    trial_rows,
)
from instep_tools.load.search import Search
from instep_tools.machine import typed_command
from instep_tools.page import Cell, Chart, Facts, Marked, Page, PageSection, Table, Tone
from instep_tools.problems import Exit
from instep_tools.words import counted

MOST_BINS: Final = 60
LEAST_MS: Final = 1e-3
"""The smallest latency on a logarithmic axis."""
BLUE, ORANGE, GREY, BLACK = "#2b6cb0", "#dd6b20", "#a0aec0", "#1a202c"
VERDICTS: Final[dict[Verdict, tuple[str, str, Tone]]] = {
    "met": ("o", BLUE, "good"),
    "not met": ("X", ORANGE, "bad"),
    "invalid": ("^", GREY, "doubt"),
}
"""For each verdict, its marker and colour in the chart, and its colour in the table."""


def load_page(
    endpoint: str,
    info: ServerInfo,
    plan: LoadPlan,
    best: LoadResult | None,
    search: Search | None,
    sentence: str,
    ending: Exit,
) -> Page:
    """The page for one load, or for a search.

    `best` is the load that is shown in full; without one, the page names `plan`. `sentence` is the summary on the
    terminal.
    """
    sections = [*([] if search is None else [_search(search)]), *([] if best is None else [_latency(best)])]
    server = Facts({"endpoint": endpoint, **{name: str(value) for name, value in server_as_json(info).items()}})
    load = (plan if best is None else best.plan).sentence()
    return Page(
        program="instep loadtest",
        title=f"{info.model}: {load}",
        verdict=_verdict(best, search, ending),
        summary=f"{sentence[:1].upper()}{sentence[1:]}.",
        sections=[*sections, PageSection("Server", [server])],
        conditions={"command": typed_command("instep"), "load": load},
    )


def _verdict(best: LoadResult | None, search: Search | None, ending: Exit) -> Marked:
    if search is not None and best is not None:
        least = "at least " if search.ended else ""
        found = f"{least}{counted(best.plan.streams, 'stream')} within {search.slo_ms:g} ms"
        return Marked(found, "doubt" if least else "good")
    if ending is Exit.MEASURED_ITSELF:
        return Marked("no verdict: the load generator could not keep up", "doubt")
    if search is not None:
        return Marked(f"no load stayed within {search.slo_ms:g} ms", "bad")
    if best is not None and best.whole:
        return Marked("every frame was answered", "good")
    return Marked("not every frame was answered", "bad")


def _search(search: Search) -> PageSection:
    slo_ms = search.slo_ms
    rows: list[list[Cell]] = []
    for trial, cells in zip(search.trials, trial_rows(search.trials, slo_ms), strict=True):
        verdict = trial.verdict(slo_ms)
        rows.append([*cells[:-1], Marked(verdict, VERDICTS[verdict][2])])
    table = Table((*TRIAL_TITLES[:-1], f"p99 within {slo_ms:g} ms"), rows, TRIAL_TITLES[:-1], "loads")
    figure, axes = _axes()
    for verdict, (marker, colour, _) in VERDICTS.items():
        chosen = [trial for trial in search.trials if trial.verdict(slo_ms) == verdict and len(trial.samples)]
        places = [trial.plan.streams for trial in chosen], [max(trial.p99_ms, LEAST_MS) for trial in chosen]
        axes.scatter(*places, marker=marker, color=colour, s=60, label=verdict)
    axes.axhline(slo_ms, color=BLACK, linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="streams", ylabel="ms")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.legend()
    caption = "Latency at the 99th percentile of each load (dashed: the service level)"
    return PageSection("Search", [table, Chart(figure, caption)])


def _latency(result: LoadResult) -> PageSection:
    rows = [[title.strip(), *values] for title, values in result.latency_rows()]
    table = Table((f"milliseconds, n = {len(result.samples):,}", *PERCENTILES), rows, tuple(PERCENTILES))
    return PageSection("Latency", [table, _over_time(result)] if len(result.answered) else [table])


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.3)
    return figure, axes


def _over_time(result: LoadResult) -> Chart:
    samples = result.samples
    edges = np.linspace(0, max(result.plan.duration_s, 1e-3), min(MOST_BINS, max(1, len(samples) // 20)) + 1)
    places = np.searchsorted(edges, samples["at_s"], "right") - 1
    parts = [samples[places == number] for number in range(len(edges) - 1)]
    levels = [percentiles(np.maximum(part["latency_us"] / 1000, LEAST_MS), part["frames"]) for part in parts]
    figure, axes = _axes()
    # The maximum is pale and behind, since it must not hide the p99.
    for name, colour, line, alpha in (("max", BLACK, ":", 0.4), ("p50", BLUE, "-", 1.0), ("p99", ORANGE, "-", 1.0)):
        values = [level[name] for level in levels]
        axes.plot(
            (edges[1:] + edges[:-1]) / 2, values, label=name, color=colour, linestyle=line, marker=".", alpha=alpha
        )
    axes.set(yscale="log", xlabel="s", ylabel="ms", xlim=(0, edges[-1]))
    _plain_numbers(axes.yaxis)
    axes.legend(loc="upper right", ncols=3)
    return Chart(figure, "Latency over time")


def _plain_numbers(axis: Axis) -> None:
    """Labels of a logarithmic axis: 0.5, 1, 2, 5, 10 and so on."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())
