"""Which files of a recording are meant by what is named: the same rule for every command."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from instep.recording import family
from instep.recording.errors import RecordingError
from instep.recording.family import Member
from instep.recording.lock import is_being_written
from instep.recording.reader import RecordingReader


@dataclass(frozen=True, slots=True)
class Chosen:
    """What is looked at."""

    files: tuple[Path, ...]
    """In order."""
    notes: tuple[str, ...]
    """What of the same recording is not, in sentences."""
    is_complete: bool
    """False where a file is missing between others or after them, although all were meant."""


def choose(wanted: Sequence[Path]) -> Chosen:
    """The files that are meant: those that are named, or all of a recording when its first one is named alone.

    The first one may have been removed; its name is that of the recording all the same.

    Raises:
        RecordingError: when a file of the recording cannot be read, or is one of another recording.
    """
    if len(wanted) > 1:
        return Chosen(_in_order(tuple(dict.fromkeys(wanted))), (), True)
    (path,) = wanted
    if path.exists() and not family.is_first(path):
        return Chosen((path,), _others(path), True)
    members = family.members(path)
    if not members:
        return Chosen((path,), (), True)
    holes = [_hole(path, before, after) for before, after in pairwise(members)]
    gone = members[0].header.number - 1
    notes = () if path.exists() or not gone else (_gone(gone, path),)
    said = tuple(part for part in (*holes, _missing_end(path, members[-1])) if part)
    return Chosen(tuple(member.path for member in members), (*notes, *said), not said)


def _in_order(files: tuple[Path, ...]) -> tuple[Path, ...]:
    """Those of one recording by their number: a shell sorts `r-000002.instep` before `r.instep`."""
    places: dict[int, int] = {}
    keys: dict[Path, tuple[int, int]] = {}
    for at, path in enumerate(files):
        try:
            with RecordingReader(path) as reader:
                keys[path] = (places.setdefault(reader.header.family, at), reader.header.number)
        except RecordingError:
            keys[path] = (at, 0)  # who reads it will say so
    return tuple(sorted(files, key=keys.__getitem__))


def _others(path: Path) -> tuple[str, ...]:
    """What is said of the other files of the recording that one is of."""
    first = family.base_of(path)
    try:
        there = [member.path for member in family.members(first, may_be_damaged=True)]
    except RecordingError:
        return ()  # the others are not what was asked about
    if path not in there or len(there) == 1:
        return ()
    others = f"{len(there) - 1:,} other file{'' if len(there) == 2 else 's'}"
    return (f"only {path.name} was looked at; {first} stands for the whole recording, which has {others}",)


def _gone(count: int, base: Path) -> str:
    if count == 1:
        return f"the first file of {base.name} is not there any more"
    return f"the first {count:,} files of {base.name} are not there any more"


def _missing_end(base: Path, newest: Member) -> str:
    """What is missing after the newest file that is there, in words; empty where nothing is.

    A file that was copied from among others to another name is looked at for itself.
    """
    if is_being_written(base):
        return ""
    with RecordingReader(newest.path) as reader:
        missing = family.missing_follower(reader)
    if missing != family.member_path(base, newest.header.number + 1).name:
        return ""
    return f"{newest.path.name} goes on in {missing}, which is not there"


def _hole(base: Path, before: Member, after: Member) -> str:
    """What is missing between two files, in words; empty where nothing is."""
    first, last = before.header.number + 1, after.header.number - 1
    if first > last:
        return ""
    if first == last:
        return f"{family.member_path(base, first).name} is missing"
    return f"{family.member_path(base, first).name} to {family.member_path(base, last).name} are missing"
