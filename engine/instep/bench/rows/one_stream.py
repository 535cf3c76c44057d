"""One stream that waits for every answer: against the echo of such messages and one step of the network."""

from __future__ import annotations

from statistics import median

import numpy as np

from instep.bench.pair import Drive, engine_and_echo
from instep.bench.producer import F64, round_trips
from instep.bench.reference import step_s
from instep.bench.result import Row, Samples
from instep.bench.rounds import Run, in_turn

AT_MOST = 2.0
SERVED, ECHO, STEP = "served, p50 µs", "echo, p50 µs", "nn.GRU step of one frame, p50 µs"


def one_stream(run: Run) -> list[Row]:
    """Row `one-stream`."""
    drive: Drive = lambda connection, lanes: p50_us(round_trips(connection, lanes[0], run.seconds))  # noqa: E731
    with engine_and_echo(run, "one-stream", 1) as pair:
        samples = in_turn(
            run,
            {
                SERVED: lambda: pair.engine(drive),
                ECHO: lambda: pair.echo(drive),
                STEP: lambda: step_s(pair.subject.gru, pair.feeds[0].x, run.seconds) * 1e6,
            },
        )
    return [row(samples, pair.subject.words)]


def p50_us(times: F64) -> float:
    """The median of times in seconds, in microseconds."""
    return float(np.median(times)) * 1e6


def row(samples: Samples, model: str) -> Row:
    """What was measured, as a row."""
    return Row(
        name="one-stream",
        what="one stream in closed loop, p50, over that of a bare ZeroMQ echo plus one bare step",
        unit="×",
        value=median(samples[SERVED]) / (median(samples[ECHO]) + median(samples[STEP])),
        bar=AT_MOST,
        direction="at most",
        samples=samples,
        details={"model": model},
    )
