"""One step of the network over one batch of streams."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final, Protocol

import numpy as np
import torch

from instep.core.typing import F32, I64, U8, float32_zeros
from instep.models.base import RecurrentModel, StateSpec
from instep.models.network import PortableNetwork
from instep.models.torch_network import TorchNetwork
from instep.runtime.batches import GraphBatch
from instep.runtime.state_store import StateStore

_SIZES: Final = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Of batches for which a graph is captured on a GPU."""


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
    """The model, the states of all streams, and memory to step them.

    Steps run wherever the executor runs them, one at a time. Everything else runs in the loop's thread, on streams that
    are in no run.

    Args:
        model: what is stepped.
        max_batch_size: the most streams in one step.
        max_streams: slots run from 1 to this.
        device: where states and weights live.
        zeros: see `StateStore`.
    """

    def __init__(
        self,
        model: RecurrentModel,
        max_batch_size: int,
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        self.model = model
        self.state = model.state
        self.max_batch_size = max_batch_size
        self._store = StateStore(model.state, max_streams, device, zeros)
        self._steps: _OnCpu | _OnGpu
        if isinstance(model, TorchNetwork):
            self._steps = _OnGpu(model, self._store, max_batch_size)
        else:
            assert isinstance(model, PortableNetwork)
            self._steps = _OnCpu(model, self._store)

    def step(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        """Step the streams in `slots` with one frame each.

        Args:
            slots: int64 [B], distinct.
            rows: int64 [B], the frames' rows in `inputs` and `outputs`.
            inputs: float32 [capacity, features].
            outputs: float32 [capacity, outputs], written at `rows`.

        Raises:
            StateLost: when states may have been written in part, or have advanced without their outputs.
        """
        self._steps.run(slots, rows, inputs, outputs)

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


class _OnCpu:
    """Frames, states and outputs are read and written where they are, in any number of rows."""

    def __init__(self, model: PortableNetwork, store: StateStore) -> None:
        self._model = model
        self._states: U8 = store.rows.numpy()
        self._tables: tuple[F32, F32] = (np.empty((0, 0), np.float32), np.empty((0, 0), np.float32))

    def run(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        if self._tables[0] is not inputs or self._tables[1] is not outputs:
            self._tables = inputs, outputs
            self._rows = self._model.bind(inputs, self._states, outputs)
        self._rows.run(slots, rows)


class _OnGpu:
    """Batches are padded to the sizes for which graphs were captured."""

    def __init__(self, model: TorchNetwork, store: StateStore, max_batch_size: int) -> None:
        pool = torch.cuda.graph_pool_handle()
        self._sizes = [*(size for size in _SIZES if size < max_batch_size), max_batch_size]
        self._batches = [GraphBatch(model, store, size, pool) for size in self._sizes]

    def run(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        batch = self._batches[bisect_left(self._sizes, len(slots))]
        outputs[rows] = batch.run(slots, inputs[rows])
