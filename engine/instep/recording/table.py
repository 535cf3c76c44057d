"""A recording's frames and outputs as one table, in chunks of columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Final

import numpy as np

from instep.core.typing import F32, I64, U32, U64
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedBatch, StreamInfo, find_sorted

CHUNK_FRAMES: Final = 65_536


@dataclass(frozen=True, slots=True)
class TableChunk:
    """Some rows of the table, as columns of the same length."""

    names: I64
    """Which name, as an index into `FrameTable.names`."""
    stream_ids: U32
    seqs: U64
    times_ns: I64
    """Nanoseconds since 1970, of the step."""
    x: F32
    """float32 [rows, features]."""
    y: F32
    """float32 [rows, outputs]; NaN in rows whose output was not recorded."""

    def __len__(self) -> int:
        return len(self.seqs)


class FrameTable:
    """Every frame of some streams of a recording with its output, in the order they were stepped.

    A frame whose output was not recorded, because the engine was killed as it computed it, has NaN there. A frame that
    is missing is damage.

    Args:
        reader: an open recording.
        streams: all that it has.
        selected: which of them, as ascending indices.
        on_progress: called with the share (0 to 1) of the recording that was read.
        chunk_bytes: floats in a chunk, about; a chunk has as many frames as fit, and up to one batch more.
        chunk_frames: the same for narrow frames: the arrays of many small batches weigh more than what is in them.

    Attributes:
        features: floats in x.
        outputs: floats in y.
        streams: the openings, in order.
        names: of the streams; one name may be there more than once.
        stream_ids: their numbers.
        frames: rows that `chunks` has given so far.
        unanswered: how many of them have no recorded output.

    Raises:
        DamagedRecording: when the recording is damaged.
    """

    def __init__(
        self,
        reader: RecordingReader,
        streams: Sequence[StreamInfo],
        selected: Sequence[int],
        on_progress: Callable[[float], None] = lambda share: None,
        *,
        chunk_bytes: int = 16 * 2**20,
        chunk_frames: int = CHUNK_FRAMES,
    ) -> None:
        reader.check_positions()
        self._reader = reader
        self._on_progress = on_progress
        ends = [streams[at].closed_position for at in selected]
        self._first = min((streams[at].opened_position for at in selected), default=1)
        self._last = max((end or reader.last_position for end in ends), default=0)
        self._known: I64 = np.sort(np.array([info.stream for info in streams], np.int64))
        self._selected: I64 = np.full(len(streams), -1, np.int64)
        numbers = np.array([streams[at].stream for at in selected], np.int64)
        self._selected[np.searchsorted(self._known, numbers)] = np.arange(len(selected))
        self._next: I64 = np.array([streams[at].first_seq for at in selected], np.int64)
        """The seq of each stream's next frame."""
        self._closings = [(streams[at].closed_position, streams[at].frames) for at in selected]
        self.features = reader.header.features
        self.outputs = reader.header.outputs
        fit = chunk_bytes // (4 * (self.features + self.outputs))
        self._most_frames = max(min(fit, chunk_frames), 1)
        self.streams = [streams[at] for at in selected]
        self.names = [info.name for info in self.streams]
        self.stream_ids = numbers.tolist()
        self.frames = 0
        self.unanswered = 0

    def chunks(self) -> Iterator[TableChunk]:
        """All rows once, in bounded memory.

        Raises:
            DamagedRecording: when a row is missing or damaged, or a frame of a stream is missing or in another place.
        """
        pieces: list[TableChunk] = []
        rows = 0
        for batch in self._reader.batches(self._first, self._last):
            part = self._rows(batch)
            if len(part):
                pieces.append(part)
                rows += len(part)
            if rows >= self._most_frames:
                yield self._joined(pieces)
                pieces, rows = [], 0
            self._on_progress((batch.position - self._first + 1) / (self._last - self._first + 1))
        self._check_closings()
        if pieces:
            yield self._joined(pieces)

    def _rows(self, batch: RecordedBatch) -> TableChunk:
        names = self._names_of(batch)
        rows = np.flatnonzero(names >= 0)
        self._check_seqs(batch, names[rows], batch.seqs[rows].astype(np.int64))
        if batch.y is None:
            self.unanswered += len(rows)
        y = np.full((len(rows), self.outputs), np.nan, np.float32) if batch.y is None else batch.y[rows]
        times: I64 = np.full(len(rows), batch.time_ns, np.int64)
        return TableChunk(names[rows], batch.streams[rows], batch.seqs[rows], times, batch.x[rows], y)

    def _names_of(self, batch: RecordedBatch) -> I64:
        """Indices into `names`, -1 where the stream is not wanted."""
        places, are_known = find_sorted(self._known, batch.streams.astype(np.int64))
        if not are_known.all():
            raise self._reader.damaged(
                f"the batch at position {batch.position} holds frames of a stream that was never opened"
            )
        names: I64 = self._selected[places]
        return names

    def _check_seqs(self, batch: RecordedBatch, names: I64, seqs: I64) -> None:
        """Every stream goes on with its next frame, and stands once in a batch."""
        wrong = np.flatnonzero(seqs != self._next[names])
        if not len(wrong) and len(np.unique(names)) == len(names):
            self._next[names] += 1
            return
        if not len(wrong):
            raise self._reader.damaged(f"the batch at position {batch.position} holds two frames of one stream")
        name, seq = names[wrong[0]], seqs[wrong[0]]
        raise self._reader.damaged(
            f"the batch at position {batch.position} holds frame {seq} of stream {self.stream_ids[name]} "
            f"({self.names[name]!r}) where frame {self._next[name]} belongs",
        )

    def _check_closings(self) -> None:
        for at, (position, frames) in enumerate(self._closings):
            if position is not None and frames != self._next[at]:
                raise self._reader.damaged(
                    f"stream {self.stream_ids[at]} ({self.names[at]!r}) was closed before frame {frames}, but its "
                    f"recorded frames end before frame {self._next[at]}",
                )

    def _joined(self, pieces: Sequence[TableChunk]) -> TableChunk:
        columns = (np.concatenate([getattr(part, each.name) for part in pieces]) for each in fields(TableChunk))
        chunk = TableChunk(*columns)
        self.frames += len(chunk)
        return chunk
