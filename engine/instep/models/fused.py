"""The GRU of one frame by hand: two matrix products a layer, and the gates in place, in memory that is used again.

It is the same arithmetic in the same order as `torch.gru`, without what that allocates: on the CPU it takes less time
and less cache. Nothing promises that its bits are the same, so certification compares them (`certify`), and where one
differs it is not used. (Written with `lerp` or `addcmul` they do differ; measured with torch 2.13.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class _Layer:
    input_weight: torch.Tensor
    state_weight: torch.Tensor
    input_bias: torch.Tensor | None
    state_bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class _Gates:
    """Views of the two products for one batch size; reset and update lie before the new state in both."""

    of_input: torch.Tensor
    of_state: torch.Tensor
    both: torch.Tensor
    both_of_state: torch.Tensor
    reset: torch.Tensor
    update: torch.Tensor
    new_of_input: torch.Tensor
    new: torch.Tensor


class FusedGru:
    """Steps a GRU whose states change in place. One thread at a time: all batch sizes share two buffers.

    Args:
        weights: as `nn.GRU` orders them, layer by layer.
        layers: how many layers.
        bias: whether there are biases among the weights.
    """

    def __init__(self, weights: Sequence[torch.Tensor], layers: int, *, bias: bool) -> None:
        each = len(weights) // layers
        self._layers = []
        for layer in range(layers):
            input_weight, state_weight, *biases = weights[layer * each : (layer + 1) * each]
            input_bias, state_bias = biases if bias else (None, None)
            self._layers.append(_Layer(input_weight.t(), state_weight.t(), input_bias, state_bias))
        self._size = weights[1].shape[1]
        self._device = weights[0].device
        self._gates: dict[int, _Gates] = {}
        self._products = torch.empty(2, 0, device=self._device)

    def advance(self, x: torch.Tensor, h: Sequence[torch.Tensor]) -> torch.Tensor:
        """One frame of every row.

        Args:
            x: float32 [B, inputs], contiguous.
            h: the states of each layer, float32 [B, size], contiguous; changed.

        Returns:
            The last of `h`.
        """
        gates = self._gates.get(len(x)) or self._gates_for(len(x))
        for layer, state in zip(self._layers, h, strict=True):
            _product(layer.input_bias, x, layer.input_weight, gates.of_input)
            _product(layer.state_bias, state, layer.state_weight, gates.of_state)
            gates.both.add_(gates.both_of_state).sigmoid_()
            new = gates.new.mul_(gates.reset).add_(gates.new_of_input).tanh_()
            x = state.sub_(new).mul_(gates.update).add_(new)
        return x

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def _gates_for(self, rows: int) -> _Gates:
        size = self._size
        if self._products.shape[1] < rows * 3 * size:
            self._products = torch.empty(2, rows * 3 * size, device=self._device)
            self._gates.clear()
        of_input, of_state = (product[: rows * 3 * size].view(rows, 3 * size) for product in self._products)
        gates = _Gates(
            of_input,
            of_state,
            both=of_input[:, : 2 * size],
            both_of_state=of_state[:, : 2 * size],
            reset=of_input[:, :size],
            update=of_input[:, size : 2 * size],
            new_of_input=of_input[:, 2 * size :],
            new=of_state[:, 2 * size :],
        )
        self._gates[rows] = gates
        return gates


def _product(bias: torch.Tensor | None, rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    if bias is None:
        torch.mm(rows, weight, out=out)
    else:
        torch.addmm(bias, rows, weight, out=out)
