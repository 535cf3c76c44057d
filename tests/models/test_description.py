from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from instep.models.description import DenseLayer, GruLayers, NetworkDescription


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_tensors_of_a_gru_are_those_of_torch(layers: int, bias: bool) -> None:
    description = NetworkDescription(features=5, gru=GruLayers(hidden_size=7, num_layers=layers, bias=bias))
    theirs = nn.GRU(5, 7, layers, bias=bias).state_dict()
    assert description.tensor_shapes() == {f"gru.{name}": tuple(tensor.shape) for name, tensor in theirs.items()}


def test_the_tensors_of_dense_layers_are_those_of_torch() -> None:
    description = NetworkDescription(
        features=5,
        before=(DenseLayer(size=6, activation="relu"), DenseLayer(size=8, bias=False)),
        gru=GruLayers(hidden_size=7),
        after=(DenseLayer(size=2, activation="sigmoid"),),
    )
    theirs = nn.ModuleDict(
        {
            "before": nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 8, bias=False)),
            "gru": nn.GRU(8, 7),
            "after": nn.Sequential(nn.Linear(7, 2)),
        }
    ).state_dict()
    assert description.tensor_shapes() == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_what_goes_in_and_out() -> None:
    plain = NetworkDescription(features=3, gru=GruLayers(hidden_size=4, num_layers=2))
    assert (plain.gru_input_size, plain.outputs, plain.state_layers, plain.state_size) == (3, 4, 2, 4)
    dense = NetworkDescription(
        features=3,
        before=(DenseLayer(size=10),),
        gru=GruLayers(hidden_size=4),
        after=(DenseLayer(size=8), DenseLayer(size=9)),
    )
    assert (dense.gru_input_size, dense.outputs, dense.state_layers, dense.state_size) == (10, 9, 1, 4)


def test_bidirectional_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError) as caught:
        NetworkDescription.model_validate({"features": 3, "gru": {"hidden_size": 4, "bidirectional": True}})
    (error,) = caught.value.errors()
    assert error["loc"] == ("gru", "bidirectional")
    assert error["msg"].startswith("a bidirectional GRU cannot stream: its backward direction starts at the last")


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"gru": {"hidden_size": 4}}, ("features",)),
        ({"features": 3}, ("gru",)),
        ({"features": 0, "gru": {"hidden_size": 4}}, ("features",)),
        ({"features": True, "gru": {"hidden_size": 4}}, ("features",)),
        ({"features": "3", "gru": {"hidden_size": 4}}, ("features",)),
        ({"features": 3, "gru": {"hidden_size": 4.0}}, ("gru", "hidden_size")),
        ({"features": 3, "gru": {"hidden_size": 4, "num_layers": 0}}, ("gru", "num_layers")),
        ({"features": 3, "gru": {"hidden_size": 4, "bias": "no"}}, ("gru", "bias")),
        ({"features": 3, "gru": {"hidden_size": 4, "dropout": 0.1}}, ("gru", "dropout")),
        ({"features": 3, "gru": {"hidden_size": 4}, "head": 3}, ("head",)),
        ({"features": 3, "gru": {"hidden_size": 4}, "after": [{"size": -1}]}, ("after", 0, "size")),
        (
            {"features": 3, "gru": {"hidden_size": 4}, "before": [{"size": 1}, {"size": 1, "activation": "gelu"}]},
            ("before", 1, "activation"),
        ),
    ],
)
def test_a_bad_field_is_refused_by_its_path(fields: dict[str, Any], place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        NetworkDescription.model_validate(fields)
    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_equal_descriptions_have_one_json_and_it_reads_back() -> None:
    short = NetworkDescription.model_validate({"features": 3, "gru": {"hidden_size": 4}})
    full = NetworkDescription(features=3, before=(), gru=GruLayers(hidden_size=4, num_layers=1, bias=True), after=())
    assert short.canonical_json() == full.canonical_json()
    assert NetworkDescription.model_validate_json(full.canonical_json()) == short
    other = NetworkDescription(features=3, gru=GruLayers(hidden_size=5))
    assert other.canonical_json() != short.canonical_json()


def test_a_description_does_not_change() -> None:
    description = NetworkDescription(features=3, gru=GruLayers(hidden_size=4))
    with pytest.raises(ValidationError):
        description.features = 4


def test_a_description_needs_no_torch() -> None:
    code = "import sys; from instep.models import description, errors, ulp; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
