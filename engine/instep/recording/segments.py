"""The rows of a recording in bounded segments, in the order in which they were written, from any position on."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

import numpy as np

from instep.core.typing import I64, U8
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedEvent, RecordedFrames
from instep.recording.schema import CHECKPOINT_EVENT, END_EVENT, ENGINE_EVENT, RESET_EVENT

SEGMENT_BYTES: Final = 16 * 2**20
"""The approximate size of the frames and outputs in a segment."""
_KINDS: Final = (RESET_EVENT, CHECKPOINT_EVENT, ENGINE_EVENT, END_EVENT)


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream was opened, or was open where the history begins."""

    position: int
    stream: int
    name: str
    first_seq: int
    state: U8 | None
    """Its state, uint8 [row_bytes]; None for the model's initial state."""


@dataclass(frozen=True, slots=True)
class Closed:
    """A stream ended."""

    position: int
    stream: int
    next_seq: int
    """The seq that the stream expected next, or `UNKNOWN_SEQ`."""
    state: U8 | None
    """The state after the last frame; None if it was lost."""


Mark: TypeAlias = Opened | Closed | RecordedEvent
"""An event: a reset, a write of states, a checkpoint, a change of the engine, or the end."""


@dataclass(frozen=True, slots=True)
class Segment:
    """The rows between two positions."""

    frames: RecordedFrames
    marks: Sequence[Mark]
    position: int
    """All positions up to this one are in this segment or an earlier one."""
    is_last: bool = False
    """Whether this is the last segment."""

    def only(self, streams: I64) -> Segment:
        """Select the rows of some streams, by number."""
        numbers = set(streams.tolist())
        marks = [mark for mark in self.marks if mark.stream in numbers]
        return replace(self, frames=self.frames.only(np.isin(self.frames.streams, streams)), marks=marks)


def segments(
    reader: RecordingReader,
    first: int = 1,
    *,
    cuts: Sequence[int] = (),
    settled: bool = False,
    segment_bytes: int = SEGMENT_BYTES,
) -> Iterator[Segment]:
    """Read all rows from a position on; batches whose step failed are left out.

    Args:
        reader: the recording, which is read up to the last commit that the reader shows.
        first: the position.
        cuts: rising positions at each of which a segment ends.
        settled: whether to end before the first batch without an outcome.
        segment_bytes: see `SEGMENT_BYTES`.

    Raises:
        RecordingError: when a row is damaged, or the history was trimmed meanwhile.
    """
    first = max(first, reader.first_position)
    marks, waiting, found = _marks(reader, first), deque[Mark](), [reader.no_frames()]
    last, ahead = reader.last_position, deque(cuts)

    def taken(position: int, *, is_last: bool = False) -> Segment:
        while (mark := waiting.popleft() if waiting else next(marks, None)) is not None:
            if mark.position > position:
                waiting.append(mark)
                break
            of_segment.append(mark)
        segment = Segment(RecordedFrames.join(found), list(of_segment), position, is_last)
        del found[1:]
        of_segment.clear()
        return segment

    of_segment = list[Mark]()
    killed_before = max(reader.recovered_at, default=0) if settled else last
    for frames in _cut(reader.frames(first), cuts):
        while ahead and ahead[0] < frames.positions[0]:
            yield taken(ahead.popleft())
        known = len(frames)
        if not frames.answered[0]:
            known = int(np.searchsorted(frames.positions, killed_before, "right"))
        found.append(frames.only(slice(known)))
        if known < len(frames):
            last = int(frames.positions[known]) - 1
            break
        if sum(each.x.nbytes + each.y.nbytes for each in found) >= segment_bytes:
            yield taken(int(frames.positions[-1]))
    while ahead and ahead[0] < last:
        yield taken(ahead.popleft())
    yield taken(last, is_last=True)


def empty_segment(reader: RecordingReader, position: int) -> Segment:
    """A segment without rows."""
    return Segment(reader.no_frames(), [], position)


def _marks(reader: RecordingReader, first: int) -> Iterator[Mark]:
    openings = (
        Opened(position, stream, name, first_seq, reader.state(state, position))
        for position, _, stream, name, _, first_seq, state in reader.rows("openings", first)
    )
    closings = (Closed(row[0], row[2], row[3], reader.final_state(row)) for row in reader.rows("closings", first))
    events = (event for event in reader.events(first) if event.kind in _KINDS)
    return heapq.merge(openings, closings, events, key=lambda mark: mark.position)


def _cut(parts: Iterator[RecordedFrames], cuts: Sequence[int]) -> Iterator[RecordedFrames]:
    for frames in parts:
        begin = 0
        for end in np.searchsorted(frames.positions, cuts, "right").tolist():
            if begin < end < len(frames):
                yield frames.only(slice(begin, end))
                begin = end
        yield frames.only(slice(begin, None)) if begin else frames
