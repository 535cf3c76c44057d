"""A recurrent model as torch's own modules: what tests take for the truth, within rounding errors."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from torch import nn

from instep.core.typing import F32, U8
from instep.models.base import LEARNED, RecurrentModel, StateSpec, step_frames
from instep.models.model import Model
from instep.models.recurrent.description import Activation, DenseLayer, FrameLayer, RecurrentDescription

ACTIVATIONS: Final[dict[Activation, nn.Module]] = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "elu": nn.ELU(),
    "leaky_relu": nn.LeakyReLU(),
    "softplus": nn.Softplus(),
    "softmax": nn.Softmax(dim=-1),
}
KINDS: Final[dict[str, Any]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}


class TorchNetwork(nn.Module):
    """It has the parameters of the model, which is of a recurrent kind, under the model's names."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        description = recurrent_of(model)
        layers = description.recurrent
        options = {"nonlinearity": layers.nonlinearity} if description.kind == "rnn" else {}  # type: ignore[attr-defined]
        self.description = description
        self.kind = description.kind
        self.before = _modules(description.before, description.features)
        module = KINDS[self.kind](
            description.recurrent_inputs, layers.hidden_size, layers.num_layers, bias=layers.bias, **options
        )
        self.add_module(self.kind, module)
        self.after = _modules(description.after, layers.hidden_size)
        self.load_state_dict({name: each for name, each in model.weights.items() if not name.startswith(LEARNED)})
        self.eval()

    @torch.inference_mode()
    def run(self, x: F32, rows: U8, dtype: torch.dtype = torch.float32) -> tuple[F32, U8]:
        """Whole sequences, as `RecurrentModel.sequence`; the outputs have the dtype, and the states are float32."""
        spec = self.description.state
        self.to(dtype)
        values = _run(self.before, self.description.before, torch.from_numpy(x).to(dtype))
        values, state = self.get_submodule(self.kind)(values, _given(spec, rows, dtype))
        y = _run(self.after, self.description.after, values)
        leaves = state if isinstance(state, tuple) else (state,)
        after = {
            leaf.name: each.transpose(0, 1).float().numpy() for leaf, each in zip(spec.leaves, leaves, strict=True)
        }
        return y.numpy(), spec.pack(after)


def recurrent_of(model: Model) -> RecurrentDescription:
    """The description of a model of a recurrent kind."""
    assert isinstance(model.description, RecurrentDescription)
    return model.description


def random_rows(spec: StateSpec, count: int, random: np.random.Generator) -> U8:
    """States of floats in ±0.5."""
    rows = spec.initial(count)
    for leaf in spec.unpack(rows).values():
        leaf[...] = random.uniform(-0.5, 0.5, leaf.shape)
    return rows


def _given(spec: StateSpec, rows: U8, dtype: torch.dtype) -> Any:
    leaves = [
        torch.from_numpy(leaf.copy()).transpose(0, 1).contiguous().to(dtype) for leaf in spec.unpack(rows).values()
    ]
    return tuple(leaves) if len(leaves) > 1 else leaves[0]


def _modules(layers: tuple[FrameLayer, ...], inputs: int) -> nn.ModuleList:
    modules = nn.ModuleList()
    for layer in layers:
        if isinstance(layer, DenseLayer):
            modules.append(nn.Linear(inputs, layer.size, bias=layer.bias))
            inputs = layer.size
        else:
            affine, bias = layer.elementwise_affine, layer.bias
            modules.append(nn.LayerNorm(inputs, eps=layer.eps, elementwise_affine=affine, bias=bias))
    return modules


def _run(modules: nn.ModuleList, layers: tuple[FrameLayer, ...], values: torch.Tensor) -> torch.Tensor:
    for module, layer in zip(modules, layers, strict=True):
        values = ACTIVATIONS[layer.activation](module(values))
    return values


def check_bits(network: RecurrentModel, x: F32, states: U8) -> tuple[F32, U8]:
    """That steps have the bits of the definition, and rows the same ones in every batch; outputs and states after."""
    y, after = step_frames(network, x, states)
    definition, rows = network.definition(), len(states)
    assert definition is not None
    found, leaves = definition.run(x, network.state.unpack(states), np.full(len(x), rows))
    assert found.tobytes() == y.tobytes()
    assert network.state.pack(leaves).tobytes() == after.tobytes()
    for count in (1, 2, 5, 16, 33):
        chosen = np.random.default_rng(count).permutation(rows)[:count]
        part, rest = step_frames(network, np.ascontiguousarray(x[:, chosen]), states[chosen])
        assert part.tobytes() == np.ascontiguousarray(y[:, chosen]).tobytes(), count
        assert rest.tobytes() == after[chosen].tobytes(), count
    return y, after
