"""The layers of a trained network as torch modules, and the model that they make up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import pairwise
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from pydantic import ValidationError
from torch import nn

from instep.models.base import LEARNED
from instep.models.errors import ModelError
from instep.models.folder import check_name, check_output_names
from instep.models.model import Model, check_weights
from instep.models.recurrent.description import (
    ACTIVATIONS,
    BIDIRECTIONAL,
    DESCRIPTIONS,
    PROJECTION,
    Activation,
    activation_name,
)
from instep.models.recurrent.module import FUNCTIONS
from instep.models.registry import sentences

RecurrentModule: TypeAlias = nn.GRU | nn.LSTM | nn.RNN
RECURRENT: Final[dict[str, type[RecurrentModule]]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
"""Torch's modules by kind."""
SERVED: Final = (
    "a model folder holds one nn.GRU, nn.LSTM or nn.RNN, and nn.Linear and nn.LayerNorm layers with activations before "
    "and after it; any other network can be written as a step and exported with instep.models.export_step"
)
"""The list of supported layers, for error messages."""


class Layer(NamedTuple):
    """A dense layer or a layer norm, and the activation after it."""

    label: str
    """Its name in error messages."""
    module: nn.Linear | nn.LayerNorm
    activation: Activation = "none"

    def checked(self) -> Layer:
        """Return this layer after checking it.

        Raises:
            ModelError: when it does not work on one frame at a time, or its class computes something of its own.
        """
        _check_forward(self.label, self.module, nn.Linear if isinstance(self.module, nn.Linear) else nn.LayerNorm)
        if isinstance(self.module, nn.LayerNorm) and len(self.module.normalized_shape) != 1:
            raise ModelError(
                f"{self.label} is a LayerNorm over {list(self.module.normalized_shape)}, and only one over the values "
                "of a frame can be served: train one with a single size"
            )
        return self

    def fields(self) -> dict[str, Any]:
        """The keys of the layer in `model.yaml`."""
        module, bias = self.module, self.module.bias is not None
        if isinstance(module, nn.Linear):
            return {"size": module.out_features, "bias": bias, "activation": self.activation}
        affine = module.elementwise_affine
        own = {"eps": module.eps, "elementwise_affine": affine, "bias": bias or not affine}
        return {"layer_norm": True, **own, "activation": self.activation}


def dense(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """A dense layer with weights [outputs, inputs] and a bias [outputs]."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made


def folded(linear: nn.Linear, norm: nn.BatchNorm1d) -> nn.Linear:
    """A dense layer with the following batch norm folded into its weights, computed in float64."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
    shift = torch.zeros_like(mean)
    if norm.affine:
        scale, shift = scale * norm.weight.double(), norm.bias.double()
    bias = -mean if linear.bias is None else linear.bias.double() - mean
    return dense((linear.weight.double() * scale[:, None]).float(), (bias * scale + shift).float())


def sizes(module: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs of a layer."""
    match module:
        case nn.Linear():
            return module.in_features, module.out_features
        case nn.LayerNorm():
            return module.normalized_shape[-1], module.normalized_shape[-1]
        case nn.BatchNorm1d():
            return module.num_features, module.num_features
        case nn.RNNBase():
            return module.input_size, module.hidden_size
    raise TypeError(f"{type(module).__name__} is not a layer")


def check_recurrent(label: str, module: RecurrentModule) -> None:
    """Refuse a recurrent module that is bidirectional or has projections, or computes something of its own.

    Raises:
        ModelError: saying which.
    """
    kind = kind_of(module)
    _check_forward(label, module, RECURRENT[kind])
    if module.bidirectional:
        raise ModelError(BIDIRECTIONAL.format(kind.upper()))
    if module.proj_size:
        raise ModelError(PROJECTION)


def kind_of(module: RecurrentModule) -> str:
    """The kind in `model.yaml`."""
    return next(kind for kind, each in RECURRENT.items() if isinstance(module, each))


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers in the order in which they process a frame."""

    before: Sequence[Layer]
    recurrent: tuple[str, RecurrentModule]
    """The recurrent module's name in error messages, and the module."""
    after: Sequence[Layer]
    initial_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """The learned initial state by leaf, [num_layers, hidden_size]; empty for zeros."""

    def model(self, name: str, outputs: Sequence[str] = ()) -> Model:
        """Build the model from copies of the tensors.

        Raises:
            ModelError: the layers do not fit each other, a weight is not finite float32, or a name is not valid.
        """
        _, recurrent = self.recurrent
        parts: list[tuple[str, nn.Module]] = [
            *(layer[:2] for layer in self.before),
            self.recurrent,
            *(layer[:2] for layer in self.after),
        ]
        for (giver, given), (taker, taken) in pairwise(parts):
            if sizes(given)[1] != sizes(taken)[0]:
                raise ModelError(
                    f"{taker} takes {sizes(taken)[0]} values but {giver} gives {sizes(given)[1]}; their sizes must be "
                    "equal"
                )
        kind = kind_of(recurrent)
        of_rnn = {"nonlinearity": recurrent.nonlinearity} if isinstance(recurrent, nn.RNN) else {}
        fields = {
            "kind": kind,
            "features": sizes(parts[0][1])[0],
            "before": [layer.fields() for layer in self.before],
            kind: {
                "hidden_size": recurrent.hidden_size,
                "num_layers": recurrent.num_layers,
                "bias": recurrent.bias,
                **of_rnn,
            },
            "after": [layer.fields() for layer in self.after],
            "initial_state": "learned" if self.initial_state else "zeros",
        }
        try:
            description = DESCRIPTIONS[kind].model_validate(fields)
        except ValidationError as error:
            raise ModelError(f"these layers do not make a network: {sentences(error)}") from None
        modules: dict[str, Any] = {kind: recurrent}
        for place, layers in (("before", self.before), ("after", self.after)):
            modules |= {f"{place}.{at}": layer.module for at, layer in enumerate(layers)}
        learned = {LEARNED + leaf: tensor for leaf, tensor in self.initial_state.items()}
        weights = {}
        for path in description.tensor_shapes():
            module, _, own = path.rpartition(".")
            tensor: torch.Tensor = learned[path] if path in learned else getattr(modules[module], own)
            weights[path] = tensor.detach().cpu().clone()
        check_weights(weights, description, "the given network")
        return Model(check_name(name), description, weights, check_output_names(list(outputs), description))


def _check_forward(label: str, module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module).forward is not kind.forward:
        raise ModelError(
            f"{label} is a {type(module).__name__} with a forward of its own, which cannot be served: hand over an "
            f"nn.{kind.__name__} that computes the same"
        )


def activation_of(given: object, place: str) -> Activation:
    """The activation for a name, a module or a function of torch; `place` names the layer in error messages.

    Raises:
        ModelError: when it cannot be served.
    """
    name = activation_name(given)
    if name in ACTIVATIONS:
        return name
    allowed = f"give one of {', '.join(ACTIVATIONS)}, or torch's module or function of that name"
    if isinstance(given, str) and (close := get_close_matches(given.lower(), ACTIVATIONS, n=1)):
        allowed = f"did you mean {close[0]}? If not, {allowed}"
    found = recognised(given, (4, 30)) if callable(given) and not isinstance(given, type) else None
    if found is None:
        raise ModelError(f"{place} is {shown(given)}, which cannot be served: {allowed}")
    return found


@torch.no_grad()
def recognised(function: Callable[[torch.Tensor], Any], shape: Sequence[int]) -> Activation | None:
    """The activation that equals a function on sample tensors of a shape, some of them with huge values."""
    x = 10 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    x.view(-1)[::7] *= 1e25
    try:
        y = function(x.clone())
    except Exception:  # whatever the user's function raises
        return None
    if not isinstance(y, torch.Tensor) or y.shape != x.shape:
        return None
    alike = (name for name, each in FUNCTIONS.items() if torch.allclose(y.cpu(), each(x), rtol=1e-5, atol=1e-6))
    return next(alike, None)


def plain_path(name: str) -> str:
    """A module's path without the prefixes that torch.compile adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def shown(value: object) -> str:
    """A value as error messages show it."""
    return " ".join(f"{value!r:.120}".split())
