"""One frame a message, many streams at once: what the engine does with a message beside taking and answering it."""

from __future__ import annotations

from instep.bench.pair import Drive, engine_and_echo
from instep.bench.producer import closed_loop
from instep.bench.result import Row, ratio
from instep.bench.rounds import Run, in_turn

STREAMS = 256
OVER_ECHO = 0.5
SERVED, ECHO = "served, messages/s", "echo, messages/s"


def single_frames(run: Run) -> list[Row]:
    """Row `single-frames`."""
    drive: Drive = lambda connection, lanes: closed_loop(connection, lanes, STREAMS, run.seconds)  # noqa: E731
    with engine_and_echo(run, "single-frames", STREAMS) as pair:
        samples = in_turn(run, {SERVED: lambda: pair.engine(drive), ECHO: lambda: pair.echo(drive)})
    return [
        Row(
            name="single-frames",
            what="256 streams in closed loop, one frame a message, over a bare ZeroMQ echo of equal messages",
            unit="×",
            value=ratio(samples, SERVED, ECHO),
            bar=OVER_ECHO,
            direction="at least",
            samples=samples,
            details={"model": pair.subject.words},
        )
    ]
