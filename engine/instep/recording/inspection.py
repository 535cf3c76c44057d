"""Summaries of recordings, and the recordings in a folder."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from instep.recording.database import SUFFIX, bytes_on_disk, looks_like_one, lost_tail
from instep.recording.errors import RecordingError
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.recovery import Recovered
from instep.recording.schema import RECOVERED_EVENT
from instep.recording.table import read_frames
from instep_tools.problems import is_part


@dataclass(frozen=True, slots=True)
class Inspection:
    """The contents of an undamaged recording."""

    streams: int
    frames: int


def inspect(path: Path) -> Inspection:
    """Read every row of a recording, and check CRCs, positions, the order of each stream's frames, and states.

    Raises:
        RecordingError: when it cannot be read.
        DamagedRecording: when anything is wrong.
    """
    with RecordingReader(path) as reader:
        streams = reader.streams()
        frames = sum(map(len, read_frames(reader, streams, range(len(streams)))))
    with Recovered(path) as recovered:
        for _ in recovered.segments():
            pass  # what a restart would use is checked as it is read
    return Inspection(len(streams), frames)


def how_it_ends(reader: RecordingReader) -> str:
    """A phrase about the end of a recording."""
    if is_being_written(reader.path):
        return "being written"
    if reader.finished:
        return "closed in order"
    tail = lost_tail(reader.path)
    return f"not closed: its server ended without closing it{f'; {tail}' if tail else ''}"


def where_it_begins(reader: RecordingReader) -> str:
    """A predicate such as "begins at position 1,201 (…)"; empty if nothing was trimmed or cut off."""
    if not reader.trimmed.position:
        return ""
    since = when(reader.checkpoints()[0].time_ns)
    return f"begins at position {reader.first_position:,} ({since}); what came before was trimmed or cut off"


def look_over(path: Path) -> dict[str, Any]:
    """Facts about a recording as JSON values.

    The count of frames includes those of failed steps, and `bytes` includes the WAL. Each opening, batch, output,
    closing and event has a position. `trimmed` gives the beginning of a trimmed history, and is empty otherwise. A
    restart replays the rows after `checkpoint_position`, which is 0 without a checkpoint.

    Raises:
        RecordingError: when it cannot be read, or a row that this reads is damaged.
    """
    with RecordingReader(path) as reader:
        with reader.at_once():
            checkpoint = reader.checkpoint()
        header, engine, streams = reader.header, reader.engines[-1].header, reader.streams()
        batches, frames = reader.totals()
        return {
            "file": str(path),
            "began": when(header.created_ns),
            "ends": how_it_ends(reader),
            "model": header.model_name,
            "features": header.features,
            "outputs": header.outputs,
            "model_folder": header.model_folder,
            "fingerprint": header.model_fingerprint,
            "instep_version": engine.instep_version,
            "durability": engine.durability,
            "arithmetic": engine.arithmetic,
            "streams": len(streams),
            "open_streams": sum(info.closed_position is None for info in streams),
            "batches": batches,
            "frames": frames,
            "restarts": sum(event.kind == RECOVERED_EVENT for event in reader.events()),
            "checkpoint_position": checkpoint.position,
            "first_position": reader.first_position,
            "trimmed": where_it_begins(reader),
            "last_position": reader.last_position,
            "bytes": bytes_on_disk(path),
        }


def facts(found: Mapping[str, Any]) -> dict[str, str]:
    """The result of `look_over` as text, without positions."""
    shown = {name.replace("_", " "): value for name, value in found.items() if not name.endswith("position")}
    return {name: f"{value:,}" if isinstance(value, int) else value or "never" for name, value in shown.items()}


def recordings_in(folder: Path) -> list[Path]:
    """The recordings in a folder and in its folders `shard-K`, and files `*.instep` that do not begin like a recording.

    Files with another suffix that cannot be read, and incomplete files, are left out.

    Raises:
        RecordingError: when the folder cannot be read.
    """
    try:
        folders = (folder, *folder.glob("shard-*/"))
        files = (path for each in folders for path in each.iterdir() if path.is_file())
        return sorted(path for path in files if path.suffix == SUFFIX or (not is_part(path) and _begins_as_one(path)))
    except OSError as error:
        raise RecordingError(f"cannot read the folder {folder}: {error.strerror}") from None


def _begins_as_one(path: Path) -> bool:
    with suppress(OSError):  # it is somebody else's, or gone by now, as the files next to a recording are once it ends
        return looks_like_one(path)
    return False


def when(time_ns: int) -> str:
    """A time in nanoseconds since 1970, as text."""
    return datetime.fromtimestamp(time_ns // 10**9, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
