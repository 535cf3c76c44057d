"""Results as files: JSON, the text format of HdrHistogram, and two saved results side by side."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from instep_tools.load.result import Measured
from instep_tools.load.samples import percentiles
from instep_tools.problems import BadFile, Exit, reads_or_writes
from instep_tools.terminal import Terminal
from instep_tools.words import three_digits

_LATENCIES: Final = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9", "max": "max"}
"""The percentiles of a saved result, and what the table calls them."""
MOST_LETTERS: Final = 24
"""Of a file's name, its last ones, at the head of a column."""
_TICKS: Final = 5
"""Lines for each halving of what is left to 100 %: the default of HdrHistogram's own tools."""
_SUB_BUCKETS: Final = 2048
"""What HdrHistogram uses for three significant digits."""


def as_hgrm(result: Measured) -> bytes:
    """The latencies in ms, as HdrHistogram's `outputPercentileDistribution` prints them and its plotters read them.

    The format and the percentiles that it lists are those of `AbstractHistogram.java` and `PercentileIterator.java` in
    github.com/HdrHistogram/HdrHistogram. The values are exact and not those of buckets; the number of buckets in the
    last line is what a histogram of three significant digits would have needed for the largest of them, in µs.
    """
    values, frames = result.samples["latency_us"] / 1000, result.samples["frames"]
    order = np.argsort(values)
    values, frames = values[order], frames[order]
    counts = np.cumsum(frames)
    total = int(frames.sum())
    text = io.StringIO()
    text.write(f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}\n\n")
    level = 0.0
    while level < 1 and (1 - level) * total >= 1:
        value = percentiles(values, frames, (100 * level,))[0]
        below = counts[np.searchsorted(values, value, "right") - 1]
        text.write(f"{value:12.3f} {level:14.12f} {below:10d} {1 / (1 - level):14.2f}\n")
        level += 1 / (_TICKS * 2 ** (math.floor(-math.log2(1 - level)) + 1))
    mean = float(np.average(values, weights=frames))
    deviation = math.sqrt(float(np.average((values - mean) ** 2, weights=frames)))
    buckets = max(1, math.floor(math.log2(max(1.0, 1000 * values[-1] / _SUB_BUCKETS))) + 2)
    text.write(f"{values[-1]:12.3f} {1:14.12f} {total:10d}\n")
    text.write(f"#[Mean    = {mean:12.3f}, StdDeviation   = {deviation:12.3f}]\n")
    text.write(f"#[Max     = {values[-1]:12.3f}, Total count    = {total:12d}]\n")
    text.write(f"#[Buckets = {buckets:12d}, SubBuckets     = {_SUB_BUCKETS:12d}]\n")
    return text.getvalue().encode()


def compare(one: Path, other: Path, terminal: Terminal) -> Exit:
    """Print what two saved runs measured, and the second over the first.

    Raises:
        BadFile: when one of them holds none.
    """
    (server, load, first, ended), (other_server, other_load, second, other_ended) = _saved_run(one), _saved_run(other)
    names = [name for name in first if name in second]
    ratios = {name: second[name] / first[name] if first[name] else None for name in names}
    differ = {"servers": _differences(server, other_server), "loads": _differences(load, other_load)}
    if terminal.as_json:
        found = {f"{what}_differ": differences for what, differences in differ.items()}
        early = {"first": ended or None, "second": other_ended or None}
        terminal.result({"first": first, "second": second, "ratio": ratios, **found, "ended_early": early})
        return Exit.OK
    figures = ((name, first[name], second[name], ratios[name]) for name in names)
    rows = ((name, *(three_digits(math.nan if each is None else each) for each in row)) for name, *row in figures)
    terminal.table(("", *(path.name[-MOST_LETTERS:] for path in (one, other)), "ratio"), rows)
    for path, why in ((one, ended), (other, other_ended)):
        if why:
            terminal.note(f"{path}: {why}")
    for what, differences in differ.items():
        if differences:
            both = ", ".join(f"{name} {mine!s:.12} and {theirs!s:.12}" for name, (mine, theirs) in differences.items())
            terminal.note(f"the {what} differ: {both}")
    return Exit.OK


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {name: (one[name], other.get(name)) for name in one if one[name] != other.get(name)}


def _saved_run(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, float], str]:
    """The server, the load and the figures of a run, or of the best try of a search, and whether it ended early.

    Raises:
        BadFile: when it holds none.
    """
    with reads_or_writes(path, "read"):
        text = path.read_text(errors="replace")
    try:
        values: Mapping[str, Any] = json.loads(text)
        run = values.get("best", values)
        if run is None:
            raise BadFile(f"{path} is a search that found no load within its level: there is nothing to compare")
        figures = {"streams": run["load"]["streams"], "frames/s": run["frames_per_second"]}
        latency = run["latency_us"]["latency"]
        figures |= {
            f"latency {title}, ms": latency[name] / 1000
            for name, title in _LATENCIES.items()
            if latency[name] is not None
        }
        lost = sum(run["refused_frames"].values()) + run["unanswered_frames"] + run["unsent_frames"]
        figures |= {"frames not answered": lost}
        figures = {name: float(value) for name, value in figures.items()}
        seconds, whole_s = float(run["seconds"]), float(run["load"]["duration_s"])
        ended = f"it ended after {seconds:.1f} of {whole_s:g} s" if seconds < whole_s else ""
        if ended and run["error"]:
            ended += f", {run['error']}"
        if run is not values and values["ended"]:
            ended = str(values["ended"])
        return dict(values["server"]), dict(run["load"]), figures, ended
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BadFile(f"{path} holds no result of a load test; loadtest --save FILE writes one") from None
