"""One batch size on the CPU: its buffers, and the way through gather, step and scatter."""

from __future__ import annotations

import numpy as np

from instep.core.typing import F32, I64
from instep.models.base import RecurrentModel
from instep.runtime.state_store import StateCopies, StateStore


class HostBatch:
    """Room for one batch of one size, used again for the next one.

    Args:
        model: what is stepped.
        store: the states.
        size: rows, padding included.
    """

    def __init__(self, model: RecurrentModel, store: StateStore, size: int) -> None:
        self._step = model.bind(size)
        self._copies = StateCopies(store, self._step)
        self._y: F32 = self._step.y.numpy()
        self.slots: I64 = np.zeros(size, np.int64)
        """int64 [size]: to be set before `run`, the scratch slot for padding."""
        self.x: F32 = self._step.x.numpy()
        """float32 [size, at least features], frames: to be set before `run`, zeros for padding."""

    def run(self, rows: int) -> F32:
        """Step; the outputs, float32 [size, at least outputs], until the next call.

        Args:
            rows: how many are not padding; their states are changed.

        Raises:
            Exception: whatever the model raised; no state has changed.
        """
        self._copies.gather(self.slots)
        self._step.run()
        self._copies.scatter(self.slots, rows)
        return self._y
