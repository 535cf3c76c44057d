"""The rows of a recording in the order in which they were written, from any position on, in bounded portions."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np

from instep.core.typing import F32, I64, U8, Bool
from instep.recording.reader import RecordingReader
from instep.recording.records import BatchGroup, RecordedEvent
from instep.recording.schema import CHECKPOINT_EVENT, END_EVENT, ENGINE_EVENT, RESET_EVENT

PORTION_BYTES: Final = 16 * 2**20
"""Of the frames and outputs in a portion, about."""
_KINDS: Final = (RESET_EVENT, CHECKPOINT_EVENT, ENGINE_EVENT, END_EVENT)


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream opened, or was open where the history begins."""

    position: int
    stream: int
    name: str
    first_seq: int
    state: U8 | None
    """uint8 [row_bytes]; None for the model's initial state."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A stream ended."""

    position: int
    stream: int
    next_seq: int
    """The seq that its next frame would have had."""
    state: U8 | None
    """After its last frame; None where it was not known."""


Mark: TypeAlias = Opened | Closed | RecordedEvent
"""Events are resets and writes of states, checkpoints, changes of the engine, and the end."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Frames in the order in which they were stepped; those of one batch share a position."""

    positions: I64
    streams: I64
    seqs: I64
    x: F32
    """float32 [N, features]."""
    y: F32
    """float32 [N, outputs]; zeros where no outputs were recorded."""
    answered: Bool
    """bool [N]: False where the outputs were not recorded, because the engine was killed."""

    def __len__(self) -> int:
        return len(self.seqs)

    def only(self, wanted: Bool) -> Frames:
        """Some of them, bool [N]."""
        return Frames(
            self.positions[wanted],
            self.streams[wanted],
            self.seqs[wanted],
            self.x[wanted],
            self.y[wanted],
            self.answered[wanted],
        )


@dataclass(frozen=True, slots=True)
class Portion:
    """What was recorded between two positions."""

    frames: Frames
    marks: Sequence[Mark]
    """In order."""
    position: int
    """Everything up to here is in this portion or in an earlier one."""

    def only(self, streams: I64) -> Portion:
        """What concerns some streams, by number."""
        numbers = set(streams.tolist())
        marks = [mark for mark in self.marks if mark.stream in numbers]
        return replace(self, frames=self.frames.only(np.isin(self.frames.streams, streams)), marks=marks)


def portions(
    reader: RecordingReader,
    first: int = 1,
    *,
    cuts: Sequence[int] = (),
    settled: bool = False,
    portion_bytes: int = PORTION_BYTES,
) -> Iterator[Portion]:
    """Everything that was recorded from a position on; batches whose step failed are left out.

    Args:
        reader: the recording, up to the last commit that it shows.
        first: the position.
        cuts: positions, rising, at each of which a portion ends.
        settled: end before the first batch whose outcome is not known yet.
        portion_bytes: see `PORTION_BYTES`.

    Raises:
        RecordingError: when a row is damaged, or the history was trimmed meanwhile.
    """
    first = max(first, reader.first_position)
    marks, waiting, found = _marks(reader, first), deque[Mark](), list[BatchGroup]()
    last, ahead = reader.last_position, deque(cuts)

    def taken(position: int) -> Portion:
        while (mark := waiting.popleft() if waiting else next(marks, None)) is not None:
            if mark.position > position:
                waiting.append(mark)
                break
            of_portion.append(mark)
        portion = Portion(_joined(found, reader), list(of_portion), position)
        found.clear()
        of_portion.clear()
        return portion

    of_portion = list[Mark]()
    killed_before = max(reader.recovered_at, default=0) if settled else last
    for group in _cut(reader.whole_groups(first), cuts):
        while ahead and ahead[0] < group.positions[0]:
            yield taken(ahead.popleft())
        known = len(group.positions) if group.y is not None else bisect_right(group.positions, killed_before)
        found.append(group.part(0, known))
        if known < len(group.positions):
            last = group.positions[known] - 1
            break
        if sum(each.x.nbytes + (0 if each.y is None else each.y.nbytes) for each in found) >= portion_bytes:
            yield taken(group.position)
    while ahead and ahead[0] < last:
        yield taken(ahead.popleft())
    yield taken(last)


def empty_portion(reader: RecordingReader, position: int) -> Portion:
    """One without rows."""
    return Portion(_joined([], reader), [], position)


def _marks(reader: RecordingReader, first: int) -> Iterator[Mark]:
    openings = (
        Opened(position, stream, name, first_seq, reader.state(state, position))
        for position, _, stream, name, _, first_seq, state in reader.rows("openings", first)
    )
    closings = (Closed(row[0], row[2], row[3], reader.final_state(row)) for row in reader.rows("closings", first))
    events = (event for event in reader.events(first) if event.kind in _KINDS)
    return heapq.merge(openings, closings, events, key=lambda mark: mark.position)


def _cut(groups: Iterator[BatchGroup], cuts: Sequence[int]) -> Iterator[BatchGroup]:
    for group in groups:
        begin = 0
        for cut in cuts:
            end = bisect_right(group.positions, cut)
            if begin < end < len(group.positions):
                yield group.part(begin, end)
                begin = end
        yield group.part(begin, len(group.positions)) if begin else group


def _joined(groups: Sequence[BatchGroup], reader: RecordingReader) -> Frames:
    widths = (reader.header.features, reader.header.outputs)
    x, y = ([np.empty((0, width), np.float32)] for width in widths)
    positions, streams, seqs = ([np.empty(0, np.int64)] for _ in range(3))
    answered = [np.empty(0, np.bool_)]
    for group in groups:
        positions.append(np.repeat(np.array(group.positions, np.int64), np.diff(group.starts)))
        streams.append(group.streams.astype(np.int64))
        seqs.append(group.seqs.astype(np.int64))  # one of 2^63 or more turns negative, and is out of order
        x.append(group.x)
        y.append(np.zeros((len(group.x), widths[1]), np.float32) if group.y is None else group.y)
        answered.append(np.full(len(group.x), group.y is not None))
    return Frames(
        np.concatenate(positions),
        np.concatenate(streams),
        np.concatenate(seqs),
        np.concatenate(x),
        np.concatenate(y),
        np.concatenate(answered),
    )
