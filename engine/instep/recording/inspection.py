"""Looking through a whole recording for damage, and saying what is in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from instep.recording.family import base_of, missing_follower
from instep.recording.joints import Following
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.recovery import read_recovery
from instep.recording.schema import RECOVERED_EVENT
from instep.recording.sequences import SequenceIndex


@dataclass(frozen=True, slots=True)
class Inspection:
    """What files without damage hold."""

    files: int
    streams: int
    open_streams: int
    frames: int
    unanswered: int
    """How many of them have no recorded outputs."""
    restarts: int
    """How often another process went on with it."""
    positions: int
    snapshot_position: int
    """How far the newest states go; 0 for no snapshot."""
    ending: str
    """How it ends, in words."""


def inspect_all(files: Sequence[Path], on_progress: Callable[[float], None]) -> Inspection:
    """Read every row of all files of a recording, in order, and see that each goes on where the one before it ends.

    Raises:
        RecordingError: when one cannot be read.
        DamagedRecording: when anything is wrong.
    """
    found, carried = list[Inspection](), 0
    for at, path in enumerate(files):

        def tell(share: float, at: int = at) -> None:
            on_progress((at + share) / len(files))

        following = Following.after(path, files[at + 1]) if at + 1 < len(files) else None
        carried += len(following.streams) if following is not None else 0
        found.append(inspect(path, tell, following))
    last = found[-1]
    return Inspection(
        files=len(files),
        streams=sum(each.streams for each in found) - carried,
        open_streams=last.open_streams,
        frames=sum(each.frames for each in found),
        unanswered=sum(each.unanswered for each in found),
        restarts=sum(each.restarts for each in found),
        positions=sum(each.positions for each in found),
        snapshot_position=last.snapshot_position,
        ending=last.ending,
    )


def inspect(path: Path, on_progress: Callable[[float], None], following: Following | None = None) -> Inspection:
    """Read every row of a file: CRCs, positions, that streams' frames follow each other, states.

    Args:
        path: the file.
        on_progress: called with the share (0 to 1) of it that was read.
        following: what the file after it begins with, which must be what this one ends with; None for nothing.

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
        if following is not None:
            _check_joint(reader, index, following)
        restarts = sum(event.kind == RECOVERED_EVENT for event in reader.events())
        ending = how_it_ends(reader)
    with read_recovery(path, lambda _: None) as recovered:
        for _ in recovered.replay():
            pass  # what a restart would use is checked as it is read
    return Inspection(
        files=1,
        streams=len(index.streams),
        open_streams=sum(info.closed_position is None for info in index.streams),
        frames=int(index.frames.sum()),
        unanswered=int(index.unanswered.sum()),
        restarts=restarts,
        positions=reader.last_position - reader.header.first_position + 1,
        snapshot_position=recovered.snapshot_position,
        ending=ending,
    )


def _check_joint(reader: RecordingReader, index: SequenceIndex, following: Following) -> None:
    """Raise when the next file goes on otherwise than this one ends; states are for the verifier to compare."""
    for info, next_seq in zip(index.streams, index.next_seqs, strict=True):
        if (defect := following.defect(info, next_seq)) is not None:
            raise reader.damaged(f"in stream {info.stream} ({info.name!r}), {defect}")
    for problem in following.problems(reader.last_position, {info.stream for info in index.streams}):
        raise reader.damaged(problem)


def how_it_ends(reader: RecordingReader) -> str:
    """In words."""
    if (follower := reader.followed_by) is not None and reader.path.with_name(follower).exists():
        return f"goes on in {follower}"
    if any(is_being_written(path) for path in {reader.path, base_of(reader.path)}):
        return "being written"
    if (missing := missing_follower(reader)) is not None:
        return f"goes on in {missing}, which is not there"
    return (
        "closed in order" if reader.finished and follower is None else "not closed: its engine ended without closing it"
    )
