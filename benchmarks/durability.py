"""The cost of recording: the load in blocks without a recording and with each durability."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.measurement import Bench, Row, interleave, ratio
from benchmarks.reference import BenchmarkModel
from benchmarks.rows import STREAMS, block_inputs, serve_blocks

THRESHOLDS: Final = {"commit": 0.8, "fsync": 0.5}
"""The least throughput, as a share of `memory`'s."""
_SYNCS: Final = 20


def durability(bench: Bench) -> list[Row]:
    """One row for each durability that survives a crash."""
    model = BenchmarkModel.of(bench, "durability")
    inputs = block_inputs(model)
    none, fsync = "no recording, frames/s", "fsync of 4 KiB alone, ms"
    with ExitStack() as stack:
        servers = {none: stack.enter_context(bench.serve(model.folder, server_arguments(bench.folder, None)))}
        for level in ("memory", *THRESHOLDS):
            server = stack.enter_context(bench.serve(model.folder, server_arguments(bench.folder, level)))
            servers[f"{level}, frames/s"] = server
        sides = {
            name: partial(serve_blocks, server.endpoint, model, inputs, bench.seconds)
            for name, server in servers.items()
        }
        samples = interleave(bench, {**sides, fsync: lambda: fsync_ms(bench.folder)})
    return [
        Row(
            name=f"durability-{level}",
            what=f"1,024 streams in blocks of 256, recorded with {level} over memory",
            model=model.description,
            unit="×",
            value=ratio(samples, f"{level}, frames/s", "memory, frames/s"),
            threshold=threshold,
            samples={side: samples[side] for side in (f"{level}, frames/s", "memory, frames/s", none, fsync)},
        )
        for level, threshold in THRESHOLDS.items()
    ]


def server_arguments(folder: Path, level: str | None) -> list[str]:
    """Arguments of `instep serve` for a recording of this durability below `folder`; None for no recording."""
    record = [] if level is None else ["--record", str(folder / f"{level}.instep"), "--durability", level]
    return ["--max-streams", str(STREAMS), *record]


def fsync_ms(folder: Path) -> float:
    """The median time that this disk takes to make a small write durable."""
    times = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        for _ in range(_SYNCS):
            began = time.perf_counter()
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times) * 1000
