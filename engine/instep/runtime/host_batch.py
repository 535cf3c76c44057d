"""Where a batch stands while it is stepped on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from instep.core.typing import F32, I64
from instep.models.network import Network
from instep.runtime.errors import StateLost
from instep.runtime.state_cache import StateCache


class HostBatch:
    """Room for one batch of one size, used again for the next one.

    Args:
        network: what is stepped.
        cache: the states.
        size: rows, padding included.
    """

    def __init__(self, network: Network, cache: StateCache, size: int) -> None:
        self._network = network
        self._cache: F32 = cache.array
        self._x = torch.zeros(size, network.input_width)
        self._h = torch.zeros(network.state_layers, size, network.state_width)
        self._layers = self._h.unbind()
        self._states: F32 = self._h.numpy()
        self.slots: I64 = np.zeros(size, np.int64)
        """int64 [size], rows of the cache: to be set before `run`, the scratch slot for padding."""
        self.x: F32 = self._x.numpy()
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
        y = self._network.advance(self._x, self._h, self._layers)
        outputs: F32 = self._states[-1] if y is self._layers[-1] else y.numpy()
        try:
            self._cache[:, self.slots[:rows]] = self._states[:, :rows]
        except Exception as error:
            raise StateLost(str(error)) from error
        return outputs
