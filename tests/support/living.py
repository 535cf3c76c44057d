"""An engine that trims its recording as it goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from instep.recording.database import DatabaseLimits
from instep.recording.trim import Retention
from instep.recording.writer import RecordingWriter
from tests.support.recordings import gru_description, make_gru, make_header
from tests.support.scribe import F32, Scribe

STREAMS = [1, 2, 3, 4]


def live(scribe: Scribe, rounds: int, *, now_ns: int | None = None, goes_on: bool = False) -> Iterator[int]:
    """Rounds of an engine that trims as its recorder does: streams step, begin, end and are reset."""
    newest = max(scribe.states)
    for number in range(rounds):
        open_now = sorted(scribe.states)
        position = scribe.step(open_now)
        if goes_on:  # before a checkpoint has their states
            scribe.step(open_now)
        if number % 7 == 3:
            scribe.reset(open_now[number % len(open_now)], scribe.random_state())
        if number % 11 == 5:
            newest += 1
            scribe.open(newest, scribe.random_state() if number % 2 else None)
            scribe.close(open_now[0])
        scribe.writer.commit()
        now = scribe.now if now_ns is None else now_ns
        if scribe.writer.wants_checkpoint(now):
            scribe.checkpoint(position)
            scribe.writer.commit()
        for _ in range(scribe.rng.integers(1, 40)):  # other rows are written between two segments
            if not scribe.writer.trim(now):
                break
        yield number
    while scribe.writer.trim(scribe.now if now_ns is None else now_ns):
        pass


GRU = make_gru(3, 4, layers=2)


def step(x: F32, h: F32) -> tuple[F32, F32]:
    """In place of a GRU of that size, which these thousands of steps need not be: every frame changes all states."""
    after = np.linspace(0.3, 0.7, 8, dtype=np.float32).reshape(2, 1, 4) * h + x.sum(1, keepdims=True)
    return after[-1], after


def small_scribe(folder: Path, name: str = "a.rec") -> Scribe:
    """Of a recording with small rows and pages, so that little is written for much to happen."""
    header = make_header(gru_description(GRU), model_folder=str(folder / "model"))
    kept, small = Retention(keep_bytes=60 * 1024), DatabaseLimits(page_bytes=1024)
    scribe = Scribe(RecordingWriter.create(folder / name, header, kept, small), step)
    for stream in STREAMS:
        scribe.open(stream)
    return scribe
