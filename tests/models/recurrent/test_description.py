from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers, NormLayer
from instep.models.registry import KINDS, parse_description


@pytest.mark.parametrize(("kind", "module"), [("gru", nn.GRU), ("lstm", nn.LSTM), ("rnn", nn.RNN)])
@pytest.mark.parametrize(("layers", "bias"), [(1, True), (3, True), (2, False)])
def test_the_tensors_of_recurrent_layers_are_those_of_torch(
    kind: str, module: type[nn.RNNBase], layers: int, bias: bool
) -> None:
    recurrent = {"hidden_size": 7, "num_layers": layers, "bias": bias}
    description = parse_description({"kind": kind, "features": 5, kind: recurrent})
    theirs = module(5, 7, layers, bias=bias).state_dict()  # type: ignore[arg-type]
    assert description.tensor_shapes() == {f"{kind}.{name}": tuple(tensor.shape) for name, tensor in theirs.items()}
    assert list(description.tensor_shapes()) == [f"{kind}.{name}" for name in theirs]


def test_the_tensors_of_other_layers_are_those_of_torch() -> None:
    description = GruDescription(
        features=5,
        before=(DenseLayer(size=6, activation="relu"), DenseLayer(size=8, bias=False), NormLayer(layer_norm=True)),
        gru=GruLayers(hidden_size=7),
        after=(
            NormLayer(layer_norm=True, bias=False),
            NormLayer(layer_norm=True, elementwise_affine=False),
            DenseLayer(size=2, activation="sigmoid"),
        ),
    )
    norms = nn.LayerNorm(7, bias=False), nn.LayerNorm(7, elementwise_affine=False)
    theirs = nn.ModuleDict(
        {
            "before": nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 8, bias=False), nn.LayerNorm(8)),
            "gru": nn.GRU(8, 7),
            "after": nn.Sequential(*norms, nn.Linear(7, 2)),
        }
    ).state_dict()
    assert description.tensor_shapes() == {name: tuple(tensor.shape) for name, tensor in theirs.items()}


def test_what_goes_in_and_out() -> None:
    plain = GruDescription(features=3, gru=GruLayers(hidden_size=4, num_layers=2))
    assert (plain.recurrent_inputs, plain.outputs, plain.state.encode()) == (3, 4, [["h", [2, 4], "float32", 0.0]])
    dense = GruDescription(
        features=3,
        before=(DenseLayer(size=10),),
        gru=GruLayers(hidden_size=4),
        after=(DenseLayer(size=8), DenseLayer(size=9)),
    )
    assert (dense.recurrent_inputs, dense.outputs, dense.state.row_bytes) == (10, 9, 16)
    recurrent = {"hidden_size": 4, "num_layers": 2}
    norm: dict[str, Any] = {"layer_norm": True, "eps": "1e-3", "activation": "ReLU"}  # YAML takes 1e-3 for text
    fields = {"features": 3, "before": [{"size": 10}, norm], "after": [norm]}
    lstm = parse_description({"kind": "lstm", "lstm": recurrent, **fields})
    assert lstm.state.encode() == [["h", [2, 4], "float32", 0.0], ["c", [2, 4], "float32", 0.0]]
    assert lstm.outputs == 4
    assert lstm.in_words() == "3 features → dense 10 → layer norm relu → LSTM 4 × 2 layers → layer norm relu"
    rnn = parse_description({"kind": "rnn", "rnn": recurrent | {"nonlinearity": "relu"}, **fields})
    assert rnn.state == GruDescription(features=3, gru=GruLayers(hidden_size=4, num_layers=2)).state
    assert rnn.in_words().split(" → ")[3] == "RNN 4 × 2 layers relu"


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"features": 3}, ("gru",)),
        ({"features": 3, "gru": {"hidden_size": 4, "dropout": 0.1}}, ("gru", "dropout")),
        (
            {"features": 3, "gru": {"hidden_size": 4}, "before": [{"size": 1}, {"size": 1, "activation": "mish"}]},
            ("before", 1, "activation"),
        ),
        ({"features": 3, "gru": {"hidden_size": 4}, "after": [{"layer_norm": True, "size": 4}]}, ("after", 0, "size")),
    ],
)
def test_a_bad_field_is_refused_by_its_path(fields: dict[str, Any], place: tuple[str | int, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        KINDS[fields.get("kind", "gru")].parse(fields)
    assert [error["loc"] for error in caught.value.errors()] == [place]


def test_equal_descriptions_have_one_json_and_it_reads_back() -> None:
    short = GruDescription.model_validate({"features": 3, "gru": {"hidden_size": 4}})
    full = GruDescription(features=3, before=(), gru=GruLayers(hidden_size=4, num_layers=1, bias=True), after=())
    assert short.as_json() == full.as_json()
    assert parse_description(json.loads(json.dumps(full.as_json()))) == short
    other = GruDescription(features=3, gru=GruLayers(hidden_size=5))
    assert other.as_json() != short.as_json()
    # As recordings and fingerprints have it.
    assert json.dumps(short.as_json()) == (
        '{"kind": "gru", "features": 3, "before": [], "gru": {"hidden_size": 4, "num_layers": 1, "bias": true}, '
        '"after": []}'
    )
    norm = {"layer_norm": True, "eps": 1e-3}
    fields = {"kind": "lstm", "features": 3, "before": [norm], "lstm": {"hidden_size": 4}, "after": [{"size": 2}]}
    assert parse_description(fields).as_json(defaults=False) == fields
    assert parse_description(parse_description(fields).as_json()) == parse_description(fields)


def test_a_description_needs_no_torch() -> None:
    code = "import sys; from instep.models import registry, errors; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
