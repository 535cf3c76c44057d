"""The recurrence of `nn.LSTM`.

On the CPU torch computes an LSTM with oneDNN, which gives a row the same bits in every batch but prepares its weights
anew in each call. Without oneDNN, torch computes it as it does a GRU, with other bits. The step by hand has those bits,
and is several times faster in small batches.
"""
# ruff: noqa: D102 - see the protocols in `cell`

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch.nn import functional

from instep.core.compiled import kernel
from instep.core.typing import F32
from instep.models.recurrent.cell import VECTOR, Kernel, LayerWeights, Products, States, add_gates, layer_weights


class Lstm:
    """A `Recurrence`."""

    plain: Final[Kernel] = "native"
    width_multiple: Final = VECTOR

    def call(
        self, kernel: Kernel, x: torch.Tensor, states: States, flat: list[torch.Tensor], layers: int, *, bias: bool
    ) -> tuple[torch.Tensor, States]:
        if kernel != "torch":
            return _without_onednn(x, states, layer_weights(flat, layers))
        with torch.no_grad():  # with gradients, oneDNN's code for training gives several layers other bits
            y, h, c = torch.lstm(x, (states["h"], states["c"]), flat, bias, layers, 0.0, False, False, False)
        return y, {"h": h, "c": c}

    def cell(self, products: Products, states: States) -> LstmCell:
        return LstmCell(products, states["h"], states["c"])


class LstmCell:
    """A `Cell`."""

    def __init__(self, products: Products, state: torch.Tensor, cell_state: torch.Tensor) -> None:
        width = state.shape[1]
        self._products = products
        self._state = state
        gates = products.of_input
        self._input_and_forget = gates[:, : 2 * width]
        self._new, self._output = gates[:, 2 * width : 3 * width], gates[:, 3 * width :]
        self._arrays: tuple[F32, F32] = state.numpy(), cell_state.numpy()

    def run(self, x: torch.Tensor) -> torch.Tensor:
        of_input, of_state, biases = self._products.arrays
        state, cell_state = self._arrays
        self._products.run(x, self._state)
        add_gates(of_input, of_state, biases, of_input.shape[1])
        self._input_and_forget.sigmoid_()
        self._new.tanh_()
        self._output.sigmoid_()
        update_cell_state(cell_state, state, of_input)
        self._state.tanh_()
        apply_output_gate(state, of_input)
        return self._state


def _without_onednn(x: torch.Tensor, states: States, layers: Sequence[LayerWeights]) -> tuple[torch.Tensor, States]:
    """`torch.lstm` as torch computes it without oneDNN, operation by operation; see `Recurrence.call`.

    The switch that would make torch do so belongs to the whole process, and other threads may be stepping models whose
    bits depend on it.
    """
    after: dict[str, list[torch.Tensor]] = {"h": [], "c": []}
    for layer, h, c in zip(layers, states["h"], states["c"], strict=True):
        outputs = []
        for given in functional.linear(x, layer.input_weight.t(), layer.input_bias):
            gates = functional.linear(h, layer.state_weight.t(), layer.state_bias).add_(given)
            enter, forget, new, output = gates.chunk(4, dim=1)
            c = (forget.sigmoid_() * c).add_(enter.sigmoid_() * new.tanh_())
            h = output.sigmoid_() * c.tanh()
            outputs.append(h)
        x = torch.stack(outputs)
        after["h"].append(h)
        after["c"].append(c)
    return x, {name: torch.stack(leaves) for name, leaves in after.items()}


@kernel
def update_cell_state(cell_state: F32, copy: F32, gates: F32) -> None:
    """Forget some of the cell state, float32 [rows, width], and add some of the new one: in place, and into `copy`.

    The gates of a row are side by side: input, forget, new cell state, output.
    """
    width = cell_state.shape[1]
    for place in range(len(cell_state)):
        cell, copied = cell_state[place], copy[place]
        enter, forget, new = gates[place, :width], gates[place, width : 2 * width], gates[place, 2 * width : 3 * width]
        for at in range(width):
            kept = forget[at] * cell[at]
            cell[at] = kept + enter[at] * new[at]
            copied[at] = cell[at]


@kernel
def apply_output_gate(state: F32, gates: F32) -> None:
    """Multiply the tanh of the cell state, float32 [rows, width], by the output gate: the state."""
    width = state.shape[1]
    for place in range(len(state)):
        values, output = state[place], gates[place, 3 * width :]
        for at in range(width):
            values[at] = output[at] * values[at]
