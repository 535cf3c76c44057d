"""An independent reference: the network written again in numpy, from the equations.

It follows the documentation of torch's modules. It shares neither torch nor any code with the step, only the
description and the trained weights. With x the frame, h and c the states before it, σ the logistic function and ⊙ the
elementwise product:

    GRU     r  = σ(W_ir x + b_ir + W_hr h + b_hr)
            z  = σ(W_iz x + b_iz + W_hz h + b_hz)
            n  = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))
            h' = (1 − z) ⊙ n + z ⊙ h

    LSTM    i, f, o = σ(W_i· x + b_i· + W_h· h + b_h·), each with weights of its own
            g  = tanh(W_ig x + b_ig + W_hg h + b_hg)
            c' = f ⊙ c + i ⊙ g
            h' = o ⊙ tanh(c')

    RNN     h' = tanh(W_ih x + b_ih + W_hh h + b_hh), or relu in its place

The weights of the gates lie one under the other: W_ih = [W_ir; W_iz; W_in] for a GRU, [W_ii; W_if; W_ig; W_io] for an
LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[Any]
"""float64 or float32, as the reference's dtype."""
InPlace: TypeAlias = Callable[[Floats], None]
_OnRows: TypeAlias = tuple[Callable[[Floats], Floats], InPlace]
"""A layer with its activation, from rows [R, inputs] to a new array [R, outputs]."""
Counts: TypeAlias = npt.NDArray[np.int64]
_Weights: TypeAlias = Mapping[str, npt.NDArray[np.float32]]

TILE_ROWS: Final = 32
TILE_BYTES: Final = 2**15
"""The size of a tile of weights, which stays in the nearest cache while it is used for several rows."""
WHOLE_COLUMNS: Final = 16
"""A tile with at least this many columns has a multiple of it, because BLAS is slow on the remainder."""
SMALL: Final = 2.0**-7
"""Below this magnitude the fast formula of tanh would have a relative error above 2^-44; float32 rounds by 2^-24."""
BLOCK_BYTES: Final = 2**19
"""The size of the input's contribution to the gates, computed for some timesteps at once and used while in the cache.
"""


class RecurrentReference:
    """A `Reference` in float64, or in float32 to measure the effect of rounding alone.

    Args:
        description: the network's description as plain values.
        weights: by torch's names, prefixed `before.{i}.`, with the kind and a dot, and `after.{i}.`.
        dtype: numpy's float64 or float32, used for every value.
    """

    independent = True

    def __init__(self, description: Mapping[str, Any], weights: _Weights, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        given = {name: values.astype(self._dtype) for name, values in weights.items()}
        kind = description["kind"]
        self._before = _frame_layers("before", description["before"], given)
        self._after = _frame_layers("after", description["after"], given)
        self._layers = [
            _Layer(given, f"{kind}.", f"_l{layer}", _CELLS[kind], description[kind])
            for layer in range(description[kind]["num_layers"])
        ]
        self._leaves = ("h", "c") if kind == "lstm" else ("h",)

    def run(self, x: Floats, state: Mapping[str, Any], active: Counts) -> tuple[Floats, dict[str, Any]]:
        """Run sequences of different lengths, the longest first; see `Reference.run`.

        The leaves of the state are `h` and, for an LSTM, `c`: [R, layers, hidden size].
        """
        steps, rows, _ = x.shape
        states = [np.array(np.swapaxes(state[name], 0, 1), self._dtype, order="C") for name in self._leaves]
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is a value like any other here
            values = _run_layers(self._before, x.reshape(steps * rows, -1))
            for index, layer in enumerate(self._layers):
                after = layer.run(values.reshape(steps, rows, -1), [leaf[index] for leaf in states], active)
                values = after.reshape(steps * rows, -1)
            outputs = _run_layers(self._after, values).reshape(steps, rows, -1)
        return outputs, {name: np.swapaxes(leaf, 0, 1) for name, leaf in zip(self._leaves, states, strict=True)}


class _Cell:
    """The equations of one layer, except the product with the input.

    Attributes:
        bias: added to that product, [gates · size].
        products: the products with the state.
    """

    bias: Floats
    products: Sequence[Affine]

    def __init__(self, weight: Floats, biases: tuple[Floats, Floats], layers: Mapping[str, Any]) -> None:
        self.bias = biases[0] + biases[1]
        self.products = [Affine(weight, np.zeros_like(self.bias))]

    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        """Step once, with `given` the input's product [R, gates · size]. Returns the new states; `h` is in `out`."""
        raise NotImplementedError


class _Layer:
    def __init__(
        self, weights: Mapping[str, Floats], prefix: str, suffix: str, cell: type[_Cell], layers: Mapping[str, Any]
    ) -> None:
        of_input, of_state = (weights[f"{prefix}weight_{of}{suffix}"] for of in ("ih", "hh"))
        nothing = np.zeros(len(of_state), of_state.dtype)
        input_bias, state_bias = (weights.get(f"{prefix}bias_{of}{suffix}", nothing) for of in ("ih", "hh"))
        self._size = of_state.shape[1]
        self._cell = cell(of_state, (input_bias, state_bias), layers)
        self._of_input = Affine(of_input, self._cell.bias)

    def run(self, x: Floats, states: Sequence[Floats], active: Counts) -> Floats:
        """Run the layer over time.

        Args:
            x: the layer's inputs [T, R, inputs].
            states: by leaf, [R, hidden size], updated in place.
            active: as in `Reference.run`.

        Returns:
            `h` after each timestep [T, R, hidden size].
        """
        steps, rows, inputs = x.shape
        counts, gates = [*active.tolist(), 0], len(self._cell.bias)
        block = max(BLOCK_BYTES // (rows * gates * states[0].itemsize), 1)
        room, rooms = self._of_input.room(block * rows), [each.room(rows) for each in self._cell.products]
        after = np.zeros((steps, rows, self._size), states[0].dtype)
        now = states
        for timestep, count in enumerate(counts[:-1]):
            if timestep % block == 0:
                frames = x[timestep : timestep + block].reshape(-1, inputs)
                given = self._of_input(frames, room[: len(frames)]).reshape(-1, rows, gates)
            before = [leaf[:count] for leaf in now]
            now = self._cell.step(
                given[timestep % block, :count], before, after[timestep, :count], [each[:count] for each in rooms]
            )
            left = counts[timestep + 1]
            for leaf, new in zip(states, now, strict=True):
                leaf[left:count] = new[left:]
        return after


class _Gru(_Cell):
    def __init__(self, weight: Floats, biases: tuple[Floats, Floats], layers: Mapping[str, Any]) -> None:
        input_bias, state_bias = biases
        size = weight.shape[1]
        # Both biases of r and z are only added up; that of n, b_hn, is multiplied by r first.
        self.bias = np.concatenate([input_bias[: 2 * size] + state_bias[: 2 * size], input_bias[2 * size :]])
        gates = Affine(weight[: 2 * size], np.zeros_like(state_bias[: 2 * size]))
        self.products = [gates, Affine(weight[2 * size :], state_bias[2 * size :])]

    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        (h,), size = states, out.shape[1]
        gates = self.products[0].product(h, rooms[0])
        gates += given[:, : 2 * size]
        _sigmoid(gates)
        new = self.products[1](h, rooms[1])
        new *= gates[:, :size]
        new += given[:, 2 * size :]
        _tanh(new)
        # (1 - z) * n + z * h, with one product less.
        np.subtract(h, new, out=out)
        out *= gates[:, size:]
        out += new
        return (out,)


class _Lstm(_Cell):
    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        (h, c), size = states, out.shape[1]
        gates = self.products[0].product(h, rooms[0])
        gates += given
        enter, forget, new, output = (gates[:, at * size : (at + 1) * size] for at in range(4))
        _sigmoid(gates[:, : 2 * size])
        _tanh(new)
        _sigmoid(output)
        cell_state = forget * c
        new *= enter
        cell_state += new
        out[...] = cell_state
        _tanh(out)
        out *= output
        return out, cell_state


class _Rnn(_Cell):
    def __init__(self, weight: Floats, biases: tuple[Floats, Floats], layers: Mapping[str, Any]) -> None:
        super().__init__(weight, biases, layers)
        self._activate = IN_PLACE[layers["nonlinearity"]]

    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        np.add(self.products[0].product(states[0], rooms[0]), given, out=out)
        self._activate(out)
        return (out,)


_CELLS: Final[dict[str, type[_Cell]]] = {"gru": _Gru, "lstm": _Lstm, "rnn": _Rnn}


def _frame_layers(place: str, layers: Sequence[Mapping[str, Any]], weights: Mapping[str, Floats]) -> list[_OnRows]:
    built: list[_OnRows] = []
    for index, layer in enumerate(layers):
        weight, bias = (weights.get(f"{place}.{index}.{name}") for name in ("weight", "bias"))
        activate = IN_PLACE[layer["activation"]]
        if "layer_norm" in layer:
            built.append((partial(_normed, weight, bias, layer["eps"]), activate))
        else:
            assert weight is not None
            built.append((Affine(weight, np.zeros(len(weight), weight.dtype) if bias is None else bias), activate))
    return built


def _run_layers(layers: Sequence[_OnRows], rows: Floats) -> Floats:
    for layer, activate in layers:
        rows = layer(rows)
        activate(rows)
    return rows


def _normed(weight: Floats | None, bias: Floats | None, eps: float, rows: Floats) -> Floats:
    """(x - mean) / sqrt(variance + eps) · weight + bias, with each row's mean and biased variance."""
    centred: Floats = rows - rows.mean(axis=1, keepdims=True)
    variance = (centred * centred).mean(axis=1, keepdims=True)
    centred /= np.sqrt(variance + rows.dtype.type(eps))
    if weight is not None:
        centred *= weight
    if bias is not None:
        centred += bias
    return centred


class Affine:
    """x W^T + b, in tiles so small that BLAS starts no threads, which would compete with torch's for the cores.

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
        """Map [R, inputs] to [R, outputs]; `room` is as in `product`."""
        outputs = self.product(rows, self.room(len(rows)) if room is None else room)
        outputs += self.bias
        return outputs

    def room(self, rows: int) -> Floats:
        """A buffer for the result of `product`: [R, outputs padded to tiles]."""
        return np.empty((rows, len(self._tiles) * self._columns), self.bias.dtype)

    def product(self, rows: Floats, room: Floats) -> Floats:
        """Multiply [R, inputs] by W^T into `room`, and return the part that contains the outputs, [R, outputs]."""
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


IN_PLACE: Final[dict[str, InPlace]] = {
    "none": lambda rows: None,
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
"""In-place activations by name."""
