"""The recurrence of `nn.RNN`."""
# ruff: noqa: D102 - see the protocols in `cell`

from __future__ import annotations

from typing import Final

import torch

from instep.core.compiled import kernel
from instep.core.typing import F32
from instep.models.recurrent.cell import Kernel, Products, States
from instep.models.recurrent.description import Nonlinearity


class Rnn:
    """A `Recurrence`."""

    plain: Final[Kernel] = "torch"
    width_multiple: Final = 1  # its one function is over all rows at once, as torch's is

    def __init__(self, nonlinearity: Nonlinearity) -> None:
        self._nonlinearity = nonlinearity
        self._function = {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[nonlinearity]

    def call(
        self, kernel: Kernel, x: torch.Tensor, states: States, flat: list[torch.Tensor], layers: int, *, bias: bool
    ) -> tuple[torch.Tensor, States]:
        y, h = self._function(x, states["h"], flat, bias, layers, 0.0, False, False, False)
        return y, {"h": h}

    def cell(self, products: Products, states: States) -> RnnCell:
        return RnnCell(products, states["h"], self._nonlinearity)


class RnnCell:
    """A `Cell`."""

    def __init__(self, products: Products, state: torch.Tensor, nonlinearity: Nonlinearity) -> None:
        self._products = products
        self._state = state
        self._state_array: F32 = state.numpy()
        self._activate = {"tanh": torch.tanh_, "relu": torch.relu_}[nonlinearity]

    def run(self, x: torch.Tensor) -> torch.Tensor:
        self._products.run(x, self._state)
        add_products(self._state_array, *self._products.arrays)
        return self._activate(self._state)


@kernel
def add_products(state: F32, of_input: F32, of_state: F32, biases: F32) -> None:
    """Write the sum of the products with the input and with the state: float32 [rows, width] each.

    `biases`, float32 [2, width], are added to both before; of shape [0, 0] where the products hold them, or there are
    none.
    """
    for place in range(len(state)):
        new, given, other = state[place], of_input[place], of_state[place]
        if len(biases):
            bias, other_bias = biases[0], biases[1]
            for at in range(len(new)):
                new[at] = (given[at] + bias[at]) + (other[at] + other_bias[at])
        else:
            for at in range(len(new)):
                new[at] = given[at] + other[at]
