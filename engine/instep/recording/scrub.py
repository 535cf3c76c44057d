"""Looking for damage in the part of a recording that a restart does not read, while the server serves."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from instep.recording.errors import DamagedRecording, RecordingError
from instep.recording.reader import RecordingReader
from instep.recording.schema import HISTORY

_AT_ONCE_S: Final = 0.001
"""How long it reads before it pauses."""
_PAUSES: Final = 19
"""Every pause is this many times as long as the reading before it, so a core is busy for at most 5 % of the time."""
_POSITIONS: Final = 1024
"""Positions that are looked at in one query of each table."""
_JOIN_S: Final = 0.1


class Scrub:
    """A thread that looks through the older history of a recording, a little at a time, up to the first damage.

    It finds rows that are missing and rows that do not match their CRC.
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
        """Tell the thread to end; a read that takes long is not waited for, as the disk may not answer at all."""
        self._stopping.set()
        self._thread.join(_JOIN_S)  # usually it has let go of the file then, and the recorder can remove the WAL

    def _run(self) -> None:
        try:
            self._read()
        except DamagedRecording as error:
            self._on_damage(error)
        except (RecordingError, sqlite3.Error, OSError):
            pass  # what the recorder needs of the file, it reads and writes itself

    def _read(self) -> None:
        with RecordingReader(self._path) as reader:
            began = time.perf_counter()
            for _ in self._steps(reader):
                took_s = time.perf_counter() - began
                pauses = took_s > _AT_ONCE_S
                if self._stopping.wait(_PAUSES * took_s if pauses else 0.0):
                    return
                if pauses:
                    began = time.perf_counter()

    def _steps(self, reader: RecordingReader) -> Iterator[None]:
        """Check a row or a range of positions before each item."""
        for first in range(reader.first_position, self._through + 1, _POSITIONS):
            reader.check_positions(first, min(first + _POSITIONS - 1, self._through))
            yield
        for table in HISTORY:
            for _ in reader.rows(table, reader.first_position, self._through):
                yield
