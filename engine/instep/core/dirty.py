"""Which states the recording lacks, so that a checkpoint writes only those."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.typing import I64, U8, Bool

_CLEAN: Final = 0
_FLUSHING: Final = 1
_DIRTY: Final = 2


class DirtyTracker:
    """For slots 1 … `max_streams`, whether each state is clean (a committed row holds it), being flushed, or dirty.

    A slot without a stream is clean: nothing of it has to be written.
    """

    def __init__(self, max_streams: int) -> None:
        self._states: U8 = np.zeros(max_streams + 1, np.uint8)

    def mark_dirty(self, slots: I64) -> None:
        """The states are about to change: int64 [N]."""
        self._states[slots] = _DIRTY

    def mark_clean(self, slots: I64) -> None:
        """The recording holds the states as they are, or never needs to: int64 [N]."""
        self._states[slots] = _CLEAN

    def are_dirty(self, slots: I64) -> Bool:
        """Whether a committed row may lack the states of these slots, int64 [N]: bool [N]."""
        dirty: Bool = self._states[slots] != _CLEAN
        return dirty

    def begin_flush(self) -> I64:
        """The slots that a checkpoint has to write that begins now: int64 [N]. One checkpoint at a time."""
        slots = np.flatnonzero(self._states == _DIRTY)
        self._states[slots] = _FLUSHING
        return slots

    def flushed(self, slots: I64) -> None:
        """These slots, int64 [N], are in the recording; those that changed in the meantime stay dirty."""
        self._states[slots[self._states[slots] == _FLUSHING]] = _CLEAN

    def flush_failed(self, slots: I64) -> None:
        """Those of these slots, int64 [N], that are being flushed still will not be in the recording."""
        self._states[slots[self._states[slots] == _FLUSHING]] = _DIRTY
