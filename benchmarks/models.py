"""Several models in one server: the latency while one is swapped, and whether two get equal shares."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np

from benchmarks.client_load import load_command
from benchmarks.connection import NotServed
from benchmarks.measurement import Bench, Row, Samples, compared, interleave
from benchmarks.reference import LeftOut
from instep.demo.child_server import ChildServer
from instep.models.folder import make_model, write_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep_client import AsyncClient, AsyncStream
from instep_tools.load.plan import LoadPlan

STREAMS, CONNECTIONS, RATE_HZ, FEATURES, HIDDEN = 32, 4, 50, 40, 128
POLICIES: Final = ("keep", "move", "replay:128")
SWAP_AT_MOST: Final = 3.0
SHORTEST_S: Final = 0.5
"""Of a load that is sure to see answers."""
FAIR_AT_LEAST: Final = 0.8
MODEL: Final = "GRU 40→128, float32"
LOAD_STREAMS: Final = 256
LONGER: Final = 2.0
"""Times the length of other rounds."""


def swap(bench: Bench) -> list[Row]:
    """A paced load while its model is swapped, by each policy, against the same load while nothing happens."""
    folder, seeds = _version(bench, "swapped", seed=1), cycle([2, 1])
    recordings, config = bench.folder / "recordings", bench.folder / "swap.yaml"
    config.write_text("{}")
    quiet = "quiet, p99 ms"
    with ChildServer(folder, ["--device", "cpu", "--record", str(recordings), "--config", str(config)]) as server:

        def latency(policy: str | None) -> float:
            if policy is not None:
                config.write_text(f"model: {{on_reload: {policy}}}")
                _version(bench, "swapped", next(seeds))
            pid = None if policy is None else server.pid
            return asyncio.run(_latency_ms(server.endpoint, pid, bench.seconds * LONGER))

        sides = {quiet: partial(latency, None)}
        sides |= {f"{policy}, p99 ms": partial(latency, policy) for policy in POLICIES}
        samples = interleave(bench, sides)
    return [
        compared(
            f"swap-{policy.partition(':')[0]}",
            f"p99 of {STREAMS} streams at {RATE_HZ} Hz while their model is swapped ({policy}) over p99 without",
            MODEL,
            samples,
            f"{policy}, p99 ms",
            quiet,
            SWAP_AT_MOST,
            "at most",
        )
        for policy in POLICIES
    ]


def fairness(bench: Bench) -> list[Row]:
    """Two models of one server whose frames cost the same, each under a load of its own that never pauses."""
    folders = [_version(bench, name, seed) for seed, name in enumerate(("fair-a", "fair-b"))]
    samples: Samples = {f"{folder.name}, frames/s": [] for folder in folders}
    with bench.serve(folders[0], [str(folders[1])]) as server:
        for number in range(1 - bench.warm_up, bench.rounds + 1):  # 0 is the warm-up
            rates = _rates(server.endpoint, [folder.name for folder in folders], bench.seconds * LONGER)
            for side, rate in zip(samples, rates, strict=True):
                samples[side] += [rate] if number else []
    value = median(min(pair) / max(pair) for pair in zip(*samples.values(), strict=True))
    what = "frames/s of the slower of two equal models in one server over those of the faster, both saturated"
    return [Row("fairness", what, MODEL, "×", value, FAIR_AT_LEAST, samples)]


def _version(bench: Bench, name: str, seed: int) -> Path:
    if bench.model is not None:
        raise LeftOut("it needs two models, and the run has one")
    description = GruDescription(features=FEATURES, gru=GruLayers(hidden_size=HIDDEN))
    model = make_model(description, init="random", seed=seed, name=name)
    write_model(bench.folder / name, model, overwrite=True)
    return bench.folder / name


async def _latency_ms(endpoint: str, pid: int | None, seconds: float) -> float:
    """The p99, in milliseconds, of a load for some seconds or, given a server's id, until it has swapped its model."""
    latencies_s: list[float] = []
    is_over = asyncio.Event()

    async def paced(stream: AsyncStream) -> None:
        x, due_s = np.ones(FEATURES, np.float32), time.perf_counter()
        while not is_over.is_set():
            began_s = time.perf_counter()
            await stream.step(x)
            latencies_s.append(time.perf_counter() - began_s)
            due_s += 1 / RATE_HZ
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))

    async with AsyncExitStack() as stack:
        operator, *clients = [AsyncClient(endpoint) for _ in range(1 + CONNECTIONS)]
        for client in (operator, *clients):
            await stack.enter_async_context(client)
        while True:
            if len(await operator.list_models()) == 1:
                break
            await asyncio.sleep(0.05)  # until the version has left that was kept before
        streams = [await clients[number % CONNECTIONS].open(f"s{number}") for number in range(STREAMS)]
        load = [asyncio.create_task(paced(stream)) for stream in streams]
        await asyncio.sleep(seconds)
        latencies_s.clear()
        if pid is None:
            await asyncio.sleep(seconds)
        else:
            await _reload(endpoint, pid)
        is_over.set()
        await asyncio.gather(*load)  # also those whose answers the swap holds up
        for stream in streams:
            await stream.close()
    return float(np.percentile(latencies_s, 99)) * 1e3


async def _reload(endpoint: str, pid: int) -> None:
    async def fingerprint() -> str:
        async with AsyncClient(endpoint) as client:
            return client.info.fingerprint

    before = await fingerprint()
    os.kill(pid, signal.SIGHUP)
    while await fingerprint() == before:  # noqa: ASYNC110 - what happens there sets no event here
        await asyncio.sleep(0.05)


def _rates(endpoint: str, names: list[str], seconds: float) -> list[float]:
    """Frames per second of a load for each of these models, all at the same time."""
    duration_s, warm_up_s = max(seconds, SHORTEST_S), min(seconds, 1.0)
    plan = LoadPlan(LOAD_STREAMS, 1, 1, None, duration_s, warm_up_s, block=LOAD_STREAMS // 2)
    running = [
        subprocess.Popen(
            load_command(endpoint, plan, name), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for name in names
    ]
    results = [json.loads(each.communicate()[0] or "{}") for each in running]
    for name, result in zip(names, results, strict=True):
        if not result or result["refused_frames"]:
            raise NotServed(f"the load of model {name!r} was not answered in full: {result}")
    return [float(result["frames_per_second"]) for result in results]
