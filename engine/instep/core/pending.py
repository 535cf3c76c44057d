"""Frames that were admitted and not yet answered: one pool of rows, one queue a stream."""

from __future__ import annotations

import numpy as np

from instep.core.typing import F32, I32, I64, Bool

NONE = -1


class PendingFrames:
    """A pool of `capacity` frames, inputs and outputs side by side, and a first-in-first-out queue for each slot.

    A frame is named by its row in the pool. A stream has at most one frame in a step: from `take` to `done` it is
    stepping, and what arrives for it meanwhile waits. Queues are linked through `_following`, so that admitting a block
    and taking the heads of a batch are array operations, whatever the number of streams.

    Args:
        capacity: the most frames admitted and unanswered at once.
        max_streams: slots run from 1 to this.
        features: width of an input.
        outputs: width of an output.
    """

    def __init__(self, capacity: int, max_streams: int, features: int, outputs: int) -> None:
        self.capacity = capacity
        self.x: F32 = np.zeros((capacity, features), np.float32)
        self.y: F32 = np.zeros((capacity, outputs), np.float32)
        self.block: I32 = np.zeros(capacity, np.int32)
        self._following: I32 = np.full(capacity, NONE, np.int32)
        self._head: I32 = np.full(max_streams + 1, NONE, np.int32)
        self._tail: I32 = np.full(max_streams + 1, NONE, np.int32)  # counts only where there is a head
        self._stepping: Bool = np.zeros(max_streams + 1, np.bool_)
        self._free = np.arange(capacity, dtype=np.int32)  # a stack
        self.free_count = capacity

    def append(self, slots: I64, lengths: I64, x: F32, block: int) -> tuple[I32, I64]:
        """Queue the admitted frames of a block behind what their streams have pending.

        Args:
            slots: int64 [N], distinct.
            lengths: int64 [N], admitted timesteps of each column; the caller has checked that there is room.
            x: float32 [T, N, features].
            block: the block's number.

        Returns:
            rows: int32 [T, N], the frames' rows, `NONE` where a frame was not admitted.
            ready: int64 [≤ N], slots that can step now: they had nothing pending and are not stepping.
        """
        count = int(lengths.sum())
        assert count <= self.free_count, "the pool has no room for this block"
        flat = self._free[self.free_count - count : self.free_count].copy()
        self.free_count -= count
        shape = x.shape[:2]
        following = np.full(shape, NONE, np.int32)
        if count == shape[0] * shape[1]:
            rows = flat.reshape(shape)
            following[:-1] = rows[1:]
            self.x[flat] = x.reshape(count, -1)
            self._following[flat] = following.reshape(count)
            first, last = rows[0], rows[-1]
        else:
            admitted = np.arange(shape[0])[:, None] < lengths
            rows = np.full(shape, NONE, np.int32)
            rows[admitted] = flat
            following[:-1] = rows[1:]
            self.x[flat] = x[admitted]
            self._following[flat] = following[admitted]
            some = np.flatnonzero(lengths)
            slots = slots[some]
            first, last = rows[0, some], rows[lengths[some] - 1, some]
        self.block[flat] = block
        return rows, self._join(slots, first, last)

    def _join(self, slots: I64, first: I32, last: I32) -> I64:
        """Put chains of frames behind what their streams have pending; the slots that can step now."""
        waiting = self._head[slots] != NONE
        if waiting.any():
            self._following[self._tail[slots[waiting]]] = first[waiting]
            self._tail[slots[waiting]] = last[waiting]
            slots, first, last = slots[~waiting], first[~waiting], last[~waiting]
        self._head[slots] = first
        self._tail[slots] = last
        return slots[~self._stepping[slots]]

    def take(self, slots: I64) -> I32:
        """Take the oldest frame of each slot off its queue for a step; the streams are stepping until `done`.

        Returns:
            rows: int32 [N].
        """
        assert not self._stepping[slots].any(), "a stream that is stepping was scheduled"
        self._stepping[slots] = True
        return self._pop(slots)

    def done(self, slots: I64) -> I64:
        """The step of these slots has ended; those that can step again: int64 [≤ N]."""
        self._stepping[slots] = False
        again: I64 = slots[self._head[slots] != NONE]
        return again

    def take_all(self, slots: I64) -> tuple[I32, I64]:
        """Take every frame of these slots off their queues, each stream's in order.

        Returns:
            rows: int32 [frames].
            slots: int64 [frames], whose they are.
        """
        rows, whose = [np.empty(0, np.int32)], [np.empty(0, np.int64)]
        while len(slots := slots[self._head[slots] != NONE]):
            rows.append(self._pop(slots))
            whose.append(slots)
        return np.concatenate(rows), np.concatenate(whose)

    def _pop(self, slots: I64) -> I32:
        rows = self._head[slots]
        assert rows.min(initial=0) != NONE, "a slot without pending frames was scheduled"
        self._head[slots] = self._following[rows]
        return rows

    def free(self, rows: I32) -> None:
        """Give rows back to the pool: int32 [frames]."""
        self._free[self.free_count : self.free_count + len(rows)] = rows
        self.free_count += len(rows)
