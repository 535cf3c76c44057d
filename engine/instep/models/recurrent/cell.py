"""What recurrent layers of every kind have in common: how they are stepped by hand, and by torch.

By hand, a layer is two matrix products and the gates in place. It is the same arithmetic in the same order as torch's
own, without what that allocates, and, in the kernel `fused`, without the pass in which `addmm` writes the biases.
Nothing promises equal bits, so certification compares them (`RecurrentNetwork.select_step`). (A GRU written with `lerp`
or `addcmul` differs, and so does `fused` where MKL cuts a product into parts, as on a Xeon with 400 units; measured
with torch 2.13.)

The compiled kernels in `gru`, `lstm` and `rnn` do in one pass each what torch would do in several. Every multiplication
and addition is rounded by itself and in torch's order, so the bits are the same; sigmoid and tanh stay torch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol, TypeAlias

import numpy as np
import torch

from instep.core.compiled import kernel
from instep.core.typing import F32

Kernel: TypeAlias = Literal["fused", "addmm", "torch", "native"]
"""Ways to step recurrent layers, or cells of a module: by hand with the biases added along with the gates; by hand
with `addmm`; with torch's own call for them; with torch's operators, as that call does without oneDNN."""
BY_HAND: Final[tuple[Kernel, ...]] = ("fused", "addmm")
"""The quickest first."""
VECTOR: Final = 16
"""Floats of the widest vector."""
States: TypeAlias = Mapping[str, torch.Tensor]
"""By leaf, float32 [layers, R, width], padding included."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One recurrent layer, padded; its gates are side by side, in torch's order."""

    input_weight: torch.Tensor
    """[inputs, gates · width]."""
    state_weight: torch.Tensor
    """[width, gates · width]."""
    input_bias: torch.Tensor | None
    state_bias: torch.Tensor | None


class Cell(Protocol):
    """One layer by hand, on its own part of the states."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """Step every row of frames [R, inputs]; the states change in place, and `h` [R, width] is returned."""


class Recurrence(Protocol):
    """One kind of recurrent layer."""

    @property
    def plain(self) -> Kernel:
        """The kernel of torch whose bits the steps by hand have."""

    @property
    def width_multiple(self) -> int:
        """Only in multiples of it are steps by hand worth trying: in others, torch ends its vectors elsewhere."""

    def call(
        self, kernel: Kernel, x: torch.Tensor, states: States, flat: list[torch.Tensor], layers: int, *, bias: bool
    ) -> tuple[torch.Tensor, States]:
        """Torch's function over frames [T, R, inputs]: outputs [T, R, width], and new states."""

    def cell(self, products: Products, states: States) -> Cell:
        """One layer by hand, with its own part of the states by leaf, [R, width], which change in place."""


class Products:
    """The matrix products of one layer with its input and with its state.

    Args:
        layer: its weights.
        room: where they are put, [2, R, gates · width]; the layers share it.
        adds_biases: along with the gates instead of within the products.
    """

    def __init__(self, layer: LayerWeights, room: torch.Tensor, *, adds_biases: bool) -> None:
        self.biases: F32 = np.zeros((0, 0), np.float32)
        """Those that are still to be added, float32 [2, gates · width]; of shape [0, 0] where there are none."""
        if adds_biases and layer.input_bias is not None and layer.state_bias is not None:
            self.biases = torch.stack([layer.input_bias, layer.state_bias]).numpy()
            layer = replace(layer, input_bias=None, state_bias=None)
        self._layer = layer
        self.of_input, self.of_state = room
        self.arrays: tuple[F32, F32, F32] = (self.of_input.numpy(), self.of_state.numpy(), self.biases)
        """Both products and the biases, for kernels."""

    def run(self, x: torch.Tensor, state: torch.Tensor) -> None:
        """Multiply."""
        layer = self._layer
        _product(layer.input_bias, x, layer.input_weight, self.of_input)
        _product(layer.state_bias, state, layer.state_weight, self.of_state)


def layer_weights(flat: Sequence[torch.Tensor], layers: int) -> list[LayerWeights]:
    """Each layer's weights, as views of what torch's function takes."""
    each = len(flat) // layers
    found = []
    for first in range(0, len(flat), each):
        input_weight, state_weight, *biases = flat[first : first + each]
        input_bias, state_bias = biases or (None, None)
        found.append(LayerWeights(input_weight.t(), state_weight.t(), input_bias, state_bias))
    return found


def _product(bias: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.addmm(bias, rows, weight, out=out)


@kernel
def add_gates(of_input: F32, of_state: F32, biases: F32, columns: int) -> None:
    """Add the first `columns` gates of the state to those of the input: float32 [rows, gates · width] each.

    `biases`, float32 [2, gates · width], are added to both before; of shape [0, 0] where the products hold them, or
    there are none.
    """
    for place in range(len(of_input)):
        gates, other = of_input[place, :columns], of_state[place, :columns]
        if len(biases):
            bias, other_bias = biases[0, :columns], biases[1, :columns]
            for at in range(columns):
                gates[at] = (gates[at] + bias[at]) + (other[at] + other_bias[at])
        else:
            for at in range(columns):
                gates[at] = gates[at] + other[at]
