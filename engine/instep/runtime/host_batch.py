"""Where a batch stands while it is stepped on the CPU."""

from __future__ import annotations

import torch

from instep.core.slots import SCRATCH_SLOT
from instep.core.typing import F32, I64
from instep.model.network import Network
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
        self._cache = cache
        slots, self._x = torch.zeros(size, dtype=torch.int64), torch.zeros(size, network.input_width)
        self._h = torch.zeros(network.state_layers, size, network.state_width)
        self._slots = slots
        self.slots: I64 = slots.numpy()
        """int64 [size], rows of the cache: to be set before `run`, the scratch slot for padding."""
        self.x: F32 = self._x.numpy()
        """float32 [size, input_width], frames: to be set before `run`, zeros for padding."""

    def run(self) -> F32:
        """Step; the outputs, float32 [size, output_width], until the next call.

        Raises:
            StateLost: when states may have been written in part.
            Exception: whatever went wrong before that; no state has changed.
        """
        # Each call into torch, a mere view included, gives up the interpreter's lock and may wait to get it back.
        self._cache.gather(self._slots, self._h)
        outputs: F32 = self._network.advance(self._x, self._h).numpy()
        try:
            self._cache.scatter(self._slots, self._h)
            if self.slots[-1] == SCRATCH_SLOT:
                self._cache.clear_scratch()
        except Exception as error:
            raise StateLost(str(error)) from error
        return outputs
