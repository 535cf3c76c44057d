"""`instep bench`: every row in one run, each a comparison within that run, held against its bar."""

from __future__ import annotations

import datetime
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from instep.bench.choice import NAMES
from instep.bench.connection import Refused
from instep.bench.machine import facts, load_average
from instep.bench.plot import plot
from instep.bench.reference import WrongOutput
from instep.bench.result import Row
from instep.bench.rounds import Run
from instep.bench.rows.blocks import blocks, blocks_2x256
from instep.bench.rows.chunks import chunks
from instep.bench.rows.exact_off import exact_off
from instep.bench.rows.many_open import many_open
from instep.bench.rows.one_stream import one_stream
from instep.bench.rows.paced import paced
from instep.bench.rows.single_frames import single_frames
from instep.bench.rows.start import start
from instep.bench.rows.verification import verification
from instep.bench.show import line, show
from instep.server.child import ChildFailed


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is measured at once."""

    rows: tuple[str, ...]
    measure: Callable[[Run], list[Row]]
    """All of them, in that order."""


MEASUREMENTS: Final = (
    Measurement(("blocks-bare", "blocks-seed"), blocks),
    Measurement(("blocks-2x256",), blocks_2x256),
    Measurement(("single-frames",), single_frames),
    Measurement(("one-stream",), one_stream),
    Measurement(("paced",), paced),
    Measurement(("many-open",), many_open),
    Measurement(("exact-off",), exact_off),
    Measurement(("chunks",), chunks),
    Measurement(("verify",), verification),
    Measurement(("start",), start),
)
QUICK: Final[dict[str, Any]] = {"rounds": 1, "seconds": 0.05, "scale": 50}
"""What a quick run does less of."""
NO_VERDICT: Final[dict[str, Any]] = {"reached": None, "verdict": "no verdict"}
"""What it says of a row."""


def run(
    console: Console,
    *,
    rows: Sequence[str] = NAMES,
    quick: bool = False,
    out: Path | None = None,
    as_json: bool = False,
) -> int:
    """Measure, show, and judge.

    Args:
        console: where everything goes but the JSON.
        rows: names, as `chosen` gives them.
        quick: much shorter, to try it out: what comes of it is no verdict.
        out: a folder for `bench.json` and `bench.png`, made if it is not there; None for no files.
        as_json: one JSON object on standard output.

    Returns:
        0 when every one of these rows reached its bar, or it was quick, and every output was right; else 1.
    """
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that no collection looks at all that torch brought while answers are waited for
    before, started = load_average(), datetime.datetime.now(datetime.UTC)
    try:
        found = list(_measured(console, rows, quick))
    except (WrongOutput, Refused, ChildFailed) as error:
        console.print(f"[red]not measured:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    finally:
        gc.unfreeze()
    missed = None if quick else [row.name for row in found if not row.reached]
    result: dict[str, Any] = {
        "started": started.isoformat(timespec="seconds"),
        "machine": facts(),
        "load_average": {"before": before, "after": load_average()},
        "quick": quick,
        "rows": [{**row.as_json(), **(NO_VERDICT if quick else {})} for row in found],
        "missed": missed,
        "passed": None if missed is None else not missed,
    }
    show(console, result, found)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "bench.json").write_text(json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        title = "quick: no verdict" if quick else result["machine"]["processor"]
        plot(found, out / "bench.png", title, is_judged=not quick)
        console.print(f"{out / 'bench.json'}, {out / 'bench.png'}", highlight=False, soft_wrap=True)
    if as_json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n")
    return 1 if missed else 0


def _measured(console: Console, rows: Sequence[str], quick: bool) -> Iterator[Row]:
    """Each row, shown as soon as it is there."""
    with tempfile.TemporaryDirectory() as folder, _bar(console) as bar:
        for measurement in MEASUREMENTS:
            asked = [name for name in measurement.rows if name in rows]
            if not asked:
                continue
            run = Run(Path(folder), advance=bar(", ".join(asked)), **(QUICK if quick else {}))
            for row in measurement.measure(run):
                if row.name in asked:
                    console.print(line(row, is_judged=not quick), highlight=False, soft_wrap=True)
                    yield row


@contextmanager
def _bar(console: Console) -> Iterator[Callable[[str], Callable[[], object]]]:
    """What shows how far a measurement is, drawn only between two rounds: drawing takes time of a core."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:g} rounds"))
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        task = progress.add_task("")
        rounds = Run(Path()).rounds + 1

        def begin(name: str) -> Callable[[], object]:
            progress.reset(task, total=rounds, description=name)
            progress.refresh()
            return lambda: progress.update(task, advance=1, refresh=True)

        yield begin
