"""The result of a verification as the content of a page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from instep.verify.render import HEADINGS, NUMBERS, cells, remarks
from instep.verify.report import WORST_FIRST, Report, StreamReport, Verdict
from instep_tools.machine import typed_command
from instep_tools.page import BAD, DOUBT, GOOD, SOFT, Cell, Chart, Facts, Marked, Page, PageSection, Part, Table, Tone

MOST_DOTS: Final = 1000
"""Of the chart, about."""
UNIT_ROUNDOFF: Final = 2.0**-24
"""The largest relative error of rounding to float32."""
TONES: Final[Mapping[Verdict, Tone]] = {
    "exact": "good",
    "within tolerance": "doubt",
    "not checked": "bad",
    "mismatch": "bad",
    "empty": "",
}
_COLOURS: Final[Mapping[Tone, str]] = {"good": GOOD, "doubt": DOUBT, "bad": BAD, "": SOFT}
_TRUTH: Final = {
    "independent": "the same equations, written a second time and computed in float64 from the original weights",
    "same graph": "the graph in the model folder, computed in float64",
    "none": "nothing: this kind of model has no float64 reference",
}


def verify_page(report: Report, recording: Mapping[str, str]) -> Page:
    """The page.

    Args:
        report: the result.
        recording: facts about the recording, in words.
    """
    return Page(
        program="instep verify",
        title=f"{report.file.name}, a recording of {report.model_name}",
        verdict=_verdict(report),
        summary=f"{_sentence(report.summary())} {_sentence(report.checkers())}",
        sections=list(_sections(report, recording)),
        conditions={"command": typed_command("instep"), "checked in": f"{report.seconds:,.1f} s"},
    )


def _verdict(report: Report) -> Marked:
    if report.verified:
        return Marked(f"verified: {report.verdict}", TONES[report.verdict])
    return Marked(f"not verified: {report.verdict}", "bad")


def _sections(report: Report, recording: Mapping[str, str]) -> Iterator[PageSection]:
    wrong = [stream for stream in report.streams if stream.verdict == "mismatch"]
    if wrong:
        yield PageSection("Mismatches", list(_mismatches(wrong)))
    yield PageSection("The four checks", [_checks(report)])
    if limits := [_sentence(remark) for remark in remarks(report)]:
        yield PageSection("Limits of the verdict", [Marked(limit, "doubt") for limit in limits])
    yield PageSection("Streams", list(_streams(report)))
    yield PageSection("Recording", [Facts(recording)])


def _mismatches(wrong: list[StreamReport]) -> Iterator[Part]:
    headings = ("stream", "name", "where", "element", "expected", "recorded", "found by")
    rows = []
    for stream in wrong:
        if (found := stream.divergence) is not None:
            where = f"frame {found.frame:,}" if found.place == "output" else f"{found.place} before {found.frame:,}"
            values = (f"{found.replayed:.9g}", f"{found.recorded:.9g}")
            rows.append((str(stream.stream), stream.name, where, str(found.element), *values, found.checker))
    if rows:
        yield "The first wrong value of each stream, as the check computes it and as it was recorded."
        yield Table(headings, rows, ("stream", "element", "expected", "recorded"), "streams with a mismatch")
    problems = [(str(stream.stream), stream.name, _sentence(each)) for stream in wrong for each in stream.problems]
    yield Table(("stream", "name", "problem"), problems, ("stream",), "problems")


def _checks(report: Report) -> Table:
    within = "within the bound of rounding"
    bits = f"{within}, twice" if report.notes else "equal bits"
    everything = f"every frame, {report.elements.get('stepped', 0):,} values"
    rows = [
        ("stepped", "the compiled step, frame by frame", bits, everything, f"{report.max_difference:.1e}"),
        ("definition", "a second program of the same arithmetic", "equal bits", report.by_definition, "–"),
        (
            "torch",
            "torch's own module, in whole sequences",
            f"{within}, twice",
            "every frame",
            f"{report.max_distance:.1e}",
        ),
        ("float64 reference", _TRUTH[report.reference], within, "every frame", f"{report.max_error:.1e}"),
    ]
    is_made = (True, not report.notes, bool(report.elements.get("torch")), report.reference != "none")
    rows = [row if made else (*row[:2], "–", "not compared", "–") for row, made in zip(rows, is_made, strict=True)]
    headings = ("check", "recorded outputs and states are compared with", "required", "compared", "largest distance")
    return Table(headings, rows)


def _streams(report: Report) -> Iterator[Part]:
    worst_first = sorted(
        report.streams,
        key=lambda each: (WORST_FIRST.index(each.verdict), -_known(each.max_difference), -_known(each.max_error)),
    )
    rows: list[list[Cell]] = [
        [*cells(report, stream), Marked(stream.verdict, TONES[stream.verdict])] for stream in worst_first
    ]
    if report.reference != "none" and (chart := _errors(worst_first)) is not None:
        yield chart
    yield Table(HEADINGS, rows, NUMBERS, "streams, none of which is worse")


def _errors(streams: list[StreamReport]) -> Chart | None:
    """The distances from the float64 reference, rising: of many streams the largest ones, and some of the others."""
    known = sorted((each for each in streams if 0 < each.max_error < math.inf), key=lambda each: each.max_error)
    if not known:
        return None
    count, half = len(known), MOST_DOTS // 2
    places = np.unique(np.append(np.linspace(0, count - 1, half).astype(int), np.arange(max(0, count - half), count)))
    figure = Figure(figsize=(9.6, 2.8), layout="constrained")
    axes = figure.subplots()
    for verdict, tone in TONES.items():
        dots = np.array([(place + 1, known[place].max_error) for place in places if known[place].verdict == verdict])
        if len(dots):
            axes.scatter(dots[:, 0], dots[:, 1], s=16, color=_COLOURS[tone], linewidth=0, label=verdict)
    axes.axhline(UNIT_ROUNDOFF, color=SOFT, linestyle="--", linewidth=1)
    axes.annotate(
        "rounding 1 to float32",
        (0, UNIT_ROUNDOFF),
        (4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        color=SOFT,
    )
    axes.set(yscale="log", xlabel="streams, by their error", ylabel="absolute error")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.margins(x=0.02, y=0.15)
    axes.grid(alpha=0.5)
    if len({each.verdict for each in known}) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(TONES), frameon=False, borderaxespad=0.2)
    some = f" ({len(places):,} of {count:,} streams)" if len(places) < count else ""
    return Chart(figure, f"Largest error of each stream: its recorded values against the float64 reference{some}")


def _known(error: float) -> float:
    return math.inf if math.isnan(error) else error


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
