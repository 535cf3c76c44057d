"""The states of all streams on the device: one row of bytes per stream, leaves as views into it.

`StateSpec` drives everything here; there is no second list of what a slot holds. On the CPU a step reads and writes the
rows of its slots where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64, U8, float32_zeros
from instep.models.base import StateSpec


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
