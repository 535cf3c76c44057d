"""Hidden states on the device: one tensor, one row a slot in each layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from instep.core.tables import SCRATCH_SLOT
from instep.core.typing import F32, I64, float32_zeros


class StateCache:
    """float32 [layers, slots, size] on the device, allocated once and changed in place.

    Slot 0 is scratch: padding rows read it, and `GraphBatch` writes and clears it; no stream ever does either.

    Args:
        rows: slots beside the scratch slot.
        layers: layers of the network.
        size: state of one layer, as the network keeps it (padding included).
        device: where the tensor lives.
        zeros: makes the array that the tensor is on the CPU; another than numpy's may be in memory that is shared.
    """

    def __init__(
        self,
        rows: int,
        layers: int,
        size: int,
        device: torch.device,
        zeros: Callable[[tuple[int, ...]], F32] = float32_zeros,
    ) -> None:
        # On the CPU numpy copies rows several times faster than torch, and without giving up the interpreter's lock.
        self._array: F32 | None = None
        if device.type == "cpu":
            self._array = zeros((layers, rows + 1, size))
            self._states = torch.from_numpy(self._array)
        else:
            self._states = torch.zeros(layers, rows + 1, size, device=device)

    def gather(self, slots: Tensor, out: Tensor) -> None:
        """States of the slots as the network takes them: int64 [B] → `out` float32 [layers, B, size], contiguous."""
        torch.index_select(self._states, 1, slots, out=out)

    def scatter(self, slots: Tensor, states: Tensor) -> None:
        """Write states back: int64 [B], float32 [layers, B, size]. Rows of the scratch slot may repeat."""
        self._states.index_copy_(1, slots, states)

    @property
    def array(self) -> F32:
        """The states themselves, float32 [layers, slots, size], on the CPU."""
        assert self._array is not None, "the states are on another device"
        return self._array

    def read(self, slots: I64) -> F32:
        """States of slots as the host keeps them: int64 [N] → float32 [N, layers, size], a copy."""
        if self._array is not None:
            return np.take(self._array, slots, 1).transpose(1, 0, 2)
        there = torch.from_numpy(slots).to(self._states.device)
        states: F32 = torch.index_select(self._states, 1, there).cpu().numpy()
        return states.transpose(1, 0, 2)

    def write(self, slots: I64, states: F32) -> None:
        """Write states from the host: int64 [N], distinct, float32 [N, layers, size]."""
        by_layer = states.transpose(1, 0, 2)
        if self._array is not None:
            self._array[:, slots] = by_layer
        else:
            there = torch.from_numpy(slots).to(self._states.device)
            moved = torch.from_numpy(np.ascontiguousarray(by_layer)).to(self._states.device)
            self._states.index_copy_(1, there, moved)

    def clear(self, slots: Tensor) -> None:
        """Set slots to the initial state, zeros: int64 [N]."""
        self._states.index_fill_(1, slots, 0.0)

    def clear_scratch(self) -> None:
        """Set the scratch slot to zeros, so that what padding computes never grows."""
        self._states[:, SCRATCH_SLOT].zero_()
