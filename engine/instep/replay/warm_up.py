"""Steps a recording's newest frames of its open streams in another network, to get the streams' states there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import I64, U8
from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint, find_sorted
from instep.recording.segments import Closed, Mark, Opened, Segment
from instep.replay.following import Follower
from instep.runtime.stepper import Stepper

_WINDOW: Final = 512
"""The number of positions that are read together, backwards."""
_TRIES: Final = 8
"""The most attempts to read a recording whose history is trimmed meanwhile."""


class WarmUpReplay(Follower):
    """Follows the open streams of a recording in a network that nobody else uses.

    It begins in the network's initial state, with the N newest frames of each stream or, where there are fewer since
    it was opened or reset, with all of them. The stepper has `max_streams` slots.
    """

    def __init__(self, path: Path, stepper: Stepper, max_streams: int, frames: int) -> None:
        super().__init__(path, stepper)
        self._free = list(range(max_streams, SCRATCH_SLOT, -1))
        self._frames = frames
        self._firsts: dict[int, int] = {}
        """By stream, the first frame that is part of its state."""
        self._taken = 0

    def follow(self) -> int:
        """Step all committed frames, outside of an event loop's thread; return their number.

        Raises:
            RecordingError: when the recording is damaged, or has more open streams than slots.
        """
        before = self._taken
        for _ in range(_TRIES):
            if self.look():
                return self._taken - before
        raise RecordingError(f"{self.path} is trimmed faster than it is read: try again")

    def states(self, streams: I64, next_seqs: I64) -> tuple[U8, I64]:
        """The states of open streams by number, int64 [N], after the last `follow`.

        Args:
            streams: int64 [N].
            next_seqs: int64 [N], the seqs of the frames that must follow the states.

        Returns:
            States as rows of bytes [N, row_bytes], and the first frame that is in each, int64 [N].

        Raises:
            RecordingError: when frames of a stream are missing.
        """
        numbers, found = streams.tolist(), self.next_seqs
        if [found.get(number) for number in numbers] != next_seqs.tolist():
            raise RecordingError(f"{self.path} lacks frames of streams that are open")
        slots = np.array([self._streams[number].slot for number in numbers], np.int64)
        return self.stepper.read(slots), np.array([self._firsts[number] for number in numbers], np.int64)

    def begin(self, reader: RecordingReader, checkpoint: Checkpoint) -> int:
        """See `Follower`; finds the frames of each open stream that count."""
        closed = {row[2] for row in reader.rows("closings")}
        opened = sorted(row[2] for row in reader.rows("openings") if row[2] not in closed)
        found = (reader.open_stream(number) for number in opened)
        rows = [(stream.stream, stream.first_seq, stream.seq) for stream in found if stream is not None]
        numbers, first_seqs, nexts = np.array(rows, np.int64).reshape(-1, 3).T.copy()
        for frames in reader.frames(checkpoint.position + 1):
            at, is_open = find_sorted(numbers, frames.streams)
            np.maximum.at(nexts, at[is_open], frames.seqs[is_open] + 1)
        starts = np.maximum(first_seqs, nexts - self._frames)
        lowest, first = nexts.copy(), reader.last_position + 1
        while (lowest > starts).any() and first > reader.first_position:
            last, first = first - 1, max(first - _WINDOW, reader.first_position)
            for frames in reader.frames(first, last):
                at, is_open = find_sorted(numbers, frames.streams)
                np.minimum.at(lowest, at[is_open], frames.seqs[is_open])
        for number, start in zip(numbers.tolist(), np.maximum(starts, lowest).tolist(), strict=True):
            self._firsts[number] = start
            self.add(number, start, None)
        return min(first - 1, checkpoint.position)

    def meet(self, numbers: Sequence[int]) -> None:
        """See `Follower`; open streams were added at the beginning."""

    def take(self, segment: Segment) -> None:
        """Step a segment. States given in it are another network's and are ignored."""
        ended = {mark.stream for mark in segment.marks if isinstance(mark, Closed)}
        for number in ended & self._streams.keys():
            self.drop(number)
        marks = list[Mark]()
        for mark in segment.marks:
            was_open = isinstance(mark, Opened) and mark.stream in self
            if mark.stream not in ended and not was_open and not isinstance(mark, Closed):
                marks.append(replace(mark, state=None))
        stretches = self.plan(replace(segment, marks=marks))
        for row in stretches.given:
            self._firsts[int(stretches.streams[row])] = int(stretches.first_seqs[row])
        self.step(stretches)
        self._taken += int(stretches.lengths.sum())

    def _take_slot(self) -> int:
        if not self._free:
            raise RecordingError(f"{self.path} has more open streams than engine.max_streams: raise it")
        return self._free.pop()
