"""The hidden states of all streams: one tensor on the device, one row a slot in each layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from instep.core.slots import SCRATCH_SLOT
from instep.core.typing import F32


class StateCache:
    """float32 [layers, slots, size] on the device, allocated once and changed in place.

    Slot 0 is scratch: padding rows read and write it, no stream ever does.

    Args:
        max_streams: slots beside the scratch slot.
        layers: layers of the network.
        size: state of one layer, as the network keeps it (padding included).
        device: where the tensor lives.
    """

    def __init__(self, max_streams: int, layers: int, size: int, device: torch.device) -> None:
        self._states = torch.zeros(layers, max_streams + 1, size, device=device)
        # On the CPU numpy copies rows several times faster than torch, and without giving up the interpreter's lock.
        self._array: F32 | None = self._states.numpy() if device.type == "cpu" else None

    def gather(self, slots: Tensor, out: Tensor) -> None:
        """States of the slots as the network takes them: int64 [B] → `out` float32 [layers, B, size], contiguous."""
        if self._array is not None:
            np.take(self._array, slots.numpy(), 1, out.numpy(), "clip")  # slots are good; "raise" would copy `out`
        else:
            torch.index_select(self._states, 1, slots, out=out)

    def scatter(self, slots: Tensor, states: Tensor) -> None:
        """Write states back: int64 [B], float32 [layers, B, size]. Rows of the scratch slot may repeat."""
        if self._array is not None:
            self._array[:, slots.numpy()] = states.numpy()
        else:
            self._states.index_copy_(1, slots, states)

    def clear(self, slots: Tensor) -> None:
        """Set slots to the initial state, zeros: int64 [N]."""
        self._states.index_fill_(1, slots, 0.0)

    def clear_scratch(self) -> None:
        """Set the scratch slot to zeros, so that what padding computes never grows."""
        self._states[:, SCRATCH_SLOT].zero_()
