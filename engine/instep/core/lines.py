"""What every frame has to do with of its stream, side by side: one access to memory for all of it.

A step of one stream costs what its calls of numpy cost, so they are few and quick: arrays with arrays
(a Python number takes twice as long to be joined), and into memory that is there already.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from instep.core.typing import I32, I64, U8, U64, Bool

ROW: Final = np.dtype(
    [
        ("handle", np.uint64),
        ("next_seq", np.int64),
        ("step_seq", np.int64),
        ("acked", np.int64),
        ("last_active_ns", np.int64),
        ("owner", np.int32),
        ("pending", np.int32),
        ("holds", np.uint8),
        ("closing", np.bool_),
        ("lost", np.bool_),
        ("renumbered", np.bool_),
        ("marks", np.int32),
    ]
)
"""Of one stream; see `StreamTable`."""
_WHOLE: Final = np.dtype((np.void, ROW.itemsize))
"""A row in one piece, as numpy copies it ten times faster than field by field."""
_MOST_WIDTHS: Final = 1024


class Line:
    """Rows of N streams, copied, with an array [N] for each field; until the next `gather`.

    Seqs are as messages have them, so that one of 2^63 or more is none that a stream expects.

    Args:
        rows: of `ROW`, [N].
    """

    __slots__ = (
        "acked",
        "closing",
        "handle",
        "holds",
        "last_active_ns",
        "next_seq",
        "owner",
        "pending",
        "rows",
        "step_seq",
    )

    def __init__(self, rows: npt.NDArray[np.void]) -> None:
        self.rows = rows.view(_WHOLE)
        self.handle: U64 = rows["handle"]
        self.next_seq: U64 = rows["next_seq"].view(np.uint64)
        self.step_seq: U64 = rows["step_seq"].view(np.uint64)
        self.acked: U64 = rows["acked"].view(np.uint64)
        self.last_active_ns: I64 = rows["last_active_ns"]
        self.owner: I32 = rows["owner"]
        self.pending: I32 = rows["pending"]
        self.holds: U8 = rows["holds"]
        self.closing: Bool = rows["closing"]


class Lines:
    """The rows of all streams.

    Args:
        count: how many rows.
    """

    def __init__(self, count: int) -> None:
        self.table: npt.NDArray[np.void] = np.zeros(count, ROW)
        self._rows = self.table.view(_WHOLE)
        self._room = np.zeros(0, ROW)
        self._by_width: dict[int, Line] = {}
        """Views of that room."""

    def gather(self, slots: I64) -> Line:
        """The rows of these slots, int64 [N]; each call writes over what the one before gave."""
        line = self._by_width.get(len(slots)) or self._line(len(slots))
        self._rows.take(slots, 0, line.rows, "clip")  # slots are good; "raise" would copy twice
        return line

    def scatter(self, slots: I64, line: Line) -> None:
        """Put back what was gathered from these slots, which are distinct, and changed since."""
        self._rows[slots] = line.rows

    def _line(self, width: int) -> Line:
        if width > len(self._room):
            self._room = np.zeros(2 * width, ROW)
            self._by_width.clear()
        if len(self._by_width) == _MOST_WIDTHS:
            self._by_width.clear()
        line = self._by_width[width] = Line(self._room[:width])
        return line


@lru_cache(maxsize=1024)
def constant(value: int, kind: type[np.integer[Any]]) -> npt.NDArray[Any]:
    """A number as an array of that kind, not to be changed."""
    array = np.array(value, kind)
    array.flags.writeable = False
    return array
