"""Where one file of a recording ends and the next begins: what is carried over must be what the replay ends with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from instep.core.typing import F32
from instep.recording.reader import RecordingReader
from instep.recording.records import StreamInfo
from instep.recording.schema import CARRIED_EVENT, RecordingHeader


@dataclass(frozen=True, slots=True)
class Following:
    """The file that follows another, and the streams it begins with."""

    path: Path
    header: RecordingHeader
    streams: dict[int, StreamInfo]
    """By their numbers."""

    @classmethod
    def after(cls, path: Path, following: Path) -> Following | None:
        """What a file begins with, if it is the one that follows another.

        Raises:
            RecordingError: when one cannot be read.
        """
        with RecordingReader(path) as reader, RecordingReader(following) as next_reader:
            header, after = reader.header, next_reader.header
            if (after.family, after.number) != (header.family, header.number + 1):
                return None
            return cls.read(next_reader)

    @classmethod
    def read(cls, reader: RecordingReader) -> Following:
        """What a file begins with.

        Raises:
            RecordingError: when it is damaged.
        """
        carried = {event.stream for event in reader.events() if event.kind == CARRIED_EVENT}
        streams = {info.stream: info for info in reader.streams() if info.stream in carried}
        return cls(reader.path, reader.header, streams)

    def state(self, stream: int) -> F32:
        """The state that a stream begins with there: float32 [layers, hidden size]."""
        state = self.streams[stream].initial_state
        return np.zeros((self.header.state_layers, self.header.state_size), np.float32) if state is None else state

    def defect(self, info: StreamInfo, next_seq: int) -> str | None:
        """What is wrong with how a stream goes on there, whose next frame is `next_seq`; None for nothing."""
        there = self.streams.get(info.stream)
        if info.closed_position is not None:
            return None if there is None else f"it ended in this file, and {self.path.name} begins with it"
        if there is None:
            return f"it is open at the end of this file, and {self.path.name} begins without it"
        if there.name != info.name:
            return f"it is called {there.name!r} in {self.path.name}"
        if there.first_seq != next_seq:
            return (
                f"{self.path.name} goes on with its frame {there.first_seq}, but its recorded frames end before frame "
                f"{next_seq}"
            )
        return None

    def problems(self, last_position: int, known: set[int]) -> tuple[str, ...]:
        """What is wrong between the files themselves.

        Args:
            last_position: of the file before.
            known: all streams of that.
        """
        found = []
        if self.header.first_position != last_position + 1:
            found.append(
                f"{self.path.name} begins at position {self.header.first_position:,}, but the file before it ends at "
                f"{last_position:,}"
            )
        if unknown := sorted(self.streams.keys() - known):
            found.append(
                f"{self.path.name} begins with streams that the file before it does not hold ({len(unknown):,}), "
                f"first stream {unknown[0]} ({self.streams[unknown[0]].name!r})"
            )
        return tuple(found)
