"""The cost of recording: with each durability, and while the recording is verified."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.connection import NotServed
from benchmarks.load import all_in_flight
from benchmarks.measurement import Bench, Row, compared, interleave
from benchmarks.reference import BenchmarkModel, measured
from benchmarks.rows import PACED_STREAMS, STREAMS, TIMESTEPS, block_inputs, steadily
from instep_client import Client

VERIFIED_WITHIN_S: Final = 60.0
"""After the load; a verifier that takes longer is stuck or has ended."""
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
        sides: dict[str, Callable[[], float]] = {
            name: partial(measured, server.endpoint, model, inputs, all_in_flight(bench.seconds))
            for name, server in servers.items()
        }
        sides[fsync] = partial(fsync_ms, bench.folder)
        samples = interleave(bench, sides)
    return [
        compared(
            f"durability-{level}",
            f"1,024 streams in blocks of 256, recorded with {level} over memory",
            model.description,
            samples,
            f"{level}, frames/s",
            "memory, frames/s",
            threshold,
            beside=(none, fsync),
        )
        for level, threshold in THRESHOLDS.items()
    ]


def verify_live(bench: Bench) -> list[Row]:
    """The load of `paced`, recorded, while another process verifies what was recorded."""
    model = BenchmarkModel.of(bench, "verify-live")
    inputs = model.lone_inputs(TIMESTEPS, PACED_STREAMS)
    served_ms = partial(measured, model=model, inputs=inputs, drive=steadily(bench.seconds))

    def verified_ms(endpoint: str) -> float:
        found, began = served_ms(endpoint), time.monotonic()
        while not _is_all_verified(endpoint):  # before the other side is measured
            if time.monotonic() - began > VERIFIED_WITHIN_S:
                raise NotServed(f"what was recorded is not verified within {VERIFIED_WITHIN_S:g} s")
            time.sleep(0.1)
        return found

    with ExitStack() as stack:
        sides: dict[str, Callable[[], float]] = {}
        for name, arguments in {"verified": ["--set", "verify.live=true"], "not verified": []}.items():
            recording = ["--record", str(bench.folder / f"{name}.instep")]
            server = stack.enter_context(bench.serve(model.folder, [*recording, *arguments]))
            sides[f"{name}, p99 ms"] = partial(verified_ms if arguments else served_ms, server.endpoint)
        samples = interleave(bench, sides)
    what = "64 streams at 50 Hz, recorded, p99 while what is recorded is verified over p99 without"
    verified, alone = sides
    return [compared("verify-live", what, model.description, samples, verified, alone, 1.1, "at most")]


def _is_all_verified(endpoint: str) -> bool:
    with Client(endpoint) as client:
        stats = client.stats()
    return stats["verified_frames_total"] + stats["verify_skipped_frames_total"] >= stats["frames_total"]


def server_arguments(folder: Path, level: str | None) -> list[str]:
    """Arguments of `instep serve` for a recording of this durability below `folder`; None for no recording."""
    arguments = ["--set", f"engine.max_streams={STREAMS}"]
    if level is not None:
        arguments += ["--record", str(folder / f"{level}.instep"), "--set", f"recording.durability={level}"]
    return arguments


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
