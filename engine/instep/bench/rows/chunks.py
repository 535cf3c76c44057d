"""Recordings that are replayed through the engine in chunks, against one call over the padded whole of them."""

from __future__ import annotations

import math

import numpy as np

from instep.bench.connection import Connection
from instep.bench.lanes import Feed, opened
from instep.bench.producer import closed_loop
from instep.bench.reference import Subject, check_and_close, whole
from instep.bench.result import Row, ratio
from instep.bench.rounds import Run, in_turn
from instep.core.typing import I64
from instep.server.child import ChildServer

RECORDINGS, CHUNK = 64, 32
LONGEST = 4096
"""Frames; the shortest has three quarters of them."""
AT_LEAST = 0.4
SERVED, WHOLE = "served, frames/s", "nn.GRU over the padded whole, frames/s"


def chunks(run: Run) -> list[Row]:
    """Row `chunks`."""
    subject = Subject.made(run.folder / "chunks")
    longest = run.scaled(LONGEST // CHUNK, 4) * CHUNK
    lengths = lengths_up_to(longest)
    x = subject.inputs(longest, RECORDINGS)
    for recording, length in enumerate(lengths.tolist()):
        x[length:, recording] = 0
    feeds = [Feed.of(x[:length, at : at + 1], CHUNK) for at, length in enumerate(lengths.tolist())]
    with ChildServer(subject.folder) as child:

        def served() -> float:
            with Connection(child.endpoint, CHUNK * subject.outputs * 4) as connection:
                connection.hello()
                lanes = opened(connection, feeds, "recording", once=True)
                rate = closed_loop(connection, lanes, len(lanes), math.inf)
                check_and_close(connection, lanes, subject.gru)
            return rate

        samples = in_turn(run, {SERVED: served, WHOLE: lambda: whole(subject.gru, x, lengths)})
    return [
        Row(
            name="chunks",
            what=f"64 recordings at once in chunks of {CHUNK} frames over nn.GRU on the padded whole of them",
            unit="×",
            value=ratio(samples, SERVED, WHOLE),
            bar=AT_LEAST,
            direction="at least",
            samples=samples,
            details={"model": subject.words, "frames": int(lengths.sum()), "longest": longest},
        )
    ]


def lengths_up_to(longest: int) -> I64:
    """Of the recordings, in frames: whole chunks, one of them the longest."""
    most = longest // CHUNK
    lengths: I64 = np.random.default_rng(2).integers(most * 3 // 4, most + 1, RECORDINGS)
    lengths[0] = most
    return lengths * CHUNK
