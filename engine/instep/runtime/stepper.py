"""One step of the network over one batch: stage, gather, step, scatter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch

from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64, float32_zeros
from instep.models.gru.network import GruNetwork
from instep.runtime.errors import StateLost
from instep.runtime.graph_batch import GraphBatch
from instep.runtime.host_batch import HostBatch
from instep.runtime.state_cache import StateCache


class Stepper:
    """The network, the states of all streams, and room for a batch of each bucket.

    Steps run in the worker's thread, or in the process for steps and short ones in the loop's thread; everything else
    in the worker's thread.

    Args:
        network: what is stepped.
        buckets: the padded batch sizes to use, rising.
        max_streams: slots run from 1 to this.
        device: where states and weights live.
        zeros: see `StateCache`.
    """

    def __init__(
        self,
        network: GruNetwork,
        buckets: Sequence[int],
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        self.network = network
        self.buckets = tuple(buckets)
        self._device = device
        self._cache = StateCache(max_streams, network.state_layers, network.state_width, device, zeros)
        self._batches: dict[int, HostBatch | GraphBatch]
        if device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            self._batches = {bucket: GraphBatch(network, self._cache, bucket, pool) for bucket in buckets}
        else:
            self._batches = {bucket: HostBatch(network, self._cache, bucket) for bucket in buckets}

    def bucket(self, size: int) -> int:
        """The smallest bucket that holds a batch of this size."""
        return self.buckets[bisect_left(self.buckets, size)]

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        """Step the streams in `slots` with one frame each; for speed under `torch.inference_mode()`.

        Args:
            slots: int64 [B], distinct.
            rows: int64 [B], the frames' rows in `inputs` and `outputs`.
            inputs: float32 [capacity, features].
            outputs: float32 [capacity, outputs], written at `rows`.

        Raises:
            StateLost: when states may have been written in part, or have advanced without their outputs.
            Exception: whatever the network raised; no state has changed.
        """
        size = len(slots)
        batch = self._batches[self.bucket(size)]
        batch.slots[:size] = slots
        batch.slots[size:] = SCRATCH_SLOT
        # Rows are good; "raise" would copy twice.
        inputs.take(rows, 0, batch.x[:size, : inputs.shape[1]], "clip")
        batch.x[size:] = 0.0
        y = batch.run(size)
        try:
            outputs[rows] = y[:size, : outputs.shape[1]]
        except Exception as error:
            raise StateLost(f"the outputs could not be written: {error}") from error

    @torch.inference_mode()
    def load(self, slots: I64, states: F32 | None) -> None:
        """Give slots their initial state: zeros, or float32 [N, layers, state_size]."""
        if states is not None:
            self._cache.write(slots, self._padded(states))  # at once, so that a write that fails has not cleared them
        else:
            self._cache.clear(torch.from_numpy(slots).to(self._device))

    @torch.inference_mode()
    def read(self, slots: I64) -> F32:
        """The states of slots: float32 [N, layers, state_size], a copy."""
        return np.ascontiguousarray(self._cache.read(slots)[:, :, : self.network.state_size])

    def _padded(self, states: F32) -> F32:
        padded = np.zeros((len(states), self.network.state_layers, self.network.state_width), np.float32)
        padded[:, :, : self.network.state_size] = states
        return padded

    def no_states(self, count: int) -> F32:
        """NaN in the shape of `read`: float32 [count, layers, state_size]."""
        return np.full((count, self.network.state_layers, self.network.state_size), np.nan, np.float32)
