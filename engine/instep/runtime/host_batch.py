"""Where a batch stands while it is stepped on the CPU."""

from __future__ import annotations

import numpy as np

from instep.core.typing import F32, I64
from instep.models.gru.network import GruNetwork
from instep.runtime.errors import StateLost
from instep.runtime.state_cache import StateCache


class HostBatch:
    """Room for one batch of one size, used again for the next one.

    Args:
        network: what is stepped.
        cache: the states.
        size: rows, padding included.
    """

    def __init__(self, network: GruNetwork, cache: StateCache, size: int) -> None:
        self._cache: F32 = cache.array
        self._step = network.bind(size)
        self._states: F32 = self._step.h.numpy()
        self._y: F32 = self._step.y.numpy()
        self.slots: I64 = np.zeros(size, np.int64)
        """int64 [size], rows of the cache: to be set before `run`, the scratch slot for padding."""
        self.x: F32 = self._step.x.numpy()
        """float32 [size, input_width], frames: to be set before `run`, zeros for padding."""

    def run(self, rows: int) -> F32:
        """Step; the outputs, float32 [size, output_width], until the next call.

        Args:
            rows: how many are not padding; their states are changed.

        Raises:
            StateLost: when states may have been written in part.
            Exception: whatever went wrong before that; no state has changed.
        """
        # Each call into torch, a mere view included, costs a small step several microseconds, and may wait for the
        # interpreter's lock.
        self._cache.take(self.slots, 1, self._states, "clip")  # slots are good; "raise" would copy twice
        self._step.run()
        try:
            self._cache[:, self.slots[:rows]] = self._states[:, :rows]
        except Exception as error:
            raise StateLost(str(error)) from error
        return self._y
