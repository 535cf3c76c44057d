"""A report as text of 80 columns, and as an HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Final

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from instep.replay.report import WORST_FIRST, Report, StreamReport, Verdict
from instep_tools import page
from instep_tools.machine import typed_command
from instep_tools.terminal import say
from instep_tools.words import counted

FIRST_STREAMS: Final = 20
"""The number of streams shown even if they match."""
HEADINGS: Final = ("stream", "name", "frames", "vs. torch", "vs. float64", "verdict")
NUMBERS: Final = ("stream", "frames", "vs. torch", "vs. float64")
"""The headings of columns of numbers."""
_STYLES: Final[dict[Verdict, str]] = {
    "exact": "green",
    "within tolerance": "yellow",
    "not checked": "bold red",
    "mismatch": "bold red",
    "empty": "dim",
}
_TONES: Final[dict[Verdict, page.Tone]] = {
    "exact": "good",
    "within tolerance": "doubt",
    "not checked": "bad",
    "mismatch": "bad",
    "empty": "",
}


def render(report: Report, console: Console, *, briefly: bool = False) -> None:
    """Print verdicts, problems and notes, with a summary as the last line.

    With `briefly`, print one line with the file and the verdict, then problems and notes.
    """
    style = "bold green" if report.verified else "bold red"
    if briefly:
        say(console, f"{report.file}: {report.summary()}", style)
        for text, colour in _problems(report):
            say(console, textwrap.indent(text, "  "), colour)
        return
    console.print(_table(report), highlight=False)
    for text, colour in _problems(report):
        say(console, text, colour)
    say(console, report.checkers())
    say(console, report.summary(), style)


def verify_page(report: Report, recording: Mapping[str, str]) -> page.Page:
    """The HTML page, with facts about the recording as text."""
    tone = _TONES[report.verdict] if report.verified else "bad"
    return page.Page(
        program="instep verify",
        title=f"{report.file.name}, a recording of {report.model_name}",
        verdict=page.Marked(f"{'verified' if report.verified else 'not verified'}: {report.verdict}", tone),
        summary=f"{_sentence(report.summary())} {_sentence(report.checkers())}",
        sections=list(_sections(report, recording)),
        conditions={"command": typed_command("instep"), "checked in": f"{report.seconds:,.1f} s"},
    )


def _table(report: Report) -> Table:
    unusual = ("mismatch", "not checked")
    shown = [each for at, each in enumerate(report.streams) if at < FIRST_STREAMS or each.verdict in unusual]
    left_out = len(report.streams) - len(shown)
    table = Table(
        title=counted(len(report.streams), "stream"),
        caption=f"and {left_out:,} more without a mismatch" if left_out else None,
    )
    for heading in HEADINGS:
        justify: JustifyMethod = "right" if heading in NUMBERS else "left"
        folds = heading == "name"
        table.add_column(heading, justify=justify, no_wrap=not folds, overflow="fold" if folds else "ellipsis")
    for stream in shown:
        table.add_row(*map(Text, _cells(report, stream)), Text(stream.verdict, _STYLES[stream.verdict]))
    return table


def _cells(report: Report, stream: StreamReport) -> list[str]:
    distance = f"{stream.max_distance:.1e}" if report.elements.get("torch") else "–"
    error = "–" if report.reference == "none" else f"{stream.max_error:.1e}"
    return [str(stream.stream), stream.name, f"{stream.frames:,}", distance, error]


def _problems(report: Report) -> Iterator[tuple[str, str]]:
    """Sentences, each with its style."""
    mismatches = [stream for stream in report.streams if stream.problems]
    for stream in mismatches[:FIRST_STREAMS]:
        yield f"mismatch in stream {stream.stream} ({stream.name}):", "red"
        yield "\n".join(f"  {problem}" for problem in stream.problems), "red"
    if len(mismatches) > FIRST_STREAMS:
        yield f"and mismatches in {counted(len(mismatches) - FIRST_STREAMS, 'more stream')}", "red"
    for remark in _remarks(report):
        yield remark, "yellow"
    if report.unchecked:
        streams = counted(report.unchecked, "stream")
        yield f"not checked: {streams} where neither bits nor the float64 reference decide", "red"


def _remarks(report: Report) -> Iterator[str]:
    """Sentences about the limits of the verdict."""
    for note in report.notes:
        yield f"bits were not required to be equal: {note}"
    if report.reference == "same graph":
        yield "the float64 reference computes the graph in the model folder: a mistake in that does not show"
    lossy = [stream for stream in report.streams if stream.lossy_from is not None]
    why = "frames or states are too large for float32, so the float64 reference bounds nothing"
    if report.reference == "none":
        why = "bits differ, and no float64 reference bounds by how much they may"
    for stream in lossy[:FIRST_STREAMS]:
        yield f"stream {stream.stream} ({stream.name}), from frame {stream.lossy_from} on: {why}"
    if len(lossy) > FIRST_STREAMS:
        yield f"and {counted(len(lossy) - FIRST_STREAMS, 'more stream')} in which {why}"
    if report.not_compared:
        frames = counted(report.not_compared, "frame")
        why = "the server was killed, its recording failed or the copy was cut"
        yield f"not compared: {frames} whose inputs were recorded, but not their outputs: {why}"
    if report.trimmed:
        yield f"the recording {report.trimmed}"
    if not report.finished:
        yield f"the recording was checked up to its last commit: {report.ending}"


def _sections(report: Report, recording: Mapping[str, str]) -> Iterator[page.PageSection]:
    problems = [
        (str(stream.stream), stream.name, _sentence(problem))
        for stream in report.streams
        for problem in stream.problems
    ]
    if problems:
        yield page.PageSection(
            "Mismatches", [page.Table(("stream", "name", "problem"), problems, ("stream",), "problems")]
        )
    if limits := [page.Marked(_sentence(remark), "doubt") for remark in _remarks(report)]:
        yield page.PageSection("Limits of the verdict", limits)
    worst_first = sorted(report.streams, key=lambda each: (WORST_FIRST.index(each.verdict), -each.max_error))
    rows: list[list[page.Cell]] = [
        [*_cells(report, stream), page.Marked(stream.verdict, _TONES[stream.verdict])] for stream in worst_first
    ]
    yield page.PageSection("Streams", [page.Table(HEADINGS, rows, NUMBERS, "streams, none of which is worse")])
    yield page.PageSection("Recording", [page.Facts(recording)])


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
