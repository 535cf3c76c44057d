"""A recording's frames and outputs as columns: in the order in which they were stepped, or stream by stream."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.typing import F32, I64, U64, Bool
from instep.recording.errors import RecordingError
from instep.recording.reader import Closing, RecordingReader
from instep.recording.records import BatchGroup, StreamInfo, find_sorted, no_such_stream
from instep.recording.schema import RecordingHeader
from instep_tools.words import counted

CHUNK_BYTES: Final = 16 * 2**20
CHUNK_FRAMES: Final = 65_536


@dataclass(frozen=True, slots=True)
class FrameChunk:
    """Frames in the order in which they were stepped, as columns of one length."""

    rows: I64
    """Which stream, as an index into those that were asked for."""
    seqs: U64
    times_ns: I64
    """Nanoseconds since 1970, of the step."""
    x: F32
    """float32 [frames, features]."""
    y: F32
    """float32 [frames, outputs]; NaN where the output was not recorded."""
    answered: Bool
    """False where the output was not recorded, because the engine was killed as it computed it."""

    def __len__(self) -> int:
        return len(self.seqs)

    @classmethod
    def join(cls, chunks: Sequence[FrameChunk]) -> FrameChunk:
        """Several as one."""
        return cls(*(np.concatenate([getattr(chunk, each.name) for chunk in chunks]) for each in fields(cls)))


def read_frames(
    reader: RecordingReader,
    streams: Sequence[StreamInfo],
    selected: Sequence[int],
    on_progress: Callable[[float], None] = lambda share: None,
    *,
    chunk_frames: int = CHUNK_FRAMES,
) -> Iterator[FrameChunk]:
    """Every frame of some streams of a recording, once and in bounded memory; at least one chunk, which may be empty.

    Args:
        reader: an open recording.
        streams: all that it has.
        selected: which of them, as ascending indices.
        on_progress: called with the share (0 to 1) of the recording that was read.
        chunk_frames: a chunk is complete with about this many frames, or with `CHUNK_BYTES` of floats.

    Raises:
        DamagedRecording: when a row is missing or damaged, or a frame of a stream is missing or in another place.
    """
    reader.check_positions()
    table = _Table(reader, streams, selected)
    first = min((streams[at].opened_position for at in selected), default=1)
    last = max((streams[at].closed_position or reader.last_position for at in selected), default=0)
    most = max(1, min(chunk_frames, CHUNK_BYTES // (4 * (reader.header.features + reader.header.outputs))))
    found, count = [table.empty()], 0
    for group in reader.whole_groups(first, last):
        found.append(table.chunk(group))
        count += len(found[-1])
        if count >= most:
            yield FrameChunk.join(found)
            found, count = [table.empty()], 0
        on_progress((group.position - first + 1) / (last - first + 1))
    table.check_closings()
    yield FrameChunk.join(found)


class _Table:
    def __init__(self, reader: RecordingReader, streams: Sequence[StreamInfo], selected: Sequence[int]) -> None:
        self._reader = reader
        self._streams = [streams[at] for at in selected]
        numbers = np.array([info.stream for info in streams], np.int64)
        self._by_number: I64 = np.argsort(numbers).astype(np.int64)
        self._numbers = numbers[self._by_number]
        self._selected: I64 = np.full(len(streams), -1, np.int64)
        self._selected[list(selected)] = np.arange(len(selected))
        self._first: I64 = np.array([info.first_seq for info in self._streams], np.int64)
        self._next = self._first.copy()

    def empty(self) -> FrameChunk:
        x, y = (
            np.empty((0, width), np.float32) for width in (self._reader.header.features, self._reader.header.outputs)
        )
        none = np.empty(0, np.int64)
        return FrameChunk(none, none.astype(np.uint64), none, x, y, none.astype(np.bool_))

    def chunk(self, group: BatchGroup) -> FrameChunk:
        """The frames of these batches that were asked for."""
        sizes = np.diff(group.starts)
        positions = np.repeat(np.array(group.positions, np.int64), sizes)
        at, are_known = find_sorted(self._numbers, group.streams.astype(np.int64))
        # Batches up to there may hold frames that are in the states with which the history begins.
        early = positions <= self._reader.trimmed_until
        if unknown := np.flatnonzero(~are_known & ~early).tolist():
            raise self._reader.damaged(
                f"the batch at position {positions[unknown[0]]} holds frames of a stream that was never opened"
            )
        rows = np.where(are_known, self._selected[self._by_number[at]] if len(at) else at, -1)
        seqs = group.seqs.astype(np.int64)  # one of 2^63 or more turns negative, and is out of order
        wanted = rows >= 0
        if early.any():
            wanted[early] &= seqs[early] >= self._first[rows[early]]
        rows, positions = rows[wanted], positions[wanted]
        self._check(rows, seqs[wanted], positions)
        outputs = self._reader.header.outputs
        y = np.full((len(rows), outputs), np.nan, np.float32) if group.y is None else group.y[wanted]
        times: I64 = np.repeat(np.array(group.times_ns, np.int64), sizes)[wanted]
        return FrameChunk(rows, group.seqs[wanted], times, group.x[wanted], y, np.full(len(rows), group.y is not None))

    def _check(self, rows: I64, seqs: I64, positions: I64) -> None:
        """Raise where a frame does not follow the one before it."""
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(self._streams))
        expected = np.arange(len(rows)) + np.repeat(self._next - (np.cumsum(counts) - counts), counts)
        wrong = order[np.flatnonzero(seqs[order] != expected)]
        if len(wrong):
            at = int(wrong.min())
            info, before = self._streams[rows[at]], int((rows[:at] == rows[at]).sum())
            raise self._reader.damaged(
                f"the batch at position {positions[at]} holds frame {seqs[at]} of stream {info.stream} "
                f"({info.name!r}) where frame {self._next[rows[at]] + before} belongs"
            )
        self._next += counts

    def check_closings(self) -> None:
        """Raise where a stream has fewer frames than its closing says."""
        for info, following in zip(self._streams, self._next.tolist(), strict=True):
            if info.frames not in (None, following):
                raise self._reader.damaged(
                    f"stream {info.stream} ({info.name!r}) was closed before frame {info.frames}, but its recorded "
                    f"frames end before frame {following}"
                )


@dataclass(frozen=True)
class RecordedStream:
    """The frames of one opening of a stream, in order."""

    name: str
    stream_id: int
    """Tells apart openings of one name."""
    inputs: F32
    """float32 [T, features]."""
    outputs: F32
    """float32 [T, outputs]; NaN in frames whose output was not recorded, because the engine was killed."""
    times_ns: I64
    """int64 [T], when each frame's batch was recorded, in nanoseconds since 1970."""
    seqs: U64
    """uint64 [T]."""

    def __len__(self) -> int:
        return len(self.seqs)

    def __repr__(self) -> str:
        inputs, outputs = counted(self.inputs.shape[1], "input"), counted(self.outputs.shape[1], "output")
        size = f"{counted(len(self), 'frame')}, {inputs} and {outputs} each"
        return f"<RecordedStream {self.name!r} stream_id={self.stream_id}: {size}>"


class OpenedRecording(Closing, Mapping[str, RecordedStream]):
    """The streams of a recording by name, in the order in which they first opened; read-only.

    It shows what was committed when it was opened, also while a server continues to write. Each lookup reads and checks
    the part of the file in which the stream was open; `items()` and `values()` read the file once and hold all streams
    in memory.

    Args:
        path: the recording.

    Attributes:
        header: the model's name, fingerprint and sizes, and the arithmetic.

    Raises:
        RecordingError: from every method that reads, when the file is not a recording, is damaged, its history was
            trimmed since it was opened, or this was closed.
    """

    def __init__(self, path: Path) -> None:
        self._reader = RecordingReader(path)
        self._is_closed = False
        self.header: RecordingHeader = self._reader.header
        self._streams = self._reader.streams()
        self._openings: dict[str, list[int]] = {}
        """By name, indices of streams."""
        for at, info in enumerate(self._streams):
            self._openings.setdefault(info.name, []).append(at)

    def __repr__(self) -> str:
        names = counted(len(self), "name of a stream", "names of streams")
        return f"<OpenedRecording of model {self.header.model_name!r}: {names}>"

    def __getitem__(self, name: str) -> RecordedStream:
        """The newest opening of this name.

        Raises:
            NoSuchStream: when there is none (also a KeyError).
        """
        return self._read(self._named(name)[-1:])[0]

    def openings(self, name: str) -> list[RecordedStream]:
        """All openings of this name, the oldest first.

        Raises:
            NoSuchStream: when there is none.
        """
        return self._read(self._named(name))

    def __contains__(self, name: object) -> bool:
        return name in self._openings

    def __iter__(self) -> Iterator[str]:
        return iter(self._openings)

    def __len__(self) -> int:
        return len(self._openings)

    def values(self) -> ValuesView[RecordedStream]:
        """The newest opening of each name."""
        return self._all().values()

    def items(self) -> ItemsView[str, RecordedStream]:
        """Each name with its newest opening."""
        return self._all().items()

    def close(self) -> None:
        """Let go of the file; what was read stays."""
        self._is_closed = True
        self._reader.close()

    def _named(self, name: str) -> list[int]:
        if name not in self._openings:
            raise no_such_stream(self._streams, name)
        return self._openings[name]

    def _all(self) -> dict[str, RecordedStream]:
        newest = sorted(openings[-1] for openings in self._openings.values())
        found = {stream.name: stream for stream in self._read(newest)}
        return {name: found[name] for name in self._openings}

    def _read(self, selected: Sequence[int]) -> list[RecordedStream]:
        """The streams at these indices, which ascend."""
        if self._is_closed:
            raise RecordingError(f"the recording {self._reader.path} was closed: open it again to read more of it")
        frames = FrameChunk.join(list(read_frames(self._reader, self._streams, selected)))
        order = np.argsort(frames.rows, kind="stable")
        ends = np.cumsum(np.bincount(frames.rows, minlength=len(selected)))[:-1]
        columns = [np.split(column[order], ends) for column in (frames.x, frames.y, frames.times_ns, frames.seqs)]
        chosen = [self._streams[at] for at in selected]
        return [RecordedStream(info.name, info.stream, *arrays) for info, *arrays in zip(chosen, *columns, strict=True)]
