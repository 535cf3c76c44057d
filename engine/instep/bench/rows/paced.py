"""Streams that send at a steady rate, whatever comes back: how late answers are, from when a frame was due."""

from __future__ import annotations

from statistics import median

import numpy as np

from instep.bench.pair import Drive, engine_and_echo
from instep.bench.producer import F64, open_loop
from instep.bench.result import Row, Samples
from instep.bench.rounds import Run, in_turn

STREAMS, RATE_HZ = 64, 50.0
AT_MOST_MS, ECHO_BELOW_MS = 2.0, 0.5
LONGER = 2.0
"""A round is so much longer than others: 3 s are 9,600 messages, of which 96 are later than the p99."""
SERVED, ECHO = "served, p99 ms", "echo, p99 ms"


def paced(run: Run) -> list[Row]:
    """Row `paced`."""
    seconds = run.seconds * LONGER
    drive: Drive = lambda connection, lanes: p99_ms(open_loop(connection, lanes, RATE_HZ, seconds))  # noqa: E731
    with engine_and_echo(run, "paced", STREAMS) as pair:
        samples = in_turn(run, {SERVED: lambda: pair.engine(drive), ECHO: lambda: pair.echo(drive)})
    return [row(samples, pair.subject.words)]


def p99_ms(latencies: F64) -> float:
    """The 99th percentile of times in seconds, in milliseconds."""
    return float(np.percentile(latencies, 99)) * 1e3


def row(samples: Samples, model: str) -> Row:
    """What was measured, as a row: where the echo itself is late, it says nothing of the engine."""
    echo_ms = median(samples[ECHO])
    is_noisy = echo_ms >= ECHO_BELOW_MS
    return Row(
        name="paced",
        what=f"64 streams at {RATE_HZ:g} Hz, one frame a message, from when it was due: p99",
        unit="ms",
        value=median(samples[SERVED]),
        bar=AT_MOST_MS,
        direction="at most",
        samples=samples,
        details={"model": model, "echo_p99_ms": round(echo_ms, 4), "echo_p99_below_ms": ECHO_BELOW_MS},
        problem=f"machine too noisy, the bare echo's p99 is {echo_ms:.2f} ms, not below {ECHO_BELOW_MS} ms"
        if is_noisy
        else "",
    )
