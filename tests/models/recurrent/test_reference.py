from __future__ import annotations

from typing import Any, Final

import numpy as np
import pytest
import torch

from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.recurrent import reference as reference_module
from instep.models.recurrent.description import Activation
from instep.models.recurrent.reference import RecurrentReference
from instep.models.registry import parse_description
from tests.support.torch_network import ACTIVATIONS, TorchNetwork

GRU: Final[dict[str, Any]] = {"kind": "gru", "before": [], "gru": {"num_layers": 1}, "after": []}


def run(reference: RecurrentReference, x: Any, h: Any, active: Any) -> tuple[Any, Any]:
    """With states of a GRU as torch has them, [layers, R, hidden size]."""
    y, state = reference.run(x, {"h": h.swapaxes(0, 1)}, active)
    return y, state["h"].swapaxes(0, 1)


FLAVOURS = ("gru", "lstm", "rnn", "rnn relu")


def model_of(flavour: str, features: int, hidden: int, layers: int = 1, bias: bool = True, **around: Any) -> Model:
    """A model with random weights, of a flavour of recurrent layers."""
    kind, _, nonlinearity = flavour.partition(" ")
    recurrent: dict[str, Any] = {"hidden_size": hidden, "num_layers": layers, "bias": bias}
    if nonlinearity:
        recurrent["nonlinearity"] = nonlinearity
    fields = {"kind": kind, "features": features, kind: recurrent, **around}
    return make_model(parse_description(fields), "random", name="n", seed=layers)


def reference_of(model: Model, dtype: Any) -> RecurrentReference:
    weights = {name: tensor.numpy() for name, tensor in model.weights.items()}
    return RecurrentReference(model.description.as_json(), weights, dtype)


def states_of(model: Model, rows: int, dtype: Any = np.float64) -> dict[str, Any]:
    random = np.random.default_rng(rows)
    return {
        leaf.name: random.uniform(-1, 1, (rows, *leaf.shape)).astype(np.float32).astype(dtype)
        for leaf in model.description.state.leaves
    }


def in_float64(model: Model, x: Any, state: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """By torch's own modules: the outputs, and the states rounded to float32."""
    spec = model.description.state
    rows = spec.pack({name: leaf.astype(np.float32) for name, leaf in state.items()})
    y, after = TorchNetwork(model).run(x, rows, torch.float64)
    return y, spec.unpack(after)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layers_around_are_torchs_in_float64(bias: bool) -> None:
    dense, plain = {"size": 37, "bias": bias}, {"layer_norm": True, "elementwise_affine": bias}
    norm = {"layer_norm": True, "activation": "tanh", "bias": bias, "eps": 1e-3}
    model = model_of("gru", 5, 33, bias=bias, before=[dense, plain], after=[norm, plain, dense, {"size": 2}])
    x, state = np.random.default_rng(0).standard_normal((11, 40, 5)), states_of(model, 40)
    y, _ = reference_of(model, np.float64).run(x, state, np.full(11, 40))
    np.testing.assert_allclose(y, in_float64(model, x, state)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_are_those_of_torch_for_values_of_every_size(activation: Activation) -> None:
    size = np.geomspace(1e-8, 1e30, 400)
    x = np.stack([size, -size, size[::-1] / 1e20], axis=1)[None]
    nothing, keep = np.zeros((9, 3), np.float32), np.repeat([0, np.inf, 0], 3).astype(np.float32)
    # The update gate keeps the state, which is the frame.
    weights = {"gru.weight_ih_l0": nothing, "gru.weight_hh_l0": nothing, "gru.bias_ih_l0": keep}
    weights["after.0.weight"] = np.eye(3, dtype=np.float32)
    parts = {**GRU, "after": [{"activation": activation}]}
    with torch.inference_mode():
        expected = ACTIVATIONS[activation](torch.from_numpy(x[0])).numpy()
    for dtype, relative in ((np.float64, 1e-9), (np.float32, 1e-6)):
        y, _ = run(RecurrentReference(parts, weights, dtype), np.zeros_like(x, dtype), x.astype(dtype), np.array([400]))
        scale = np.maximum(1, np.abs(x[0]) if activation != "softmax" else 1)
        assert (np.abs(y[0] - expected) <= relative * scale).all()
        assert y.dtype == dtype


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(("tile_bytes", "block_bytes"), [(1, 1), (37 * 8 * 20, 4 * 10**4), (2**20, 2**20)])
def test_tiles_and_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int, block_bytes: int, flavour: str
) -> None:
    monkeypatch.setattr(reference_module, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(reference_module, "BLOCK_BYTES", block_bytes)
    model = model_of(flavour, 37, 33, layers=2)
    x, state = np.random.default_rng(0).standard_normal((11, 71, 37)), states_of(model, 71)
    lengths = np.clip(np.arange(71, 0, -1), 3, 11)
    y, final = reference_of(model, np.float64).run(x, state, (np.arange(11)[:, None] < lengths).sum(axis=1))
    for length in np.unique(lengths):
        rows = lengths == length
        part = {name: leaf[rows] for name, leaf in state.items()}
        expected, expected_final = in_float64(model, np.ascontiguousarray(x[:length, rows]), part)
        np.testing.assert_allclose(y[:length, rows], expected, rtol=0, atol=1e-13)
        for name, leaf in final.items():
            np.testing.assert_allclose(leaf[rows], expected_final[name], rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_shorter_sequences_keep_the_state_of_their_last_frame(flavour: str) -> None:
    model = model_of(flavour, 3, 4, layers=2)
    reference = reference_of(model, np.float64)
    x, state = np.random.default_rng(0).standard_normal((6, 3, 3)), states_of(model, 3)
    given = {name: leaf.copy() for name, leaf in state.items()}
    y, final = reference.run(x, state, np.array([3, 3, 2, 2, 1, 1]))
    for name, leaf in state.items():
        assert (leaf == given[name]).all(), "the given states are not changed"
    for row, length in enumerate((6, 4, 2)):
        one = slice(row, row + 1)
        part = {name: leaf[one] for name, leaf in state.items()}
        alone_y, alone = reference.run(x[:length, one], part, np.ones(length, np.int64))
        np.testing.assert_allclose(y[:length, row], alone_y[:, 0], rtol=0, atol=1e-15)
        for name, leaf in final.items():
            np.testing.assert_allclose(leaf[row], alone[name][0], rtol=0, atol=1e-15)


def test_tanh_is_near_the_truth_however_small_the_value() -> None:
    x = np.concatenate([[0.0], np.geomspace(1e-300, 800, 200_000)])
    x = np.concatenate([x, -x])
    weights = {f"gru.{name}_l0": np.zeros((3, 1), np.float32) for name in ("weight_ih", "weight_hh")}
    weights["gru.bias_ih_l0"] = np.array([0, -np.inf, 0], np.float32)  # the new state is n alone
    weights["gru.weight_ih_l0"][2] = 1
    parts = GRU
    y, _ = run(
        RecurrentReference(parts, weights, np.float64), x[None, :, None], np.zeros((1, len(x), 1)), np.array([len(x)])
    )
    exact = np.tanh(x.astype(np.longdouble))
    assert np.finfo(np.longdouble).eps < np.finfo(np.float64).eps / 1000
    assert (np.abs(y[0, :, 0] - exact) <= 2.0**-44 * np.abs(exact)).all()


def test_overflow_is_a_value_and_not_a_warning() -> None:
    model = model_of("gru", 3, 4, after=[{"size": 2}, {"layer_norm": True}])
    rows = np.array([[1, 1, 1, 1], [1, -1, 1, -1]], np.float32)
    model.weights["after.0.weight"].copy_(torch.from_numpy(np.full((2, 4), 3e38, np.float32) * rows))
    x = np.full((1, 1, 3), 3e38, np.float32)
    y, _ = reference_of(model, np.float32).run(x, {"h": np.ones((1, 1, 4), np.float32)}, np.array([1]))
    assert not np.isfinite(y).all()
