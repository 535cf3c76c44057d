"""A recurrent network as torch modules: `nn.GRU`, `nn.LSTM` or `nn.RNN`, `nn.Linear` and `nn.LayerNorm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from instep.models.model import Model
from instep.models.recurrent.description import Activation, FrameLayer, NormLayer, RecurrentDescription, RnnLayers
from instep.models.torch_network import Leaves

Function: TypeAlias = Callable[[torch.Tensor], torch.Tensor]

FUNCTIONS: Final[dict[Activation, Function]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "elu": functional.elu,
    "leaky_relu": functional.leaky_relu,
    "softplus": functional.softplus,
    "softmax": lambda x: torch.softmax(x, -1),
}


class RecurrentModule:
    """The `Forward` of a recurrent network."""

    def __init__(self, model: Model, device: torch.device) -> None:
        assert isinstance(model.description, RecurrentDescription)
        description, layers = model.description, model.description.recurrent
        options = {"nonlinearity": layers.nonlinearity} if isinstance(layers, RnnLayers) else {}
        self._recurrent: nn.RNNBase = getattr(nn, layers.NAME)(
            description.recurrent_inputs, layers.hidden_size, layers.num_layers, bias=layers.bias, **options
        )
        prefix = f"{description.kind}."
        self._recurrent.load_state_dict(
            {name.removeprefix(prefix): each for name, each in model.weights.items() if name.startswith(prefix)}
        )
        self._recurrent.requires_grad_(False).to(device)
        self._before = _frame_layers("before", description.before, description.features, model.weights, device)
        self._after = _frame_layers("after", description.after, layers.hidden_size, model.weights, device)
        self._names = layers.LEAVES

    def __call__(self, x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # noqa: D102
        for layer in self._before:
            x = layer(x)
        states = tuple(leaves[name].transpose(0, 1).contiguous() for name in self._names)
        x, after = self._recurrent(x, states if len(states) > 1 else states[0])
        for layer in self._after:
            x = layer(x)
        results = after if len(states) > 1 else (after,)
        return x, {name: leaf.transpose(0, 1) for name, leaf in zip(self._names, results, strict=True)}


def _frame_layers(
    place: str,
    layers: Sequence[FrameLayer],
    inputs: int,
    weights: Mapping[str, torch.Tensor],
    device: torch.device,
) -> list[Function]:
    found: list[Function] = []
    for index, layer in enumerate(layers):
        module: nn.Module
        if isinstance(layer, NormLayer):
            module = nn.LayerNorm(inputs, layer.eps, layer.elementwise_affine, layer.bias)
        else:
            module = nn.Linear(inputs, layer.size, layer.bias)
        names = layer.tensor_shapes(inputs)
        module.load_state_dict({name: weights[f"{place}.{index}.{name}"] for name in names})
        found += [module.requires_grad_(False).to(device), FUNCTIONS[layer.activation]]
        inputs = layer.outputs(inputs)
    return found
