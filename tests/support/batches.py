"""The batches of a recording one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from instep.core.typing import F32, I64
from instep.recording.reader import RecordingReader


@dataclass(frozen=True, slots=True)
class Batch:
    position: int
    time_ns: int
    streams: I64
    seqs: I64
    x: F32
    y: F32 | None


def batches_of(reader: RecordingReader, first: int = 1, last: int | None = None) -> Iterator[Batch]:
    """Those at positions `first` to `last`, but the ones whose step failed."""
    for frames in reader.frames(first, last):
        for position in np.unique(frames.positions).tolist():
            one = frames.only(frames.positions == position)
            y = one.y if one.answered.all() else None
            yield Batch(position, int(one.times_ns[0]), one.streams, one.seqs, one.x, y)
