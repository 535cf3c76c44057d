"""States of streams on their way into a recording."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from instep.core.typing import F32, I64, U8
from instep.recording.schema import Column, row_crc


@dataclass(frozen=True, slots=True)
class StateRows:
    """States of streams at some point, as columns."""

    streams: I64
    """int64 [N], distinct."""
    seqs: I64
    """int64 [N]: the states are those before these frames."""
    states: U8
    """Rows of bytes, uint8 [N, row_bytes]."""
    tail_seqs: I64
    """int64 [N]: the client may not have the outputs of the frames from here to `seqs`."""
    tail_x: F32
    """float32 [sum(seqs - tail_seqs), features]: those frames, one stream after another."""
    tail_y: F32
    """float32 [sum(seqs - tail_seqs), outputs]: their outputs."""

    def as_rows(self, position: int) -> Iterator[tuple[Column, ...]]:
        """The rows of the table `states`, of a snapshot at that position."""
        lengths = self.seqs - self.tail_seqs
        assert len(self.tail_x) == len(self.tail_y) == lengths.sum()
        assert (lengths >= 0).all()
        ends = np.cumsum(lengths).tolist()
        columns = zip(self.streams.tolist(), self.seqs.tolist(), self.tail_seqs.tolist(), strict=True)
        for at, (stream, seq, tail_seq) in enumerate(columns):
            tail = slice(ends[at] - (seq - tail_seq), ends[at])
            x, y = (blob(array, "<f4") for array in (self.tail_x[tail], self.tail_y[tail]))
            row = (stream, position, seq, self.states[at].tobytes(), tail_seq, x, y)
            yield (*row, row_crc(*row))


def blob(array: npt.NDArray[Any], dtype: str) -> bytes:
    """The array's bytes in the file's byte order."""
    return np.ascontiguousarray(array, dtype).tobytes()


def state_blobs(states: U8 | None, count: int) -> Iterator[bytes | None]:
    """The blobs of `count` states, rows of bytes [N, row_bytes]; None for each where there are none."""
    return repeat(None, count) if states is None else (state.tobytes() for state in states)
