"""What exactness costs: the same load on a server that keeps to certified batches, and on one that does not."""

from __future__ import annotations

from contextlib import ExitStack

from instep.bench.reference import Subject
from instep.bench.result import Row, ratio
from instep.bench.rounds import Run, in_turn
from instep.bench.rows.blocks import STREAMS, feeds, served
from instep.server.child import ChildServer

AT_LEAST = 0.95
EXACT, OFF = "exact, frames/s", "exactness off, frames/s"


def exact_off(run: Run) -> list[Row]:
    """Row `exact-off`; outputs of the one that promises no bits are compared nearly."""
    subject = Subject.made(run.folder / "exact-off")
    of_blocks = feeds(subject)
    arguments = ["--max-streams", str(STREAMS), "--exactness"]
    with ExitStack() as stack:
        exact, off = (
            stack.enter_context(ChildServer(subject.folder, [*arguments, mode])) for mode in ("require", "off")
        )
        samples = in_turn(
            run,
            {
                EXACT: lambda: served(exact.endpoint, subject, of_blocks, run.seconds),
                OFF: lambda: served(off.endpoint, subject, of_blocks, run.seconds, exactly=False),
            },
        )
    return [
        Row(
            name="exact-off",
            what="1,024 streams in blocks of 256, exact over exactness: off",
            unit="×",
            value=ratio(samples, EXACT, OFF),
            bar=AT_LEAST,
            direction="at least",
            samples=samples,
            details={"model": subject.words},
        )
    ]
