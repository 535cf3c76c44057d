"""The recurrence of `nn.GRU`."""
# ruff: noqa: D102 - see the protocols in `cell`

from __future__ import annotations

from typing import Final

import torch

from instep.core.compiled import kernel
from instep.core.typing import F32
from instep.models.recurrent.cell import VECTOR, Kernel, Products, States, add_gates


class Gru:
    """A `Recurrence`."""

    plain: Final[Kernel] = "torch"
    width_multiple: Final = VECTOR

    def call(
        self, kernel: Kernel, x: torch.Tensor, states: States, flat: list[torch.Tensor], layers: int, *, bias: bool
    ) -> tuple[torch.Tensor, States]:
        # nn.GRU.forward ends in this call; its checks and bookkeeping cost as much again at small batches.
        y, h = torch.gru(x, states["h"], flat, bias, layers, 0.0, False, False, False)
        return y, {"h": h}

    def cell(self, products: Products, states: States) -> GruCell:
        return GruCell(products, states["h"])


class GruCell:
    """A `Cell`."""

    def __init__(self, products: Products, state: torch.Tensor) -> None:
        width = state.shape[1]
        self._products = products
        self._state = state
        self._gates, self._new = products.of_input[:, : 2 * width], products.of_state[:, 2 * width :]
        self._state_array: F32 = state.numpy()

    def run(self, x: torch.Tensor) -> torch.Tensor:
        of_input, of_state, biases = self._products.arrays
        self._products.run(x, self._state)
        add_gates(of_input, of_state, biases, self._gates.shape[1])
        self._gates.sigmoid_()
        new_state(of_input, of_state, biases)
        self._new.tanh_()
        update_state(self._state_array, of_input, of_state)
        return self._state


@kernel
def new_state(of_input: F32, of_state: F32, biases: F32) -> None:
    """Reset the state's part of the new state, and add the input's; the result, before tanh, is in `of_state`.

    The gates of a row are side by side: reset, update, new state. `biases` as for `add_gates`.
    """
    width = of_input.shape[1] // 3
    for place in range(len(of_input)):
        reset, of_new = of_input[place, :width], of_input[place, 2 * width :]
        new = of_state[place, 2 * width :]
        if len(biases):
            bias, new_bias = biases[0, 2 * width :], biases[1, 2 * width :]
            for at in range(width):
                new[at] = (new[at] + new_bias[at]) * reset[at] + (of_new[at] + bias[at])
        else:
            for at in range(width):
                new[at] = new[at] * reset[at] + of_new[at]


@kernel
def update_state(state: F32, of_input: F32, of_state: F32) -> None:
    """Let the update gate choose between the state, float32 [rows, width], and the new one: it changes in place."""
    width = state.shape[1]
    for place in range(len(state)):
        old, update, new = state[place], of_input[place, width : 2 * width], of_state[place, 2 * width :]
        for at in range(width):
            old[at] = (old[at] - new[at]) * update[at] + new[at]
