from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.handover.save import save_model
from instep.models.model import Model
from instep.models.recurrent.description import DenseLayer, GruDescription

LINEAR = nn.Linear(4, 2)


def same(one: Model, other: Model) -> bool:
    return (
        (one.name, one.description, one.fingerprint) == (other.name, other.description, other.fingerprint)
        and list(one.weights) == list(other.weights)
        and all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    )


def test_layers_in_folder_out(tmp_path: Path) -> None:
    torch.manual_seed(3)
    gru = nn.GRU(5, 3, 2, dropout=0.3, batch_first=True)
    before, after = nn.Linear(2, 5, bias=False), nn.Linear(3, 4)
    folder = tmp_path / "ears"
    saved = save_model(folder, gru, [(before, "relu")], [(after, nn.Tanh())], outputs=["n", "e", "s", "w"])
    assert saved.name == "ears"
    assert same(load_model(folder), saved)
    assert load_model(folder).output_names == saved.output_names == ("n", "e", "s", "w")

    assert yaml.safe_load((folder / "model.yaml").read_text()) == {
        "name": "ears",
        "kind": "gru",
        "features": 2,
        "before": [{"size": 5, "activation": "relu", "bias": False}],
        "gru": {"hidden_size": 3, "num_layers": 2},
        "after": [{"size": 4, "activation": "tanh"}],
        "outputs": ["n", "e", "s", "w"],
    }
    stored = load_file(folder / "weights.safetensors")
    theirs = {f"gru.{name}": tensor for name, tensor in gru.state_dict().items()} | {
        "before.0.weight": before.weight,
        "after.0.weight": after.weight,
        "after.0.bias": after.bias,
    }
    assert stored.keys() == theirs.keys()
    assert all(torch.equal(stored[name], theirs[name]) for name in stored)


@pytest.mark.parametrize(
    ("module", "description"),
    [
        (nn.LSTM(5, 3, 2, batch_first=True), {"kind": "lstm", "lstm": {"hidden_size": 3, "num_layers": 2}}),
        (nn.RNN(5, 3, bias=False), {"kind": "rnn", "rnn": {"hidden_size": 3, "bias": False}}),
        (nn.RNN(5, 3, nonlinearity="relu"), {"kind": "rnn", "rnn": {"hidden_size": 3, "nonlinearity": "relu"}}),
    ],
)
def test_an_lstm_or_an_rnn_with_layer_norms(tmp_path: Path, module: nn.RNNBase, description: dict[str, Any]) -> None:
    norm, last = nn.LayerNorm(5, eps=1e-3, bias=False), nn.LayerNorm(3, elementwise_affine=False)
    saved = save_model(tmp_path / "m", module, [(nn.Linear(2, 5), "none"), (norm, "ReLU")], [(last, "none")])
    assert same(load_model(tmp_path / "m"), saved)
    assert yaml.safe_load((tmp_path / "m" / "model.yaml").read_text()) == {
        "name": "m",
        "features": 2,
        "before": [{"size": 5}, {"layer_norm": True, "activation": "relu", "eps": 1e-3, "bias": False}],
        "after": [{"layer_norm": True, "elementwise_affine": False}],
        **description,
    }
    kind = description["kind"]
    for name, tensor in module.state_dict().items():
        assert torch.equal(saved.weights[f"{kind}.{name}"], tensor)
    assert torch.equal(saved.weights["before.1.weight"], norm.weight)
    assert not any(name.startswith("after") for name in saved.weights)


def test_layers_that_cannot_be_served_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    broken = nn.GRU(3, 4, 2)
    with torch.no_grad():
        broken.get_parameter("bias_hh_l1")[2] = math.nan
    given: list[tuple[nn.Module, dict[str, Any], str]] = [
        (nn.GRU(3, 4, bidirectional=True), {}, "a bidirectional GRU"),
        (nn.GRU(3, 4), {"after": [(nn.Linear(5, 6), "none")]}, r"after\[0\] takes 5 values but the GRU gives 4"),
        (nn.GRU(3, 4).double(), {}, r"gru\.weight_ih_l0 .* float64"),
        (broken, {}, r"gru\.bias_hh_l1 .* NaN"),
        (nn.GRU(3, 4), {"name": ""}, "name"),
        (nn.GRU(3, 4), {"outputs": ["yes"]}, "outputs: "),
        (nn.GRU(3, 4), {"example": torch.zeros(1, 1, 3)}, "example"),
        (nn.GRU(3, 4), {"after": LINEAR}, r"after\[0\]"),
        (nn.GRU(3, 4), {"after": [(nn.RMSNorm(4), "none")]}, "RMSNorm"),
        (nn.GRU(3, 4), {"after": [(nn.LayerNorm((2, 4)), "none")]}, "LayerNorm"),
        (nn.RNN(3, 4), {"nonlinearity": "relu"}, "state dict"),
        (nn.RNNCell(3, 4), {}, "RNNCell"),
        (nn.LSTM(3, 4, proj_size=2), {}, "proj_size"),
        (nn.ModuleList([nn.GRU(3, 4), nn.LSTM(4, 4)]), {}, r"`0` \(GRU\), `1` \(LSTM\)"),
    ]
    for network, options, named in given:
        with pytest.raises(ModelError, match=named):
            save_model(tmp_path / "m", network, **options)
    assert not (tmp_path / "m").exists()


class OwnGru(nn.GRU):
    def forward(self, *args: Any) -> Any:
        return super().forward(*args)[0] * 2


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def test_a_layer_with_a_forward_of_its_own_is_refused(tmp_path: Path) -> None:
    for network, after, named in (
        (OwnGru(3, 4), (), "OwnGru"),
        (nn.Sequential(OwnGru(3, 4)), (), "OwnGru"),
        (nn.GRU(3, 4), [(OwnLinear(4, 4), "none")], "OwnLinear"),
        (nn.Sequential(OwnLinear(3, 3), nn.GRU(3, 4)), (), "OwnLinear"),
    ):
        with pytest.raises(ModelError, match=named):
            save_model(tmp_path / "m", network, after=after)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        *((name, name) for name in ("none", "relu", "tanh", "sigmoid", "gelu", "silu", "elu", "leaky_relu", "softmax")),
        ("LeakyReLU", "leaky_relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.Softmax(dim=-1), "softmax"),
        (functional.softplus, "softplus"),
        (lambda x: functional.leaky_relu(x, 0.01), "leaky_relu"),
    ],
)
def test_an_activation_is_a_name_in_any_case_or_torchs_module_or_function(
    tmp_path: Path, activation: Any, name: str
) -> None:
    model = save_model(tmp_path / "m", nn.GRU(3, 4), after=[(LINEAR, activation)])
    assert isinstance(model.description, GruDescription)
    assert model.description.after == (DenseLayer.model_validate({"size": 2, "activation": name}),)


@pytest.mark.parametrize(
    "activation",
    [
        *("relyu", nn.ReLU, None, len, lambda x, y: x, lambda _: torch.zeros(3, 4)),
        *(nn.LeakyReLU(0.2), nn.GELU(approximate="tanh"), nn.ELU(alpha=0.5), nn.Softplus(beta=2), nn.Softmax(dim=0)),
        *(torch.square, torch.round, lambda x: x.clamp(-1e9, 1e9), lambda x: x * torch.tanh(x)),
    ],
)
def test_an_activation_that_cannot_be_served_is_refused(tmp_path: Path, activation: Any) -> None:
    with pytest.raises(ModelError, match=r"after\[0\]"):
        save_model(tmp_path / "m", nn.GRU(3, 4), after=[(LINEAR, activation)])
    assert not (tmp_path / "m").exists()
