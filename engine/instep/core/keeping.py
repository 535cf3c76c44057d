"""Which states have changed since the last snapshot, so that the next one writes only those."""

from __future__ import annotations

from typing import Final

import numpy as np

from instep.core.typing import I64, U8

_CLEAN: Final = 0
_IN_SNAPSHOT: Final = 1
_CHANGED: Final = 2


class Keeping:
    """For each slot, whether the recording holds the state of its stream.

    A state is clean (a committed row holds it), in a snapshot that is not committed yet, or changed since. A slot
    without a stream counts as clean, and so does a stream that has the state it was opened with.

    Args:
        max_streams: slots run from 1 to this.
    """

    def __init__(self, max_streams: int) -> None:
        self._standing: U8 = np.zeros(max_streams + 1, np.uint8)

    def changed(self, slots: I64) -> None:
        """The states change: int64 [N]."""
        self._standing[slots] = _CHANGED

    def kept(self, slots: I64) -> None:
        """The recording holds the states as they are, or never needs to: int64 [N]."""
        self._standing[slots] = _CLEAN

    def take(self) -> I64:
        """Slots whose states a snapshot that begins now has to hold: int64 [N], rising. One snapshot at a time."""
        slots = np.flatnonzero(self._standing == _CHANGED)
        self._standing[slots] = _IN_SNAPSHOT
        return slots

    def committed(self, slots: I64) -> None:
        """The snapshot of these slots, int64 [N], is in the recording; those that changed meanwhile stay changed."""
        self.kept(slots[self._standing[slots] == _IN_SNAPSHOT])

    def failed(self, slots: I64) -> None:
        """The snapshot of these slots, int64 [N], will not be in the recording: the next one has to hold them."""
        self._standing[slots[self._standing[slots] == _IN_SNAPSHOT]] = _CHANGED
