"""`instep bench`: what serving costs beyond the network itself, measured in one run on one machine."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from instep.bench.load import BLOCK, FEATURES, HIDDEN, MODEL_IN_WORDS, STREAMS, TIMESTEPS, make_load, served
from instep.bench.machine import machine
from instep.core.typing import F32
from instep.model.folder import write_model
from instep.server.child import ChildServer
from instep_client import AsyncClient

ROUNDS = 5
SECONDS = 1.5
"""Of each measurement in each round."""
BAR_OVER_SEED = 10.0


def run(console: Console, *, as_json: bool = False) -> int:
    """Measure, show, and judge.

    Returns:
        0 when served throughput is at least `BAR_OVER_SEED` times the seed's way and every output was right, else 1.
    """
    torch.set_num_threads(1)
    model, gru, x = make_load()
    with (
        tempfile.TemporaryDirectory() as folder,
        Progress(console=console, transient=True, auto_refresh=False) as progress,
    ):
        write_model(Path(folder) / "model", model)
        with ChildServer(Path(folder) / "model", ["--max-streams", str(STREAMS)]) as child:
            task = progress.add_task("measuring", total=ROUNDS)
            samples = asyncio.run(
                _measure(child.endpoint, gru, x, lambda: progress.update(task, advance=1, refresh=True))
            )
    medians = {name: statistics.median(values) for name, values in samples.rates.items()}
    ratio = medians["served"] / medians["seed"]
    passed = ratio >= BAR_OVER_SEED and samples.wrong_streams == 0
    result: dict[str, Any] = {
        "machine": machine(),
        "model": MODEL_IN_WORDS,
        "load": f"{STREAMS} streams in blocks of {BLOCK}, {ROUNDS} interleaved rounds of {SECONDS} s, medians",
        "frames_per_s": {name: round(value) for name, value in medians.items()},
        "served_over_seed": round(ratio, 2),
        "served_over_bare": round(medians["served"] / medians["bare"], 3),
        "bar_served_over_seed": BAR_OVER_SEED,
        "streams_with_wrong_state": samples.wrong_streams,
        "passed": passed,
    }
    if as_json:
        sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")
    else:
        _show(console, result)
    return 0 if passed else 1


@dataclass(slots=True)
class Samples:
    """Frames a second by way and round, and how many streams ended in another state than they should."""

    rates: dict[str, list[float]]
    wrong_streams: int = 0


async def _measure(endpoint: str, gru: torch.nn.GRU, x: F32, advance: Callable[[], object]) -> Samples:
    samples = Samples({"seed": [], "bare": [], "served": []})
    async with AsyncClient(endpoint) as client:
        for round_number in range(ROUNDS):
            samples.rates["seed"].append(_seed_way(gru, x))
            samples.rates["bare"].append(_bare_loop(gru, x))
            rate, wrong = await served(client, gru, x, round_number, SECONDS)
            samples.rates["served"].append(rate)
            samples.wrong_streams += wrong
            advance()
    return samples


@torch.inference_mode()
def _seed_way(gru: torch.nn.GRU, x: F32) -> float:
    """One stream at a time, one frame at a time, the state carried: as the experiment does it."""
    inputs = torch.from_numpy(x[:, 0])
    h = torch.zeros(1, 1, HIDDEN)
    frames = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        for timestep in range(TIMESTEPS):
            _, h = gru(inputs[timestep].view(1, 1, FEATURES), h)
        frames += TIMESTEPS
    return frames / elapsed


@torch.inference_mode()
def _bare_loop(gru: torch.nn.GRU, x: F32) -> float:
    """The same batch as served, in a loop around `nn.GRU` and nothing else."""
    inputs = torch.from_numpy(x[:, :BLOCK].copy())
    h = torch.zeros(1, BLOCK, HIDDEN)
    frames = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < SECONDS:
        for timestep in range(TIMESTEPS):
            _, h = gru(inputs[timestep : timestep + 1], h)
        frames += TIMESTEPS * BLOCK
    return frames / elapsed


def _show(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"{result['model']} · {result['load']}", caption=result["machine"])
    table.add_column("way")
    table.add_column("frames/s", justify="right")
    table.add_column("× seed's way", justify="right")
    names = {
        "seed": "the seed's way: nn.GRU, one stream, one frame",
        "bare": f"nn.GRU alone, batch {BLOCK}",
        "served": "served over ZeroMQ",
    }
    rates = result["frames_per_s"]
    for key, name in names.items():
        table.add_row(name, f"{rates[key]:,}", f"{rates[key] / rates['seed']:.1f}")
    console.print(table)
    verdict, colour = ("reached", "green") if result["passed"] else ("NOT reached", "red")
    console.print(
        f"[{colour}]served {result['served_over_seed']}× the seed's way (bar {BAR_OVER_SEED:g}×, {verdict}), "
        f"{result['served_over_bare']} of the bare loop; "
        f"{result['streams_with_wrong_state']} streams with a wrong final state[/]"
    )
