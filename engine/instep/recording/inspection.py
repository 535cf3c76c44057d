"""Summing up a recording, and finding those in a folder."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from instep.recording.database import SUFFIX, bytes_on_disk, looks_like_one, lost_tail
from instep.recording.errors import RecordingError
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.schema import RECOVERED_EVENT
from instep.recording.sequences import SequenceIndex
from instep_tools.problems import is_part


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


def inspect(path: Path) -> Inspection:
    """Read every row of a recording: CRCs, positions, that streams' frames follow each other, states.

    Raises:
        RecordingError: when it cannot be read.
        DamagedRecording: when anything is wrong.
    """
    with RecordingReader(path) as reader:
        reader.check_positions()
        index = SequenceIndex(reader, lambda _: None)
        for row, defect in sorted(index.defects.items()):
            info = index.streams[row]
            raise reader.damaged(f"in stream {info.stream} ({info.name!r}), {defect}")
        restarts = sum(event.kind == RECOVERED_EVENT for event in reader.events())
    with Recovered(path) as recovered:
        for _ in recovered.portions():
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
    )


def how_it_ends(reader: RecordingReader) -> str:
    """In words."""
    if is_being_written(reader.path):
        return "being written"
    if reader.finished:
        return "closed in order"
    tail = lost_tail(reader.path)
    return f"not closed: its server ended without closing it{f'; {tail}' if tail else ''}"


def where_it_begins(reader: RecordingReader) -> str:
    """A predicate such as "begins at position 1,201 (…)"; empty where nothing was trimmed or left out by a cut."""
    if not reader.trimmed.position:
        return ""
    since = when(reader.checkpoints()[0].time_ns)
    return f"begins at position {reader.first_position:,} ({since}); what came before was trimmed or cut off"


@dataclass(frozen=True, slots=True)
class Overview:
    """Facts about a recording."""

    file: str
    began: str
    ends: str
    """In words."""
    model: str
    features: int
    outputs: int
    model_folder: str
    fingerprint: str
    instep_version: str
    durability: str
    arithmetic: str
    """Of the engine that wrote last."""
    streams: int
    open_streams: int
    batches: int
    frames: int
    """Frames of failed steps are counted, too."""
    restarts: int
    checkpoint_position: int
    """How far the newest states go; 0 for none."""
    first_position: int
    """Above 1 where the history was trimmed."""
    trimmed: str
    """Where the history begins, in words; empty where none was trimmed."""
    last_position: int
    bytes: int
    """With the WAL."""


def look_over(path: Path) -> Overview:
    """The facts about a recording.

    Raises:
        RecordingError: when it cannot be read, or is damaged where this reads.
    """
    with RecordingReader(path) as reader:
        header, engine = reader.header, reader.engines[-1].header
        streams = reader.streams()
        batches, frames = reader.totals()
        return Overview(
            file=str(path),
            began=when(header.created_ns),
            ends=how_it_ends(reader),
            model=header.model_name,
            features=header.features,
            outputs=header.outputs,
            model_folder=header.model_folder,
            fingerprint=header.model_fingerprint,
            instep_version=engine.instep_version,
            durability=engine.durability,
            arithmetic=engine.arithmetic,
            streams=len(streams),
            open_streams=sum(info.closed_position is None for info in streams),
            batches=batches,
            frames=frames,
            restarts=sum(event.kind == RECOVERED_EVENT for event in reader.events()),
            checkpoint_position=reader.checkpoint().position,
            first_position=reader.first_position,
            trimmed=where_it_begins(reader),
            last_position=reader.last_position,
            bytes=bytes_on_disk(path),
        )


def recordings_in(folder: Path) -> list[Path]:
    """The recordings in a folder, in the order of their names; also files `*.instep` that do not begin as one.

    A file of another name is left out if it cannot be read, and one that is not complete yet.

    Raises:
        RecordingError: when the folder cannot be read.
    """
    try:
        files = (path for path in folder.iterdir() if path.is_file())
        return sorted(path for path in files if path.suffix == SUFFIX or (not is_part(path) and _begins_as_one(path)))
    except OSError as error:
        raise RecordingError(f"cannot read the folder {folder}: {error.strerror}") from None


def holds_frames(path: Path) -> bool:
    """Whether a recording holds frames, or lacks some that it should hold; also True where it cannot be read."""
    try:
        with RecordingReader(path) as reader:
            return next(reader.batch_groups(), None) is not None or bool(SequenceIndex(reader, lambda _: None).defects)
    except RecordingError:
        return True


def _begins_as_one(path: Path) -> bool:
    with suppress(OSError):  # it is somebody else's, or gone by now, as the files next to a recording are once it ends
        return looks_like_one(path)
    return False


def when(time_ns: int) -> str:
    """A time in nanoseconds since 1970, in words."""
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
