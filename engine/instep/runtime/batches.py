"""A padded batch on its way through a step: one class for the CPU, one for a GPU."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch

from instep.core.compiled import kernel
from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64
from instep.models.base import RecurrentModel
from instep.runtime.executor import StateLost
from instep.runtime.state_store import StateCopies, StateStore


@kernel
def stage(slots: I64, rows: I64, inputs: F32, batch_slots: I64, batch_x: F32) -> None:
    """Fill a batch: its slots and frames, the scratch slot and zeros where it is padded.

    Args:
        slots: int64 [B].
        rows: int64 [B], of `inputs`.
        inputs: float32 [capacity, features].
        batch_slots: int64 [bucket].
        batch_x: float32 [bucket, at least features]; columns beyond the features stay as they are.
    """
    features = inputs.shape[1]
    for place in range(len(slots)):
        batch_slots[place] = slots[place]
        # Slices: loops over them become copies of whole vectors, those over two indices do not.
        frame, target = inputs[rows[place]], batch_x[place, :features]
        for value in range(features):
            target[value] = frame[value]
    for place in range(len(slots), len(batch_slots)):
        batch_slots[place] = SCRATCH_SLOT
        batch_x[place, :features] = 0.0


@kernel
def unstage(batch_y: F32, rows: I64, outputs: F32) -> None:
    """Copy the first B rows of a batch's outputs to `rows`, int64 [B], of float32 [capacity, outputs]."""
    width = outputs.shape[1]
    for place in range(len(rows)):
        y, target = batch_y[place, :width], outputs[rows[place]]
        for value in range(width):
            target[value] = y[value]


class HostBatch:
    """Room for one batch of one size, used again for the next one.

    `size` counts rows, padding included.
    """

    def __init__(self, model: RecurrentModel, store: StateStore, size: int) -> None:
        self.step = model.bind(size)
        """Its buffers may be used between two runs."""
        self._copies = StateCopies(store, self.step)
        self._y: F32 = self.step.y.numpy()
        self.slots: I64 = np.zeros(size, np.int64)
        """int64 [size]: to be set before `run`, the scratch slot for padding."""
        self.x: F32 = self.step.x.numpy()
        """float32 [size, at least features], frames: to be set before `run`, zeros for padding."""

    def run(self, rows: int) -> F32:
        """Step; the outputs, float32 [size, at least outputs], until the next call.

        Args:
            rows: how many are not padding; their states are changed.

        Raises:
            Exception: whatever the model raised; no state has changed.
        """
        self._copies.gather(self.slots)
        self.step.run()
        self._copies.scatter(self.slots, rows)
        return self._y


_WARM_UPS: Final = 3
"""Runs before the capture: libraries allocate and choose kernels in them. As many as in torch's own example."""


class GraphBatch:
    """As `HostBatch`, on a GPU.

    Copies to the device, gather, step, scatter and copies back are one launch; the host waits once, for the outputs.

    `pool` is memory that graphs of other sizes use, too (`torch.cuda.graph_pool_handle`).
    """

    def __init__(self, model: RecurrentModel, store: StateStore, size: int, pool: Any) -> None:
        self.step = model.bind(size)
        """As `HostBatch.step`."""
        self._store = store
        self._device = model.device
        self._host_slots = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._host_x = torch.zeros(size, self.step.x.shape[1], pin_memory=True)
        self._host_y = torch.zeros(size, self.step.y.shape[1], pin_memory=True)
        self.slots: I64 = self._host_slots.numpy()
        """As `HostBatch.slots`."""
        self.x: F32 = self._host_x.numpy()
        """As `HostBatch.x`."""
        self._y: F32 = self._host_y.numpy()
        self._slots = torch.zeros(size, dtype=torch.int64, device=self._device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.inference_mode():
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):  # on the scratch slot alone
                    self._enqueue()
            stream.synchronize()
            with torch.cuda.graph(self._graph, pool=pool, stream=stream):
                self._enqueue()

    def _enqueue(self) -> None:
        self._slots.copy_(self._host_slots, non_blocking=True)
        self.step.x.copy_(self._host_x, non_blocking=True)
        self._store.gather(self._slots, self.step.state)
        self.step.run()
        self._store.scatter(self._slots, self.step.new_state)
        self._host_y.copy_(self.step.y, non_blocking=True)

    def run(self, rows: int) -> F32:
        """As `HostBatch.run`.

        Raises:
            StateLost: when anything went wrong: what a graph had done by then is not known.
        """
        try:
            with torch.cuda.device(self._device):
                self._graph.replay()
                self._done.record()
                self._done.synchronize()
        except Exception as error:
            raise StateLost(str(error)) from error
        return self._y
