"""Which sealed files of a recording are kept, and removing the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from instep.recording.family import Member
from instep.recording.one_file import bytes_on_disk, remove_with_all_beside


@dataclass(frozen=True, slots=True)
class Sealed:
    """A file that another one follows."""

    path: Path
    bytes: int
    """With the WAL beside it, where somebody had it open as it was sealed."""
    sealed_ns: int
    """When the following one began, nanoseconds since 1970."""


def surplus(files: Sequence[Sealed], keep_bytes: int, keep_ns: int, now_ns: int) -> int:
    """How many sealed files, the oldest first, are more than is kept.

    Args:
        files: in order.
        keep_bytes: so much of the newest of them is kept; 0 for any number.
        keep_ns: what was sealed longer ago is not kept; 0 for any time.
        now_ns: nanoseconds since 1970.
    """
    count = 0
    if keep_ns:
        count = max((at + 1 for at, file in enumerate(files) if file.sealed_ns < now_ns - keep_ns), default=0)
    left = sum(file.bytes for file in files[count:])
    while keep_bytes and left > keep_bytes:
        left -= files[count].bytes
        count += 1
    return count


class Retention:
    """Removes the oldest sealed files of a recording; the file that is written is none of them.

    Used in the recorder's thread, at its start and after each rotation: the newest file is complete then, and recovery
    needs no other.

    Args:
        files: of the recording, in order, the one that is written last.
        keep_bytes: see `surplus`.
        keep_ns: see `surplus`.
        clock_ns: nanoseconds since 1970.
        on_removed: told of each file and its bytes; called in the recorder's thread.
        on_kept: told of each file that could not be removed, and why; it is tried again the next time.
    """

    def __init__(
        self,
        files: Sequence[Member],
        keep_bytes: int,
        keep_ns: int,
        clock_ns: Callable[[], int],
        on_removed: Callable[[Path, int], None],
        on_kept: Callable[[Path, OSError], None],
    ) -> None:
        self._keep_bytes = keep_bytes
        self._keep_ns = keep_ns
        self._clock_ns = clock_ns
        self._on_removed = on_removed
        self._on_kept = on_kept
        self._sealed: list[Sealed] = []
        for file, following in pairwise(files):
            self.add(file.path, following.header.created_ns)

    def add(self, path: Path, sealed_ns: int) -> None:
        """A file was sealed."""
        self._sealed.append(Sealed(path, bytes_on_disk(path), sealed_ns))

    def run(self) -> None:
        """Remove what is more than is kept; one that cannot be removed keeps those after it."""
        for _ in range(surplus(self._sealed, self._keep_bytes, self._keep_ns, self._clock_ns())):
            file = self._sealed[0]
            try:
                remove_with_all_beside(file.path)
            except OSError as error:
                self._on_kept(file.path, error)
                return
            del self._sealed[0]
            self._on_removed(file.path, file.bytes)
