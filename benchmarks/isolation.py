"""Isolation: the latency of well-behaved clients while a neighbour streams, is killed, or stops reading."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Final

from benchmarks.client_load import load_command
from benchmarks.connection import NotServed
from benchmarks.measurement import Bench, Row, compared, interleave
from benchmarks.reference import BenchmarkModel
from instep_tools.load.plan import LoadPlan

CONNECTIONS, STREAMS, NEIGHBOUR_STREAMS, RATE_HZ = 8, 64, 64, 50
AT_MOST: Final = 1.5
START_S: Final = 1.0
"""About the time in which the load's process starts; its warm-up is as long as a round of the other rows."""
LONGER: Final = 2.0
"""Times the length of other rounds, so that there is time left to give the neighbour up."""
HEARTBEAT: Final = ("--set", "transport.heartbeat_s=0.5")
"""Short, so that the server gives the neighbour up within the phase in which it died."""
PHASES: Final = {"alive": None, "killed": signal.SIGKILL, "stopped": signal.SIGSTOP}

_PRODUCE: Final = """
import sys, time
import numpy as np
from instep_client import Client
endpoint, name, streams, rate_hz = sys.argv[1:]
with Client(endpoint) as client:
    group = client.open_group([f"{name}-{number}" for number in range(int(streams))])
    noise, due = np.random.default_rng(0), time.monotonic()
    while True:
        group.step(noise.standard_normal((len(group), client.info.features), np.float32))
        due += 1 / float(rate_hz)
        time.sleep(max(0, due - time.monotonic()))
"""


def isolation(bench: Bench) -> list[Row]:
    """One row for each thing that happens to the neighbour; each phase has a new one."""
    model = BenchmarkModel.of(bench, "isolation")
    names = (f"neighbour-{number}" for number in count())
    with bench.serve(model.folder, HEARTBEAT) as server:
        sides = {
            f"{phase}, p99 ms": partial(_phase, server.endpoint, names, sent, bench.seconds)
            for phase, sent in PHASES.items()
        }
        samples = interleave(bench, sides)
    return [
        compared(
            f"isolation-{phase}",
            f"p99 of 64 streams at 50 Hz while a neighbour is {phase} over while it is alive",
            model.description,
            samples,
            f"{phase}, p99 ms",
            "alive, p99 ms",
            AT_MOST,
            "at most",
        )
        for phase, sent in PHASES.items()
        if sent is not None
    ]


def _phase(endpoint: str, names: Iterator[str], sent: signal.Signals | None, warm_up_s: float) -> float:
    """The p99, in milliseconds, of `instep loadtest` next to a neighbour that may get a signal meanwhile."""
    seconds = warm_up_s * LONGER
    plan = LoadPlan(STREAMS, CONNECTIONS, processes=1, rate_hz=RATE_HZ, duration_s=seconds, warmup_s=warm_up_s)
    load = load_command(endpoint, plan)
    with _neighbour(endpoint, next(names)) as neighbour:
        measuring = subprocess.Popen(load, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        if sent is not None:
            time.sleep(START_S + warm_up_s + seconds / 3)
            neighbour.send_signal(sent)
        result = json.loads(measuring.communicate()[0] or "{}")
    # Its status may also say that its own sending was late, as on a busy machine: on both sides of the comparison.
    if not result or result["unanswered_frames"] or result["unsent_frames"] or result["refused_frames"]:
        raise NotServed(f"the load of {STREAMS} streams was not answered in full: {result}")
    p99_ms: float = result["latency_us"]["latency"]["p99"] / 1000
    return p99_ms


@contextmanager
def _neighbour(endpoint: str, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """A producer in a process of its own that streams until it is ended."""
    produce = [sys.executable, "-c", _PRODUCE, endpoint, name, str(NEIGHBOUR_STREAMS), str(RATE_HZ)]
    process = subprocess.Popen(produce, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
