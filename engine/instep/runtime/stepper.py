"""One step of the network over one batch: stage, gather, step, scatter."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from instep.core.typing import F32, I64, U8, float32_zeros
from instep.models.base import RecurrentModel, StateSpec
from instep.models.stepping import step_rows
from instep.runtime.batches import GraphBatch, HostBatch, stage, unstage
from instep.runtime.state_store import StateStore


class StateAccess(Protocol):
    """The states of all streams, by slot, as rows of bytes [N, row_bytes]."""

    @property
    def state(self) -> StateSpec:
        """The layout of a row."""

    def load(self, slots: I64, states: U8 | None) -> None:
        """Set states; None for the model's initial ones."""

    def read(self, slots: I64) -> U8:
        """A copy of states."""


class Stepper:
    """The model, the states of all streams, and room for a batch of each bucket.

    Steps run wherever the executor runs them. Everything else runs in the loop's thread, on streams that are in no run.

    Args:
        model: what is stepped.
        buckets: the padded batch sizes to use, rising.
        max_streams: slots run from 1 to this.
        device: where states and weights live.
        zeros: see `StateStore`.
    """

    def __init__(
        self,
        model: RecurrentModel,
        buckets: Sequence[int],
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        self.model = model
        self.state = model.state
        self.buckets = tuple(buckets)
        self._store = StateStore(model.state, max_streams, device, zeros)
        self._batches: dict[int, HostBatch | GraphBatch]
        if device.type == "cuda":
            pool = torch.cuda.graph_pool_handle()
            self._batches = {bucket: GraphBatch(model, self._store, bucket, pool) for bucket in buckets}
        else:
            self._batches = {bucket: HostBatch(model, self._store, bucket) for bucket in buckets}

        # Compiled now, or loaded from the cache, and not while the first frame waits.
        nothing, batch = np.empty(0, np.int64), self._batches[self.buckets[0]]
        stage(nothing, nothing, np.empty((0, model.description.features), np.float32), batch.slots, batch.x)
        outputs = np.empty((1, model.description.outputs), np.float32)
        unstage(outputs, nothing, outputs)

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
            Exception: whatever the model raised; no state has changed.
        """
        size = len(slots)
        batch = self._batches[self.bucket(size)]
        stage(slots, rows, inputs, batch.slots, batch.x)
        unstage(batch.run(size), rows, outputs)

    @torch.inference_mode()
    def step_again(self, bucket: int, x: F32, states: U8) -> tuple[F32, U8]:
        """Step a whole batch that is no stream's, where the others are stepped; changes no stream.

        Args:
            bucket: one of `buckets`.
            x: float32 [bucket, features].
            states: uint8 [bucket, row_bytes].

        Returns:
            Outputs [bucket, outputs] and states after the frames, copies.
        """
        return step_rows(self._batches[bucket].step, self.state, x, states, self.model.description.outputs)

    @torch.inference_mode()
    def load(self, slots: I64, rows: U8 | None) -> None:
        """Give slots the initial state, or the states in rows of bytes, uint8 [N, row_bytes]."""
        if rows is None:
            self._store.clear(slots)
        else:
            self._store.write(slots, rows)

    @torch.inference_mode()
    def read(self, slots: I64) -> U8:
        """The states of slots as rows of bytes, uint8 [N, row_bytes], a copy."""
        return self._store.read(slots)
