"""Looking for damage in the part of a recording that a restart does not read, while the server serves."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.reader import RecordingReader

_ROWS: Final = 64
"""Rows that are read before the next pause."""
_PAUSES: Final = 19
"""Every pause is this many times as long as the reading before it, so a core is busy for at most 5 % of the time."""


class Scrub:
    """A thread that reads the older batches and outputs of a recording, a few at a time, up to the first damage.

    It ends early, and says nothing, when the history is trimmed meanwhile.

    Args:
        path: the recording, which may be written meanwhile.
        through: the last position to read.
        on_damage: called in the thread with the damage that was found.
    """

    def __init__(self, path: Path, through: int, on_damage: Callable[[DamagedRecording], None]) -> None:
        self._path = path
        self._through = through
        self._on_damage = on_damage
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="instep-scrub", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self._read()
        except DamagedRecording as error:
            self._on_damage(error)
        except (RecordingError, sqlite3.Error, OSError):
            pass  # what the recorder needs of the file, it reads and writes itself

    def _read(self) -> None:
        with RecordingReader(self._path) as reader:
            for table in ("batches", "outputs"):
                began = time.perf_counter()
                for count, _ in enumerate(reader.rows(table, reader.first_position, self._through), start=1):
                    if count % _ROWS:
                        continue
                    if self._stopping.wait(_PAUSES * (time.perf_counter() - began)):
                        return
                    began = time.perf_counter()
