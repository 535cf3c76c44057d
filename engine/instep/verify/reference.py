"""An independent reference: the network written again, in numpy, from the equations.

It follows the documentation of `torch.nn.GRU` and `torch.nn.Linear` and shares nothing with what serves or replays: no
torch, no padding, no bucket, no code of the model layer; only the description and the weights as they were trained.
With x the frame, h the state before it, σ the logistic function and ⊙ the elementwise product:

    r  = σ(W_ir x + b_ir + W_hr h + b_hr)
    z  = σ(W_iz x + b_iz + W_hz h + b_hz)
    n  = tanh(W_in x + b_in + r ⊙ (W_hn h + b_hn))
    h' = (1 − z) ⊙ n + z ⊙ h

The weights of the three gates lie one under the other: W_ih = [W_ir; W_iz; W_in], W_hh = [W_hr; W_hz; W_hn].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[Any]
"""float64 or float32, as the reference's dtype."""
Counts: TypeAlias = npt.NDArray[np.int64]

TILE_ROWS: Final = 16
TILE_PRODUCTS: Final = 2**18


class Reference:
    """The network in float64, or in float32 to see what rounding alone does to it.

    Args:
        description: the network's description as plain values, as a recording holds it.
        weights: by torch's names, prefixed `before.{i}.`, `gru.` and `after.{i}.`.
        dtype: numpy's float64 or float32: everything is computed in it.
    """

    def __init__(
        self, description: Mapping[str, Any], weights: Mapping[str, npt.NDArray[np.float32]], dtype: npt.DTypeLike
    ) -> None:
        self._dtype = np.dtype(dtype)
        self._before = self._dense_layers("before", description["before"], weights)
        self._after = self._dense_layers("after", description["after"], weights)
        self._layers = [
            (
                self._affine(weights, f"gru.weight_ih_l{layer}", f"gru.bias_ih_l{layer}"),
                self._affine(weights, f"gru.weight_hh_l{layer}", f"gru.bias_hh_l{layer}"),
            )
            for layer in range(description["gru"]["num_layers"])
        ]

    def run(self, x: Floats, h: Floats, active: Counts) -> tuple[Floats, Floats]:
        """Run sequences of different lengths, the longest first.

        Args:
            x: frames [T, R, features].
            h: states before them [layers, R, hidden size]; not changed.
            active: [T], descending: how many of the rows, from the first, have a frame at each timestep.

        Returns:
            Outputs [T, R, outputs], meaningless where a row has no frame, and the states after each row's last frame.
        """
        steps, rows, _ = x.shape
        states = np.array(h, self._dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is a value like any other here
            values = _dense(self._before, np.asarray(x.reshape(steps * rows, -1), self._dtype))
            for (of_input, of_state), state in zip(self._layers, states, strict=True):
                gates = of_input(values).reshape(steps, rows, -1)
                values = _gru_layer(gates, of_state, state, active).reshape(steps * rows, -1)
            return _dense(self._after, values).reshape(steps, rows, -1), states

    def _dense_layers(
        self,
        place: str,
        layers: Sequence[Mapping[str, Any]],
        weights: Mapping[str, npt.NDArray[np.float32]],
    ) -> list[tuple[_Affine, str]]:
        return [
            (self._affine(weights, f"{place}.{index}.weight", f"{place}.{index}.bias"), layer["activation"])
            for index, layer in enumerate(layers)
        ]

    def _affine(self, weights: Mapping[str, npt.NDArray[np.float32]], weight: str, bias: str) -> _Affine:
        offset = weights.get(bias)
        if offset is None:
            offset = np.zeros(len(weights[weight]), np.float32)
        return _Affine(weights[weight].astype(self._dtype), offset.astype(self._dtype))


class _Affine:
    """x W^T + b, in tiles too small for BLAS to start threads over: they would fight with torch's for the cores."""

    def __init__(self, weight: Floats, bias: Floats) -> None:
        self._bias = bias
        outputs, inputs = weight.shape
        columns = min(max(TILE_PRODUCTS // (TILE_ROWS * inputs), 1), outputs)
        padded = np.zeros((inputs, -(-outputs // columns) * columns), weight.dtype)
        padded[:, :outputs] = weight.T
        self._tiles = np.ascontiguousarray(padded.reshape(inputs, -1, columns).transpose(1, 0, 2))

    def __call__(self, rows: Floats) -> Floats:
        """[R, inputs] to [R, outputs]."""
        count, inputs = rows.shape
        padded = np.zeros((-(-count // TILE_ROWS), 1, TILE_ROWS, inputs), rows.dtype)
        padded.reshape(-1, inputs)[:count] = rows
        product: Floats = (padded @ self._tiles).transpose(0, 2, 1, 3).reshape(len(padded) * TILE_ROWS, -1)
        outputs: Floats = product[:count, : len(self._bias)] + self._bias
        return outputs


def _gru_layer(from_input: Floats, of_state: _Affine, h: Floats, active: Counts) -> Floats:
    """One layer over time.

    Args:
        from_input: W_ih x + b_ih of every timestep [T, R, 3 * hidden size].
        of_state: W_hh h + b_hh as a function of h.
        h: states [R, hidden size]; goes along.
        active: as in `Reference.run`.

    Returns:
        The states after each timestep [T, R, hidden size].
    """
    size = h.shape[1]
    after = np.zeros((*from_input.shape[:2], size), h.dtype)
    for timestep, count in enumerate(active.tolist()):
        before = h[:count]
        given, held = from_input[timestep, :count], of_state(before)
        reset_update = _sigmoid(given[:, : 2 * size] + held[:, : 2 * size])
        reset, update = reset_update[:, :size], reset_update[:, size:]
        new = np.tanh(given[:, 2 * size :] + reset * held[:, 2 * size :])
        h[:count] = after[timestep, :count] = (1 - update) * new + update * before
    return after


def _dense(layers: list[tuple[_Affine, str]], rows: Floats) -> Floats:
    for affine, activation in layers:
        rows = _ACTIVATIONS[activation](affine(rows))
    return rows


def _sigmoid(rows: Floats) -> Floats:
    # 1 / (1 + exp(-x)), written so that nothing overflows.
    return (np.tanh(rows / 2) + 1) / 2


def _relu(rows: Floats) -> Floats:
    return np.maximum(rows, 0)


def _same(rows: Floats) -> Floats:
    return rows


_ACTIVATIONS: Final[dict[str, Callable[[Floats], Floats]]] = {
    "none": _same,
    "relu": _relu,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
}
