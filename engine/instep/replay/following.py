"""Follows a recording that is being written, one short look after another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from instep.recording.errors import TrimmedMeanwhile
from instep.recording.reader import RecordingReader
from instep.recording.records import Checkpoint
from instep.recording.schema import END_EVENT
from instep.recording.segments import Segment, segments
from instep.replay.replay import LAST, Replay, Stepping

SEGMENT_BYTES: Final = 4 * 2**20


class Follower(Replay):
    """Follows a recording that is being written, and steps the committed frames.

    Each look opens the file anew and reads it in short transactions, because a permanent reader would keep the writer
    from reusing its WAL, trimming, and closing the file cleanly. It begins at the newest checkpoint. A stream that was
    open there is added at its first frame, in its newest recorded state.

    Attributes:
        position: everything in the recording up to here has been processed; None before the first look.
        lag_s: seconds since the commit of the first unread batch.
        is_finished: whether the recording had been closed cleanly when it was last read.
    """

    def __init__(self, path: Path, stepper: Stepping, position: int | None = None) -> None:
        self.path = path
        self.position = position
        self.lag_s = 0.0
        self.is_finished = False
        with RecordingReader(path) as reader:
            super().__init__(stepper, reader, ignore_until=LAST)

    def look(self, most_segments: int | None = None, segment_bytes: int = SEGMENT_BYTES) -> bool:
        """Step some or all committed segments; return whether nothing is left to step.

        Raises:
            RecordingError: when the recording is damaged.
            UnavailableRecording: when it is locked at the moment.
        """
        began, taken, since = time.time(), 0, self.position or 0
        try:
            with RecordingReader(self.path, since=since) as reader, torch.inference_mode():
                self.reader = reader
                with reader.at_once():  # a newer one may replace it right away
                    checkpoint = reader.checkpoint()
                if self.position is None or self.is_to_begin(reader, checkpoint):
                    for number in list(self._streams):
                        self.drop(number)
                    self.position = self.begin(reader, checkpoint)
                    if self.position < since:
                        return False  # this reader does not show what is read again
                for segment in segments(reader, self.position + 1, settled=True, segment_bytes=segment_bytes):
                    self.take(segment)
                    self.position, taken = segment.position, taken + 1
                    self.is_finished = bool(segment.marks) and getattr(segment.marks[-1], "kind", "") == END_EVENT
                    if taken == most_segments and not segment.is_last:
                        unread = next(reader.rows("batches", self.position + 1), None)
                        self.lag_s = 0.0 if unread is None else max(0.0, time.time() - unread[1] / 1e9)
                        return False
        except TrimmedMeanwhile:
            return False
        self.lag_s = time.time() - began
        return True

    def is_to_begin(self, reader: RecordingReader, checkpoint: Checkpoint) -> bool:
        """Whether to skip everything up to the position that `begin` returns, because the history may be gone."""
        return reader.trimmed.position > (self.position or 0)

    def begin(self, reader: RecordingReader, checkpoint: Checkpoint) -> int:
        """Return the position after which to begin, that of the newest checkpoint; no stream is open yet."""
        return checkpoint.position

    def take(self, segment: Segment) -> None:
        """Step a segment."""
        self.step(self.plan(segment))

    def meet(self, numbers: Sequence[int]) -> None:
        """Add streams in their newest states."""
        for number in numbers:
            if (found := self.reader.open_stream(number)) is not None:
                self.add(number, found.seq, found.state)
