"""One writer at a time: a lock beside the recording, which ends with the process that holds it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from instep.recording.errors import RecordingError


class WriterLock:
    """Held from when it is made until `release` or the end of the process.

    Args:
        path: the recording; the lock is the file `path` + `-lock`.

    Raises:
        RecordingError: when another process, or another writer in this one, holds it.
        OSError: when it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = lock_path(path)
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._file)
                raise RecordingError(
                    f"{path} is being written by another instep (pid {holder}); stop that one, or choose another file"
                ) from None
            if self._is_in_place():
                break
            os.close(self._file)  # its holder took it away as it let go
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let others write, and take the file away, if the folder can still be written."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._file)

    def _is_in_place(self) -> bool:
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return False
        return os.path.samestat(there, os.fstat(self._file))


def lock_path(path: Path) -> Path:
    """Where the lock of a recording lies."""
    return Path(f"{path}-lock")


def is_being_written(path: Path) -> bool:
    """Whether a writer has the recording open just now."""
    try:
        file = os.open(lock_path(path), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False
