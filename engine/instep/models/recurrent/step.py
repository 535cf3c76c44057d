"""The step of one batch size: dense layers, the GRU and dense layers on buffers that are allocated once.

On the CPU the GRU is stepped by hand where that pays: two matrix products per layer and the gates in place. It is the
same arithmetic in the same order as `torch.gru`, without what that allocates, and, in the kernel `fused`, without the
pass in which `addmm` writes the biases. Nothing promises equal bits, so certification compares them
(`GruNetwork.select_step`). (Written with `lerp` or `addcmul` they differ, and so does `fused` where MKL cuts a product
into parts, as on a Xeon with 400 units; measured with torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np
import torch

from instep.core.compiled import kernel
from instep.core.typing import F32

InPlace: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
GruKernel: TypeAlias = Literal["fused", "addmm", "torch"]
"""By hand with the biases added along with the gates, by hand with `addmm`, or with `torch.gru`."""
BY_HAND: Final[tuple[GruKernel, ...]] = ("fused", "addmm")
"""The quickest first."""


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """A dense layer, padded."""

    weight: torch.Tensor
    """[inputs, outputs]."""
    bias: torch.Tensor
    """[outputs]."""
    activate: InPlace | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer of the GRU, padded; the gates reset, update and new state side by side."""

    input_weight: torch.Tensor
    """[inputs, 3 · width]."""
    state_weight: torch.Tensor
    """[width, 3 · width]."""
    input_bias: torch.Tensor | None
    state_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class GruWeights:
    """Everything a step computes with."""

    before: Sequence[DenseWeights]
    layers: Sequence[LayerWeights]
    flat: list[torch.Tensor]
    """The layers' tensors as `torch.gru` takes them."""
    after: Sequence[DenseWeights]
    input_width: int
    """Columns of a frame, padding included."""
    width: int
    """Columns of a layer's state, padding included."""
    device: torch.device

    def gru(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`torch.gru` over [T, R, inputs] and states [layers, R, width]."""
        # nn.GRU.forward ends in this call; its checks and bookkeeping cost as much again at small batches.
        has_bias = self.layers[0].input_bias is not None
        return torch.gru(x, h, self.flat, has_bias, len(self.layers), 0.0, False, False, False)


class GruStep:
    """A `BoundStep`; its states change in place.

    Args:
        weights: what it computes with.
        rows: of the batch.
        state_size: the hidden size without padding.
        kernel: how to step the GRU.
    """

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def __init__(self, weights: GruWeights, rows: int, state_size: int, kernel: GruKernel) -> None:
        device, width = weights.device, weights.width
        self._weights = weights
        self.kernel = kernel
        self.x = torch.zeros(rows, weights.input_width, device=device)
        self.h = torch.zeros(len(weights.layers), rows, width, device=device)
        """States [layers, rows, width], padding included."""
        self.state = {"h": self.h.transpose(0, 1)[:, :, :state_size]}
        self.new_state = self.state
        self._before = [_Dense(layer, rows) for layer in weights.before]
        self._after = [_Dense(layer, rows) for layer in weights.after]
        self._states = self.h.unbind()
        self._padding = self.h[:, :, state_size:] if state_size < width else None
        self._cells: list[_Cell] = []
        if kernel in BY_HAND:
            products = torch.empty(2, rows, 3 * width, device=device)
            self._cells = [
                _Cell(layer, state, products, adds_biases=kernel == "fused")
                for layer, state in zip(weights.layers, self._states, strict=True)
            ]
        self.y = self._after[-1].out if self._after else self._states[-1]

    def run(self) -> None:
        """Step every row."""
        if self._padding is not None:
            # Where a row overflowed, 0 · inf left NaN there, and the next step may have another stream in that row.
            self._padding.zero_()
        x = self.x
        for dense in self._before:
            x = dense.run(x)
        if self._cells:
            for cell in self._cells:
                x = cell.run(x)
        else:
            _, states = self._weights.gru(x.unsqueeze(0), self.h)
            self.h.copy_(states)
            x = self._states[-1]
        for dense in self._after:
            x = dense.run(x)


class _Dense:
    def __init__(self, layer: DenseWeights, rows: int) -> None:
        self._layer = layer
        self.out = torch.empty(rows, layer.weight.shape[1], device=layer.weight.device)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        torch.addmm(self._layer.bias, x, self._layer.weight, out=self.out)
        if self._layer.activate is not None:
            self._layer.activate(self.out)
        return self.out


class _Cell:
    """One layer by hand.

    Args:
        layer: its weights.
        state: [rows, width], changed in place.
        products: room for the products with the input and with the state, [2, rows, 3 · width]; the layers share it.
        adds_biases: with the gates instead of within the products.
    """

    def __init__(self, layer: LayerWeights, state: torch.Tensor, products: torch.Tensor, *, adds_biases: bool) -> None:
        size = state.shape[1]
        self._biases: F32 = np.zeros((0, 0), np.float32)
        if adds_biases and layer.input_bias is not None and layer.state_bias is not None:
            self._biases = torch.stack([layer.input_bias, layer.state_bias]).numpy()
            layer = replace(layer, input_bias=None, state_bias=None)
        self._layer = layer
        self._state = state
        self._of_input, self._of_state = products
        self._gates, self._new = self._of_input[:, : 2 * size], self._of_state[:, 2 * size :]
        self._arrays: tuple[F32, F32] = self._of_input.numpy(), self._of_state.numpy()
        self._state_array: F32 = state.numpy()

    def run(self, x: torch.Tensor) -> torch.Tensor:
        layer, state = self._layer, self._state
        _product(layer.input_bias, x, layer.input_weight, self._of_input)
        _product(layer.state_bias, state, layer.state_weight, self._of_state)
        add_gates(*self._arrays, self._biases)
        self._gates.sigmoid_()
        new_state(*self._arrays, self._biases)
        self._new.tanh_()
        update_state(self._state_array, *self._arrays)
        return state


def _product(bias: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.addmm(bias, rows, weight, out=out)


# The kernels do between torch's own functions, in one pass each, what torch would do in several. Every multiplication
# and addition is rounded by itself and in the order in which `torch.gru` does it, so the bits are the same; sigmoid and
# tanh stay torch's. Arrays hold the gates of a row side by side: reset, update, new state.


@kernel
def add_gates(of_input: F32, of_state: F32, biases: F32) -> None:
    """Add the reset and update gates of the state to those of the input: float32 [rows, 3 · width] each.

    `biases`, float32 [2, 3 · width], are added to both before; of shape [0, 0] where the products hold them, or there
    are none.
    """
    width = of_input.shape[1] // 3
    for place in range(len(of_input)):
        gates, other = of_input[place, : 2 * width], of_state[place, : 2 * width]
        if len(biases):
            bias, other_bias = biases[0, : 2 * width], biases[1, : 2 * width]
            for at in range(2 * width):
                gates[at] = (gates[at] + bias[at]) + (other[at] + other_bias[at])
        else:
            for at in range(2 * width):
                gates[at] = gates[at] + other[at]


@kernel
def new_state(of_input: F32, of_state: F32, biases: F32) -> None:
    """Reset the state's part of the new state, and add the input's; the result, before tanh, is in `of_state`.

    `biases` as for `add_gates`.
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
