"""Locks that allow one writer at a time, on the recording and on a file next to it; they end with their process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from pathlib import Path
from typing import Final

from instep.recording.errors import RecordingError

# Whether somebody holds a lock of `flock` is only seen by taking it. (F_GETLK asks about the other kind, which SQLite
# uses.) So `is_being_written` holds a shared lock for an instant, and a writer that finds the lock taken tries again
# for a while before it concludes that another writer has it.
_PATIENCE_S: Final = 0.2
_RETRY_S: Final = 0.005


class WriterLock:
    """A lock that is held until `release` or the end of the process.

    There are two locks. The file `path` + `-lock` can be locked before the recording exists, and names the process that
    holds it. `hold` also locks the recording, so that a second writer is noticed even if the lock file was
    removed, or the recording is opened through a link.

    Raises:
        RecordingError: when another process, or another writer in this one, holds it.
        OSError: when it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = lock_path(path)
        self._recording = path
        self._held: int | None = None
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(self._file, 32, 0).decode(errors="replace").strip() or "unknown"
                os.close(self._file)
                if time.monotonic() < deadline:
                    time.sleep(_RETRY_S)
                    continue
                raise RecordingError(
                    f"{path} is being written by another instep (pid {holder}); stop that one, or choose another file"
                ) from None
            if _is_file_of(self.path, self._file):
                break
            os.close(self._file)  # its holder took it away as it let go
        try:
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, str(os.getpid()).encode(), 0)
        except OSError:  # the disk is full
            self.release()
            raise

    def hold(self) -> None:
        """Lock the recording itself.

        The file stays open until `release`, after SQLite has closed it: closing it would end SQLite's own locks on it
        in this process. (SQLite takes locks of another kind, so the two do not conflict.)

        Raises:
            RecordingError: when another process holds it, under this name or another.
            OSError: when it cannot be opened.
        """
        file = os.open(self._recording, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise RecordingError(
                f"{self._recording} is being written by another process, under another name or without its lock file; "
                "stop that one, or choose another file"
            ) from None
        self._held = file

    def is_recording_in_place(self) -> bool:
        """Whether the recording still has its name."""
        return self._held is None or _is_file_of(self._recording, self._held)

    def release(self) -> None:
        """Release the locks, and remove the lock file if the folder can still be written."""
        if self._held is not None:
            os.close(self._held)
            self._held = None
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._file)


def _is_file_of(path: Path, file: int) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(file))


def lock_path(path: Path) -> Path:
    """The lock file of a recording."""
    return Path(f"{path}-lock")


def check_not_written(path: Path) -> None:
    """Raise RecordingError if a writer has the recording open."""
    if is_being_written(path):
        raise RecordingError(f"{path} is being written by another instep; stop that one, or choose another file")


def is_being_written(path: Path) -> bool:
    """Whether a writer has the recording open now. A writer that begins meanwhile waits for this call."""
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
