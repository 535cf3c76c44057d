"""A report on the terminal, readable at 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final, Literal

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from instep.verify.report import Report, StreamReport, Verdict
from instep_tools.terminal import say
from instep_tools.words import counted, printable

FIRST_STREAMS: Final = 20
"""Streams shown even when nothing is wrong with them."""
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


def render(report: Report, console: Console) -> None:
    """Print verdicts, problems and notes, and a summary as the last line."""
    for part in _parts(report):
        if isinstance(part, Text):
            say(console, part.plain, str(part.style))
        else:
            console.print(part, highlight=False)


def render_briefly(report: Report, console: Console) -> None:
    """Print one line with the file and the verdict, and below it problems and notes."""
    summary = _summary(report, f"{report.file}: ")
    say(console, summary.plain, str(summary.style))
    for part in _problems(report):
        say(console, textwrap.indent(part.plain, "  "), str(part.style))


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _streams(report)
    yield from _problems(report)
    yield Text(report.checkers())
    yield _summary(report)


def _summary(report: Report, prefix: str = "") -> Text:
    return Text(f"{prefix}{report.summary()}", "bold green" if report.verified else "bold red")


def _problems(report: Report) -> Iterator[Text]:
    mismatches = [stream for stream in report.streams if stream.verdict == "mismatch"]
    for stream in mismatches[:FIRST_STREAMS]:
        yield Text(f"mismatch in stream {stream.stream} ({stream.name}):", "red")
        yield Text("\n".join(f"  {problem}" for problem in stream.problems), "red")
    if len(mismatches) > FIRST_STREAMS:
        yield Text(f"and mismatches in {counted(len(mismatches) - FIRST_STREAMS, 'more stream')}", "red")
    for remark in remarks(report):
        yield Text(remark, "yellow")
    if report.unchecked:
        streams = counted(report.unchecked, "stream")
        yield Text(f"not checked: {streams} where neither bits nor the float64 reference decide", "red")


def remarks(report: Report) -> Iterator[str]:
    """Limits of the verdict, as sentences."""
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


def _streams(report: Report) -> RenderableType:
    streams = report.streams
    unusual = ("mismatch", "not checked")
    shown = [stream for at, stream in enumerate(streams) if at < FIRST_STREAMS or stream.verdict in unusual]
    left_out = len(streams) - len(shown)
    table = Table(
        title=counted(len(streams), "stream"), caption=f"and {left_out:,} more without a mismatch" if left_out else None
    )
    for heading in HEADINGS:
        justify: Literal["left", "right"] = "right" if heading in NUMBERS else "left"
        folds = heading == "name"
        table.add_column(heading, justify=justify, no_wrap=not folds, overflow="fold" if folds else "ellipsis")
    for stream in shown:
        table.add_row(*map(Text, cells(report, stream)), Text(stream.verdict, _STYLES[stream.verdict]))
    return table


def cells(report: Report, stream: StreamReport) -> list[str]:
    """The row of a stream under `HEADINGS`, except the verdict."""
    distance = f"{stream.max_distance:.1e}" if report.elements.get("torch") else "–"
    error = "–" if report.reference == "none" else f"{stream.max_error:.1e}"
    return [str(stream.stream), printable(stream.name), f"{stream.frames:,}", distance, error]
