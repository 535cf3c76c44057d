"""Problems that end a command early, the exit statuses of all commands, and files that they write."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from secrets import token_hex
from typing import Final

_PART: Final = ".part"
_MOST_LETTERS: Final = 50
"""The number of letters of a file's name that the name of its part keeps."""
_TOKEN_BYTES: Final = 4


class Exit(IntEnum):
    """Exit statuses of `instep`."""

    OK = 0
    FOUND_PROBLEMS = 1
    """The command ended, but something was refused, malformed or different, or the server is not ready."""
    COULD_NOT_RUN = 2
    """Nobody answers, a file cannot be used, or the arguments do not fit together."""
    MEASURED_ITSELF = 3
    """A load test was late in sending, so it measured the load generator and not the server."""
    INTERRUPTED = 130
    """Ctrl-C: sent frames were answered, and the streams are closed."""
    TERMINATED = 143
    """SIGTERM: the same."""


class CommandProblem(Exception):
    """The command cannot do its work; the message gives the reason and what to do."""


class BadFile(CommandProblem):
    """A file cannot be read or written; the message names it."""


def check_writable(path: Path) -> None:
    """Check, before the work begins, whether a file can be written. Nothing is made or changed.

    Raises:
        BadFile: when it cannot.
    """
    why: str | None = None
    try:
        path.absolute()  # which there is not in a working directory that was deleted
        if path.is_dir():
            why = "it is a folder"
        elif not path.parent.is_dir():
            why = f"there is no folder {path.parent}"
        elif path.exists() and not os.access(path, os.W_OK):
            why = "you have no permission"
        elif not is_special(path) and not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK):
            why = "you have no permission to make a file in its folder"
    except OSError as error:  # a name is too long
        why = error.strerror
    if why is not None:
        raise BadFile(f"{path} cannot be written: {why}")


def is_special(path: Path) -> bool:
    """Whether the path is a pipe or a device, which can be written to and not replaced."""
    return os.path.exists(path) and not os.path.isfile(path)


@contextmanager
def reads_or_writes(path: Path, done: str) -> Iterator[None]:
    """Convert errors of the file system to errors for the user; `done` is `read` or `written`.

    Raises:
        BadFile: when the file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise BadFile(f"{path} cannot be {done}: {error.strerror or error}") from None


def part_of(path: Path) -> Path:
    """The path of a file while it is incomplete: next to it, with a name of allowed length."""
    return path.with_name(f".{path.name[:_MOST_LETTERS]}.{token_hex(_TOKEN_BYTES)}{_PART}")


def parts_left(path: Path) -> list[Path]:
    """Existing files that `part_of` may have named for a file; none if another file could have the same part."""
    if len(path.name) >= _MOST_LETTERS:
        return []  # they might be another file's
    named = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{{2 * _TOKEN_BYTES}}}{re.escape(_PART)}")
    return [each for each in path.parent.iterdir() if named.fullmatch(each.name)]


def is_part(path: Path) -> bool:
    """Whether a file's name marks it as incomplete."""
    return path.name.startswith(".") and path.suffix == _PART


def check_new(path: Path, option: str) -> None:
    """Check, before the work begins, whether a new file can be made; `option` gives it another name."""
    if os.path.lexists(path):
        raise _exists(path, option)
    check_writable(path)


def _exists(path: Path, option: str) -> BadFile:
    return BadFile(f"{path} exists already and is not written over: move it, or name another file with {option}")


@contextmanager
def made_new(path: Path, option: str) -> Iterator[None]:
    """Convert errors of making a new file in the block to errors for the user.

    Raises:
        BadFile: when a file of that name exists, or it cannot be written.
    """
    with reads_or_writes(path, "written"):
        try:
            yield
        except FileExistsError:
            raise _exists(path, option) from None


@contextmanager
def written_aside(path: Path, new: str = "") -> Iterator[Path]:
    """A path for the block to write a file; if it succeeds, the file replaces an older one.

    For a link, the file it points to is replaced. A pipe or a device is written to directly. With `new`, the name of an
    option, an existing file is an error.

    Raises:
        BadFile: when it cannot be written, or exists and must be new.
    """
    if new:
        check_new(path, new)
    with made_new(path, new):
        if is_special(path):
            yield path
            return
        target = Path(os.path.realpath(path))
        part = part_of(target)
        try:
            yield part
            if new:
                from instep_client.files import rename_to_new

                rename_to_new(part, target)
            else:
                part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a complete file, or leave an existing one unchanged, even if the disk is full.

    Raises:
        BadFile: when it cannot be written.
    """
    with written_aside(path) as part:
        part.write_bytes(content)
