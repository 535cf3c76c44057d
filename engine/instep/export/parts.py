"""The files of a recording, read as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from instep.recording.errors import DamagedRecording
from instep.recording.reader import RecordingReader
from instep.recording.records import RecordedBatch, StreamInfo


class Parts:
    """Files that follow each other: one, or all of a recording.

    A stream that goes on in another file is one stream. What the last file shows is fixed from now on, though it may be
    written still; the others are opened one at a time.

    Args:
        files: in order.

    Attributes:
        header: of the first file.
        streams: every stream in the order in which they opened, without states.
        last_position: the newest row of all.
        finished: whether the last file was closed in order.

    Raises:
        RecordingError: when a file cannot be read.
        DamagedRecording: when one is damaged, or does not begin with what the one before it ends with.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._last = RecordingReader(files[-1])
        self._spans: list[tuple[Path, int, int]] = []
        """The first and the last position of every file."""
        self._by_number: dict[int, StreamInfo] = {}
        try:
            for path in files:
                with self._reader(path) as reader:
                    self._look_at(reader)
            self.finished = self._last.finished
        except BaseException:
            self._last.close()
            raise
        self.streams = list(self._by_number.values())
        self.last_position = self._last.last_position

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._last.close()

    def batches(self, first: int, last: int) -> Iterator[RecordedBatch]:
        """The batches at positions `first` to `last`, in order, but those whose step failed.

        Raises:
            DamagedRecording: when a row of a file that holds any of them is damaged or missing.
        """
        for path, begin, end in self._spans:
            if begin <= last and end >= first:
                with self._reader(path) as reader:
                    reader.check_positions()
                    yield from reader.batches(max(first, begin), None if end <= last else last)

    def damaged(self, position: int, what: str) -> DamagedRecording:
        """The error that says so of the file with that position."""
        path = next((path for path, _, end in self._spans if position <= end), self._last.path)
        return DamagedRecording(f"{path} is damaged: {what}", path)

    def _reader(self, path: Path) -> RecordingReader | nullcontext[RecordingReader]:
        return nullcontext(self._last) if path == self._last.path else RecordingReader(path)

    def _look_at(self, reader: RecordingReader) -> None:
        first = reader.header.first_position
        if not self._spans:
            self.header = reader.header
        elif first != self._spans[-1][2] + 1:
            raise reader.damaged(f"it begins at position {first}, but the file before it ends at {self._spans[-1][2]}")
        self._spans.append((reader.path, first, reader.last_position))
        open_before = {info.stream for info in self._by_number.values() if info.closed_position is None}
        here = reader.streams()
        if lost := open_before - {info.stream for info in here}:
            raise reader.damaged(f"stream {min(lost)}, which is open at the end of the file before it, does not go on")
        for info in here:
            before = self._by_number.get(info.stream)
            if before is None:
                self._by_number[info.stream] = replace(info, initial_state=None, final_state=None)
                continue
            if info.stream not in open_before:
                raise reader.damaged(f"stream {info.stream} goes on, but it ended in a file before it, or opens twice")
            self._by_number[info.stream] = replace(
                before, closed_ns=info.closed_ns, closed_position=info.closed_position, frames=info.frames
            )
