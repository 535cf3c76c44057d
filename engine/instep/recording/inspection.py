"""Looking through a whole recording for damage, and saying what is in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.recovery import read_recovery
from instep.recording.schema import RECOVERED_EVENT
from instep.recording.sequences import SequenceIndex
from instep.recording.wal import lost_tail


@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of a recording without damage."""

    streams: int
    open_streams: int
    frames: int
    unanswered: int
    """How many of the frames have no recorded outputs."""
    restarts: int
    """How often another process resumed it."""
    positions: int
    first_position: int
    """Above 1 where the history was trimmed."""
    checkpoint_position: int
    """How far the newest states go; 0 for no checkpoint."""
    ending: str
    """How it ends, in words."""


def inspect(path: Path, on_progress: Callable[[float], None]) -> Inspection:
    """Read every row of a recording: CRCs, positions, that streams' frames follow each other, states.

    Args:
        path: the recording.
        on_progress: called with the share (0 to 1) of it that was read.

    Raises:
        RecordingError: when it cannot be read.
        DamagedRecording: when anything is wrong.
    """
    with RecordingReader(path) as reader:
        reader.check_positions()
        index = SequenceIndex(reader, on_progress)
        for row, defect in sorted(index.defects.items()):
            info = index.streams[row]
            raise reader.damaged(f"in stream {info.stream} ({info.name!r}), {defect}")
        restarts = sum(event.kind == RECOVERED_EVENT for event in reader.events())
        ending = how_it_ends(reader)
    with read_recovery(path, lambda _: None) as recovered:
        for _ in recovered.replay():
            pass  # what a restart would use is checked as it is read
    return Inspection(
        streams=len(index.streams),
        open_streams=sum(info.closed_position is None for info in index.streams),
        frames=int(index.frames.sum()),
        unanswered=int(index.unanswered.sum()),
        restarts=restarts,
        positions=reader.last_position - reader.trimmed.position,
        first_position=reader.first_position,
        checkpoint_position=recovered.checkpoint_position,
        ending=ending,
    )


def how_it_ends(reader: RecordingReader) -> str:
    """In words."""
    if is_being_written(reader.path):
        return "being written"
    if reader.finished:
        return "closed in order"
    tail = lost_tail(reader.path)
    return f"not closed: its engine ended without closing it{f'; {tail}' if tail else ''}"
