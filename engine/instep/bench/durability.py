"""`instep bench durability`: what it costs that answers wait until they are recorded."""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from instep.bench.load import BLOCK, MODEL_IN_WORDS, STREAMS, make_load, served
from instep.bench.machine import machine
from instep.core.typing import F32
from instep.models.folder import write_model
from instep.server.child import ChildServer
from instep_client import AsyncClient

ROUNDS = 5
SECONDS = 1.5
"""Of each measurement in each round."""
WAYS = ("none", "memory", "commit", "fsync")
"""No recording, and one with each durability."""
BARS = {"commit": 0.8, "fsync": 0.5}
"""The least throughput, as a share of `memory`'s."""
_SYNCS = 20


def run(console: Console, folder: Path | None = None, *, as_json: bool = False) -> int:
    """Measure what is served without a recording and with each durability, show, and judge.

    Args:
        console: where the table goes.
        folder: the recordings are written below it, on its disk, and removed; None for the system's temporary folder.
        as_json: one JSON object on standard output instead.

    Returns:
        0 when `commit` and `fsync` reach their `BARS` and every output was right, else 1.
    """
    torch.set_num_threads(1)
    with (
        tempfile.TemporaryDirectory(dir=folder) as below,
        Progress(console=console, transient=True, auto_refresh=False) as progress,
    ):
        task = progress.add_task("measuring", total=ROUNDS * len(WAYS))
        samples = measure(Path(below), lambda: progress.update(task, advance=1, refresh=True))
    medians = {way: statistics.median(values) for way, values in samples.rates.items()}
    over_memory = {way: medians[way] / medians["memory"] for way in WAYS}
    missed = [way for way, bar in BARS.items() if over_memory[way] < bar]
    result: dict[str, Any] = {
        "machine": machine(),
        "model": MODEL_IN_WORDS,
        "load": f"{STREAMS} streams in blocks of {BLOCK}, {ROUNDS} interleaved rounds of {SECONDS} s, medians",
        "folder": str(Path(below).parent),
        "fsync_ms": round(statistics.median(samples.fsync_ms), 3),
        "frames_per_s": {way: round(value) for way, value in medians.items()},
        "over_memory": {way: round(value, 3) for way, value in over_memory.items()},
        "over_none": {way: round(value / medians["none"], 3) for way, value in medians.items()},
        "bars_over_memory": BARS,
        "missed": missed,
        "streams_with_wrong_state": samples.wrong_streams,
        "passed": not missed and samples.wrong_streams == 0,
    }
    if as_json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    else:
        _show(console, result)
    return 0 if result["passed"] else 1


def _server(folder: Path, way: str) -> ChildServer:
    recording = () if way == "none" else ("--record", str(folder / f"{way}.db"), "--durability", way)
    return ChildServer(folder / "model", ["--max-streams", str(STREAMS), *recording])


@dataclass(slots=True)
class Samples:
    """Frames a second by way and round, what the disk took alone, and how many streams ended in a wrong state."""

    rates: dict[str, list[float]]
    fsync_ms: list[float]
    wrong_streams: int = 0


def measure(folder: Path, advance: Callable[[], object]) -> Samples:
    """Measure every way, with its server, in every round; the recordings are written into the folder."""
    model, gru, x = make_load()
    write_model(folder / "model", model)
    with ExitStack() as children:
        endpoints = {way: children.enter_context(_server(folder, way)).endpoint for way in WAYS}
        return asyncio.run(_measure(endpoints, folder, gru, x, advance))


async def _measure(
    endpoints: dict[str, str], folder: Path, gru: torch.nn.GRU, x: F32, advance: Callable[[], object]
) -> Samples:
    samples = Samples({way: [] for way in WAYS}, [])
    async with AsyncExitStack() as stack:
        clients = {way: await stack.enter_async_context(AsyncClient(endpoints[way])) for way in WAYS}
        for round_number in range(ROUNDS):
            first = round_number % len(WAYS)  # what one way leaves the disk to write, another one meets
            for way in WAYS[first:] + WAYS[:first]:
                samples.fsync_ms.append(_fsync_ms(folder))
                rate, wrong = await served(clients[way], gru, x, round_number, SECONDS)
                samples.rates[way].append(rate)
                samples.wrong_streams += wrong
                advance()
    return samples


def _fsync_ms(folder: Path) -> float:
    """What the disk takes, median of a few, to make a small write durable."""
    times = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(_SYNCS):
            began = time.perf_counter()
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def _show(console: Console, result: dict[str, Any]) -> None:
    caption = f"recordings in {result['folder']}, where an fsync takes {result['fsync_ms']:g} ms; {result['machine']}"
    table = Table(title=f"{result['model']} · {result['load']}", caption=caption)
    for heading in ("recording", "frames/s", "of memory's", "of none's"):
        table.add_column(heading, justify="left" if heading == "recording" else "right")
    for way in WAYS:
        rate, over_memory, over_none = (result[key][way] for key in ("frames_per_s", "over_memory", "over_none"))
        table.add_row(way, f"{rate:,}", f"{over_memory:.2f}", f"{over_none:.2f}")
    console.print(table)
    for way, bar in BARS.items():
        verdict, colour = ("NOT reached", "red") if way in result["missed"] else ("reached", "green")
        share = result["over_memory"][way]
        console.print(f"[{colour}]{way}: {share:.2f} of memory's, at least {bar} is asked for: {verdict}[/]")
    wrong = result["streams_with_wrong_state"]
    console.print(f"[{'red' if wrong else 'green'}]{wrong} streams with a wrong final state[/]")
