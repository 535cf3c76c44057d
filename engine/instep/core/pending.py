"""Frames that were admitted and not yet answered: one pool of rows, one queue a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

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
        self.slot: I64 = np.zeros(capacity, np.int64)
        self.seq: I64 = np.zeros(capacity, np.int64)
        self.block: I64 = np.zeros(capacity, np.int64)
        self._following: I32 = np.full(capacity, NONE, np.int32)
        self._head: I32 = np.full(max_streams + 1, NONE, np.int32)
        self._tail: I32 = np.full(max_streams + 1, NONE, np.int32)
        self._stepping: Bool = np.zeros(max_streams + 1, np.bool_)
        self._free = np.arange(capacity, dtype=np.int32)  # a stack
        self.free_count = capacity

    def append(self, slots: I64, seqs: I64, lengths: I64, x: F32, block: int) -> tuple[I32, I64]:
        """Queue the admitted frames of a block behind what their streams have pending.

        Args:
            slots: int64 [N], distinct.
            seqs: int64 [N], seq of each column's first timestep.
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
        timesteps, columns = x.shape[:2]
        rows, pick = _layout(flat, lengths, timesteps, columns)
        self.x[flat] = pick(x)
        self.slot[flat] = pick(np.repeat(slots[None], timesteps, axis=0))
        self.seq[flat] = pick(seqs + np.arange(timesteps)[:, None])
        self.block[flat] = block
        self._following[flat] = NONE
        behind = rows[1:] != NONE
        self._following[rows[:-1][behind]] = rows[1:][behind]

        some = np.flatnonzero(lengths)
        slots = slots[some]
        first, last = rows[0, some], rows[lengths[some] - 1, some]
        tails = self._tail[slots]
        self._tail[slots] = last
        waiting = tails != NONE
        if waiting.any():
            self._following[tails[waiting]] = first[waiting]
            slots, first = slots[~waiting], first[~waiting]
        self._head[slots] = first
        return rows, slots[~self._stepping[slots]]

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

    def take_all(self, slots: I64) -> I32:
        """Take every frame of these slots off their queues: int32 [frames], each stream's in order."""
        taken = [np.empty(0, np.int32)]
        while len(slots := slots[self._head[slots] != NONE]):
            taken.append(self._pop(slots))
        return np.concatenate(taken)

    def _pop(self, slots: I64) -> I32:
        rows = self._head[slots]
        assert (rows != NONE).all(), "a slot without pending frames was scheduled"
        following = self._following[rows]
        self._head[slots] = following
        self._tail[slots[following == NONE]] = NONE
        return rows

    def free(self, rows: I32) -> None:
        """Give rows back to the pool: int32 [frames]."""
        self._free[self.free_count : self.free_count + len(rows)] = rows
        self.free_count += len(rows)


def _layout(flat: I32, lengths: I64, timesteps: int, columns: int) -> tuple[I32, Callable[[npt.NDArray[Any]], Any]]:
    """Lay rows out as a block: int32 [T, N], and how to flatten another [T, N, …] array in the same order."""
    if len(flat) == timesteps * columns:
        return flat.reshape(timesteps, columns), lambda array: array.reshape(len(flat), *array.shape[2:])
    admitted = np.arange(timesteps)[:, None] < lengths
    rows = np.full((timesteps, columns), NONE, np.int32)
    rows[admitted] = flat
    return rows, lambda array: array[admitted]
