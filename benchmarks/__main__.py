"""`python -m benchmarks`: measure what serving costs and hold it against thresholds. See benchmarks/README.md."""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks.connection import NotServed
from benchmarks.durability import durability
from benchmarks.isolation import isolation
from benchmarks.measurement import Bench, Row
from benchmarks.reference import WrongOutput
from benchmarks.report import line, machine, show
from benchmarks.rows import MEASUREMENTS
from instep.demo.child_server import ChildFailed

SEPARATE: Final = {"durability": durability, "isolation": isolation}
"""Measured only when they are named: they depend on a disk, or take long."""
QUICK: Final[dict[str, Any]] = {"rounds": 1, "seconds": 0.05, "scale": 50}


def run(
    console: Console, names: Sequence[str], *, quick: bool = False, as_json: bool = False, folder: Path | None = None
) -> int:
    """Measure, show and judge.

    Args:
        console: for everything except the JSON.
        names: of the measurements; none for all but the separate ones.
        quick: try everything out in short rounds; the result has no verdict.
        as_json: write one JSON object to standard output.
        folder: where models and recordings are written and removed again; by default the system's temporary folder.

    Returns:
        0 when every threshold was reached, or with `quick`; 1 when one was missed, or an output was wrong.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what torch has loaded stays; a collection in the middle of a round need not look at it
    load_before, started = os.getloadavg()[0], datetime.datetime.now(datetime.UTC)
    try:
        rows = list(_measure(console, names or list(MEASUREMENTS), quick, folder))
    except (WrongOutput, NotServed, ChildFailed) as error:
        console.print(f"[red]not measured:[/] {error}", highlight=False, soft_wrap=True)
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
        "missed": missed,
        "passed": None if quick else not missed,
    }
    show(console, result, rows)
    if as_json:
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return 1 if missed else 0


def _measure(console: Console, names: Sequence[str], quick: bool, folder: Path | None) -> Iterator[Row]:
    """Every row, shown as soon as it is measured."""
    with tempfile.TemporaryDirectory(dir=folder) as below:
        for name in names:
            bench = Bench(Path(below), **(QUICK if quick else {}))
            for row in {**MEASUREMENTS, **SEPARATE}[name](bench):
                console.print(line(row, judged=not quick), highlight=False, soft_wrap=True)
                yield row


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    names = ", ".join([*MEASUREMENTS, *SEPARATE])
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what serving costs.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{names}; default: all but {' and '.join(SEPARATE)}")
    parser.add_argument("--quick", action="store_true", help="try everything in about a minute; no verdicts")
    parser.add_argument("--json", action="store_true", help="write JSON to standard output, the rest to standard error")
    parser.add_argument("--folder", type=Path, help="where to record, and on whose disk; default: a temporary folder")
    options = parser.parse_args(arguments)
    for name in options.rows:
        if name not in MEASUREMENTS and name not in SEPARATE:
            parser.error(f"there is no row {name!r}; there are {names}")
    console = Console(stderr=options.json)
    return run(console, options.rows, quick=options.quick, as_json=options.json, folder=options.folder)


if __name__ == "__main__":
    sys.exit(main())
