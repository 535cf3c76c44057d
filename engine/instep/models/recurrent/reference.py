"""An independent reference: the network written again, in numpy, from the equations.

It follows the documentation of torch's modules and shares nothing with the step: neither torch nor code of the other
modules; only the description and the weights as they were trained. With x the frame, h and c the
states before it, σ the logistic function and ⊙ the elementwise product:

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

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.models.recurrent.reference_layers import IN_PLACE, Affine, Floats, frame_layers, run_layers

Counts: TypeAlias = npt.NDArray[np.int64]
_Weights: TypeAlias = Mapping[str, npt.NDArray[np.float32]]

BLOCK_BYTES: Final = 2**19
"""Of what the input adds to the gates: it is computed for some timesteps at once, still in a cache when it is used."""

_sigmoid, _tanh = IN_PLACE["sigmoid"], IN_PLACE["tanh"]


class RecurrentReference:
    """A `Reference`: the network in float64, or in float32 to see what rounding alone does to it.

    Args:
        description: the network's description as plain values.
        weights: by torch's names, prefixed `before.{i}.`, with the kind and a dot, and `after.{i}.`.
        dtype: numpy's float64 or float32: everything is computed in it.
    """

    independent = True

    def __init__(self, description: Mapping[str, Any], weights: _Weights, dtype: npt.DTypeLike) -> None:
        self._dtype = np.dtype(dtype)
        given = {name: values.astype(self._dtype) for name, values in weights.items()}
        kind = description["kind"]
        self._before = frame_layers("before", description["before"], given)
        self._after = frame_layers("after", description["after"], given)
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
            values = run_layers(self._before, x.reshape(steps * rows, -1))
            for index, layer in enumerate(self._layers):
                after = layer.run(values.reshape(steps, rows, -1), [leaf[index] for leaf in states], active)
                values = after.reshape(steps * rows, -1)
            outputs = run_layers(self._after, values).reshape(steps, rows, -1)
        return outputs, {name: np.swapaxes(leaf, 0, 1) for name, leaf in zip(self._leaves, states, strict=True)}


class _Cell(Protocol):
    """The equations of one layer, but for the product with the input."""

    bias: Floats
    """What is added to that product [gates · size]."""

    def rooms(self, rows: int) -> Sequence[Floats]:
        """Arrays that `step` writes its products to."""

    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        """One timestep, for `given` of the input [R, gates · size]: the new states, of which `h` is in `out`."""


_CellOf: TypeAlias = Callable[[Floats, tuple[Floats, Floats], Mapping[str, Any]], _Cell]
"""Takes the weights for the state [gates · size, size], both biases, input's and state's, and the description."""


class _Layer:
    """One layer over time."""

    def __init__(
        self, weights: Mapping[str, Floats], prefix: str, suffix: str, cell: _CellOf, layers: Mapping[str, Any]
    ) -> None:
        of_input, of_state = (weights[f"{prefix}weight_{of}{suffix}"] for of in ("ih", "hh"))
        nothing = np.zeros(len(of_state), of_state.dtype)
        input_bias, state_bias = (weights.get(f"{prefix}bias_{of}{suffix}", nothing) for of in ("ih", "hh"))
        self._size = of_state.shape[1]
        self._cell = cell(of_state, (input_bias, state_bias), layers)
        self._of_input = Affine(of_input, self._cell.bias)

    def run(self, x: Floats, states: Sequence[Floats], active: Counts) -> Floats:
        """Run over time.

        Args:
            x: what the layer is given [T, R, inputs].
            states: by leaf, [R, hidden size]; they go along.
            active: as in `Reference.run`.

        Returns:
            `h` after each timestep [T, R, hidden size].
        """
        steps, rows, inputs = x.shape
        counts, gates = [*active.tolist(), 0], len(self._cell.bias)
        block = max(BLOCK_BYTES // (rows * gates * states[0].itemsize), 1)
        room, rooms = self._of_input.room(block * rows), self._cell.rooms(rows)
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


class _Gru:
    def __init__(self, weight: Floats, biases: tuple[Floats, Floats], layers: Mapping[str, Any]) -> None:
        input_bias, state_bias = biases
        size = weight.shape[1]
        # Both biases of r and z are only added up; that of n, b_hn, is multiplied by r first.
        self.bias = np.concatenate([input_bias[: 2 * size] + state_bias[: 2 * size], input_bias[2 * size :]])
        self._size = size
        self._of_state = Affine(weight[: 2 * size], np.zeros_like(state_bias[: 2 * size]))
        self._of_state_in_new = Affine(weight[2 * size :], state_bias[2 * size :])

    def rooms(self, rows: int) -> Sequence[Floats]:
        return self._of_state.room(rows), self._of_state_in_new.room(rows)

    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        (h,), size = states, self._size
        gates = self._of_state.product(h, rooms[0])
        gates += given[:, : 2 * size]
        _sigmoid(gates)
        new = self._of_state_in_new(h, rooms[1])
        new *= gates[:, :size]
        new += given[:, 2 * size :]
        _tanh(new)
        # (1 - z) * n + z * h, with one product less.
        np.subtract(h, new, out=out)
        out *= gates[:, size:]
        out += new
        return (out,)


class _Lstm:
    def __init__(self, weight: Floats, biases: tuple[Floats, Floats], layers: Mapping[str, Any]) -> None:
        self.bias = biases[0] + biases[1]
        self._size = weight.shape[1]
        self._of_state = Affine(weight, np.zeros_like(self.bias))

    def rooms(self, rows: int) -> Sequence[Floats]:
        return (self._of_state.room(rows),)

    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        (h, c), size = states, self._size
        gates = self._of_state.product(h, rooms[0])
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


class _Rnn:
    def __init__(self, weight: Floats, biases: tuple[Floats, Floats], layers: Mapping[str, Any]) -> None:
        self.bias = biases[0] + biases[1]
        self._of_state = Affine(weight, np.zeros_like(self.bias))
        self._activate = IN_PLACE[layers["nonlinearity"]]

    def rooms(self, rows: int) -> Sequence[Floats]:
        return (self._of_state.room(rows),)

    def step(self, given: Floats, states: Sequence[Floats], out: Floats, rooms: Sequence[Floats]) -> Sequence[Floats]:
        np.add(self._of_state.product(states[0], rooms[0]), given, out=out)
        self._activate(out)
        return (out,)


_CELLS: Final[dict[str, _CellOf]] = {"gru": _Gru, "lstm": _Lstm, "rnn": _Rnn}
"""By kind."""
