"""The hidden states of all streams: one tensor on the device, one row a slot in each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from instep.core.slots import SCRATCH_SLOT


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

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._states.nbytes

    def gather(self, slots: Tensor) -> Tensor:
        """States of the slots as the network takes them: int64 [B] → float32 [layers, B, size], contiguous."""
        return self._states.index_select(1, slots)

    def scatter(self, slots: Tensor, states: Tensor) -> None:
        """Write states back: int64 [B], float32 [layers, B, size]. Rows of the scratch slot may repeat."""
        self._states.index_copy_(1, slots, states)

    def clear(self, slots: Tensor) -> None:
        """Set slots to the initial state, zeros: int64 [N]."""
        self._states.index_fill_(1, slots, 0.0)

    def clear_scratch(self) -> None:
        """Set the scratch slot to zeros, so that what padding computes never grows."""
        self._states[:, SCRATCH_SLOT].zero_()
