from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from instep.models.recurrent import reference as reference_module
from instep.models.recurrent.reference import GruReference

Dense = list[tuple[torch.nn.Linear, str]]
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": torch.nn.Identity(),
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": torch.nn.GELU(),
    "silu": torch.nn.SiLU(),
    "elu": torch.nn.ELU(),
    "leaky_relu": torch.nn.LeakyReLU(),
    "softplus": torch.nn.Softplus(),
    "softmax": torch.nn.Softmax(dim=-1),
}


def run(reference: GruReference, x: Any, h: Any, active: Any) -> tuple[Any, Any]:
    """With states as torch has them, [layers, R, hidden size]."""
    y, state = reference.run(x, {"h": h.swapaxes(0, 1)}, active)
    return y, state["h"].swapaxes(0, 1)


def description(gru: torch.nn.GRU, before: Dense, after: Dense) -> dict[str, Any]:
    def dense(layers: Dense) -> list[dict[str, Any]]:
        return [
            {"size": layer.out_features, "activation": activation, "bias": layer.bias is not None}
            for layer, activation in layers
        ]

    return {"before": dense(before), "gru": {"num_layers": gru.num_layers}, "after": dense(after)}


def weights_of(gru: torch.nn.GRU, before: Dense, after: Dense) -> dict[str, npt.NDArray[np.float32]]:
    modules: dict[str, torch.nn.Module] = {"gru": gru}
    modules |= {f"before.{index}": layer for index, (layer, _) in enumerate(before)}
    modules |= {f"after.{index}": layer for index, (layer, _) in enumerate(after)}
    return {
        f"{prefix}.{name}": parameter.detach().numpy().copy()
        for prefix, module in modules.items()
        for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_it_is_torch_in_float64(layers: int, bias: bool, activation: str) -> None:
    torch.manual_seed(layers)
    before: Dense = [(torch.nn.Linear(5, 37, bias=bias), activation)]
    gru = torch.nn.GRU(37, 33, num_layers=layers, bias=bias)
    after: Dense = [(torch.nn.Linear(33, 9, bias=bias), activation), (torch.nn.Linear(9, 2), "none")]
    weights = weights_of(gru, before, after)
    x = torch.randn(11, 40, 5, dtype=torch.float64)
    h = torch.rand(layers, 40, 33, dtype=torch.float64) * 2 - 1

    reference = GruReference(description(gru, before, after), weights, np.float64)
    y, final = run(reference, x.numpy(), h.numpy(), np.full(11, 40))

    values = x
    with torch.inference_mode():
        for layer, name in before:
            values = ACTIVATIONS[name](layer.double()(values))
        values, expected_final = gru.double()(values, h)
        for layer, name in after:
            values = ACTIVATIONS[name](layer.double()(values))
    # torch's softplus is x itself from 20 on, where log(1 + exp(-x)) is left out.
    np.testing.assert_allclose(y, values.numpy(), rtol=0, atol=3e-9 if activation == "softplus" else 1e-13)
    np.testing.assert_allclose(final, expected_final.numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_are_those_of_torch_for_values_of_every_size(activation: str) -> None:
    size = np.geomspace(1e-8, 1e30, 400)
    x = np.stack([size, -size, size[::-1] / 1e20], axis=1)[None]
    nothing, keep = np.zeros((9, 3), np.float32), np.repeat([0, np.inf, 0], 3).astype(np.float32)
    # The update gate keeps the state, which is the frame.
    weights = {"gru.weight_ih_l0": nothing, "gru.weight_hh_l0": nothing, "gru.bias_ih_l0": keep}
    weights["after.0.weight"] = np.eye(3, dtype=np.float32)
    parts = {"before": [], "gru": {"num_layers": 1}, "after": [{"activation": activation}]}
    with torch.inference_mode():
        expected = ACTIVATIONS[activation](torch.from_numpy(x[0])).numpy()
    for dtype, relative in ((np.float64, 1e-9), (np.float32, 1e-6)):
        y, _ = run(GruReference(parts, weights, dtype), np.zeros_like(x, dtype), x.astype(dtype), np.array([400]))
        scale = np.maximum(1, np.abs(x[0]) if activation != "softmax" else 1)
        assert (np.abs(y[0] - expected) <= relative * scale).all()
        assert y.dtype == dtype


@pytest.mark.parametrize(("tile_bytes", "block_bytes"), [(1, 1), (37 * 8 * 20, 4 * 10**4), (2**20, 2**20)])
def test_tiles_and_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, tile_bytes: int, block_bytes: int
) -> None:
    monkeypatch.setattr(reference_module, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(reference_module, "BLOCK_BYTES", block_bytes)
    torch.manual_seed(0)
    gru = torch.nn.GRU(37, 33, num_layers=2)
    x = torch.randn(11, 71, 37, dtype=torch.float64)
    h = torch.rand(2, 71, 33, dtype=torch.float64) * 2 - 1
    reference = GruReference(description(gru, [], []), weights_of(gru, [], []), np.float64)
    lengths = torch.arange(71, 0, -1).clamp(3, 11)
    y, final = run(reference, x.numpy(), h.numpy(), (np.arange(11)[:, None] < lengths.numpy()).sum(axis=1))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths)
    with torch.inference_mode():
        expected, expected_final = gru.double()(packed, h)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(expected)
    np.testing.assert_allclose(y, padded.numpy(), rtol=0, atol=1e-13)
    np.testing.assert_allclose(final, expected_final.numpy(), rtol=0, atol=1e-13)


def test_one_unit_by_hand() -> None:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    numbers = ([[0.5], [-0.25], [0.75]], [[0.125], [0.5], [-0.5]], [0.1, 0.2, 0.3], [-0.1, 0.05, 0.4])
    weights = {f"gru.{name}_l0": np.array(value, np.float32) for name, value in zip(names, numbers, strict=True)}
    x, h = 2.0, 0.5
    b = {name: weights[f"gru.{name}_l0"].astype(float).tolist() for name in ("bias_ih", "bias_hh")}
    r = 1 / (1 + math.exp(-(0.5 * x + b["bias_ih"][0] + 0.125 * h + b["bias_hh"][0])))
    z = 1 / (1 + math.exp(-(-0.25 * x + b["bias_ih"][1] + 0.5 * h + b["bias_hh"][1])))
    n = math.tanh(0.75 * x + b["bias_ih"][2] + r * (-0.5 * h + b["bias_hh"][2]))
    expected = (1 - z) * n + z * h

    reference = GruReference({"before": [], "gru": {"num_layers": 1}, "after": []}, weights, np.float64)
    y, final = run(reference, np.full((1, 1, 1), x), np.full((1, 1, 1), h), np.array([1]))
    assert y.item() == pytest.approx(expected, abs=1e-15)
    assert final.item() == y.item()


def test_shorter_sequences_keep_the_state_of_their_last_frame() -> None:
    torch.manual_seed(0)
    gru = torch.nn.GRU(3, 4, num_layers=2)
    reference = GruReference(description(gru, [], []), weights_of(gru, [], []), np.float64)
    x = np.random.default_rng(0).standard_normal((6, 3, 3))
    h = np.random.default_rng(1).uniform(-1, 1, (2, 3, 4))
    given = h.copy()
    y, final = run(reference, x, h, np.array([3, 3, 2, 2, 1, 1]))
    assert (h == given).all(), "the given states are not changed"
    for row, length in enumerate((6, 4, 2)):
        alone_y, alone = run(reference, x[:length, row : row + 1], h[:, row : row + 1], np.ones(length, np.int64))
        np.testing.assert_allclose(y[:length, row], alone_y[:, 0], rtol=0, atol=1e-15)
        np.testing.assert_allclose(final[:, row], alone[:, 0], rtol=0, atol=1e-15)


def test_tanh_is_near_the_truth_however_small_the_value() -> None:
    x = np.concatenate([[0.0], np.geomspace(1e-300, 800, 200_000)])
    x = np.concatenate([x, -x])
    weights = {f"gru.{name}_l0": np.zeros((3, 1), np.float32) for name in ("weight_ih", "weight_hh")}
    weights["gru.bias_ih_l0"] = np.array([0, -np.inf, 0], np.float32)  # the new state is n alone
    weights["gru.weight_ih_l0"][2] = 1
    parts: dict[str, Any] = {"before": [], "gru": {"num_layers": 1}, "after": []}
    y, _ = run(GruReference(parts, weights, np.float64), x[None, :, None], np.zeros((1, len(x), 1)), np.array([len(x)]))
    exact = np.tanh(x.astype(np.longdouble))
    assert np.finfo(np.longdouble).eps < np.finfo(np.float64).eps / 1000
    assert (np.abs(y[0, :, 0] - exact) <= 2.0**-44 * np.abs(exact)).all()


def test_tanh_in_float32_loses_no_more_than_float32_does() -> None:
    x = np.geomspace(1e-30, 20, 100_000).astype(np.float32)
    weights = {f"gru.{name}_l0": np.zeros((3, 1), np.float32) for name in ("weight_ih", "weight_hh")}
    weights["gru.bias_ih_l0"] = np.array([0, -np.inf, 0], np.float32)
    weights["gru.weight_ih_l0"][2] = 1
    parts: dict[str, Any] = {"before": [], "gru": {"num_layers": 1}, "after": []}
    h = np.zeros((1, len(x), 1), np.float32)
    y, _ = run(GruReference(parts, weights, np.float32), x[None, :, None], h, np.array([len(x)]))
    exact = np.tanh(x.astype(np.float64))
    assert (np.abs(y[0, :, 0] - exact) <= 2.0**-22 * exact).all()


def test_in_float32_it_rounds() -> None:
    torch.manual_seed(0)
    gru = torch.nn.GRU(3, 4)
    parts = description(gru, [], []), weights_of(gru, [], [])
    x = np.random.default_rng(0).standard_normal((20, 5, 3)).astype(np.float32)
    h = np.zeros((1, 5, 4), np.float32)
    exact, _ = run(GruReference(*parts, np.float64), x, h, np.full(20, 5))
    rounded, final = run(GruReference(*parts, np.float32), x, h, np.full(20, 5))
    assert rounded.dtype == final.dtype == np.float32
    assert 0 < np.abs(exact - rounded).max() < 1e-6


def test_overflow_is_a_value_and_not_a_warning() -> None:
    torch.manual_seed(0)
    gru = torch.nn.GRU(3, 4)
    head: Dense = [(torch.nn.Linear(4, 2), "none")]
    weights = weights_of(gru, [], head)
    weights["after.0.weight"] = np.full((2, 4), 3e38, np.float32) * np.array([[1, 1, 1, 1], [1, -1, 1, -1]], np.float32)
    x = np.full((1, 1, 3), 3e38, np.float32)
    y, _ = run(
        GruReference(description(gru, [], head), weights, np.float32), x, np.ones((1, 1, 4), np.float32), np.array([1])
    )
    assert not np.isfinite(y).all()
