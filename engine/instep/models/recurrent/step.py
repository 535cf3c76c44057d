"""The step of one batch size, on buffers that are allocated once: frame layers, recurrent layers, frame layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from instep.models.recurrent.cell import BY_HAND, Cell, Kernel, LayerWeights, Products, Recurrence, States
from instep.models.recurrent.frame_layers import OnRows, apply


@dataclass(frozen=True, slots=True)
class Weights:
    """Everything a step computes with."""

    before: Sequence[OnRows]
    recurrence: Recurrence
    layers: Sequence[LayerWeights]
    flat: list[torch.Tensor]
    """The layers' tensors as torch's functions take them."""
    after: Sequence[OnRows]
    input_width: int
    """Columns of a frame, padding included."""
    width: int
    """Columns of a layer's state, padding included."""
    leaves: Sequence[str]
    """Names of the states, `h` first."""
    device: torch.device

    def call(self, kernel: Kernel, x: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        """Torch's function over [T, R, width of its input]; see `Recurrence.call`."""
        has_bias = self.layers[0].input_bias is not None
        return self.recurrence.call(kernel, x, states, self.flat, len(self.layers), bias=has_bias)


class RecurrentStep:
    """A `BoundStep`; its states change in place.

    Args:
        weights: what it computes with.
        rows: of the batch.
        state_size: the hidden size without padding.
        kernel: how to step the recurrent layers.
    """

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def __init__(self, weights: Weights, rows: int, state_size: int, kernel: Kernel) -> None:
        device, width = weights.device, weights.width
        self._weights = weights
        self.kernel = kernel
        self.x = torch.zeros(rows, weights.input_width, device=device)
        self.leaves = {name: torch.zeros(len(weights.layers), rows, width, device=device) for name in weights.leaves}
        """States [layers, rows, width], padding included."""
        self.state = {name: leaf.transpose(0, 1)[:, :, :state_size] for name, leaf in self.leaves.items()}
        self.new_state = self.state
        self._padding = [leaf[:, :, state_size:] for leaf in self.leaves.values() if state_size < width]
        self._before, self._after = (
            [torch.empty(rows, layer.width, device=device) for layer in layers]
            for layers in (weights.before, weights.after)
        )
        self._cells: list[Cell] = []
        if kernel in BY_HAND:
            room = torch.empty(2, rows, weights.layers[0].state_weight.shape[1], device=device)
            self._cells = [
                weights.recurrence.cell(
                    Products(layer, room, adds_biases=kernel == "fused"),
                    {name: leaf[index] for name, leaf in self.leaves.items()},
                )
                for index, layer in enumerate(weights.layers)
            ]
        self._last_state = self.leaves["h"][-1]
        self.y = self._after[-1] if self._after else self._last_state

    def run(self) -> None:
        """Step every row."""
        for padding in self._padding:
            # Where a row overflowed, 0 · inf left NaN there, and the next step may have another stream in that row.
            padding.zero_()
        x = apply(self._weights.before, self.x, self._before)
        if self._cells:
            for cell in self._cells:
                x = cell.run(x)
        else:
            _, states = self._weights.call(self.kernel, x.unsqueeze(0), self.leaves)
            for name, leaf in self.leaves.items():
                leaf.copy_(states[name])
            x = self._last_state
        apply(self._weights.after, x, self._after)
