"""The layers over single frames of the independent reference, in numpy, from the equations.

They follow the documentation of `torch.nn.Linear`, `torch.nn.LayerNorm` and the activations, and share nothing with the
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[Any]
"""float64 or float32, as the reference's dtype."""
InPlace: TypeAlias = Callable[[Floats], None]
OnRows: TypeAlias = tuple[Callable[[Floats], Floats], InPlace]
"""A layer from rows [R, inputs] to an array of its own, [R, outputs], and the activation after it."""

TILE_ROWS: Final = 32
TILE_BYTES: Final = 2**15
"""Of the weights of a tile: they stay in the nearest cache while they are used for a tile's rows."""
WHOLE_COLUMNS: Final = 16
"""Columns of a tile, where there are so many, are a multiple of it: BLAS is slower over the rest."""
SMALL: Final = 2.0**-7
"""Below it, the quick way to tanh would be off by more than 2^-44 of the value: float32 rounds by 2^-24."""


def frame_layers(place: str, layers: Sequence[Mapping[str, Any]], weights: Mapping[str, Floats]) -> list[OnRows]:
    """Layers of the description, with weights whose names begin with `place`."""
    built: list[OnRows] = []
    for index, layer in enumerate(layers):
        weight, bias = (weights.get(f"{place}.{index}.{name}") for name in ("weight", "bias"))
        activate = IN_PLACE[layer["activation"]]
        if "layer_norm" in layer:
            built.append((_NormInNumpy(weight, bias, layer["eps"]), activate))
        else:
            assert weight is not None
            built.append((Affine(weight, np.zeros(len(weight), weight.dtype) if bias is None else bias), activate))
    return built


def run_layers(layers: Sequence[OnRows], rows: Floats) -> Floats:
    """Rows [R, inputs] through all layers."""
    for layer, activate in layers:
        rows = layer(rows)
        activate(rows)
    return rows


class _NormInNumpy:
    """(x - mean) / sqrt(variance + eps) · weight + bias, with the mean and the biased variance of each row."""

    def __init__(self, weight: Floats | None, bias: Floats | None, eps: float) -> None:
        self._weight, self._bias, self._eps = weight, bias, eps

    def __call__(self, rows: Floats) -> Floats:
        centred: Floats = rows - rows.mean(axis=1, keepdims=True)
        variance = (centred * centred).mean(axis=1, keepdims=True)
        centred /= np.sqrt(variance + rows.dtype.type(self._eps))
        if self._weight is not None:
            centred *= self._weight
        if self._bias is not None:
            centred += self._bias
        return centred


class Affine:
    """x W^T + b, in tiles too small for BLAS to start threads over: they would fight with torch's for the cores.

    Args:
        weight: [outputs, inputs].
        bias: [outputs].
    """

    def __init__(self, weight: Floats, bias: Floats) -> None:
        self.bias = bias
        outputs, inputs = weight.shape
        columns = max(TILE_BYTES // (inputs * weight.itemsize), 1)
        self._columns = min(columns if columns < WHOLE_COLUMNS else columns // WHOLE_COLUMNS * WHOLE_COLUMNS, outputs)
        padded = np.zeros((inputs, -(-outputs // self._columns) * self._columns), weight.dtype)
        padded[:, :outputs] = weight.T
        self._tiles = np.ascontiguousarray(padded.reshape(inputs, -1, self._columns).transpose(1, 0, 2))

    def __call__(self, rows: Floats, room: Floats | None = None) -> Floats:
        """[R, inputs] to [R, outputs]; `room` as in `product`."""
        outputs = self.product(rows, self.room(len(rows)) if room is None else room)
        outputs += self.bias
        return outputs

    def room(self, rows: int) -> Floats:
        """Where `product` can write for so many rows: [R, outputs padded to tiles]."""
        return np.empty((rows, len(self._tiles) * self._columns), self.bias.dtype)

    def product(self, rows: Floats, room: Floats) -> Floats:
        """Multiply [R, inputs] by W^T into `room`; the part of it that holds the outputs, [R, outputs]."""
        rows = rows.astype(room.dtype, copy=False)
        whole = len(rows) // TILE_ROWS * TILE_ROWS
        for part, height in ((slice(whole), TILE_ROWS), (slice(whole, None), len(rows) - whole)):
            if len(rows[part]):
                tiles = rows[part].reshape(-1, 1, height, rows.shape[1])
                places = room[part].reshape(-1, height, len(self._tiles), self._columns).transpose(0, 2, 1, 3)
                np.matmul(tiles, self._tiles, out=places)
        return room[:, : len(self.bias)]


def _sigmoid(rows: Floats) -> None:
    # 1 / (1 + exp(-x)): where exp overflows to infinity, the result is the 0 that it should be.
    np.negative(rows, out=rows)
    np.exp(rows, out=rows)
    rows += 1
    np.reciprocal(rows, out=rows)


def _silu(rows: Floats) -> None:
    factor = rows.copy()
    _sigmoid(factor)
    rows *= factor


def _relu(rows: Floats) -> None:
    np.maximum(rows, 0, out=rows)


def _tanh(rows: Floats) -> None:
    if rows.dtype != np.float64:
        np.tanh(rows, out=rows)
        return
    # 1 - 2 / (1 + exp(2x)) is much quicker, and as good where the result is not so small that its digits are lost.
    small = np.abs(rows) < SMALL
    exact = np.tanh(rows[small])
    rows += rows
    np.exp(rows, out=rows)
    rows += 1
    np.divide(-2, rows, out=rows)
    rows += 1
    rows[small] = exact


def _gelu(rows: Floats) -> None:
    # x Φ(x), with Φ the normal distribution; numpy has no erf.
    arguments = (rows * rows.dtype.type(math.sqrt(0.5))).ravel().tolist()
    rows *= np.fromiter(map(math.erf, arguments), rows.dtype, rows.size).reshape(rows.shape) + 1
    rows *= 0.5


def _elu(rows: Floats) -> None:
    below = np.expm1(np.minimum(rows, 0))
    np.copyto(rows, below, where=rows < 0)


def _leaky_relu(rows: Floats) -> None:
    np.multiply(rows, rows.dtype.type(0.01), out=rows, where=rows < 0)


def _softplus(rows: Floats) -> None:
    np.logaddexp(rows, 0, out=rows)


def _softmax(rows: Floats) -> None:
    rows -= rows.max(axis=1, keepdims=True)
    np.exp(rows, out=rows)
    rows /= rows.sum(axis=1, keepdims=True)


def _none(rows: Floats) -> None:
    pass


IN_PLACE: Final[dict[str, InPlace]] = {
    "none": _none,
    "relu": _relu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "gelu": _gelu,
    "silu": _silu,
    "elu": _elu,
    "leaky_relu": _leaky_relu,
    "softplus": _softplus,
    "softmax": _softmax,
}
"""Activations, by name."""
