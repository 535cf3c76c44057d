"""Which file records which version of a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, takewhile
from pathlib import Path
from typing import Final

from instep.config import Config
from instep.recording.database import SUFFIX
from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader

_MOST_BYTES: Final = 200
"""Of a name that becomes a file's; SQLite and the lock add endings to it."""


def recording_file(config: Config, name: str, *, is_only: bool) -> Path | None:
    """The recording of the first version of a model of that name; None where nothing is recorded.

    It is recording.file, or NAME.instep in that where it is a folder, as it has to be unless the model `is_only`.

    Raises:
        RecordingError: when several models would need one file, or the name is not one for a file.
    """
    place = config.recording.file
    if place is None or (is_only and not place.is_dir()):
        return place
    check_several(place, is_only=is_only)
    if "/" in name or len(name.encode()) > _MOST_BYTES:
        raise RecordingError(f"the model's name {name!r} cannot be a file's name: give the model another one")
    return place / f"{name}{SUFFIX}"


def check_several(place: Path, *, is_only: bool) -> None:
    """Raise RecordingError where several models would need one file."""
    if not is_only and not place.is_dir():
        raise RecordingError(
            f"{place} is not a folder, and each of several models, or versions of one, is recorded in a file of its "
            "own: start the server with --record FOLDER, a folder that exists"
        )


def present_recording(file: Path, fingerprint: str) -> Path:
    """The newest recording of a version of a model, among NAME.instep and NAME@2.instep, NAME@3.instep and so on.

    Each version that replaced another one in a running server has a recording of its own. A version without one gets
    the first file.

    Raises:
        RecordingError: when one cannot be read.
    """
    present = file
    for later in later_recordings(file):
        with RecordingReader(later) as reader:
            if reader.header.model_fingerprint == fingerprint:
                present = later
    return present


def next_recording(file: Path) -> Path:
    """Where a version is recorded that replaces another one: the first of those names that is free."""
    return file.with_stem(f"{file.stem}@{len(list(later_recordings(file))) + 2}")


def later_recordings(file: Path) -> Iterator[Path]:
    """The recordings that there are of versions that replaced the first one."""
    names = (file.with_stem(f"{file.stem}@{number}") for number in count(2))
    return takewhile(Path.exists, names)
