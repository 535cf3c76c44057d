"""Where a batch stands while it is stepped on a GPU: one captured graph a size, from pinned memory to pinned memory."""

from __future__ import annotations

from typing import Any, Final

import torch

from instep.core.typing import F32, I64
from instep.models.base import RecurrentModel
from instep.runtime.errors import StateLost
from instep.runtime.state_store import StateStore

_WARM_UPS: Final = 3
"""Runs before the capture, in which libraries allocate and choose what they use: torch's own example makes as many."""


class GraphBatch:
    """As `HostBatch`, on a GPU.

    Copies to the device, gather, step, scatter and copies back are one launch; the host waits once, for the outputs.

    Args:
        model: what is stepped.
        store: the states, on the model's device.
        size: rows, padding included.
        pool: memory that graphs of other sizes use, too (`torch.cuda.graph_pool_handle`).
    """

    def __init__(self, model: RecurrentModel, store: StateStore, size: int, pool: Any) -> None:
        self._step = model.bind(size)
        self._store = store
        self._device = model.device
        self._host_slots = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._host_x = torch.zeros(size, self._step.x.shape[1], pin_memory=True)
        self._host_y = torch.zeros(size, self._step.y.shape[1], pin_memory=True)
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
        self._step.x.copy_(self._host_x, non_blocking=True)
        self._store.gather(self._slots, self._step.state)
        self._step.run()
        self._store.scatter(self._slots, self._step.new_state)
        self._host_y.copy_(self._step.y, non_blocking=True)

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
