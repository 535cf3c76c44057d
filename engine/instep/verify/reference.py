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

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[Any]
Counts: TypeAlias = npt.NDArray[np.int64]


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
        self.dtype = np.dtype(dtype)
        self._weights = {name: np.asarray(weight, self.dtype) for name, weight in weights.items()}
        self._before: Sequence[Mapping[str, Any]] = description["before"]
        self._after: Sequence[Mapping[str, Any]] = description["after"]
        self._layers = int(description["gru"]["num_layers"])

    def run(self, x: Floats, h: Floats, active: Counts) -> tuple[Floats, Floats]:
        """Run sequences of different lengths, the longest first.

        Args:
            x: frames [T, R, features].
            h: states before them [layers, R, hidden size]; not changed.
            active: [T], descending: how many of the rows, from the first, have a frame at each timestep.

        Returns:
            Outputs [T, R, outputs], meaningless where a row has no frame, and the states after each row's last frame.
        """
        after = np.array(h, self.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # infinity is a value like any other here
            rows = self._dense("before", self._before, np.asarray(x, self.dtype))
            for layer in range(self._layers):
                rows = self._gru_layer(layer, rows, after[layer], active)
            return self._dense("after", self._after, rows), after

    def _gru_layer(self, layer: int, x: Floats, h: Floats, active: Counts) -> Floats:
        """The states of one layer after each timestep [T, R, hidden size]; `h` [R, hidden size] goes along."""
        size = h.shape[1]
        zeros = np.zeros(3 * size, self.dtype)
        bias_input = self._weights.get(f"gru.bias_ih_l{layer}", zeros)
        bias_state = self._weights.get(f"gru.bias_hh_l{layer}", zeros)
        of_state = self._weights[f"gru.weight_hh_l{layer}"].T
        inputs = x @ self._weights[f"gru.weight_ih_l{layer}"].T + bias_input
        states = np.zeros((*x.shape[:2], size), self.dtype)
        for timestep, count in enumerate(active.tolist()):
            before = h[:count]
            from_input = inputs[timestep, :count]
            from_state = before @ of_state + bias_state
            gates = _sigmoid(from_input[:, : 2 * size] + from_state[:, : 2 * size])
            reset, update = gates[:, :size], gates[:, size:]
            new = np.tanh(from_input[:, 2 * size :] + reset * from_state[:, 2 * size :])
            h[:count] = states[timestep, :count] = (1 - update) * new + update * before
        return states

    def _dense(self, place: str, layers: Sequence[Mapping[str, Any]], rows: Floats) -> Floats:
        for index, layer in enumerate(layers):
            rows = rows @ self._weights[f"{place}.{index}.weight"].T
            if layer["bias"]:
                rows = rows + self._weights[f"{place}.{index}.bias"]
            rows = _activate(layer["activation"], rows)
        return rows


def _activate(activation: str, rows: Floats) -> Floats:
    if activation == "relu":
        return np.maximum(rows, 0)
    if activation == "tanh":
        return np.tanh(rows)
    if activation == "sigmoid":
        return _sigmoid(rows)
    if activation == "none":
        return rows
    raise ValueError(f"no such activation: {activation}")


def _sigmoid(rows: Floats) -> Floats:
    # 1 / (1 + exp(-x)) written so that nothing overflows.
    return (np.tanh(rows / 2) + 1) / 2
