"""A report as text of 80 columns, and as an HTML page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeAlias

from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from instep.replay.report import WORST_FIRST, NoFrames, Report, StreamReport, Verdict
from instep_tools import page
from instep_tools.machine import typed_command
from instep_tools.terminal import say
from instep_tools.words import counted

Outcome: TypeAlias = Report | Exception
"""The result for a recording, or the reason why there is none."""
FIRST_STREAMS: Final = 20
"""The most streams that are shown."""
HEADINGS: Final = ("stream", "name", "frames", "vs. torch", "vs. float64", "verdict")
NUMBERS: Final = ("stream", "frames", "vs. torch", "vs. float64")
"""The headings of columns of numbers."""
_TONES: Final[dict[Verdict, page.Tone]] = {
    "exact": "good",
    "within tolerance": "doubt",
    "not checked": "bad",
    "mismatch": "bad",
    "empty": "",
}
_TONES_UP: Final[tuple[page.Tone, ...]] = ("", "good", "doubt", "bad")


def render(report: Report, console: Console, *, briefly: bool = False) -> None:
    """Print the streams that differ, problems and notes, with a summary as the last line.

    With `briefly`, print one line with the file and the summary, then problems and notes.
    """
    style = "bold green" if report.verified else "bold red"
    if briefly:
        say(console, f"{report.file}: {report.summary()}", style)
        for text, colour in _problems(report):
            say(console, textwrap.indent(text, "  "), colour)
        return
    if differing := [each for each in report.streams if each.verdict in ("mismatch", "not checked")]:
        console.print(_table(report, differing), highlight=False)
    for text, colour in _problems(report):
        say(console, text, colour)
    say(console, report.checkers())
    say(console, report.summary(), style)


def verify_page(found: Mapping[Path, Outcome], summary: str, facts: Mapping[Path, Mapping[str, str]]) -> page.Page:
    """The HTML page for some recordings, with a summary of all and facts about each that was checked."""
    reports = [each for each in found.values() if isinstance(each, Report)]
    if len(reports) == len(found) == 1:
        (report,) = reports
        title = f"{report.file.name}, a recording of {report.model_name}"
        verdict = page.Marked(f"{'verified' if report.verified else 'not verified'}: {report.verdict}", _tone(report))
        summary, sections = f"{_sentence(report.summary())} {_sentence(report.checkers())}", []
    else:
        title, worst = counted(len(found), "recording"), max(map(_tone, found.values()), key=_TONES_UP.index)
        verdict, summary = page.Marked(summary, worst), ""
        rows = sorted(map(_result, found, found.values()), key=lambda row: -_TONES_UP.index(row[1].tone))
        table = page.Table(("recording", "result"), rows, rest="recordings, none of which is worse")
        sections = [page.PageSection("Recordings", [table])]
    for report in reports:
        name = f" of {report.file.name}" if len(found) > 1 else ""
        sections += _sections(report, facts.get(report.file, {}), name)
    conditions = {"command": typed_command("instep"), "checked in": f"{sum(each.seconds for each in reports):,.1f} s"}
    return page.Page("instep verify", title, verdict, summary, sections, conditions)


def _result(file: Path, found: Outcome) -> tuple[str, page.Marked]:
    if isinstance(found, Report):
        return str(file), page.Marked(_sentence(found.summary()), _tone(found))
    return str(file), page.Marked(_sentence(f"{failure_verdict(found)}: {found}"), _tone(found))


def _tone(found: Outcome) -> page.Tone:
    if isinstance(found, Report):
        return _TONES[found.verdict] if found.verified else "bad"
    return _TONES[failure_verdict(found)]


def failure_verdict(found: Exception) -> Verdict:
    """The verdict for a recording that was not checked, and for one without frames."""
    return "empty" if isinstance(found, NoFrames) else "not checked"


def _table(report: Report, streams: Sequence[StreamReport]) -> Table:
    more = len(streams) - FIRST_STREAMS
    table = Table(
        title=f"{len(streams):,} of {counted(len(report.streams), 'stream')}",
        caption=f"and {more:,} more" if more > 0 else None,
    )
    for heading in HEADINGS:
        justify: JustifyMethod = "right" if heading in NUMBERS else "left"
        folds = heading == "name"
        table.add_column(heading, justify=justify, no_wrap=not folds, overflow="fold" if folds else "ellipsis")
    for stream in streams[:FIRST_STREAMS]:
        table.add_row(*map(Text, _cells(report, stream)), Text(stream.verdict, "bold red"))
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


def _sections(report: Report, recording: Mapping[str, str], of: str) -> Iterator[page.PageSection]:
    problems = [
        (str(stream.stream), stream.name, _sentence(problem))
        for stream in report.streams
        for problem in stream.problems
    ]
    if problems:
        yield page.PageSection(
            f"Mismatches{of}", [page.Table(("stream", "name", "problem"), problems, ("stream",), "problems")]
        )
    if limits := [page.Marked(_sentence(remark), "doubt") for remark in _remarks(report)]:
        yield page.PageSection(f"Limits of the verdict{of}", limits)
    worst_first = sorted(report.streams, key=lambda each: (WORST_FIRST.index(each.verdict), -each.max_error))
    rows: list[list[page.Cell]] = [
        [*_cells(report, stream), page.Marked(stream.verdict, _TONES[stream.verdict])] for stream in worst_first
    ]
    yield page.PageSection(f"Streams{of}", [page.Table(HEADINGS, rows, NUMBERS, "streams, none of which is worse")])
    yield page.PageSection(f"Recording{of and f' {report.file.name}'}", [page.Facts(recording)])


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
