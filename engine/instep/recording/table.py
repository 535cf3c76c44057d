"""A recording's frames and outputs as columns, in the order of the steps or stream by stream."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from instep.core.typing import F32, I64, U64
from instep.recording.errors import RecordingError
from instep.recording.reader import Closing, RecordingReader
from instep.recording.records import RecordedFrames, StreamInfo, find_sorted, no_such_stream
from instep.recording.schema import RecordingHeader
from instep_tools.words import counted

PART_BYTES: Final = 16 * 2**20
PART_FRAMES: Final = 65_536


def read_frames(
    reader: RecordingReader,
    streams: Sequence[StreamInfo],
    selected: Sequence[int],
    on_progress: Callable[[float], None] = lambda share: None,
    *,
    part_frames: int = PART_FRAMES,
) -> Iterator[RecordedFrames]:
    """Read every frame of some streams once, in bounded memory. Yields at least one part, which may be empty.

    Args:
        reader: an open recording.
        streams: all streams of the recording.
        selected: ascending indices of the streams to read.
        on_progress: called with the share (0 to 1) of the recording that was read.
        part_frames: the approximate frames in a part, unless `PART_BYTES` of floats are fewer.

    Raises:
        DamagedRecording: when a row is missing or damaged, or a frame of a stream is missing or out of order.
    """
    reader.check_positions()
    table = _Table(reader, streams, selected)
    first = min((streams[at].opened_position for at in selected), default=1)
    last = max((streams[at].closed_position or reader.last_position for at in selected), default=0)
    most = max(1, min(part_frames, PART_BYTES // (4 * (reader.header.features + reader.header.outputs))))
    found, count = [reader.no_frames()], 0
    for frames in reader.frames(first, last):
        found.append(table.chosen(frames))
        count += len(found[-1])
        if count >= most:
            yield RecordedFrames.join(found)
            found, count = [reader.no_frames()], 0
        on_progress((int(frames.positions[-1]) - first + 1) / (last - first + 1))
    table.check_closings()
    yield RecordedFrames.join(found)


class StreamIndex:
    """Finds streams by number."""

    def __init__(self, streams: Sequence[StreamInfo]) -> None:
        numbers = np.array([info.stream for info in streams], np.int64)
        self._by_number: I64 = np.argsort(numbers).astype(np.int64)
        self._numbers = numbers[self._by_number]

    def rows(self, numbers: I64) -> I64:
        """The index of each number; -1 if it is unknown."""
        if not len(self._numbers):
            return np.full(len(numbers), -1, np.int64)
        at, are_known = find_sorted(self._numbers, numbers)
        rows: I64 = np.where(are_known, self._by_number[at], -1)
        return rows


class _Table:
    def __init__(self, reader: RecordingReader, streams: Sequence[StreamInfo], selected: Sequence[int]) -> None:
        self._reader = reader
        self._streams = [streams[at] for at in selected]
        self._all, self._chosen = StreamIndex(streams), StreamIndex(self._streams)
        self._next: I64 = np.array([info.first_seq for info in self._streams], np.int64)

    def chosen(self, frames: RecordedFrames) -> RecordedFrames:
        # Batches up to there may hold frames that are in the states with which the history begins.
        early = frames.positions <= self._reader.trimmed_until
        for at in np.flatnonzero((self._all.rows(frames.streams) < 0) & ~early)[:1].tolist():
            raise self._reader.damaged(
                f"the batch at position {frames.positions[at]} holds frames of a stream that was never opened"
            )
        rows = self._chosen.rows(frames.streams)
        wanted = rows >= 0
        wanted[early & wanted] = frames.seqs[early & wanted] >= self._next[rows[early & wanted]]
        frames = frames.only(wanted)
        self._check(rows[wanted], frames)
        return frames

    def _check(self, rows: I64, frames: RecordedFrames) -> None:
        """Raise if a frame does not follow the one before it."""
        order = np.argsort(rows, kind="stable")
        counts = np.bincount(rows, minlength=len(self._streams))
        expected = np.arange(len(rows)) + np.repeat(self._next - (np.cumsum(counts) - counts), counts)
        wrong = order[np.flatnonzero(frames.seqs[order] != expected)]
        if len(wrong):
            at = int(wrong.min())
            info, before = self._streams[rows[at]], int((rows[:at] == rows[at]).sum())
            raise self._reader.damaged(
                f"the batch at position {frames.positions[at]} holds frame {frames.seqs[at]} of stream {info.stream} "
                f"({info.name!r}) where frame {self._next[rows[at]] + before} belongs"
            )
        self._next += counts

    def check_closings(self) -> None:
        """Raise if a stream has fewer frames than its closing states."""
        for info, following in zip(self._streams, self._next.tolist(), strict=True):
            if info.frames not in (None, following):
                raise self._reader.damaged(
                    f"stream {info.stream} ({info.name!r}) was closed before frame {info.frames}, but its recorded "
                    f"frames end before frame {following}"
                )


def known_outputs(frames: RecordedFrames) -> F32:
    """Outputs of frames, float32 [N, outputs], with NaN if none were recorded."""
    return np.where(frames.answered[:, None], frames.y, np.float32(np.nan))


@dataclass(frozen=True)
class RecordedStream:
    """The frames of one opening of a stream, in order."""

    name: str
    stream_id: int
    """The number that distinguishes openings of one name."""
    inputs: F32
    """float32 [T, features]."""
    outputs: F32
    """float32 [T, outputs]; NaN for frames whose output was not recorded, because the engine was killed."""
    times_ns: I64
    """int64 [T], the times at which the frames' batches were recorded, in nanoseconds since 1970."""
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

    It shows the frames that were committed when it was opened, even while a server continues to write. Each lookup
    reads and checks the part of the file in which the stream was open; `items()` and `values()` read the file once and
    keep all streams in memory.

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
        """Indices of streams by name."""
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
        """Close the file; arrays that were read stay valid."""
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
        if self._is_closed:
            raise RecordingError(f"the recording {self._reader.path} was closed: open it again to read more of it")
        frames = RecordedFrames.join(list(read_frames(self._reader, self._streams, selected)))
        chosen = [self._streams[at] for at in selected]
        rows = StreamIndex(chosen).rows(frames.streams)
        order = np.argsort(rows, kind="stable")
        ends = np.cumsum(np.bincount(rows, minlength=len(chosen)))[:-1]
        columns = (frames.x, known_outputs(frames), frames.times_ns, frames.seqs.astype(np.uint64))
        arrays = zip(chosen, *(np.split(column[order], ends) for column in columns), strict=True)
        return [RecordedStream(info.name, info.stream, *of_stream) for info, *of_stream in arrays]
