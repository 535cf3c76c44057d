"""One step of the network over one batch: stage, gather, step, scatter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

import numpy as np
import torch

from instep.core.residency import Residency
from instep.core.slots import SCRATCH_SLOT
from instep.core.typing import F32, I64, float32_zeros
from instep.models.network import Network
from instep.runtime.bounded_store import BoundedStore, ColdStates
from instep.runtime.errors import StateLost
from instep.runtime.graph_batch import GraphBatch
from instep.runtime.host_batch import HostBatch
from instep.runtime.state_cache import StateCache
from instep.runtime.tiers import Tiers
from instep.runtime.warm_store import WarmStore


class Stepper:
    """The network, the states of all streams, and room for a batch of each bucket.

    Steps run in the worker's thread, or in the process for steps and short ones in the loop's thread; everything else
    in the worker's thread.

    Args:
        network: what is stepped.
        buckets: the padded batch sizes to use, rising.
        max_streams: slots run from 1 to this.
        device: where states and weights live.
        device_streams: how many states the device holds, at least as many as the largest batch has streams; the others
            are in host memory until they are stepped. 0, or `max_streams` and more: all of them.
        host_streams: how many states host memory holds, at least as many as the device; 0, or `max_streams` and more:
            all that are not on the device.
        cold: the recording, which holds the others; without one, host memory holds all.
        zeros: see `StateCache`.
    """

    def __init__(
        self,
        network: Network,
        buckets: Sequence[int],
        max_streams: int,
        device: torch.device,
        device_streams: int = 0,
        host_streams: int = 0,
        cold: ColdStates | None = None,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        self.network = network
        self.buckets = tuple(buckets)
        self._device = device
        rows = min(device_streams or max_streams, max_streams)
        layers, width = network.state_layers, network.state_width
        self._cache = StateCache(rows, layers, width, device, zeros)
        self.tiers: Tiers | None = None
        """Where states are; None when all are on the device, each in the row that has its slot's number."""
        if rows < max_streams:
            warm: WarmStore | BoundedStore = WarmStore(max_streams, layers, width)
            if cold is not None and 0 < host_streams < max_streams:
                warm = BoundedStore(max_streams, host_streams, layers, width, cold)
            self.tiers = Tiers(self._cache, warm, Residency(max_streams, rows))
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
            StateLost: when states may have been written in part, are gone, or have gone on without their outputs.
            Exception: whatever the network raised, or moving states to the device did; no state has changed.
        """
        size = len(slots)
        batch = self._batches[self.bucket(size)]
        batch.slots[:size] = slots if self.tiers is None else self.tiers.make_hot(slots)
        batch.slots[size:] = SCRATCH_SLOT
        # Rows are good; "raise" would copy twice.
        inputs.take(rows, 0, batch.x[:size, : inputs.shape[1]], "clip")
        batch.x[size:] = 0.0
        try:
            y = batch.run(size)
        except StateLost as error:
            raise StateLost(str(error), slots) from error
        try:
            outputs[rows] = y[:size, : outputs.shape[1]]
        except Exception as error:
            raise StateLost(f"the outputs could not be written: {error}", slots) from error

    @torch.inference_mode()
    def load(self, slots: I64, states: F32 | None) -> None:
        """Give slots their initial state: zeros, or float32 [N, layers, state_size]."""
        padded = None if states is None else self._padded(states)
        if self.tiers is not None:
            self.tiers.load(slots, padded)
            return
        if padded is not None:
            self._cache.write(slots, padded)  # at once, so that a write that fails has not cleared them
        else:
            self._cache.clear(torch.from_numpy(slots).to(self._device))

    def leave_cold(self, slots: I64) -> None:
        """The recording holds the states of slots; only where it may hold some alone."""
        assert self.tiers is not None, "all states are on the device"
        self.tiers.leave_cold(slots)

    @torch.inference_mode()
    def read(self, slots: I64) -> F32:
        """The states of slots: float32 [N, layers, state_size], a copy.

        Raises:
            StateLost: when the recording does not hold states that it should.
            Exception: when it cannot be read.
        """
        states = self._cache.read(slots) if self.tiers is None else self.tiers.read(slots)
        return np.ascontiguousarray(states[:, :, : self.network.state_size])

    def _padded(self, states: F32) -> F32:
        padded = np.zeros((len(states), self.network.state_layers, self.network.state_width), np.float32)
        padded[:, :, : self.network.state_size] = states
        return padded

    def no_states(self, count: int) -> F32:
        """NaN in the shape of `read`: float32 [count, layers, state_size]."""
        return np.full((count, self.network.state_layers, self.network.state_size), np.nan, np.float32)
