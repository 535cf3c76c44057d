"""A recording stream by stream: frames counted, gaps found, and whole sequences."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import numpy as np

from instep.core.typing import I64, U8, U32, Bool
from instep.recording.frames import FrameStore, Sequences
from instep.recording.reader import RecordingReader
from instep.recording.records import BatchGroup, RecordedBatch, StateReset, StreamInfo, find_sorted

_NEVER: Final = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Stretch:
    """Frames of one stream from its beginning, or from a reset of its state, up to the next reset or its end."""

    row: int
    """Which stream, as an index into `SequenceIndex.streams`."""
    first_seq: int
    initial_state: U8 | None
    """Before the first frame, uint8 [row_bytes]; None for the model's initial state."""
    final_state: U8 | None
    """After the last frame; None where it was not recorded."""


def all_frames(streams: Sequence[StreamInfo]) -> Sequence[int]:
    """Keep those of every stream."""
    return range(len(streams))


class SequenceIndex:
    """Finds out, in one pass over a recording, how many frames each stream has and whether any is missing.

    A stream with a defect counts only with its frames before it.

    Args:
        reader: an open recording; every row of its history is read and its CRC checked.
        on_progress: called with the share (0 to 1) of the recording that was read.
        keep: chooses streams, as indices, whose frames are kept for `sequences`; none by default.
        checkpoints: positions, ascending, where the attributes below are noted.

    Attributes:
        streams: every opening, in order.
        kept: int64, indices of the streams whose frames are kept.
        stretches: every stretch, those of one stream in order.
        frames: int64 [stretches]: frames that follow each other without a gap.
        unanswered: int64 [stretches]: how many of them have no recorded outputs.
        frames_present: all frames in the recording, those after a defect too.
        defects: by index of the stream, a sentence: a frame is missing, repeated, or out of order.
        checkpoint_seqs: for every checkpoint, int64 [streams]: the seq of the next frame there.
        checkpoint_stretches: for every checkpoint, int64 [streams]: the stretch that it belongs to, as an index into
            `stretches`.

    Raises:
        RecordingError: when the recording is damaged, or there is no room for the frames that are kept.
    """

    def __init__(
        self,
        reader: RecordingReader,
        on_progress: Callable[[float], None],
        keep: Callable[[Sequence[StreamInfo]], Sequence[int]] = lambda streams: (),
        *,
        checkpoints: Sequence[int] = (),
    ) -> None:
        self._reader = reader
        self.streams: list[StreamInfo] = reader.streams()
        self.kept: I64 = np.array(keep(self.streams), np.int64)
        self._is_kept: Bool = np.zeros(len(self.streams), np.bool_)
        self._is_kept[self.kept] = True
        self._store = FrameStore(reader.path, reader.header.features, reader.header.outputs)
        numbers: I64 = np.array([info.stream for info in self.streams], np.int64)
        self._by_number: I64 = np.argsort(numbers, kind="stable").astype(np.int64)
        self._numbers = numbers[self._by_number]
        self._opened: I64 = np.array([info.opened_position for info in self.streams], np.int64)
        self._closed: I64 = np.array([info.closed_position or _NEVER for info in self.streams], np.int64)
        self._next: I64 = np.array([info.first_seq for info in self.streams], np.int64)
        self._defect_at: I64 = np.full(len(self.streams), _NEVER, np.int64)
        self.stretches = [
            Stretch(row, info.first_seq, info.initial_state, info.final_state) for row, info in enumerate(self.streams)
        ]
        self._stretch: I64 = np.arange(len(self.streams))
        """Of each stream, the one that the next frame belongs to."""
        # Nothing is compared with the other events, but each is checked against its CRC as it is read.
        resets = list(reader.resets())
        counts = len(self.streams) + len(resets)
        self.frames: I64 = np.zeros(counts, np.int64)
        self.unanswered: I64 = np.zeros(counts, np.int64)
        self.frames_present = 0
        self.defects: dict[int, str] = {}
        waiting = deque(resets)
        self._checkpoints = deque(checkpoints)
        self.checkpoint_seqs: list[I64] = []
        self.checkpoint_stretches: list[I64] = []
        for group in _split(reader.batch_groups(), sorted([*checkpoints, *(reset.position for reset in resets)])):
            self._pass(waiting, group.positions[0])
            self._count_all(group)
            on_progress(group.position / reader.last_position)
        self._pass(waiting, _NEVER)
        self._compare_with_closings()
        count = len(self.stretches)
        self.frames, self.unanswered = self.frames[:count], self.unanswered[:count]

    @property
    def next_seqs(self) -> list[int]:
        """The seq that each stream's next frame would have, in the order of `streams`."""
        found: list[int] = self._next.tolist()
        return found

    def sequences(self, rows: I64) -> Sequences:
        """The frames of these stretches, of streams whose frames are kept; to be called once.

        Raises:
            RecordingError: when there is no room for them.
        """
        of_kept = self._is_kept[np.array([stretch.row for stretch in self.stretches], np.int64)]
        return self._store.sequences(rows, np.where(of_kept, self.frames, 0))

    def _keep(self, frames: BatchGroup | RecordedBatch, rows: I64, good: Bool) -> None:
        """Keep the good frames, bool [N], of streams, int64 [N], whose frames are kept."""
        wanted = self._is_kept[rows] & good
        if wanted.any():
            found = slice(None) if wanted.all() else wanted
            y = None if frames.y is None else frames.y[found]
            self._store.append(self._stretch[rows[found]], frames.x[found], y)

    def _count_all(self, group: BatchGroup) -> None:
        """Count some batches without a reset between them."""
        at, are_known = find_sorted(self._numbers, group.streams.astype(np.int64))
        if are_known.all():
            order = np.argsort(at, kind="stable")
            rows = self._by_number[at[order]]
            # A seq of 2^63 or more turns negative here and is out of order like any other wrong one.
            seqs = group.seqs.astype(np.int64)[order]
            positions = np.repeat(np.array(group.positions, np.int64), np.diff(group.starts))[order]
            is_first = np.append(True, rows[1:] != rows[:-1])
            first = np.flatnonzero(is_first)
            counts = np.diff(np.append(first, len(rows)))
            expected = self._next[rows] + np.arange(len(rows)) - np.repeat(first, counts)
            good = (
                (seqs == expected)
                & (self._defect_at[rows] == _NEVER)
                & (positions > self._opened[rows])
                & (positions < self._closed[rows])
                & (is_first | (positions > np.append(0, positions[:-1])))
            )
            if good.all():
                of, stretches = rows[first], self._stretch[rows[first]]
                self._next[of] += counts
                self.frames[stretches] += counts
                if group.y is None:
                    self.unanswered[stretches] += counts
                self.frames_present += len(rows)
                self._keep(group, self._by_number[at], good)  # all are good, in whichever order
                return
        for batch in group.batches():
            self._count(batch)

    def _count(self, batch: RecordedBatch) -> None:
        rows = self._rows_of(batch.streams, batch.position)
        seqs = batch.seqs.astype(np.int64)
        good = (
            (seqs == self._next[rows])
            & (self._defect_at[rows] == _NEVER)
            & (batch.position > self._opened[rows])
            & (batch.position < self._closed[rows])
        )
        if len(np.unique(rows)) < len(rows):
            good &= np.bincount(rows)[rows] == 1
        if not good.all():
            self._find_defects(batch.position, rows, seqs, good)
        stretches = self._stretch[rows[good]]
        self._next[rows[good]] += 1
        self.frames[stretches] += 1
        if batch.y is None:
            self.unanswered[stretches] += 1
        self.frames_present += len(rows)
        self._keep(batch, rows, good)

    def _pass(self, resets: deque[StateReset], position: int) -> None:
        """Apply the resets before a position, and note where streams are at each checkpoint before it."""
        while self._checkpoints and self._checkpoints[0] < position:
            checkpoint = self._checkpoints.popleft()
            while resets and resets[0].position <= checkpoint:
                self._reset(resets.popleft())
            self.checkpoint_seqs.append(self._next.copy())
            self.checkpoint_stretches.append(self._stretch.copy())
        while resets and resets[0].position < position:
            self._reset(resets.popleft())

    def _reset(self, reset: StateReset) -> None:
        (row,) = self._rows_of(np.array([reset.stream]), reset.position).tolist()
        if row in self.defects:
            return
        if reset.seq != self._next[row] or not self._opened[row] < reset.position < self._closed[row]:
            self.defects[row] = f"its state was reset before frame {reset.seq}, where frame {self._next[row]} belongs"
            self._defect_at[row] = reset.position
            return
        index, last = len(self.stretches), int(self._stretch[row])
        self.stretches.append(Stretch(row, reset.seq, reset.state, self.stretches[last].final_state))
        self.stretches[last] = replace(self.stretches[last], final_state=None)
        self._stretch[row] = index

    def _find_defects(self, position: int, rows: I64, seqs: I64, good: Bool) -> None:
        for row, seq in zip(rows[~good].tolist(), seqs[~good].tolist(), strict=True):
            if row in self.defects:
                continue
            expected = int(self._next[row])
            if seq > expected:
                sentence = f"frame {expected} is missing: frame {seq} was recorded in its place"
            elif seq < expected:
                sentence = f"frame {seq} was recorded again where frame {expected} belongs"
            elif not self._opened[row] < position < self._closed[row]:
                sentence = f"frame {seq} was recorded while the stream was not open"
            else:
                sentence = f"two frames were recorded in one step, at frame {seq}"
            self.defects[row] = sentence
            self._defect_at[row] = position

    def _compare_with_closings(self) -> None:
        for row, info in enumerate(self.streams):
            present = int(self._next[row])
            if row not in self.defects and info.frames is not None and info.frames != present:
                self.defects[row] = (
                    f"the stream was closed before frame {info.frames}, but its recorded frames end before frame "
                    f"{present}"
                )

    def _rows_of(self, streams: U32 | I64, position: int) -> I64:
        """Indices into `streams` of stream numbers."""
        at, are_known = find_sorted(self._numbers, streams.astype(np.int64))
        if not are_known.all():
            raise self._reader.damaged(f"the row at position {position} is of a stream that was never opened")
        rows: I64 = self._by_number[at]
        return rows


def _split(groups: Iterator[BatchGroup], ends: Sequence[int]) -> Iterator[BatchGroup]:
    """The groups, in parts where one has batches up to and behind one of these positions, which ascend."""
    for group in groups:
        first, last = group.positions[0], group.positions[-1]
        inside = ends[bisect_left(ends, first) : bisect_left(ends, last)]
        cuts = sorted({bisect_right(group.positions, end) for end in inside})
        for begin, end in pairwise([0, *cuts, len(group.positions)]):
            yield group.part(begin, end) if cuts else group
