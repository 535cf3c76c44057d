"""1,024 streams in blocks of 256 in closed loop, against the network alone and against the seed's way."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from instep.bench.connection import Connection
from instep.bench.lanes import Feed, opened
from instep.bench.producer import closed_loop
from instep.bench.reference import Subject, check_and_close, stepped
from instep.bench.result import Row, Samples, ratio
from instep.bench.rounds import Run, in_turn
from instep.core.typing import F32
from instep.server.child import ChildServer

STREAMS, BLOCK = 1024, 256
TIMESTEPS = 128
"""Different inputs; a longer round repeats them."""
OVER_BARE, OVER_SEED, OVER_BARE_2X256 = 0.85, 15.0, 0.95
SERVED, BARE, SEED = "served, frames/s", "bare nn.GRU of batch 256, frames/s", "nn.GRU one by one, frames/s"


def feeds(subject: Subject) -> list[Feed]:
    """What the blocks send, one after the other."""
    x = subject.inputs(TIMESTEPS, STREAMS)
    return [Feed.of(x[:, at : at + BLOCK]) for at in range(0, STREAMS, BLOCK)]


def served(endpoint: str, subject: Subject, of_blocks: list[Feed], seconds: float, *, exactly: bool = True) -> float:
    """Frames a second that are served over a new connection; its outputs are checked afterwards."""
    with Connection(endpoint, BLOCK * subject.outputs * 4) as connection:
        connection.hello()
        lanes = opened(connection, of_blocks, "block")
        rate = closed_loop(connection, lanes, len(lanes), seconds)
        check_and_close(connection, lanes, subject.gru, exactly=exactly)
    return rate


def blocks(run: Run) -> list[Row]:
    """Rows `blocks-bare` and `blocks-seed`."""
    subject = Subject.made(run.folder / "blocks")
    samples = _measured(run, subject, with_seed=True)
    return [
        Row(
            name="blocks-bare",
            what="1,024 streams in blocks of 256, served, over the bare nn.GRU loop of batch 256",
            unit="×",
            value=ratio(samples, SERVED, BARE),
            bar=OVER_BARE,
            direction="at least",
            samples={name: samples[name] for name in (SERVED, BARE)},
            details={"model": subject.words},
        ),
        Row(
            name="blocks-seed",
            what="the same over stepping streams one by one with nn.GRU",
            unit="×",
            value=ratio(samples, SERVED, SEED),
            bar=OVER_SEED,
            direction="at least",
            samples={name: samples[name] for name in (SERVED, SEED)},
            details={"model": subject.words},
        ),
    ]


def blocks_2x256(run: Run) -> list[Row]:
    """Row `blocks-2x256`."""
    subject = Subject.made(run.folder / "blocks-2x256", hidden=256, layers=2)
    samples = _measured(run, subject, with_seed=False)
    return [
        Row(
            name="blocks-2x256",
            what="the same load with 2 layers of 256 over its bare loop",
            unit="×",
            value=ratio(samples, SERVED, BARE),
            bar=OVER_BARE_2X256,
            direction="at least",
            samples=samples,
            details={"model": subject.words},
        )
    ]


def _measured(run: Run, subject: Subject, *, with_seed: bool) -> Samples:
    of_blocks = feeds(subject)
    block: F32 = of_blocks[0].x
    with ExitStack() as stack:
        child = stack.enter_context(ChildServer(subject.folder, ["--max-streams", str(STREAMS)]))
        ways = {
            SERVED: lambda: served(child.endpoint, subject, of_blocks, run.seconds),
            BARE: lambda: stepped(subject.gru, block, run.seconds),
        }
        if with_seed:
            one = np.ascontiguousarray(block[:, :1])
            ways[SEED] = lambda: stepped(subject.gru, one, run.seconds)
        return in_turn(run, ways)
