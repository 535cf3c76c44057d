"""A recording stream by stream: what is in it, what is missing, and whole sequences in bounded memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np

from instep.core.typing import F32, I64, U32, Bool
from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedBatch, StreamInfo

IN_MEMORY_BYTES: Final = 128 * 2**20
"""Frames of more than this are held in a temporary file."""

_NEVER: Final = np.iinfo(np.int64).max
_ZEROS: Final = bytes(2**20)


@dataclass(frozen=True, slots=True)
class Sequences:
    """Whole sequences of some streams, one after another."""

    rows: I64
    """Which streams, as indices into `SequenceIndex.streams`."""
    offsets: I64
    """[len(rows) + 1]: the frames of `rows[i]` are `offsets[i]` to `offsets[i + 1]`."""
    x: F32
    """float32 [frames, features]."""
    y: F32
    """float32 [frames, outputs]."""


class SequenceIndex:
    """Finds out, in one pass over a recording, how many frames each stream has and whether any is missing.

    A stream with a defect counts only with its frames before it.

    Args:
        reader: an open recording; every row of it is read and its CRC checked.
        on_progress: called with the share (0 to 1) of the recording that was read.

    Attributes:
        streams: every opening, in order.
        frames: int64 [streams]: frames that follow each other without a gap from seq 0.
        frames_present: all frames in the recording, those after a defect too.
        defects: by index of the stream, a sentence: a frame is missing, repeated, or out of order.

    Raises:
        RecordingError: when the recording is damaged.
    """

    def __init__(self, reader: RecordingReader, on_progress: Callable[[float], None]) -> None:
        self._reader = reader
        self.streams: list[StreamInfo] = reader.streams()
        count = len(self.streams)
        self._numbers: I64 = np.array([info.stream for info in self.streams], np.int64)
        self._by_number: I64 = np.argsort(self._numbers, kind="stable").astype(np.int64)
        self._opened: I64 = np.array([info.opened_position for info in self.streams], np.int64)
        self._closed: I64 = np.array([info.closed_position or _NEVER for info in self.streams], np.int64)
        self._defect_at: I64 = np.full(count, _NEVER, np.int64)
        self._last_at: I64 = np.zeros(count, np.int64)
        self.frames: I64 = np.zeros(count, np.int64)
        self.frames_present = 0
        self.defects: dict[int, str] = {}
        for batch in reader.batches():
            self._count(batch)
            on_progress(batch.position / reader.last_position)
        for _ in reader.events():
            pass  # nothing is compared with them, but each is checked against its CRC as it is read
        self._compare_with_closings()

    def load(self, rows: I64) -> Sequences:
        """The frames of these streams, in one pass over the part of the recording that holds them.

        More than `IN_MEMORY_BYTES` of them lie in a temporary file, which goes when the arrays do; the system reads and
        writes it as memory allows.

        Raises:
            RecordingError: when there is no room for that file.
        """
        offsets: I64 = np.concatenate(([0], np.cumsum(self.frames[rows]))).astype(np.int64)
        header, frames = self._reader.header, int(offsets[-1])
        in_memory = 4 * frames * (header.features + header.outputs) <= IN_MEMORY_BYTES
        new = _zeros if in_memory else self._zeros_in_a_file
        x, y = new(frames, header.features), new(frames, header.outputs)
        start: I64 = np.full(len(self.streams), -1, np.int64)
        start[rows] = offsets[:-1]
        first, last = int(self._opened[rows].min()), int(self._last_at[rows].max())
        for batch in self._reader.batches(first, last):
            of = self._rows_of(batch.streams, batch.position)
            wanted = np.flatnonzero((start[of] >= 0) & (batch.position < self._defect_at[of]))
            to = start[of[wanted]] + batch.seqs[wanted].astype(np.int64)
            x[to] = batch.x[wanted]
            y[to] = batch.y[wanted]
        return Sequences(rows, offsets, x, y)

    def _zeros_in_a_file(self, frames: int, width: int) -> F32:
        """float32 [frames, width] in a temporary file."""
        size = 4 * frames * width
        try:
            with tempfile.TemporaryFile(prefix="instep-") as file:
                # All of it is written now: a disk that is full later, under a mapping, would kill the process.
                for at in range(0, size, len(_ZEROS)):
                    file.write(_ZEROS[: size - at])
                file.flush()
                return np.memmap(file, np.float32, "r+", shape=(frames, width)).view(np.ndarray)
        except OSError as error:
            raise RecordingError(
                f"the frames of {self._reader.path} need {size:,} bytes in {tempfile.gettempdir()} while they are put "
                f"in order, and cannot have them ({error.strerror}); make room there, or set TMPDIR to another place"
            ) from None

    def _count(self, batch: RecordedBatch) -> None:
        rows = self._rows_of(batch.streams, batch.position)
        # A seq of 2^63 or more turns negative here and is out of order like any other wrong one.
        seqs = batch.seqs.astype(np.int64)
        good = (
            (seqs == self.frames[rows])
            & (self._defect_at[rows] == _NEVER)
            & (batch.position > self._opened[rows])
            & (batch.position < self._closed[rows])
        )
        if len(np.unique(rows)) < len(rows):
            good &= np.bincount(rows)[rows] == 1
        if not good.all():
            self._find_defects(batch.position, rows, seqs, good)
        self.frames[rows[good]] += 1
        self.frames_present += len(rows)
        self._last_at[rows] = batch.position

    def _find_defects(self, position: int, rows: I64, seqs: I64, good: Bool) -> None:
        for row, seq in zip(rows[~good].tolist(), seqs[~good].tolist(), strict=True):
            if row in self.defects:
                continue
            expected = int(self.frames[row])
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
            present = int(self.frames[row])
            if row not in self.defects and info.frames is not None and info.frames != present:
                self.defects[row] = f"the stream was closed after {info.frames} frames, but {present} are recorded"

    def _rows_of(self, streams: U32, position: int) -> I64:
        """Indices into `streams` of stream numbers."""
        wanted = streams.astype(np.int64)
        known = self._numbers[self._by_number]
        at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
        if not len(known) or (known[at] != wanted).any():
            raise RecordingError(
                f"{self._reader.path} is damaged: the batch at position {position} holds frames of a stream that "
                "was never opened"
            )
        rows: I64 = self._by_number[at]
        return rows


def _zeros(frames: int, width: int) -> F32:
    return np.zeros((frames, width), np.float32)
