"""The layers of a network that is handed over, as tensors, and the model that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, TypeAlias

import torch
from pydantic import ValidationError
from torch import nn

from instep.models.base import LEARNED
from instep.models.errors import ModelError
from instep.models.folder import check_name, check_output_names
from instep.models.model import Model, check_weights
from instep.models.recurrent.description import (
    BIDIRECTIONAL,
    DESCRIPTIONS,
    PROJECTION,
    Activation,
)
from instep.models.registry import sentences

RecurrentModule: TypeAlias = nn.GRU | nn.LSTM | nn.RNN
RECURRENT: Final[dict[str, type[RecurrentModule]]] = {"gru": nn.GRU, "lstm": nn.LSTM, "rnn": nn.RNN}
"""Torch's modules by kind."""
SERVED: Final = (
    "a model folder holds one nn.GRU, nn.LSTM or nn.RNN, and nn.Linear and nn.LayerNorm layers with activations before "
    "and after it; any other network can be written as a step and exported with instep.models.export_step"
)
"""For sentences about what it does not hold."""


@dataclass(frozen=True, eq=False)
class FrameLayer:
    """A dense layer or a layer norm, and the activation after it."""

    label: str
    """How sentences name it."""
    inputs: int
    outputs: int
    """Values that it takes and gives."""
    fields: Mapping[str, Any]
    """As in `model.yaml`, without the activation."""
    tensors: Mapping[str, torch.Tensor]
    """By torch's names."""
    activation: Activation = "none"

    @property
    def is_dense(self) -> bool:
        """Whether it is an `nn.Linear`, not an `nn.LayerNorm`."""
        return "size" in self.fields

    @property
    def description(self) -> dict[str, Any]:
        """As it stands in `model.yaml`."""
        return {**self.fields, "activation": self.activation}

    def normalised(self, norm: nn.BatchNorm1d) -> FrameLayer:
        """This dense layer with the batch norm after it folded into its weights, which float64 computes."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(mean)
        if norm.affine:
            scale, shift = scale * norm.weight.double(), norm.bias.double()
        weight, bias = self.tensors["weight"], self.tensors.get("bias", torch.zeros_like(mean)).double() - mean
        folded = (weight.double() * scale[:, None]).to(weight.dtype)
        return dense(self.label, folded, (bias * scale + shift).to(weight.dtype), self.activation)


def dense(
    label: str, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: Activation = "none"
) -> FrameLayer:
    """A dense layer with weights [outputs, inputs] and a bias [outputs]."""
    outputs, inputs = weight.shape
    tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return FrameLayer(label, inputs, outputs, {"size": outputs, "bias": bias is not None}, tensors, activation)


def layer_norm(
    label: str,
    size: int,
    eps: float,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    activation: Activation = "none",
) -> FrameLayer:
    """A layer norm over the `size` values of a frame."""
    has_weight = weight is not None
    fields = {
        "layer_norm": True,
        "eps": eps,
        "elementwise_affine": has_weight,
        "bias": bias is not None or not has_weight,
    }
    tensors = {name: tensor for name, tensor in (("weight", weight), ("bias", bias)) if tensor is not None}
    return FrameLayer(label, size, size, fields, tensors, activation)


def layer_of_module(label: str, module: nn.Linear | nn.LayerNorm, activation: Activation = "none") -> FrameLayer:
    """The layer that a module is.

    Raises:
        ModelError: when it takes more than the values of a frame together, or computes something of its own.
    """
    if isinstance(module, nn.Linear):
        _check_forward(label, module, nn.Linear)
        return dense(label, module.weight, module.bias, activation)
    _check_forward(label, module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        raise ModelError(
            f"{label} is a LayerNorm over {list(module.normalized_shape)}, and only one over the values of a frame "
            "can be served: train one with a single size"
        )
    return layer_norm(label, module.normalized_shape[0], module.eps, module.weight, module.bias, activation)


@dataclass(frozen=True, eq=False)
class Recurrent:
    """A GRU's, LSTM's or RNN's tensors by torch's names, from `weight_ih_l0` on."""

    label: str
    kind: str
    """As in `model.yaml`."""
    tensors: Mapping[str, torch.Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the description, such as `nonlinearity`."""

    @classmethod
    def of(cls, label: str, module: RecurrentModule) -> Recurrent:
        """The layers that a module is.

        Raises:
            ModelError: when it is bidirectional or has projections, or computes something of its own.
        """
        (kind,) = (kind for kind, each in RECURRENT.items() if isinstance(module, each))
        _check_forward(label, module, RECURRENT[kind])
        if module.bidirectional:
            raise ModelError(BIDIRECTIONAL.format(kind.upper()))
        if module.proj_size:
            raise ModelError(PROJECTION)
        tensors = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if module.bias else ()))
        names = [f"{tensor}_l{layer}" for layer in range(module.num_layers) for tensor in tensors]
        options = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
        return cls(label, kind, {name: getattr(module, name) for name in names}, options)

    @property
    def inputs(self) -> int:
        """Values that it takes."""
        return self.tensors["weight_ih_l0"].shape[1]

    @property
    def outputs(self) -> int:
        """Values that it gives."""
        return self.tensors["weight_hh_l0"].shape[1]

    @property
    def description(self) -> dict[str, Any]:
        """As it stands in `model.yaml`, without defaults."""
        layers = sum(name.startswith("weight_ih") for name in self.tensors)
        biased = "bias_ih_l0" in self.tensors
        return {"hidden_size": self.outputs, "num_layers": layers, "bias": biased, **self.options}


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers in the order in which a frame meets them."""

    before: Sequence[FrameLayer]
    recurrent: Recurrent
    after: Sequence[FrameLayer]
    initial_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """By leaf, [num_layers, hidden_size], what streams begin with where that was learned; empty for zeros."""

    def model(self, name: str, outputs: Sequence[str] = ()) -> Model:
        """The model, of copies of the tensors.

        Raises:
            ModelError: the layers do not fit each other, a weight is not finite float32, or a name is not valid.
        """
        layers: Sequence[FrameLayer | Recurrent] = (*self.before, self.recurrent, *self.after)
        for giver, taker in pairwise(layers):
            if giver.outputs != taker.inputs:
                raise ModelError(
                    f"{taker.label} takes {taker.inputs} values but {giver.label} gives {giver.outputs}; their sizes "
                    "must be equal"
                )
        kind = self.recurrent.kind
        try:
            description = DESCRIPTIONS[kind].model_validate(
                {
                    "kind": kind,
                    "features": layers[0].inputs,
                    "before": [layer.description for layer in self.before],
                    kind: self.recurrent.description,
                    "after": [layer.description for layer in self.after],
                    "initial_state": "learned" if self.initial_state else "zeros",
                }
            )
        except ValidationError as error:
            raise ModelError(f"these layers do not make a network: {sentences(error)}") from None
        tensors = {f"{kind}.{tensor_name}": tensor for tensor_name, tensor in self.recurrent.tensors.items()}
        for place, in_place in (("before", self.before), ("after", self.after)):
            for index, layer in enumerate(in_place):
                tensors |= {f"{place}.{index}.{own}": tensor for own, tensor in layer.tensors.items()}
        tensors |= {LEARNED + leaf: tensor for leaf, tensor in self.initial_state.items()}
        weights = {tensor_name: tensor.detach().cpu().clone() for tensor_name, tensor in tensors.items()}
        check_weights(weights, description, "the given network")
        weights = {tensor_name: weights[tensor_name] for tensor_name in description.tensor_shapes()}
        return Model(check_name(name), description, weights, check_output_names(list(outputs), description))


def _check_forward(label: str, module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module).forward is not kind.forward:
        raise ModelError(
            f"{label} is a {type(module).__name__} with a forward of its own, which cannot be served: hand over an "
            f"nn.{kind.__name__} that computes the same"
        )
