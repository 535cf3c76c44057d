"""The batches of a recording one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from instep.core.typing import F32, U32, U64
from instep.recording.reader import RecordingReader


@dataclass(frozen=True, slots=True)
class Batch:
    position: int
    time_ns: int
    streams: U32
    seqs: U64
    x: F32
    y: F32 | None


def batches_of(reader: RecordingReader, first: int = 1, last: int | None = None) -> Iterator[Batch]:
    """Those at positions `first` to `last`, but the ones whose step failed."""
    for group in reader.whole_groups(first, last):
        for at in range(len(group.positions)):
            one = group.part(at, at + 1)
            yield Batch(one.positions[0], one.times_ns[0], one.streams, one.seqs, one.x, one.y)
