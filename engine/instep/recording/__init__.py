"""Recordings: frames and outputs of streams, in one SQLite file.

`open("r.instep")["mic-7"]` gives a stream's frames and outputs as arrays.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from instep.recording.table import OpenedRecording

__all__ = ["open"]


def open(path: str | PathLike[str]) -> OpenedRecording:
    """Open a recording to read its streams as arrays.

    Raises:
        RecordingError: when it is not a recording, or is damaged.
    """
    from instep.recording.table import OpenedRecording  # numpy only where it is needed: the command line is light

    return OpenedRecording(Path(path))
