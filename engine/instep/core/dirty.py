"""Tracks which states the recording lacks, so that a checkpoint writes only those."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.typing import I64, U8, Bool

_CLEAN: Final = 0
_FLUSHING: Final = 1
_DIRTY: Final = 2


class DirtyTracker:
    """Whether the states of slots 1 … `max_streams` are clean (in a committed row), being flushed, or dirty.

    A slot without a stream is clean.
    """

    def __init__(self, max_streams: int) -> None:
        self._states: U8 = np.zeros(max_streams + 1, np.uint8)

    def mark_dirty(self, slots: I64) -> None:
        """Mark states, int64 [N], that are about to change."""
        self._states[slots] = _DIRTY

    def mark_clean(self, slots: I64) -> None:
        """Mark states, int64 [N], that the recording has or will never need."""
        self._states[slots] = _CLEAN

    def are_dirty(self, slots: I64) -> Bool:
        """Whether a committed row may be missing for the states of these slots, int64 [N]: bool [N]."""
        dirty: Bool = self._states[slots] != _CLEAN
        return dirty

    def begin_flush(self) -> I64:
        """Begin a checkpoint and return the slots to write, int64 [N]. Only one checkpoint runs at a time."""
        slots = np.flatnonzero(self._states == _DIRTY)
        self._states[slots] = _FLUSHING
        return slots

    def flushed(self, slots: I64) -> None:
        """Mark slots, int64 [N], as recorded; those that changed in the meantime stay dirty."""
        self._states[slots[self._states[slots] == _FLUSHING]] = _CLEAN

    def flush_failed(self, slots: I64) -> None:
        """Mark those of these slots, int64 [N], as dirty again that are still being flushed."""
        self._states[slots[self._states[slots] == _FLUSHING]] = _DIRTY
