"""`instep bench neighbours`: does a client that dies or stops reading slow the others down?"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from instep.bench.machine import machine
from instep.server.child import ChildServer
from instep.server.preparation import demo_model_folder
from instep_client import AsyncClient, AsyncGroup

CLIENTS, STREAMS_EACH, RATE_HZ = 8, 8, 50
NEIGHBOUR_STREAMS = 64
ROUNDS = 5
SECONDS = 3.0
"""Of each phase in each round; what happens to the neighbour happens after a third of it."""
WARM_UP_S = 1.5
"""Before each phase: the neighbour starts up and streams."""
BAR = 1.5
_GIVE_UP_SOON = ("--set", "transport.heartbeat_s=0.5")
"""So that what giving up the neighbour costs falls into the phase in which it died."""
PHASES = ("alive", "killed", "stopped")


def run(console: Console, *, as_json: bool = False) -> int:
    """Measure the p99 of well-behaved clients beside a neighbour that lives, is killed, or is stopped.

    Args:
        console: where the table goes.
        as_json: one JSON object on standard output instead.

    Returns:
        0 when neither death nor standstill of the neighbour raises the median p99 beyond `BAR` times, else 1.
    """
    with (
        Progress(console=console, transient=True) as progress,
        ChildServer(demo_model_folder(), _GIVE_UP_SOON) as child,
    ):
        task = progress.add_task("measuring", total=ROUNDS * len(PHASES))
        p99_ms = asyncio.run(_measure(child.endpoint, lambda: progress.advance(task)))
    medians = {phase: statistics.median(values) for phase, values in p99_ms.items()}
    ratios = {phase: medians[phase] / medians["alive"] for phase in PHASES[1:]}
    result: dict[str, Any] = {
        "machine": machine(),
        "load": f"{CLIENTS} connections of {STREAMS_EACH} streams at {RATE_HZ} Hz beside one neighbour of "
        f"{NEIGHBOUR_STREAMS} streams; {ROUNDS} interleaved rounds of {SECONDS:g} s, medians; latency from the "
        "scheduled time",
        "p99_ms": {phase: round(value, 3) for phase, value in medians.items()},
        "over_alive": {phase: round(value, 2) for phase, value in ratios.items()},
        "bar": BAR,
        "passed": max(ratios.values()) <= BAR,
    }
    if as_json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        _show(console, result)
    return 0 if result["passed"] else 1


async def _measure(endpoint: str, advance: Callable[[], object]) -> dict[str, list[float]]:
    p99_ms: dict[str, list[float]] = {phase: [] for phase in PHASES}
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(AsyncClient(endpoint)) for _ in range(CLIENTS)]
        groups = [
            await client.open_group([f"measured-{number}-{stream}" for stream in range(STREAMS_EACH)])
            for number, client in enumerate(clients)
        ]
        for _ in range(ROUNDS):
            for phase in PHASES:
                name = f"neighbour-{len(p99_ms['alive'])}-{phase}"
                p99_ms[phase].append(await _phase(endpoint, groups, clients[0].info.features, phase, name))
                advance()
    return p99_ms


async def _phase(endpoint: str, groups: list[AsyncGroup], features: int, phase: str, name: str) -> float:
    """The p99 latency, in milliseconds, of all measured clients during one phase."""
    with _neighbour(endpoint, name) as neighbour:
        await asyncio.sleep(WARM_UP_S)
        loop = asyncio.get_running_loop()
        if phase == "killed":
            loop.call_later(SECONDS / 3, neighbour.kill)
        elif phase == "stopped":
            loop.call_later(SECONDS / 3, neighbour.send_signal, signal.SIGSTOP)
        start = time.perf_counter()
        latencies = await asyncio.gather(
            *(_paced(group, features, start + number / CLIENTS / RATE_HZ) for number, group in enumerate(groups))
        )
    return float(np.percentile(np.concatenate(latencies), 99) * 1000)


async def _paced(group: AsyncGroup, features: int, start: float) -> np.ndarray[Any, Any]:
    """Latencies in seconds, each from when its step was due."""
    count = round(SECONDS * RATE_HZ)
    latencies = np.zeros(count)
    x = np.random.default_rng(0).standard_normal((count, STREAMS_EACH, features)).astype(np.float32)
    for index in range(count):
        due = start + index / RATE_HZ
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        await group.step(x[index])
        latencies[index] = time.perf_counter() - due
    return latencies


@contextlib.contextmanager
def _neighbour(endpoint: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A producer in a process of its own that streams as fast as its rate asks, until it is ended."""
    command = [
        *(sys.executable, "-m", "instep_client.commands", "produce", "--signal", "noise", "--endpoint", endpoint),
        *("--streams", str(NEIGHBOUR_STREAMS), "--rate", str(RATE_HZ), "--seconds", "600", "--name", name),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _show(console: Console, result: dict[str, Any]) -> None:
    table = Table(title=f"p99 of others beside one neighbour · {result['load']}", caption=result["machine"])
    table.add_column("the neighbour is")
    table.add_column("p99", justify="right")
    table.add_column("over alive", justify="right")
    for phase in PHASES:
        ratio = result["over_alive"].get(phase)
        table.add_row(phase, f"{result['p99_ms'][phase]:.2f} ms", "" if ratio is None else f"{ratio:.2f}×")
    console.print(table)
    verdict, colour = ("reached", "green") if result["passed"] else ("NOT reached", "red")
    console.print(f"[{colour}]at most {BAR}× is asked for: {verdict}[/]")
