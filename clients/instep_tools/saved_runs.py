"""Two saved results of the load test, side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from instep_tools.problems import BadFile, Exit
from instep_tools.report import three_digits
from instep_tools.terminal import Terminal

_LATENCIES: Final = ("p50", "p90", "p99", "p999", "max")


def compare_runs(one: Path, other: Path, terminal: Terminal) -> Exit:
    """Print what two runs measured, and the second over the first."""
    try:
        first, second = _figures(one), _figures(other)
    except BadFile as error:
        terminal.error(str(error))
        return Exit.COULD_NOT_RUN
    ratios = {name: second[name] / first[name] if first[name] else None for name in first}
    if terminal.as_json:
        terminal.result({"first": first, "second": second, "ratio": ratios})
        return Exit.OK
    rows = Table("", one.name, other.name, "ratio", box=None, pad_edge=False)
    for column in rows.columns[1:]:
        column.justify = "right"
    for name, value in first.items():
        ratio = ratios[name]
        rows.add_row(name, three_digits(value), three_digits(second[name]), "" if ratio is None else f"{ratio:.2f}")
    terminal.out.print(rows)
    return Exit.OK


def _figures(path: Path) -> dict[str, float]:
    """The figures of a run, or of the best trial of a search.

    Raises:
        BadFile: when it holds none.
    """
    try:
        values: Mapping[str, Any] = json.loads(path.read_text())
        run = values.get("best", values)
        if run is None:
            raise BadFile(f"{path} is a search that found no load within its level: there is nothing to compare")
        figures = {"streams": run["load"]["streams"], "frames/s": run["frames_per_second"]}
        figures |= {f"latency {name}, ms": run["latency_us"]["latency"][name] / 1000 for name in _LATENCIES}
        lost = sum(run["refused_frames"].values()) + run["unanswered_frames"] + run["unsent_frames"]
        return {name: float(value) for name, value in (figures | {"frames not answered": lost}).items()}
    except OSError as error:
        raise BadFile(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise BadFile(f"{path} holds no result of a load test; loadtest --save FILE writes one") from None
