"""The results for people: a line as soon as a row is measured, a table at the end, and the machine beside both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measurement import Row
from instep.runtime.executor import usable_cores
from instep_tools.machine import machine as machine_here
from instep_tools.machine import versions_line
from instep_tools.words import wrapped


def machine() -> dict[str, Any]:
    """The machine and the versions, by name."""
    return {
        **machine_here(),
        "cores_usable": usable_cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": {"torch_of_engine": 1, "torch_of_bare_loops": torch.get_num_threads(), "producers": 1},
    }


def value(measured: float, unit: str) -> str:
    """A number with its unit: `0.852×`, `1.23 s`."""
    digits = f"{measured:,.0f}" if abs(measured) >= 100 else f"{measured:.3g}"
    return f"{digits}×" if unit == "×" else f"{digits} {unit}"


def threshold(row: Row) -> str:
    """`at least 0.9×`, or nothing where nothing is required."""
    return "" if row.threshold is None else f"{row.direction} {value(row.threshold, row.unit)}"


def line(row: Row, *, judged: bool) -> str:
    """One row in one line, with the medians of its sides."""
    medians = "; ".join(f"{name} {number(median(values))}" for name, values in row.samples.items())
    parts = [value(row.value, row.unit), threshold(row), _verdict(row, judged)]
    return f"{row.name}: {row.what}: {', '.join(part for part in parts if part)} ({escape(medians)})"


def say(console: Console, sentence: str) -> None:
    """Print a sentence, which may hold markup, in lines of 80 columns."""
    console.print(wrapped(sentence), highlight=False, soft_wrap=True)


def show(console: Console, result: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The table, the conditions, and the verdict."""
    table = Table(title="medians of interleaved rounds")
    for heading in ("row", "measured", "threshold", "verdict"):
        table.add_column(heading, justify="right" if heading in ("measured", "threshold") else "left")
    for row in rows:
        table.add_row(row.name, value(row.value, row.unit), threshold(row), _verdict(row, not result["quick"]))
    console.print(table)
    say(console, _conditions(result))
    missed = result["missed"]
    if result["quick"]:
        say(console, "[yellow]--quick: rounds too short and loads too small for a verdict[/]")
    elif missed:
        say(console, f"[red]{len(missed)} of {len(rows)} rows missed their threshold: {', '.join(missed)}[/]")
    elif result["passed"]:
        say(console, "[green]every threshold was reached[/]")


def _conditions(result: Mapping[str, Any]) -> str:
    facts, load = result["machine"], result["load_average"]
    threads = f"1 torch thread in the engine and {facts['threads']['torch_of_bare_loops']} in the bare loops"
    models = ", ".join(dict.fromkeys(row["model"] for row in result["rows"]))
    return (
        f"{facts['processor']}, {facts['cores_usable']} of {facts['cores']} cores, {facts['cpu_capability']}; "
        f"{versions_line(facts)}; {threads}; {models}; load average {load['before']} before, {load['after']} after"
    )


def _verdict(row: Row, judged: bool) -> str:
    if row.reached is None:
        return "information"
    if not judged:
        return "[yellow]no verdict[/]"
    return "[green]reached[/]" if row.reached else "[red]missed[/]"


def number(value: float) -> str:
    """With three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
