"""Differences between the outputs of a candidate and those that were served: as values, as a table, as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from instep_tools.terminal import say
from instep_tools.words import counted, finite

_SHOWN: Final = 10
"""Streams in the table."""


@dataclass(frozen=True, slots=True)
class StreamDifference:
    """Differences of one stream."""

    name: str
    frames: int
    """Compared."""
    largest: float
    """The largest absolute difference of one value."""


@dataclass(frozen=True, slots=True)
class Differences:
    """Differences of all frames that were compared. Of a frame, its value that differs most counts in the quantiles."""

    recording: str
    candidate: str
    frames: int
    """Compared."""
    equal: int
    """Frames whose outputs have the same bits."""
    largest: float
    """The largest absolute difference of one value; infinity where one is not finite and the other differs."""
    mean: float
    """The mean absolute difference of all values."""
    quantiles: dict[float, float]
    """By share of frames, within a tenth."""
    streams: Sequence[StreamDifference]
    """Those that differ most, the most of all first; up to `most_listed` of the shadow."""
    streams_total: int
    """How many were compared."""
    dropped: int
    """Streams that were given up, because the candidate could not keep up, or left out."""

    def as_json(self) -> dict[str, Any]:
        """Plain values for JSON, which has no infinity: it becomes null."""
        return asdict(self) | {
            "largest": finite(self.largest),
            "mean": finite(self.mean),
            "equal_share": self.equal / self.frames if self.frames else None,
            "quantiles": {f"p{round(100 * share)}": finite(value) for share, value in self.quantiles.items()},
            "streams": [asdict(each) | {"largest": finite(each.largest)} for each in self.streams],
        }

    def render(self, console: Console) -> None:
        """Print it."""
        if self.streams:
            table = Table("stream", box=None, header_style="bold")
            for column in ("frames", "max |difference|"):
                table.add_column(column, justify="right")
            for each in self.streams[:_SHOWN]:
                table.add_row(Text(each.name), f"{each.frames:,}", f"{each.largest:.3g}")
            console.print(table)
        if self.streams_total > _SHOWN:
            say(console, f"and {counted(self.streams_total - _SHOWN, 'more stream')}, which differ less")
        if self.dropped:
            say(console, f"left out: {counted(self.dropped, 'stream')}, more than the candidate can keep up with")
        if not self.frames:
            say(console, "nothing was compared: no frame of a chosen stream was recorded meanwhile")
            return
        quantiles = ", ".join(f"p{round(100 * share)} {value:.3g}" for share, value in self.quantiles.items())
        differences = f"|difference| of a frame: {quantiles}, max {self.largest:.3g}"
        say(console, f"{differences}; of all values, mean {self.mean:.3g}")
        same = self.equal / self.frames
        compared = f"{counted(self.frames, 'frame')} of {counted(self.streams_total, 'stream')}"
        say(console, f"{compared} were compared; {same:.1%} have equal bits")
