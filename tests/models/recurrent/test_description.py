from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers
from instep.models.registry import parse_description


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_the_tensors_of_a_gru_are_those_of_torch(layers: int, bias: bool) -> None:
    description = GruDescription(features=5, gru=GruLayers(hidden_size=7, num_layers=layers, bias=bias))
    theirs = nn.GRU(5, 7, layers, bias=bias).state_dict()
    assert description.tensor_shapes() == {f"gru.{name}": tuple(tensor.shape) for name, tensor in theirs.items()}


def test_the_tensors_of_dense_layers_are_those_of_torch() -> None:
    description = GruDescription(
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
    plain = GruDescription(features=3, gru=GruLayers(hidden_size=4, num_layers=2))
    assert (plain.gru_input_size, plain.outputs, plain.state.encode()) == (3, 4, [["h", [2, 4], "float32", 0.0]])
    dense = GruDescription(
        features=3,
        before=(DenseLayer(size=10),),
        gru=GruLayers(hidden_size=4),
        after=(DenseLayer(size=8), DenseLayer(size=9)),
    )
    assert (dense.gru_input_size, dense.outputs, dense.state.row_bytes) == (10, 9, 16)


def test_bidirectional_is_refused_with_the_reason() -> None:
    with pytest.raises(ValidationError) as caught:
        GruDescription.model_validate({"features": 3, "gru": {"hidden_size": 4, "bidirectional": True}})
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
            {"features": 3, "gru": {"hidden_size": 4}, "before": [{"size": 1}, {"size": 1, "activation": "mish"}]},
            ("before", 1, "activation"),
        ),
    ],
)
def test_a_bad_field_is_refused_by_its_path(fields: dict[str, Any], place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        GruDescription.model_validate(fields)
    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_equal_descriptions_have_one_json_and_it_reads_back() -> None:
    short = GruDescription.model_validate({"features": 3, "gru": {"hidden_size": 4}})
    full = GruDescription(features=3, before=(), gru=GruLayers(hidden_size=4, num_layers=1, bias=True), after=())
    assert short.as_json() == full.as_json()
    assert parse_description(json.loads(json.dumps(full.as_json()))) == short
    other = GruDescription(features=3, gru=GruLayers(hidden_size=5))
    assert other.as_json() != short.as_json()


def test_a_description_does_not_change() -> None:
    description = GruDescription(features=3, gru=GruLayers(hidden_size=4))
    with pytest.raises(ValidationError):
        description.features = 4


def test_a_description_needs_no_torch() -> None:
    code = "import sys; from instep.models import registry, errors, ulp; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
