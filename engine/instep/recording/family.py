"""The files of one recording: the first has its name, those that follow it carry their number beside it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from instep.recording.errors import RecordingError
from instep.recording.one_file import BESIDE
from instep.recording.reader import RecordingReader
from instep.recording.schema import RecordingHeader

_UNFINISHED: Final = "-new"


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a recording."""

    path: Path
    header: RecordingHeader


def member_path(base: Path, number: int) -> Path:
    """Where the file of that number lies: `r.instep`, then `r-000002.instep`, `r-000003.instep` and so on."""
    return base if number == 1 else base.with_name(f"{base.stem}-{number:06d}{base.suffix}")


def base_of(path: Path) -> Path:
    """The name of the first file where the name of this one carries a number; else its own."""
    stem, dash, digits = path.stem.rpartition("-")
    if not (stem and dash and digits.isascii() and digits.isdecimal()):
        return path
    base = path.with_name(f"{stem}{path.suffix}")
    number = _number_in(path, base)
    return base if number > 1 and member_path(base, number) == path else path


def is_first(path: Path) -> bool:
    """Whether the name is that of a first file."""
    return base_of(path) == path


def unfinished_path(path: Path) -> Path:
    """Where a following file lies until it is complete."""
    return Path(f"{path}{_UNFINISHED}")


def members(
    base: Path, *, may_be_damaged: bool = False, on_damaged: Callable[[RecordingError], None] = lambda error: None
) -> list[Member]:
    """The files of the recording of that name that are there, in order.

    A file is one of them when its header says so; that another recording is called alike does not matter.

    Args:
        base: the name of the first.
        may_be_damaged: leave out files that cannot be read, unless one of them would be the newest.
        on_damaged: told of each that is left out, and why.

    Raises:
        RecordingError: when one cannot be read, or files of two recordings have the names of one.
    """
    found, unreadable = [], []
    for path in named_alike(base):
        try:
            with RecordingReader(path) as reader:
                member = Member(path, reader.header)
        except RecordingError as error:
            unreadable.append((path, error))
        else:
            if path == base or member_path(base, member.header.number) == path:
                found.append(member)
    found.sort(key=lambda member: member.header.number)
    newest = found[-1].header.number if found else 0
    for path, problem in reversed(unreadable):
        if not may_be_damaged or _number_in(path, base) > newest:
            raise problem
        on_damaged(problem)
    for member in found[1:]:
        if member.header.family != found[0].header.family:
            raise RecordingError(
                f"{member.path} and {found[0].path} are files of different recordings, though their names are those of "
                "one; move one of them to another folder"
            )
    return found


def missing_follower(reader: RecordingReader) -> str | None:
    """The name of the file in which the recording goes on, if that is not there; None where none is missing.

    None is missing where it was not complete, because its writer died as it made it.
    """
    if (name := reader.followed_by) is None:
        return None
    path = reader.path.with_name(name)
    return None if path.exists() or unfinished_path(path).exists() else name


def refuse_part(base: Path, header: RecordingHeader) -> None:
    """Raise RecordingError when a following file is named as if it were a recording: its lock has another name."""
    first = base_of(base)
    if first != base and member_path(first, header.number) == base:
        raise RecordingError(f"{base} is file {header.number} of the recording {first}; name that, there or not")


def refuse_place(base: Path) -> None:
    """Raise RecordingError where no recording can be."""
    if base.is_dir():
        raise RecordingError(f"{base} is a folder: name a file for the recording, like {base / 'r.instep'}")
    if not base.parent.is_dir():
        raise RecordingError(
            f"there is no folder {base.parent} for the recording {base.name}: make it, or name another"
        )


def settle(base: Path) -> None:
    """Undo what a writer left that died as it made the first file: SQLite finds what to undo in the journal beside it.

    Raises:
        RecordingError: when the file cannot be read or written.
    """
    if not (Path(f"{base}-journal").exists() and base.is_file()):
        return
    database = sqlite3.connect(base, isolation_level=None)
    try:
        database.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.Error as error:
        raise RecordingError(f"cannot go on with the recording {base}: {error}") from None
    finally:
        database.close()


def remove_unfinished(base: Path) -> None:
    """Remove what a crash left of following files that were not complete; only for who holds the writer's lock."""
    for path in _beside(base):
        name, _, suffix = path.name.rpartition(_UNFINISHED)
        if name and suffix in ("", *BESIDE):
            of = path.with_name(name)
            if of != base and base_of(of) == base:
                path.unlink()


def remove_orphans(base: Path, first: int) -> None:
    """Remove what lies beside the names of files before that number that are gone: their remover died before it did.

    Only for who holds the writer's lock.
    """
    for path in _beside(base):
        for suffix in BESIDE:
            of = path.with_name(path.name.removesuffix(suffix) or path.name)
            is_ours = of != path and base in (of, base_of(of))
            if is_ours and not of.exists() and _number_in(of, base) < first:
                path.unlink()


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a complete file its name, so that a loss of power leaves all of it there or none.

    Raises:
        RecordingError: when another file has that name.
        OSError: when the disk does not do it.
    """
    _sync(unfinished, os.O_RDWR)
    if path.exists():
        raise RecordingError(f"the recording cannot go on in {path}, which is another file; move that away")
    unfinished.rename(path)
    _sync(path.parent, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    file = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _number_in(path: Path, base: Path) -> int:
    """The number in the name of a file of the recording."""
    return 1 if path == base else int(path.stem.rpartition("-")[2])


def named_alike(base: Path) -> list[Path]:
    """Files that may be of the recording of that name, by their own names."""
    numbered = [path for path in _beside(base) if path != base and base_of(path) == base and path.is_file()]
    # A file that was just created is empty: nobody has recorded anything in it.
    return [base, *numbered] if base.is_file() and base.stat().st_size else numbered


def _beside(base: Path) -> list[Path]:
    try:
        return sorted(path for path in base.parent.iterdir() if path.name.startswith(base.stem))
    except OSError:
        return []  # whoever opens the file says why it cannot be
