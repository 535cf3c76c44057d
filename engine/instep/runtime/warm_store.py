"""States in host memory: a row a slot, for those that are not on the device."""

from __future__ import annotations

import numpy as np

from instep.core.typing import F32, I64, Bool


class WarmStore:
    """float32 [slots, layers, size] in host memory, zeros at first.

    A page that was never written costs nothing, so neither does a stream that begins with zeros and sends no frame.

    Args:
        max_streams: slots run from 1 to this.
        layers: layers of the network.
        size: state of one layer, as the network keeps it (padding included).
    """

    def __init__(self, max_streams: int, layers: int, size: int) -> None:
        self._states: F32 = np.zeros((max_streams + 1, layers, size), np.float32)
        self._written: Bool = np.zeros(max_streams + 1, np.bool_)

    def read(self, slots: I64) -> F32:
        """States of slots: float32 [N, layers, size], a copy."""
        return np.take(self._states, slots, 0)

    def fetch(self, slots: I64) -> F32:
        """States of slots that are about to be stepped: as `read`."""
        return self.read(slots)

    def write(self, slots: I64, states: F32) -> None:
        """Keep states: int64 [N], distinct, float32 [N, layers, size]."""
        self._written[slots] = True
        self._states[slots] = states

    def clear(self, slots: I64) -> None:
        """Set slots to zeros, touching only what is not: int64 [N]."""
        written = slots[self._written[slots]]
        self._states[written] = 0.0
        self._written[written] = False

    def leave(self, slots: I64) -> None:
        """The states are on the device now: int64 [N]. What is here stays as it is, since there is room for all."""
