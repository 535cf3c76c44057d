"""A report on the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from instep.core.typing import I64
from instep.verify.report import Report, StreamReport, Verdict, counted, ulp_label

FIRST_STREAMS: Final = 20
"""So many streams are shown even when nothing is wrong with them."""
BAR_WIDTH: Final = 40
_STYLES: Final[dict[Verdict, str]] = {
    "exact": "green",
    "within tolerance": "yellow",
    "mismatch": "bold red",
    "empty": "dim",
}


def render(report: Report, console: Console) -> None:
    """Print verdicts, histogram, first divergence and notes, and one summary line at the end."""
    for part in _parts(report):
        console.print(part, soft_wrap=isinstance(part, Text), highlight=False)


def _parts(report: Report) -> Iterator[RenderableType]:
    yield _streams(report.streams)
    if report.ulps:
        yield _histogram(report.ulps["stepped"], report.ulps["whole sequence"])
    bad = [stream for stream in report.streams if stream.verdict == "mismatch"]
    if bad:
        yield Text(f"first mismatch: stream {bad[0].stream} ({bad[0].name}): {bad[0].problems[0]}", "red")
    for note in report.notes:
        yield Text(f"bits were not required to be equal: {note}", "yellow")
    if report.not_compared:
        what = counted(report.not_compared, "frame")
        yield Text(f"not compared: {what} whose outputs were not recorded, because the engine was killed", "yellow")
    if not report.finished:
        yield Text("the recording was not closed: it was checked up to its last commit", "yellow")
    yield Text(report.summary(), "bold red" if report.mismatches else "bold green")


def _streams(streams: tuple[StreamReport, ...]) -> RenderableType:
    shown = [stream for at, stream in enumerate(streams) if at < FIRST_STREAMS or stream.verdict == "mismatch"]
    left_out = len(streams) - len(shown)
    table = Table(
        title=counted(len(streams), "stream"), caption=f"and {left_out:,} more without a mismatch" if left_out else None
    )
    for heading in ("stream", "frames", "max ULP", "max error"):
        table.add_column(heading, justify="right")
    table.add_column("name")
    table.add_column("verdict")
    for stream in shown:
        verdict = Text(stream.verdict, _STYLES[stream.verdict])
        for problem in stream.problems:
            verdict.append(f"\n{problem}", "red")
        table.add_row(
            str(stream.stream),
            f"{stream.frames:,}",
            f"{stream.max_ulp:,}",
            f"{stream.max_error:.1e}",
            Text(stream.name),
            verdict,
        )
    return table


def _histogram(stepped: I64, whole: I64) -> RenderableType:
    both = stepped + whole
    table = Table(
        title="elements by distance from the recording",
        caption="stepped counts final states, too; bars are logarithmic",
    )
    table.add_column("ULP", justify="right")
    table.add_column("stepped", justify="right")
    table.add_column("whole sequence", justify="right")
    table.add_column("")
    largest = math.log1p(int(both.max()))
    for at, count in enumerate(both.tolist()):
        if count:
            bar = "█" * max(round(BAR_WIDTH * math.log1p(count) / largest), 1)
            style = "green" if at == 0 else "yellow"
            table.add_row(ulp_label(at), f"{stepped[at]:,}", f"{whole[at]:,}", Text(bar, style))
    return table
