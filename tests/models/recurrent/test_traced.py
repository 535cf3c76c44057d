"""The layers that a description names and the same ones traced from torch's operators have the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from instep.core.typing import F32
from instep.models.folder import make_model
from instep.models.model import Model
from instep.models.portable.definition import Definition
from instep.models.portable.trace import trace
from instep.models.recurrent.description import ACTIVATIONS
from instep.models.registry import normal_form, parse_description
from tests.support.torch_network import ACTIVATIONS as MODULES
from tests.support.torch_network import recurrent_of

FEATURES, HIDDEN, LAYERS, ROWS = 5, 7, 2, 40
CELLS: Final[Mapping[str, Any]] = {
    "gru": torch.gru_cell,
    "lstm": torch.lstm_cell,
    "rnn": torch.rnn_tanh_cell,
    "rnn relu": torch.rnn_relu_cell,
}


def model_of(kind: str, bias: bool) -> Model:
    kind, _, nonlinearity = kind.partition(" ")
    layers: dict[str, Any] = {"hidden_size": HIDDEN, "num_layers": LAYERS, "bias": bias}
    layers |= {"nonlinearity": nonlinearity} if nonlinearity else {}
    fields = {"kind": kind, "features": FEATURES, kind: layers}
    return make_model(parse_description(fields), "random", name="n", seed=5)


def given(features: int, leaves: int) -> list[F32]:
    """Frames [R, features] and leaves [R, layers · hidden] of several magnitudes."""
    random = np.random.default_rng(2)
    x = random.standard_normal((ROWS, features)) * random.choice([0.01, 1, 30], (ROWS, 1))
    return [each.astype(np.float32) for each in (x, *random.uniform(-1, 1, (leaves, ROWS, LAYERS * HIDDEN)))]


def described(model: Model, arrays: Sequence[F32]) -> list[F32]:
    """Outputs and leaves of the model's form, by the definition."""
    weights = {name: tensor.numpy() for name, tensor in model.weights.items()}
    return Definition(normal_form(model.description), weights).step(arrays)


def traced(step: Any, tensors: Mapping[str, Tensor], arrays: Sequence[F32]) -> list[F32]:
    """The same of a step in torch."""
    found = trace(step, tensors, [torch.zeros(1, each.shape[1]) for each in arrays])
    named = {name: each.numpy() for name, each in {**tensors, **found.constants}.items()}
    return Definition(found.form, named).step(arrays)


def assert_same(found: Sequence[F32], expected: Sequence[F32]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == np.ascontiguousarray(other).tobytes()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, bias: bool) -> None:
    model = model_of(kind, bias)
    per_layer = len(model.weights) // LAYERS

    def step(tensors: Sequence[Tensor], x: Tensor, *leaves: Tensor) -> list[Tensor]:
        after = []
        for layer in range(LAYERS):
            weights = tensors[layer * per_layer : (layer + 1) * per_layer]
            states = [leaf[:, layer * HIDDEN : (layer + 1) * HIDDEN] for leaf in leaves]
            result = CELLS[kind](x, states if len(states) > 1 else states[0], *weights)
            after.append(result if isinstance(result, tuple) else (result,))
            x = after[-1][0]
        return [x, *(torch.cat(parts, 1) for parts in zip(*after, strict=True))]

    arrays = given(FEATURES, len(recurrent_of(model).recurrent.LEAVES))
    assert_same(traced(step, model.weights, arrays), described(model, arrays))


FRAME_LAYERS: Final[Mapping[str, Any]] = {
    **{name: {"size": 9, "activation": name} for name in ACTIVATIONS},
    "without bias": {"size": 9, "bias": False},
    "layer norm": {"layer_norm": True},
    "layer norm without bias": {"layer_norm": True, "bias": False, "eps": 1e-3},
    "layer norm without weights": {"layer_norm": True, "elementwise_affine": False},
}


@pytest.mark.parametrize("name", FRAME_LAYERS)
def test_layers_of_a_frame(name: str) -> None:
    layer = FRAME_LAYERS[name]
    recurrent = {"hidden_size": HIDDEN, "num_layers": LAYERS}
    fields = {"kind": "rnn", "features": FEATURES, "rnn": recurrent, "after": [layer]}
    model = make_model(parse_description(fields), "random", name="n", seed=5)
    assert_same(traced(_after(model, layer), model.weights, given(FEATURES, 1)), described(model, given(FEATURES, 1)))


def _after(model: Model, layer: Mapping[str, Any]) -> Any:
    names = list(model.weights)

    def step(tensors: Sequence[Tensor], x: Tensor, h: Tensor) -> list[Tensor]:
        named, after = dict(zip(names, tensors, strict=True)), []
        for at in range(LAYERS):
            weights = [named[f"rnn.{each}_l{at}"] for each in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
            x = torch.rnn_tanh_cell(x, h[:, at * HIDDEN : (at + 1) * HIDDEN], *weights)
            after.append(x)
        weight, bias = named.get("after.0.weight"), named.get("after.0.bias")
        if "layer_norm" in layer:
            y = nn.functional.layer_norm(x, (HIDDEN,), weight, bias, layer.get("eps", 1e-5))
        else:
            assert weight is not None
            y = MODULES[layer.get("activation", "none")](nn.functional.linear(x, weight, bias))
        return [y, torch.cat(after, 1)]

    return step
