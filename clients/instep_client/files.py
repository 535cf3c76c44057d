"""Small files that are complete or not there, whatever happens while they are written."""

from __future__ import annotations

import os
from pathlib import Path
from secrets import token_hex


def write_file(path: Path, content: bytes, *, overwrite: bool = True) -> None:
    """Write a file that a loss of power leaves complete, or as it was before.

    Raises:
        FileExistsError: when there is one that may not be replaced.
        OSError: as the file system says.
    """
    part = path.with_name(f".{path.name}.{token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            part.replace(path)
        else:
            rename_to_new(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk; without that, a new one may not outlive a loss of power."""
    if os.name == "nt":  # folders cannot be opened there, and names need no syncing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_to_new(part: Path, target: Path) -> None:
    """Give a complete file its name unless that name exists; the file's former name, `part`, may remain.

    Raises:
        FileExistsError: when the name exists.
    """
    try:
        target.hardlink_to(part)  # refuses what is there by itself, at no moment too late
    except OSError as error:
        if isinstance(error, FileExistsError) or os.path.lexists(target):
            raise FileExistsError(f"{target} exists already") from None
        part.rename(target)  # no links here
