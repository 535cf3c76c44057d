"""A batch on its way through a step on a GPU, padded to the size for which a graph was captured."""

from __future__ import annotations

from typing import Any, Final

import torch

from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64
from instep.models.torch_network import TorchNetwork
from instep.runtime.executor import StateLost
from instep.runtime.state_store import StateStore

_WARM_UPS: Final = 3
"""Runs before the capture: libraries allocate and choose kernels in them. As many as in torch's own example."""


class GraphBatch:
    """Room for one batch of one size, padding included, used again for the next one.

    Copies to the device, gather, step, scatter and copies back are one launch; the host waits once, for the outputs.

    `pool` is memory that graphs of other sizes use, too (`torch.cuda.graph_pool_handle`).
    """

    def __init__(self, model: TorchNetwork, store: StateStore, size: int, pool: Any) -> None:
        self.step = model.bind(size)
        self._store = store
        self._device = model.device
        self._host_slots = torch.zeros(size, dtype=torch.int64, pin_memory=True)
        self._host_x = torch.zeros(size, self.step.x.shape[1], pin_memory=True)
        self._host_y = torch.zeros(size, self.step.y.shape[1], pin_memory=True)
        self._slots_given: I64 = self._host_slots.numpy()
        self._x_given: F32 = self._host_x.numpy()
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
        self._store.scatter(self._slots, self.step.state)
        self._host_y.copy_(self.step.y, non_blocking=True)

    def run(self, slots: I64, x: F32) -> F32:
        """Step the states of slots, int64 [B], with frames, float32 [B, features].

        Returns:
            The outputs, float32 [B, outputs], until the next call.

        Raises:
            StateLost: when anything went wrong: what a graph had done by then is not known.
        """
        count = len(slots)
        self._slots_given[:count], self._slots_given[count:] = slots, SCRATCH_SLOT
        self._x_given[:count], self._x_given[count:] = x, 0.0
        try:
            with torch.cuda.device(self._device):
                self._graph.replay()
                self._done.record()
                self._done.synchronize()
        except Exception as error:
            raise StateLost(str(error)) from error
        return self._y[:count]
