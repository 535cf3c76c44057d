"""Rows of a memory: which slot's state is in which, when there are fewer rows than slots."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from instep.core.slots import SCRATCH_SLOT
from instep.core.typing import I64, U32, Bool

NO_ROW: Final = 0
"""The row of a slot whose state is not there. Row 0 itself is scratch, as slot 0 is: no stream's."""

_NOWHERE: Final = -1
_SCAN: Final = 1024
"""Entries of the queue looked at in one go."""


class Residency:
    """Says where the states of slots are, and which of them make room for others: the least recently used.

    It moves nothing. Whoever does copies a state first and says so afterwards (`vacate`, `occupy`), so that `row` is
    true at every moment, and a copy that fails leaves it true.

    Recency is a queue of rows in the order of their use. A row that is used again stands in it twice; only its last
    entry counts. So using a batch and finding the rows to evict cost as much as the batch, however many rows there are.

    Args:
        max_streams: slots run from 1 to this.
        rows: so do rows; a batch has at most this many slots.
    """

    def __init__(self, max_streams: int, rows: int) -> None:
        self.row: U32 = np.full(max_streams + 1, NO_ROW, np.uint32)
        """The row of each slot, or `NO_ROW`."""
        self.slot: I64 = np.full(rows + 1, SCRATCH_SLOT, np.int64)
        """The slot of each row, or the scratch slot when the row is free."""
        self._free = np.arange(rows, 0, -1, dtype=np.int64)  # a stack; row 1 on top
        self.free_count = rows
        self._queue = np.empty(2 * rows, np.int64)
        self._head = self._tail = 0
        self._place: I64 = np.full(rows + 1, _NOWHERE, np.int64)
        """Where in the queue each row's last entry stands."""

    def use(self, slots: I64) -> I64:
        """A batch is about to be stepped: slots that have a row become the most recently used.

        Args:
            slots: int64 [B], distinct.

        Returns:
            Their rows, int64 [B], `NO_ROW` where a slot has none.
        """
        rows = self.rows(slots)
        self._enqueue(rows if rows.all() else rows[rows != NO_ROW])
        return rows

    def rows(self, slots: I64) -> I64:
        """The rows of slots, `NO_ROW` where a slot has none: int64 [N]."""
        return self.row[slots].astype(np.int64)

    def least_recently_used(self, count: int, among: Callable[[I64], Bool] | None = None) -> I64:
        """Rows to be vacated next, longest unused first: int64 [count]. Nothing changes.

        Right after `use`, none of them is the batch's as long as batch and rows add up: count ≤ rows − batch's rows.

        Args:
            count: how many.
            among: which slots, int64 [N], may lose their rows, bool [N]; then there may be fewer than `count`.
        """
        found = np.empty(0, np.int64)
        at, scan = self._head, _SCAN
        while len(found) < count:
            entries = self._queue[at : min(at + scan, self._tail)]
            if among is not None and not len(entries):
                break
            assert len(entries), "a batch has more streams than the device has rows"
            last = entries[self._place[entries] == np.arange(at, at + len(entries))]
            if not len(last) and at == self._head:
                self._head = at + len(entries)  # entries that no longer count need not be looked at again
            at += len(entries)
            scan *= 2  # rows that may not be taken can stand in the way by the thousand
            found = np.concatenate([found, last if among is None else last[among(self.slot[last])]])
        return found[:count]

    def vacate(self, rows: I64) -> None:
        """The states of these rows are elsewhere now: int64 [N], distinct, none of them free."""
        self.row[self.slot[rows]] = NO_ROW
        self.slot[rows] = SCRATCH_SLOT
        self._place[rows] = _NOWHERE
        self._free[self.free_count : self.free_count + len(rows)] = rows
        self.free_count += len(rows)

    def free_rows(self, count: int) -> I64:
        """The rows to be occupied next: int64 [count ≤ free_count]. Nothing changes."""
        assert count <= self.free_count, "rows must be vacated first"
        return self._free[self.free_count - count : self.free_count][::-1].copy()

    def occupy(self, rows: I64, slots: I64) -> None:
        """The states of these slots are in these rows now, and most recently used.

        Args:
            rows: int64 [N], what `free_rows` said last.
            slots: int64 [N], distinct, without a row.
        """
        self.free_count -= len(rows)
        self.row[slots] = rows
        self.slot[rows] = slots
        self._enqueue(rows)

    def forget(self, slots: I64) -> None:
        """The states of these slots, wherever they were, are elsewhere now: int64 [N], distinct."""
        rows = self.rows(slots)
        self.vacate(rows[rows != NO_ROW])

    def _enqueue(self, rows: I64) -> None:
        if self._tail + len(rows) > len(self._queue):
            self._close_ranks()
        end = self._tail + len(rows)
        self._queue[self._tail : end] = rows
        self._place[rows] = np.arange(self._tail, end)
        self._tail = end

    def _close_ranks(self) -> None:
        """Drop the entries that no longer count; at most one a row stays, so half of the queue is free."""
        entries = self._queue[self._head : self._tail]
        last = entries[self._place[entries] == np.arange(self._head, self._tail)]
        self._head, self._tail = 0, len(last)
        self._queue[: len(last)] = last
        self._place[last] = np.arange(len(last))
