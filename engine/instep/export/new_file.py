"""A file that appears under its name only when it is complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import BinaryIO

from instep.export.errors import CannotExport


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Write inside; nothing is left when that fails or is interrupted, and nothing is written over.

    Raises:
        CannotExport: when there is such a file already, or it cannot be written.
    """
    _refuse_existing(path)
    partial = path.with_name(f".{path.name}.{token_hex(4)}.part")
    try:
        try:
            with partial.open("xb") as file:
                yield file
            _refuse_existing(path)
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CannotExport(f"cannot write {path}: {error.strerror or error}") from error


def _refuse_existing(path: Path) -> None:
    if os.path.lexists(path):
        raise CannotExport(f"{path} exists already and is not written over: move it, or name another with --output")
