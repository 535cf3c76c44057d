"""A warning before the disk of the recording is full, which would end the server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import structlog

_EVERY_S: Final = 1.0


class FreeSpace:
    """Looks at the disk of a recording; says once that it is nearly full, and once that it has room again."""

    def __init__(self, path: Path, log: structlog.stdlib.BoundLogger) -> None:
        self._path = path
        self._log = log
        self._is_low = False
        self._next_s = 0.0
        self._free_bytes = 0

    def tick(self, now_s: float, warn_bytes: int) -> int:
        """Look if it is time, and warn below so many bytes; how many were free when it last looked."""
        if now_s < self._next_s:
            return self._free_bytes
        self._next_s = now_s + _EVERY_S
        try:
            disk = os.statvfs(self._path.parent)
        except OSError:  # the recorder notices it, too, if it matters
            return self._free_bytes
        self._free_bytes = free_bytes = disk.f_bavail * disk.f_frsize
        enough_bytes = warn_bytes + warn_bytes // 8 if self._is_low else warn_bytes  # not to and fro at the limit
        if (free_bytes < enough_bytes) is not self._is_low:
            self._is_low = not self._is_low
            if self._is_low:
                reason = "the server ends when its recording cannot grow: make room, or start it with keep_bytes"
                self._log.warning("disk nearly full", free_bytes=free_bytes, warn_bytes=warn_bytes, reason=reason)
            else:
                self._log.info("disk has room again", free_bytes=free_bytes)
        return free_bytes
