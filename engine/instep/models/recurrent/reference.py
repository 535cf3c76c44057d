"""An independent reference: the network written again, in numpy, from the equations.

It follows the documentation of `torch.nn.GRU` and `torch.nn.Linear` and shares nothing with the step: no torch, no
padding, no bucket, no code of the other modules; only the description and the weights as they were trained.
With x the frame, h the state before it, σ the logistic function and ⊙ the elementwise product:

    r  = σ(W_ir x + b_ir + W_hr h + b_hr)
    z  = σ(W_iz x + b_iz + W_hz h + b_hz)
    n  = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))
    h' = (1 − z) ⊙ n + z ⊙ h

The weights of the three gates lie one under the other: W_ih = [W_ir; W_iz; W_in], W_hh = [W_hr; W_hz; W_hn].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[Any]
"""float64 or float32, as the reference's dtype."""
Counts: TypeAlias = npt.NDArray[np.int64]
_Weights: TypeAlias = Mapping[str, npt.NDArray[np.float32]]

TILE_ROWS: Final = 32
TILE_BYTES: Final = 2**15
"""Of the weights of a tile: they stay in the nearest cache while they are used for a tile's rows."""
WHOLE_COLUMNS: Final = 16
"""Columns of a tile, where there are so many, are a multiple of it: BLAS is slower over the rest."""
SMALL: Final = 2.0**-7
"""Below it, the quick way to tanh would be off by more than 2^-44 of the value: float32 rounds by 2^-24."""
BLOCK_BYTES: Final = 2**19
"""Of what the input adds to the gates: it is computed for some timesteps at once, still in a cache when it is used."""


class GruReference:
    """A `Reference`: the network in float64, or in float32 to see what rounding alone does to it.

    Args:
        description: the network's description as plain values.
        weights: by torch's names, prefixed `before.{i}.`, `gru.` and `after.{i}.`.
        dtype: numpy's float64 or float32: everything is computed in it.
    """

    def __init__(self, description: Mapping[str, Any], weights: _Weights, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        given = {name: values.astype(self._dtype) for name, values in weights.items()}
        self._before = _dense_layers("before", description["before"], given)
        self._after = _dense_layers("after", description["after"], given)
        self._layers = [_GruLayer(given, layer) for layer in range(description["gru"]["num_layers"])]

    def run(self, x: Floats, state: Mapping[str, Any], active: Counts) -> tuple[Floats, dict[str, Any]]:
        """Run sequences of different lengths, the longest first; see `Reference.run`.

        The state is one leaf `h`, [R, layers, hidden size].
        """
        steps, rows, _ = x.shape
        states = np.array(np.swapaxes(state["h"], 0, 1), self._dtype, order="C")
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is a value like any other here
            values = _dense(self._before, x.reshape(steps * rows, -1))
            for layer, h in zip(self._layers, states, strict=True):
                after = layer.run(values.reshape(steps, rows, -1), h, active)
                values = after.reshape(steps * rows, -1)
            outputs = _dense(self._after, values).reshape(steps, rows, -1)
        return outputs, {"h": np.swapaxes(states, 0, 1)}


class _Affine:
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


class _GruLayer:
    """One layer: the equations above, with the gates r and z side by side."""

    def __init__(self, weights: _Weights, layer: int) -> None:
        of_input, of_state = weights[f"gru.weight_ih_l{layer}"], weights[f"gru.weight_hh_l{layer}"]
        size = of_state.shape[1]
        nothing = np.zeros(len(of_state), of_state.dtype)
        input_bias = weights.get(f"gru.bias_ih_l{layer}", nothing)
        state_bias = weights.get(f"gru.bias_hh_l{layer}", nothing)
        # Both biases of r and z are only added up; that of n, b_hn, is multiplied by r first.
        bias = np.concatenate([input_bias[: 2 * size] + state_bias[: 2 * size], input_bias[2 * size :]])
        self._size = size
        self._of_input = _Affine(of_input, bias)
        self._of_state = _Affine(of_state[: 2 * size], nothing[: 2 * size])
        self._of_state_in_new = _Affine(of_state[2 * size :], state_bias[2 * size :])

    def run(self, x: Floats, h: Floats, active: Counts) -> Floats:
        """Run over time.

        Args:
            x: what the layer is given [T, R, inputs].
            h: states [R, hidden size]; goes along.
            active: as in `GruReference.run`.

        Returns:
            The states after each timestep [T, R, hidden size].
        """
        steps, rows, inputs = x.shape
        size, counts = self._size, [*active.tolist(), 0]
        block = max(BLOCK_BYTES // (3 * rows * size * h.itemsize), 1)
        given_room = self._of_input.room(block * rows)
        gates_room, new_room = self._of_state.room(rows), self._of_state_in_new.room(rows)
        after = np.zeros((steps, rows, size), h.dtype)
        before = h
        for timestep, count in enumerate(counts[:-1]):
            if timestep % block == 0:
                frames = x[timestep : timestep + block].reshape(-1, inputs)
                given = self._of_input(frames, given_room[: len(frames)]).reshape(-1, rows, 3 * size)
            from_input = given[timestep % block, :count]
            gates = self._of_state.product(before[:count], gates_room[:count])
            gates += from_input[:, : 2 * size]
            _sigmoid(gates)
            new = self._of_state_in_new.product(before[:count], new_room[:count])
            new += self._of_state_in_new.bias
            new *= gates[:, :size]
            new += from_input[:, 2 * size :]
            _tanh(new)
            # (1 - z) * n + z * h, with one product less.
            now = np.subtract(before[:count], new, out=after[timestep, :count])
            now *= gates[:, size:]
            now += new
            before, left = now, counts[timestep + 1]
            h[left:count] = now[left:]
        return after


def _dense_layers(
    place: str, layers: Sequence[Mapping[str, Any]], weights: Mapping[str, Floats]
) -> list[tuple[_Affine, str]]:
    built = []
    for index, layer in enumerate(layers):
        weight = weights[f"{place}.{index}.weight"]
        bias = weights.get(f"{place}.{index}.bias", np.zeros(len(weight), weight.dtype))
        built.append((_Affine(weight, bias), layer["activation"]))
    return built


def _dense(layers: list[tuple[_Affine, str]], rows: Floats) -> Floats:
    for affine, activation in layers:
        rows = affine(rows)
        _ACTIVATIONS[activation](rows)
    return rows


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


_ACTIVATIONS: Final[dict[str, Callable[[Floats], None]]] = {
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
"""In place."""
