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
from benchmarks.copied import copied
from benchmarks.durability import durability, verify_live
from benchmarks.encryption import encrypted
from benchmarks.isolation import isolation
from benchmarks.measurement import Bench, Row
from benchmarks.models import fairness, swap
from benchmarks.reference import LeftOut, WrongOutput
from benchmarks.report import line, machine, say, show
from benchmarks.rows import MEASUREMENTS
from benchmarks.shards import shards
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
    "encrypted": encrypted,
    "shards": shards,
    "copied": copied,
}
"""Measured only when they are named: they depend on a disk, or take long."""
QUICK: Final[dict[str, Any]] = {"rounds": 1, "seconds": 0.05, "scale": 50}


def run(console: Console, options: argparse.Namespace) -> int:
    """Measure, show and judge; `console` is for everything except the JSON.

    Returns:
        0 when every threshold was reached, or with --quick or --model; 1 when one was missed, an output was wrong, or
        nothing could be measured, or the page not be written.
    """
    quick, report = options.quick, options.report
    if report is not None:
        try:
            check_report_path(report)
        except BadFile as error:
            return _failed(console, f"not measured: {error}")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what torch has loaded stays; a collection in the middle of a round need not look at it
    load_before, started = os.getloadavg()[0], datetime.datetime.now(datetime.UTC)
    left_out: dict[str, str] = {}
    try:
        rows = list(_measure(console, options, left_out))
    except (WrongOutput, NotServed, ChildFailed, ModelError) as error:
        return _failed(console, f"not measured: {error}")
    missed = [] if quick else [row.name for row in rows if row.reached is False]
    result: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "machine": machine(),
        "load_average": {"before": round(load_before, 2), "after": round(os.getloadavg()[0], 2)},
        "quick": quick,
        "rows": [{**row.as_json(), **({"reached": None} if quick else {})} for row in rows],
        "left_out": left_out,
        "missed": missed,
        "passed": None if quick or options.model is not None else not missed,
    }
    show(console, result, rows)
    if options.json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    if report is not None:
        from benchmarks.page import benchmark_page

        try:
            write_page(report, benchmark_page(result, rows))
        except BadFile as error:
            return _failed(console, str(error))
        say(console, f"report in {escape(str(report))}")
    return 1 if missed or not rows else 0


def _failed(console: Console, sentence: str) -> int:
    console.print(sentence, style="red", markup=False, highlight=False, soft_wrap=True)
    return 1


def _measure(console: Console, options: argparse.Namespace, left_out: dict[str, str]) -> Iterator[Row]:
    """Every row, shown as soon as it is measured; why some are left out goes to `left_out`."""
    with tempfile.TemporaryDirectory(dir=options.folder) as below:
        for name in options.rows or MEASUREMENTS:
            bench = Bench(Path(below), model=options.model, **(QUICK if options.quick else {}))
            try:
                rows = {**MEASUREMENTS, **SEPARATE}[name](bench)
            except (LeftOut, ChildFailed) as error:
                if options.model is None:
                    raise
                left_out[name] = str(error)
                say(console, f"{name}: left out: {escape(str(error))}")
                continue
            for row in rows:
                if options.model is not None:
                    row = replace(row, threshold=None)
                say(console, line(row, judged=not options.quick))
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
    return run(Console(stderr=options.json), options)


if __name__ == "__main__":
    sys.exit(main())
