"""The states of all streams on the device: one row of bytes per stream, leaves as views into it.

`StateSpec` drives everything here; there is no second list of what a slot holds. On the CPU two compiled loops copy
rows straight into and out of a bound step's buffers, whatever their strides; with numpy or torch, each leaf would take
several calls and one more copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64, U8, float32_zeros
from instep.models.base import BoundStep, StateSpec

_Kernel = TypeVar("_Kernel", bound=Callable[..., None])
_SIGNATURE: Final = "void(uint8[:, ::1], int64[::1], int64, uint8[::1], int64[::1])"


def _compiled(function: _Kernel) -> _Kernel:
    """Compiled when this module is imported, or read from numba's cache."""
    return cast("_Kernel", numba.njit(_SIGNATURE, cache=True, nogil=True)(function))


@_compiled
def _gather(rows: U8, slots: I64, count: int, leaf: U8, layout: I64) -> None:
    """Copy one leaf of the first `count` slots into a step's buffer."""
    offset, start, row_stride, outer, outer_stride, inner = layout
    for i in range(count):
        slot = slots[i]
        for j in range(outer):
            source, target = offset + j * inner, start + i * row_stride + j * outer_stride
            # Slices: a loop over them becomes copies of whole vectors, 30 times faster than one over two indices.
            row, place = rows[slot, source : source + inner], leaf[target : target + inner]
            for k in range(inner):
                place[k] = row[k]


@_compiled
def _scatter(rows: U8, slots: I64, count: int, leaf: U8, layout: I64) -> None:
    """Copy one leaf of the first `count` rows of a step's buffer into their slots."""
    offset, start, row_stride, outer, outer_stride, inner = layout
    for i in range(count):
        slot = slots[i]
        for j in range(outer):
            source, target = start + i * row_stride + j * outer_stride, offset + j * inner
            row, place = rows[slot, target : target + inner], leaf[source : source + inner]
            for k in range(inner):
                row[k] = place[k]


class StateStore:
    """uint8 [max_streams + 1, row_bytes] on the device, allocated once and changed in place.

    Slot 0 is scratch: padding rows read it, a captured graph writes it, and no stream ever does.

    Args:
        spec: what a row holds.
        max_streams: slots run from 1 to this.
        device: where the rows are.
        zeros: makes the memory on the CPU; another function than numpy's may put it where forked processes share it.
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
        """Put slots, int64 [N], into the initial state."""
        self.rows[torch.from_numpy(slots).to(self.device)] = self.initial

    def read(self, slots: I64) -> U8:
        """The rows of slots, int64 [N], as the host keeps them: uint8 [N, row_bytes], a copy."""
        there = torch.from_numpy(slots).to(self.device)
        rows: U8 = self.rows.index_select(0, there).cpu().numpy()
        return rows

    def write(self, slots: I64, rows: U8) -> None:
        """Give slots, int64 [N], distinct, the rows uint8 [N, row_bytes]."""
        there = torch.from_numpy(slots).to(self.device)
        self.rows.index_copy_(0, there, torch.tensor(rows, device=self.device))

    def gather(self, slots: Tensor, into: Mapping[str, Tensor]) -> None:
        """Enqueue copies of the leaves of slots, int64 [B] on the device, into tensors [B, *shape]."""
        for name, leaf in self.leaves.items():
            into[name].copy_(leaf.index_select(0, slots))

    def scatter(self, slots: Tensor, state: Mapping[str, Tensor]) -> None:
        """Enqueue copies of tensors [B, *shape] into slots; those of the scratch slot may repeat, and it is cleared."""
        for name, leaf in self.leaves.items():
            leaf.index_copy_(0, slots, state[name])
        self.rows[SCRATCH_SLOT].copy_(self.initial)

    def _views(self) -> dict[str, Tensor]:
        views = {}
        for leaf, offset in zip(self.spec.leaves, self.spec.offsets, strict=True):
            part = self.rows[:, offset : offset + leaf.nbytes]
            views[leaf.name] = part.view(getattr(torch, leaf.dtype.name)).view(len(part), *leaf.shape)
        return views


class StateCopies:
    """Copies between a store on the CPU and the buffers of one bound step.

    Raises:
        ValueError: when a leaf of the step has strides that are not one run of bytes, repeated at one distance.
    """

    def __init__(self, store: StateStore, step: BoundStep) -> None:
        self._rows: U8 = store.rows.numpy()
        self._before = self._parts(store.spec, step.state)
        self._after = self._parts(store.spec, step.new_state)

    def gather(self, slots: I64) -> None:
        """Fill `step.state` with the rows of slots, int64 [B]."""
        for leaf, layout in self._before:
            _gather(self._rows, slots, len(slots), leaf, layout)

    def scatter(self, slots: I64, count: int) -> None:
        """Write the first `count` rows of `step.new_state` back into their slots."""
        for leaf, layout in self._after:
            _scatter(self._rows, slots, count, leaf, layout)

    @staticmethod
    def _parts(spec: StateSpec, leaves: Mapping[str, Tensor]) -> list[tuple[U8, I64]]:
        parts = []
        for leaf, offset in zip(spec.leaves, spec.offsets, strict=True):
            tensor = leaves[leaf.name]
            memory: npt.NDArray[np.uint8] = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
            parts.append((memory, np.array([offset, *_layout(tensor, leaf.name)], np.int64)))
        return parts


def _layout(tensor: Tensor, name: str) -> tuple[int, int, int, int, int]:
    """Where the elements of [B, *shape] are, in bytes: first, row stride, runs per row, their distance, run length."""
    item = tensor.element_size()
    row_stride, *strides = (stride * item for stride in tensor.stride())
    dims = list(zip(tensor.shape[1:], strides, strict=True))
    inner = item
    while dims and (dims[-1][1] == inner or dims[-1][0] == 1):
        inner *= dims.pop()[0]
    outer, distance = 1, 0
    if dims:
        outer, distance = dims.pop()
        while dims and (dims[-1][1] == distance * outer or dims[-1][0] == 1):
            outer *= dims.pop()[0]
    if dims:
        raise ValueError(f"leaf {name} of the step has strides {tensor.stride()}: they cannot be copied in runs")
    return int(tensor.storage_offset()) * item, row_stride, outer, distance, inner
