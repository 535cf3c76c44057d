"""What `instep verify` does, all three ways and the comparison, against one call of `nn.GRU` over the whole."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np

from instep.bench.connection import Connection
from instep.bench.lanes import Feed, opened
from instep.bench.producer import closed_loop
from instep.bench.reference import Subject, WrongOutput, check_and_close, whole
from instep.bench.result import Row, ratio
from instep.bench.rounds import Run, in_turn
from instep.recording.reader import RecordingReader
from instep.server.child import ChildServer
from instep.verify.model_source import recorded_model
from instep.verify.verifier import verify

STREAMS, TIMESTEPS = 256, 1000
AT_LEAST = 0.4
VERIFIED, WHOLE = "verified, frames/s", "nn.GRU over the padded whole, frames/s"


def verification(run: Run) -> list[Row]:
    """Row `verify`."""
    subject = Subject.made(run.folder / "verify")
    file = run.folder / "verify.instep"
    x = subject.inputs(run.scaled(TIMESTEPS, 40), STREAMS)
    with ChildServer(subject.folder, ["--record", str(file)]) as child:
        with Connection(child.endpoint, STREAMS * subject.outputs * 4) as connection:
            connection.hello()
            lanes = opened(connection, [Feed.of(x)], "recorded", once=True)
            closed_loop(connection, lanes, 1, math.inf)
            check_and_close(connection, lanes, subject.gru)
    lengths = np.full(STREAMS, len(x))
    samples = in_turn(run, {VERIFIED: lambda: _verified(file), WHOLE: lambda: whole(subject.gru, x, lengths)})
    return [
        Row(
            name="verify",
            what=f"instep verify of {STREAMS} streams over nn.GRU on the padded whole of them",
            unit="×",
            value=ratio(samples, VERIFIED, WHOLE),
            bar=AT_LEAST,
            direction="at least",
            samples=samples,
            details={"model": subject.words, "frames": int(lengths.sum())},
        )
    ]


def _verified(file: Path) -> float:
    """Frames a second, from the file to the report: what the command does once Python has loaded torch."""
    began = time.perf_counter()
    with RecordingReader(file) as reader:
        report = verify(reader, recorded_model(reader.header, None), [], lambda stage, share: None)
    seconds = time.perf_counter() - began
    if report.verdict != "exact":
        raise WrongOutput(report.summary())
    return report.frames / seconds
