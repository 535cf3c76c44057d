"""`python -m benchmarks`: measure what serving costs and hold it against thresholds. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import datetime
import difflib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks.connection import NotServed
from benchmarks.durability import durability, verify_live
from benchmarks.isolation import isolation
from benchmarks.measurement import Bench, Row
from benchmarks.models import fairness, swap
from benchmarks.reference import LeftOut, WrongOutput
from benchmarks.report import line, machine, say, show
from benchmarks.rows import MEASUREMENTS
from benchmarks.watching import listed, watched
from instep.demo.child_server import ChildFailed
from instep.models.errors import ModelError
from instep_tools.page import check_report_path, write_page
from instep_tools.problems import BadFile

SEPARATE: Final = {
    "durability": durability,
    "verify-live": verify_live,
    "isolation": isolation,
    "watched": watched,
    "listed": listed,
    "swap": swap,
    "fairness": fairness,
}
"""Measured only when they are named: they depend on a disk, or take long."""
QUICK: Final[dict[str, Any]] = {"rounds": 1, "seconds": 0.05, "scale": 50}


def run(
    console: Console,
    names: Sequence[str],
    *,
    quick: bool = False,
    as_json: bool = False,
    folder: Path | None = None,
    model: Path | None = None,
    report: Path | None = None,
) -> int:
    """Measure, show and judge.

    Args:
        console: for everything except the JSON.
        names: of the measurements; none for all but the separate ones.
        quick: try everything out in short rounds; the result has no verdict.
        as_json: write one JSON object to standard output.
        folder: where models and recordings are written and removed again; by default the system's temporary folder.
        model: a model folder to measure instead of the benchmark's own networks, whose thresholds it is not held to.
        report: an HTML page to write as well.

    Returns:
        0 when every threshold was reached, or with `quick` or a model; 1 when one was missed, an output was wrong, or
        nothing could be measured, or the page not be written.
    """
    if report is not None:
        try:
            check_report_path(report)
        except BadFile as error:
            console.print(f"[red]not measured:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            return 1
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what torch has loaded stays; a collection in the middle of a round need not look at it
    load_before, started = os.getloadavg()[0], datetime.datetime.now(datetime.UTC)
    left_out: dict[str, str] = {}
    try:
        rows = list(_measure(console, names or list(MEASUREMENTS), quick, folder, model, left_out))
    except (WrongOutput, NotServed, ChildFailed, ModelError) as error:
        console.print(f"[red]not measured:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    finally:
        gc.unfreeze()
    missed = [] if quick else [row.name for row in rows if row.reached is False]
    result: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "machine": machine(),
        "load_average": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "quick": quick,
        "rows": [{**row.as_json(), **({"reached": None} if quick else {})} for row in rows],
        "left_out": left_out,
        "missed": missed,
        "passed": None if quick or model is not None else not missed,
    }
    show(console, result, rows)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if report is not None:
        from benchmarks.page import benchmark_page

        try:
            write_page(report, benchmark_page(result, rows))
        except BadFile as error:
            console.print(f"[red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
            return 1
        say(console, f"report in {escape(str(report))}")
    return 1 if missed or not rows else 0


def _measure(
    console: Console,
    names: Sequence[str],
    quick: bool,
    folder: Path | None,
    model: Path | None,
    left_out: dict[str, str],
) -> Iterator[Row]:
    """Every row, shown as soon as it is measured; why some are left out goes to `left_out`."""
    with tempfile.TemporaryDirectory(dir=folder) as below:
        for name in names:
            bench = Bench(Path(below), model=model, **(QUICK if quick else {}))
            try:
                rows = {**MEASUREMENTS, **SEPARATE}[name](bench)
            except (LeftOut, ChildFailed) as error:
                if model is None:
                    raise
                left_out[name] = str(error)
                say(console, f"{name}: left out: {escape(str(error))}")
                continue
            for row in rows:
                if model is not None:
                    row = replace(row, threshold=None)
                say(console, line(row, judged=not quick))
                yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    known = [*MEASUREMENTS, *SEPARATE]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what serving costs.")
    help_of_rows = f"{', '.join(known)}; default: all but the last {len(SEPARATE)}"
    parser.add_argument("rows", nargs="*", metavar="ROW", help=help_of_rows)
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="measure your own model; gives no verdicts")
    parser.add_argument("--quick", action="store_true", help="try everything in about a minute; no verdicts")
    parser.add_argument("--json", action="store_true", help="write JSON to standard output, the rest to standard error")
    parser.add_argument("--folder", type=Path, help="where to record, and on whose disk; default: a temporary folder")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with all of it")
    options = parser.parse_args(arguments)
    for name in options.rows:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            instead = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            parser.error(f"there is no row {name!r}; {instead}")
    console = Console(stderr=options.json)
    return run(
        console,
        options.rows,
        quick=options.quick,
        as_json=options.json,
        folder=options.folder,
        model=options.model,
        report=options.report,
    )


if __name__ == "__main__":
    sys.exit(main())
