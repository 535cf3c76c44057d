"""Errors of recordings."""

from __future__ import annotations

import errno
import os
import shlex
from pathlib import Path
from typing import Final

_FULL: Final = ("disk is full", os.strerror(errno.ENOSPC))
"""The messages of SQLite and of the system for a full disk."""


class RecordingError(Exception):
    """A recording cannot be written or read; the message is a sentence saying why and what to do."""


class NoSuchStream(RecordingError, KeyError):
    """A recording has no stream of this name or number; the message lists those it has."""

    __str__ = Exception.__str__  # a KeyError's is a repr


class UnavailableRecording(RecordingError):
    """A recording cannot be read at the moment; a later attempt may succeed."""


class TrimmedMeanwhile(UnavailableRecording):
    """The history of a recording was trimmed while it was read; a second attempt can succeed."""


class DamagedRecording(RecordingError):
    """The content of a recording is not what was written; the message says where.

    Attributes:
        path: the damaged file.
    """

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


def with_advice(error: Exception) -> str:
    """The message of an error, with advice if the recording is damaged or its disk is full."""
    if isinstance(error, DamagedRecording):
        save = f"instep recordings repair {shlex.quote(str(error.path))}"
        return f"{error}; what comes before the damage is saved by: {save}"
    if isinstance(error, RecordingError) and any(words in str(error) for words in _FULL):
        return f"{error}; make room, or copy the recording and its -wal file to a larger disk and serve the copy"
    return str(error)
