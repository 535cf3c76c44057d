"""The frames of a recording: taken in as they were stepped, given back as sequences, in bounded memory."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, U8, Bool
from instep.recording.errors import RecordingError

IN_MEMORY_BYTES: Final = 128 * 2**20
"""A column of more than this is held in a temporary file. There are five: what went in, what came out, and three small
ones. So much address space is taken for each; memory only for what there is."""
_SORTED_AT_ONCE: Final = 2**16
"""Frames whose places are found together."""


@dataclass(frozen=True, slots=True)
class Sequences:
    """Whole sequences; their frames are kept in the order in which they were stepped."""

    rows: I64
    """Which ones, as indices into `SequenceIndex.stretches`."""
    starts: I64
    """Where the places of the frames of `rows[i]` begin in `order`; the others follow it."""
    lengths: I64
    """How many frames `rows[i]` has."""
    order: I64
    """The places of frames in the arrays below."""
    x: F32
    """float32 [frames, features]."""
    y: F32
    """float32 [frames, outputs]."""
    answered: Bool
    """bool [frames]: False where the outputs were not recorded, because the engine was killed."""

    def places(self, index: int) -> I64:
        """Of the frames of `rows[index]`, in order."""
        return self.order[self.starts[index] :][: self.lengths[index]]


class FrameStore:
    """Frames in the order in which they are appended.

    Large columns are kept in temporary files, which are removed with the arrays. The operating system caches them as
    memory allows.

    A frame has `features` values and `outputs`; errors name the recording at `path`. An array of up to
    `in_memory_bytes` stays in memory.
    """

    def __init__(self, path: Path, features: int, outputs: int, in_memory_bytes: int = IN_MEMORY_BYTES) -> None:
        column = partial(_Column, path, in_memory_bytes)
        self._stretches = column(np.dtype(np.int32))
        self._order = column(np.dtype(np.int64))
        self._x = column(np.dtype(np.float32), features)
        self._y = column(np.dtype(np.float32), outputs)
        self._answered = column(np.dtype(np.bool_))
        self._outputs = outputs

    def append(self, stretches: I64, x: F32, y: F32 | None) -> None:
        """Take in frames.

        Args:
            stretches: [N], the index of the stretch that each belongs to.
            x: [N, features].
            y: [N, outputs]; None where they have none.

        Raises:
            RecordingError: when there is no room for a temporary file.
        """
        self._stretches.append(stretches.astype(np.int32))
        self._order.append(np.zeros(len(x), np.int64))
        self._x.append(x)
        self._y.append(np.zeros((len(x), self._outputs), np.float32) if y is None else y)
        self._answered.append(np.full(len(x), y is not None))

    def sequences(self, rows: I64, lengths: I64) -> Sequences:
        """The frames of some stretches; to be called once, when all are taken in.

        Args:
            rows: their indices.
            lengths: how many frames were taken in of every stretch there is.

        Raises:
            RecordingError: when there is no room for a temporary file.
        """
        starts: I64 = np.cumsum(lengths) - lengths
        stretches, order = self._stretches.array(), self._order.array()
        following = starts.copy()
        for begin in range(0, len(stretches), _SORTED_AT_ONCE):
            some = stretches[begin : begin + _SORTED_AT_ONCE]
            by_stretch = np.argsort(some, kind="stable")
            found, first, counts = np.unique(some[by_stretch], return_index=True, return_counts=True)
            order[np.repeat(following[found] - first, counts) + np.arange(len(some))] = begin + by_stretch
            following[found] += counts
        x, y, answered = self._x.array(), self._y.array(), self._answered.array()
        return Sequences(rows, starts[rows], lengths[rows], order, x, y, answered)


class _Column:
    """An array [N] or [N, width] that grows."""

    def __init__(self, path: Path, most_bytes: int, dtype: np.dtype[Any], width: int | None = None) -> None:
        self._path = path
        self._most_bytes = most_bytes
        self._dtype = dtype
        self._width = width
        self._in_memory: U8 = np.empty(0, np.uint8)
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def append(self, values: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(values, self._dtype).reshape(-1).view(np.uint8)
        end = self._bytes + len(data)
        try:
            if self._file is not None:
                _write(self._file, data)
            elif end <= self._most_bytes:
                if not self._bytes:
                    self._in_memory = np.empty(self._most_bytes, np.uint8)  # pages take memory when they are written to
                self._in_memory[self._bytes : end] = data
            else:
                self._file = tempfile.TemporaryFile(buffering=0, prefix="instep-")  # noqa: SIM115 - goes when this does
                weakref.finalize(self, self._file.close)
                _write(self._file, self._in_memory[: self._bytes])
                _write(self._file, data)
                self._in_memory = np.empty(0, np.uint8)
        except OSError as error:
            raise self._no_room(error) from None
        self._bytes = end

    def array(self) -> npt.NDArray[Any]:
        try:
            if self._file is None:
                values: npt.NDArray[Any] = self._in_memory[: self._bytes].view(self._dtype)
            else:
                with self._file:
                    values = np.memmap(self._file, self._dtype, "r+").view(np.ndarray)
        except OSError as error:
            raise self._no_room(error) from None
        return values if self._width is None else values.reshape(-1, self._width)

    def _no_room(self, error: OSError) -> RecordingError:
        return RecordingError(
            f"the frames of {self._path} are put in order in {tempfile.gettempdir()}, and there is no room for them "
            f"({error.strerror}); make room there, or set TMPDIR to another place"
        )


def _write(file: IO[bytes], data: U8) -> None:
    """All of it, now: a disk that is full later, under a mapping, would kill the process."""
    left = data.data
    while left:
        left = left[file.write(left) :]
