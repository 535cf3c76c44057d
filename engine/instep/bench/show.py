"""The suite's results for people: a line as each row is there, and a table at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from instep.bench.result import Row


def value(number: float, unit: str) -> str:
    """A number as it is read: `0.852×`, `189 bytes`."""
    digits = f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"
    return f"{digits}×" if unit == "×" else f"{digits} {unit}"


def bar(row: Row) -> str:
    """What is asked for: `at least 0.85×`."""
    return f"{row.direction} {value(row.bar, row.unit)}"


def line(row: Row, *, is_judged: bool) -> str:
    """A row in one line, with its medians."""
    medians = "; ".join(f"{name} {_rate(median(values))}" for name, values in row.samples.items())
    return f"{row.name}: {value(row.value, row.unit)}, {bar(row)}: {_verdict(row, is_judged)} ({escape(medians)})"


def show(console: Console, result: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The table, and what it was measured on."""
    table = Table(title="instep bench: medians of interleaved rounds", caption=_conditions(result))
    table.add_column("row", no_wrap=True)
    table.add_column("what")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("bar", justify="right")
    table.add_column("verdict")
    for row in rows:
        verdict = _verdict(row, is_judged=not result["quick"])
        table.add_row(row.name, row.what, value(row.value, row.unit), bar(row), verdict)
    console.print(table)
    missed = result["missed"]
    if result["quick"]:
        console.print("[yellow]--quick: rounds too short and loads too small for a verdict[/]")
    elif missed:
        console.print(f"[red]{len(missed)} of {len(rows)} rows did not reach their bar: {', '.join(missed)}[/]")
    else:
        console.print(f"[green]{'all ' if len(rows) > 1 else ''}{len(rows)} reached[/]")


def _conditions(result: Mapping[str, Any]) -> str:
    machine, load = result["machine"], result["load_average"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    models = ", ".join(dict.fromkeys(row["details"]["model"] for row in result["rows"] if "model" in row["details"]))
    threads = machine["threads"]
    return (
        f"{machine['processor']}, {machine['cores_usable']} of {machine['cores']} cores, {machine['cpu_capability']}; "
        f"{versions}; {threads['torch_of_engine']} torch thread in the engine and {threads['torch_of_bare_loops']} in "
        f"bare loops, {threads['producers']} producer; {models or 'no model'}; load {load['before'][0]} before, "
        f"{load['after'][0]} after"
    )


def _verdict(row: Row, is_judged: bool) -> str:
    if not is_judged:
        return "[yellow]no verdict[/]"
    return f"[{'green' if row.reached else 'red'}]{escape(row.verdict)}[/]"


def _rate(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"
