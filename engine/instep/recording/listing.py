"""The recordings in a folder, each with all its files."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instep.recording import family
from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.one_file import bytes_on_disk
from instep.recording.overview import Overview, look_over
from instep.recording.schema import APPLICATION_ID

_SQLITE_MAGIC: Final = b"SQLite format 3\0"
_APPLICATION_ID_OFFSET: Final = 68


@dataclass(frozen=True, slots=True)
class Listed:
    """One recording, or a file that cannot be read."""

    path: Path
    overview: Overview | None
    """None where it cannot be read."""
    problem: str
    """Why, in two words: damaged, or of another version."""
    bytes: int


def list_recordings(folder: Path) -> list[Listed]:
    """What a folder holds, by name; files of one recording are one.

    Raises:
        RecordingError: when the folder cannot be read.
    """
    try:
        files = {path for path in folder.iterdir() if path.is_file() and _looks_like_one(path)}
    except OSError as error:
        raise RecordingError(f"cannot read the folder {folder}: {error.strerror}") from None
    found = []
    for base in {family.base_of(path) for path in files}:
        together = _together(base)
        if together:
            found.append(_listed(base, together))
        found += [_listed(path, [path]) for path in files if family.base_of(path) == base and path not in together]
    return sorted(found, key=_in_order)


def _in_order(listed: Listed) -> tuple[Path, bool, Path]:
    base = family.base_of(listed.path)
    return base, listed.path != base, listed.path


def _together(base: Path) -> list[Path]:
    """The files of one recording; none where they cannot be told."""
    try:
        return [member.path for member in family.members(base)]
    except RecordingError:
        return []


def _listed(path: Path, files: list[Path]) -> Listed:
    size = sum(bytes_on_disk(file) for file in files)
    try:
        return Listed(path, look_over(path, files), "", size)
    except RecordingError as error:
        return Listed(path, None, "damaged" if isinstance(error, DamagedRecording) else "of another version", size)


def _looks_like_one(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(_APPLICATION_ID_OFFSET + 4)
    return start.startswith(_SQLITE_MAGIC) and start[_APPLICATION_ID_OFFSET:] == struct.pack(">I", APPLICATION_ID)
