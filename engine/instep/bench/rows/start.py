"""How soon an engine is ready: from its process being begun to its first line, with everything in the disk's cache."""

from __future__ import annotations

import time
from statistics import median

from instep.bench.reference import Subject
from instep.bench.result import Row, Samples
from instep.bench.rounds import Run, in_turn
from instep.server.child import ChildServer

AT_MOST_S, CERTIFIED_AT_MOST_S = 4.0, 1.0
READY, CERTIFIED = "ready, s", "of which certification, s"


def start(run: Run) -> list[Row]:
    """Row `start`."""
    subject = Subject.made(run.folder / "start")
    certified: list[float] = []

    def ready_s() -> float:
        began = time.perf_counter()
        with ChildServer(subject.folder) as child:
            seconds = time.perf_counter() - began
        certified.append(float(child.first_line["certified_s"]))
        return seconds

    samples = in_turn(run, {READY: ready_s})
    return [row({**samples, CERTIFIED: certified[-run.rounds :]}, subject.words)]


def row(samples: Samples, model: str) -> Row:
    """What was measured, as a row, which also asks that certification takes no longer than it may."""
    certified_s = median(samples[CERTIFIED])
    return Row(
        name="start",
        what=f"instep serve from start to ready, warm; certification at most {CERTIFIED_AT_MOST_S:g} s of it",
        unit="s",
        value=median(samples[READY]),
        bar=AT_MOST_S,
        direction="at most",
        samples=samples,
        details={
            "model": model,
            "certified_s": round(certified_s, 4),
            "certified_s_at_most": CERTIFIED_AT_MOST_S,
        },
        problem=f"certification took {certified_s:.2f} s, more than {CERTIFIED_AT_MOST_S:g} s"
        if certified_s > CERTIFIED_AT_MOST_S
        else "",
    )
