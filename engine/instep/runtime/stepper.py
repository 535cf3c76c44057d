"""The states of all streams on the device, and one step of the network over a batch of them.

`StateSpec` alone defines the contents of a slot. On the CPU a step reads and writes the rows of its slots in place; on
a GPU a batch is padded to a size for which a graph was captured.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64, U8, float32_zeros
from instep.models.base import RecurrentModel, StateSpec
from instep.models.network import PortableNetwork
from instep.models.torch_network import TorchNetwork
from instep.runtime.executor import StateLost

_SIZES: Final = (4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Batch sizes for which a graph is captured on a GPU."""
_WARM_UPS: Final = 3
"""The runs before the capture, in which libraries allocate and choose kernels; torch's own example has as many."""


class StateStore:
    """uint8 [max_streams + 1, row_bytes] on the device, allocated once and changed in place.

    Slot 0 is scratch: padding rows read it, a captured graph writes it, and no stream uses it.

    Args:
        spec: the layout of a row.
        max_streams: slots run from 1 to this.
        device: of the rows.
        zeros: allocates memory on the CPU, like numpy's function or in memory that forked processes share.
    """

    def __init__(
        self,
        spec: StateSpec,
        max_streams: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        self.spec = spec
        self.device = device
        slots = max_streams + 1
        if device.type == "cpu":
            words = -(-slots * spec.row_bytes // 4)
            flat: U8 = zeros((words,)).view(np.uint8)[: slots * spec.row_bytes]
            self.rows = torch.from_numpy(flat.reshape(slots, spec.row_bytes))
        else:
            self.rows = torch.zeros(slots, spec.row_bytes, dtype=torch.uint8, device=device)
        self.leaves = self._views()
        """By leaf, [slots, *shape]: views into `rows`."""
        self.initial = torch.from_numpy(spec.initial(1)[0]).to(device)
        """The row of a stream before its first frame."""
        self.rows[SCRATCH_SLOT] = self.initial

    def clear(self, slots: I64) -> None:
        """Set slots, int64 [N], to the initial state."""
        self.rows[torch.from_numpy(slots).to(self.device)] = self.initial

    def read(self, slots: I64) -> U8:
        """Copy the rows of slots, int64 [N], to the host: uint8 [N, row_bytes]."""
        there = torch.from_numpy(slots).to(self.device)
        rows: U8 = self.rows.index_select(0, there).cpu().numpy()
        return rows

    def write(self, slots: I64, rows: U8) -> None:
        """Set the rows of distinct slots, int64 [N], to uint8 [N, row_bytes]."""
        there = torch.from_numpy(slots).to(self.device)
        self.rows.index_copy_(0, there, torch.tensor(rows, device=self.device))

    def gather(self, slots: Tensor, into: Mapping[str, Tensor]) -> None:
        """Enqueue copies of the leaves of slots, int64 [B] on the device, into tensors [B, *shape]."""
        for name, leaf in self.leaves.items():
            into[name].copy_(leaf.index_select(0, slots))

    def scatter(self, slots: Tensor, state: Mapping[str, Tensor]) -> None:
        """Enqueue copies of tensors [B, *shape] to slots; the scratch slot may repeat, and is cleared."""
        for name, leaf in self.leaves.items():
            leaf.index_copy_(0, slots, state[name])
        self.rows[SCRATCH_SLOT].copy_(self.initial)

    def _views(self) -> dict[str, Tensor]:
        views = {}
        for leaf, offset in zip(self.spec.leaves, self.spec.offsets, strict=True):
            part = self.rows[:, offset : offset + leaf.nbytes]
            views[leaf.name] = part.view(getattr(torch, leaf.dtype.name)).view(len(part), *leaf.shape)
        return views


class StateAccess(Protocol):
    """The states of all streams, by slot, as rows of bytes [N, row_bytes]."""

    @property
    def state(self) -> StateSpec:
        """The layout of a row."""

    def load(self, slots: I64, states: U8 | None) -> None:
        """Set states; None for the model's initial ones."""

    def read(self, slots: I64) -> U8:
        """Copy states."""


class Stepper:
    """The model, the states of all streams, and the memory to step them.

    The executor runs one step at a time. All other methods run in the loop's thread, on streams that are in no run.

    Args:
        model: the model to step.
        max_batch_size: the most streams in one step.
        max_streams: slots run from 1 to this.
        device: of the states and weights.
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
        """Set slots to the initial state, or to rows of bytes, uint8 [N, row_bytes]."""
        if rows is None:
            self._store.clear(slots)
        else:
            self._store.write(slots, rows)

    @torch.inference_mode()
    def read(self, slots: I64) -> U8:
        """Copy the states of slots as rows of bytes, uint8 [N, row_bytes]."""
        return self._store.read(slots)


class _OnCpu:
    """Steps any number of rows; frames, states and outputs are read and written in place."""

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
    """Steps batches that are padded to the sizes for which graphs were captured."""

    def __init__(self, model: TorchNetwork, store: StateStore, max_batch_size: int) -> None:
        pool = torch.cuda.graph_pool_handle()
        self._sizes = [*(size for size in _SIZES if size < max_batch_size), max_batch_size]
        self._batches = [_GraphBatch(model, store, size, pool) for size in self._sizes]

    def run(self, slots: I64, rows: I64, inputs: F32, outputs: F32) -> None:
        batch = self._batches[bisect_left(self._sizes, len(slots))]
        outputs[rows] = batch.run(slots, inputs[rows])


class _GraphBatch:
    """Buffers for one batch size, padding included, reused for every batch of that size.

    Copies to the device, gather, step, scatter and copies back are one launch; the host waits once, for the outputs.

    `pool` is memory that graphs of other sizes share (`torch.cuda.graph_pool_handle`).
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
            The outputs, float32 [B, outputs], which are valid until the next call.

        Raises:
            StateLost: after any error, because the progress of a graph is unknown.
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
