"""The demos' console output: sentences, a progress bar, tables."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from typing import Final

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from instep.core.typing import I32, I64, Bool
from instep.demo.producers import Heard
from instep_tools.terminal import progress
from instep_tools.words import counted

AFTER: Final = (1, 2, 3, 5, 7, 10, 15)
"""Numbers of frames after which the table says how many decisions are right."""


def say(console: Console, sentence: str, style: str | None = None) -> None:
    """A line, as it is."""
    console.print(sentence, style=style, markup=False, highlight=False, soft_wrap=True)


def streaming(console: Console, heard: Heard, speakers: I32) -> AbstractAsyncContextManager[None]:
    """The progress of the block that fills `heard`."""

    def detail() -> str:
        finished = f"{counted(heard.finished, 'stream')} finished"
        return f"{finished} · {heard.accuracy_now(speakers):.1%} correct" if heard.frames else finished

    return progress(console, "streaming", int(heard.lengths.sum()), "frames", lambda: heard.frames, detail)


def accuracy_table(right: Bool) -> Table:
    """How many decisions are right after some numbers of frames."""
    recordings, longest = right.shape
    shown = [count for count in AFTER if count < longest]
    table = Table(title=f"correct decisions about {recordings} speakers, by frames heard", box=box.SIMPLE)
    table.add_column("heard")
    for heading in (*map(str, shown), "all"):
        table.add_column(heading, justify="right")
    counts: I64 = right.sum(axis=0)[[*(count - 1 for count in shown), -1]]
    table.add_row("correct", *map(str, counts))
    table.add_row("accuracy", *(f"{count / recordings:.1%}" for count in counts))
    return table


def speed_table(heard: Heard, seconds: float, stats: dict[str, float]) -> Table:
    """Throughput, and latency as the producers saw it."""
    latency_ms = np.concatenate(heard.latency_s) * 1000
    table = Table(title="latency from when each frame was due, the producers' timers included", box=box.SIMPLE)
    for heading in ("frames", "seconds", "frames/s", "frames/step", "p50 ms", "p99 ms", "slowest ms"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{heard.frames:,}",
        f"{seconds:.1f}",
        f"{heard.frames / seconds:,.0f}",
        f"{stats['batch_size_mean']:.1f}",
        *(f"{value:,.1f}" for value in np.percentile(latency_ms, (50, 99, 100))),
    )
    return table
