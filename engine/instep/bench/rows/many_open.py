"""Many open streams of which some send at a time: what it costs that the others are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from instep.bench.connection import Connection
from instep.bench.lanes import Feed, Lane, opened
from instep.bench.producer import closed_loop
from instep.bench.reference import Subject, check_and_close
from instep.bench.result import Row, ratio
from instep.bench.rounds import Run, in_turn
from instep.bench.rows.blocks import BLOCK, STREAMS, feeds
from instep.server.child import ChildServer

FEW, MANY = STREAMS, 100_096
"""1,000 and 100,000, in whole blocks."""
WINDOW_FRAMES = 4
"""Of both servers: with the default, 100,000 rings would take 2 GB."""
AT_LEAST = 0.85


def many_open(run: Run) -> list[Row]:
    """Row `many-open`: two servers of equal settings, in one of which more streams are open."""
    subject = Subject.made(run.folder / "many-open")
    of_blocks = feeds(subject)
    many = run.scaled(MANY, 2 * FEW) // BLOCK * BLOCK
    settings = ["--max-streams", str(many), "--set", f"limits.window_frames={WINDOW_FRAMES}"]
    with ExitStack() as stack:
        sides = {
            f"{streams:,} open, frames/s": _Side(stack, subject, settings, of_blocks, streams)
            for streams in (FEW, many)
        }
        for side in sides.values():
            side.warm_up(run.seconds)
        samples = in_turn(run, {name: _measure(side, run.seconds) for name, side in sides.items()})
        for side in sides.values():
            check_and_close(side.connection, side.lanes, subject.gru)
        (few_name, few_side), (many_name, many_side) = sides.items()
    return [
        Row(
            name="many-open",
            what="served with 100,000 streams open, 1,024 of them at a time, all in turn, over 1,000 open",
            unit="×",
            value=ratio(samples, many_name, few_name),
            bar=AT_LEAST,
            direction="at least",
            samples=samples,
            details={
                "model": subject.words,
                "window_frames": WINDOW_FRAMES,
                "fewest_frames_of_a_stream": min(lane.answered for lane in (*few_side.lanes, *many_side.lanes)),
            },
        )
    ]


class _Side:
    """One of the servers, with streams that stay open all the time."""

    def __init__(
        self, stack: ExitStack, subject: Subject, settings: Sequence[str], of_blocks: Sequence[Feed], streams: int
    ) -> None:
        child = stack.enter_context(ChildServer(subject.folder, settings))
        self.connection = stack.enter_context(Connection(child.endpoint, BLOCK * subject.outputs * 4))
        self.connection.hello()
        self.lanes: list[Lane] = opened(self.connection, of_blocks, "many", lanes=streams // BLOCK)

    def warm_up(self, seconds: float) -> None:
        """Step every stream until its ring has been written once: a page of memory costs more the first time."""
        while min(lane.answered for lane in self.lanes) < WINDOW_FRAMES:
            closed_loop(self.connection, self.lanes, FEW // BLOCK, seconds)


def _measure(side: _Side, seconds: float) -> Callable[[], float]:
    return lambda: closed_loop(side.connection, side.lanes, FEW // BLOCK, seconds)
