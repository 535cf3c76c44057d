"""A recording as arrays by stream, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instep.core.typing import F32, I64, U64
from instep.recording.errors import RecordingError
from instep.recording.file import Closing
from instep.recording.reader import RecordingReader
from instep.recording.records import no_such_stream
from instep.recording.schema import RecordingHeader
from instep.recording.table import CHUNK_FRAMES, FrameTable, TableChunk
from instep_tools.words import counted


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
        chunk_frames: frames that are read at once, about.

    Attributes:
        header: the model's name, fingerprint and sizes, and the arithmetic.

    Raises:
        RecordingError: from every method that reads, when the file is not a recording, is damaged, its history was
            trimmed since it was opened, or this was closed.
    """

    def __init__(self, path: Path, chunk_frames: int = CHUNK_FRAMES) -> None:
        self._reader = RecordingReader(path)
        self._is_closed = False
        self._chunk_frames = chunk_frames
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
        table = FrameTable(self._reader, self._streams, selected, chunk_frames=self._chunk_frames)
        parts = list(table.chunks()) or [_no_rows(table)]
        names = np.concatenate([part.names for part in parts])
        order = np.argsort(names, kind="stable")
        ends = np.cumsum(np.bincount(names, minlength=len(selected)))[:-1]
        columns = [
            np.split(np.concatenate([getattr(part, column) for part in parts])[order], ends)
            for column in ("x", "y", "times_ns", "seqs")
        ]
        return [
            RecordedStream(info.name, info.stream, *arrays)
            for info, *arrays in zip(table.streams, *columns, strict=True)
        ]


def _no_rows(table: FrameTable) -> TableChunk:
    empty = np.empty(0, np.int64)
    x, y = (np.empty((0, width), np.float32) for width in (table.features, table.outputs))
    return TableChunk(empty, empty.astype(np.uint32), empty.astype(np.uint64), empty, x, y)
