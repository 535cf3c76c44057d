"""Finds the recording of each version of a model, and the streams that are open in it."""

from __future__ import annotations

import glob
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from instep.config import Config
from instep.recording.database import SUFFIX, holds_recording
from instep.recording.errors import RecordingError
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader
from instep.recording.schema import MOVED_EVENT, RecordingHeader, read_moved_detail

SHARDS_FILE: Final = "shards"
"""The file next to the recordings of shards, with their number."""
_MOST_BYTES: Final = 200
"""The longest file name, because SQLite and the lock append suffixes."""


def recording_file(config: Config, name: str) -> Path | None:
    """The recording of the first version of a model; None if nothing is recorded.

    This is recording.path if that ends in .instep, and otherwise NAME.instep in the folder recording.path.

    Raises:
        RecordingError: when the name is not a valid file name.
    """
    path = config.recording.path
    if path is None or config.recording.is_one_file:
        return path
    if "/" in name or len(name.encode()) > _MOST_BYTES or re.search(r"@[0-9]+$", name):  # as a later version's file
        raise RecordingError(f"the model's name {name!r} cannot be a file's name: give the model another one")
    return path / f"{name}{SUFFIX}"


def check_folder(path: Path) -> None:
    """Raise RecordingError if a folder for recordings is not there and cannot be made."""
    nearest = next(each for each in (path, *path.parents) if os.path.lexists(each))
    if not nearest.is_dir():
        raise RecordingError(f"{nearest} is not a folder, and the path of a single file ends in {SUFFIX}: name another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise RecordingError(f"{path} cannot be written: give this user the right to, or name another folder")


def nearest_folder(path: Path) -> Path:
    """The folder, or the nearest one around it that exists."""
    return next(each for each in (path, *path.parents) if os.path.isdir(each))


def shards_in(folder: Path) -> int:
    """The number of shards whose recordings are in a folder: 1 for a server on its own, 0 if there are none.

    Raises:
        RecordingError: when the number is missing.
    """
    if next(folder.glob(f"shard-*/*{SUFFIX}"), None) is None:
        return int(any(folder.glob(f"*{SUFFIX}")))
    try:
        return int((folder / SHARDS_FILE).read_text())
    except (OSError, ValueError):
        advice = "write there of how many shards the recordings are"
        raise RecordingError(f"{folder / SHARDS_FILE} does not hold a number: {advice}") from None


@dataclass(frozen=True, slots=True)
class Former:
    """An earlier recording of a model, and the streams that are open in it."""

    file: Path
    header: RecordingHeader
    streams: dict[int, str]
    """Names by number of the streams that do not continue in a later recording."""
    moved: dict[int, int]
    """The seqs at which streams continue in a later recording although their end is missing here, because the server
    was killed.
    """


@dataclass(frozen=True, slots=True)
class Versions:
    """The recordings of a model, and which of them belongs to the version to serve."""

    file: Path
    newest: RecordingHeader | None
    """The recording of the newest version; None if nothing was recorded."""
    formers: list[Former]
    """Earlier recordings with open streams, the oldest first."""


def find_versions(first: Path, fingerprint: str, log: structlog.stdlib.BoundLogger) -> Versions:
    """Find the file for a version of a model, and the streams that continue from other files.

    The versions of a model are recorded in NAME.instep, NAME@2.instep, NAME@3.instep and so on, in the order of their
    beginnings. The newest file is continued if it is of the version to serve; otherwise the next one begins. A stream
    continues from an older file unless a newer one has its `moved` event, which is committed together with its state.
    A file that is being written belongs to a version that is served. Older files that are damaged are logged.

    Raises:
        RecordingError: when the newest one cannot be read.
    """
    files, file, newest = recordings(first), next_recording(first), None
    formers, came = list[Former](), dict[tuple[str, int], int]()
    for each in reversed(files):
        try:
            with RecordingReader(each) as reader:
                header = reader.engines[-1].header
                if newest is None:
                    newest = header
                    file = each if header.model_fingerprint == fingerprint else file
                if each != file and not is_being_written(each) and (streams := _open_streams(reader)):
                    moved = {number: came[each.name, number] for number in streams if (each.name, number) in came}
                    left = {number: name for number, name in streams.items() if number not in moved}
                    formers.append(Former(each, header, left, moved))
                if each != first:
                    came |= _came(reader)
        except RecordingError as error:
            if newest is None:
                raise
            say_not_served(each, f"streams may be open in the recording of another version, but {error}", log)
    return Versions(file, newest, formers[::-1])


def say_not_served(file: Path, reason: str, log: structlog.stdlib.BoundLogger) -> None:
    """Log that the streams of a recording are not served."""
    log.warning("streams not served", file=str(file), reason=reason, next=f"instep verify {shlex.quote(str(file))}")


def next_recording(first: Path) -> Path:
    """The file for a version that replaces another one."""
    files = recordings(first)
    return first.with_stem(f"{first.stem}@{_number(files[-1], first) + 1}") if files else first


def recordings(first: Path) -> list[Path]:
    """Return the existing recordings of a model's versions, in order.

    A file without rows is skipped: a server was killed while creating it.
    """
    later = (each for each in first.parent.glob(f"{glob.escape(first.stem)}@*{first.suffix}") if _number(each, first))
    return [each for each in (first, *sorted(later, key=lambda each: _number(each, first))) if not holds_nothing(each)]


def holds_nothing(file: Path) -> bool:
    """Whether there is no recording, or one without rows that nobody writes."""
    if is_being_written(file):
        return False
    if not holds_recording(file):
        return True
    try:
        with RecordingReader(file) as reader:
            return reader.last_position == 0
    except RecordingError:  # whoever needs it is told
        return False


def _number(file: Path, first: Path) -> int:
    """The number in a file's name; 1 for the first file, and 0 for names of another form."""
    if file == first:
        return 1
    number = file.stem.removeprefix(f"{first.stem}@")
    return int(number) if number.isdecimal() and number.isascii() else 0


def _open_streams(reader: RecordingReader) -> dict[int, str]:
    # Not `streams()`, which holds the final state of every stream that there ever was.
    closed = {row[2] for row in reader.rows("closings")}
    return {row[2]: row[3] for row in reader.openings() if row[2] not in closed}


def _came(reader: RecordingReader) -> dict[tuple[str, int], int]:
    """Streams that continue here, by file and number, and the seqs of their first frames here."""
    origins = {event.stream: read_moved_detail(event.detail) for event in reader.events() if event.kind == MOVED_EVENT}
    seqs = {row[2]: row[5] for row in reader.openings() if row[2] in origins}
    return {(file, number): seqs[stream] for stream, (number, file) in origins.items() if stream in seqs}
