"""The layers of a network that is handed over, as tensors, and the model that they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

import torch
from pydantic import ValidationError
from torch import nn

from instep.models.errors import ModelError
from instep.models.folder import check_name, check_output_names
from instep.models.model import Model, model_of
from instep.models.recurrent.description import BIDIRECTIONAL, Activation, DenseLayer, GruDescription, GruLayers
from instep.models.registry import sentences
from instep.models.weights import check_weights

SERVED: Final = "a model folder holds one nn.GRU, and nn.Linear layers with activations before and after it"
"""For sentences about what it does not hold."""


@dataclass(frozen=True, eq=False)
class Dense:
    """A dense layer and the activation after it."""

    label: str
    """How sentences name it."""
    weight: torch.Tensor
    """[outputs, inputs]."""
    bias: torch.Tensor | None = None
    activation: Activation = "none"

    @classmethod
    def of(cls, label: str, linear: nn.Linear, activation: Activation = "none") -> Dense:
        """The layer that a module is.

        Raises:
            ModelError: when it computes something of its own.
        """
        _check_forward(label, linear, nn.Linear)
        return cls(label, linear.weight, linear.bias, activation)

    @classmethod
    def identity(cls, label: str, width: int, activation: Activation) -> Dense:
        """A layer that changes no value, for an activation that follows no dense layer."""
        return cls(label, torch.eye(width), None, activation)

    def normalised(self, norm: nn.BatchNorm1d) -> Dense:
        """This layer with the batch norm after it folded into its weights, which float64 computes."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, scale = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
        shift = torch.zeros_like(mean)
        if norm.affine:
            scale, shift = scale * norm.weight.double(), norm.bias.double()
        bias = -mean if self.bias is None else self.bias.double() - mean
        weight = self.weight.double() * scale[:, None]
        return replace(self, weight=weight.to(self.weight.dtype), bias=(bias * scale + shift).to(self.weight.dtype))


@dataclass(frozen=True, eq=False)
class Gru:
    """A GRU's tensors by torch's names, from `weight_ih_l0` on."""

    label: str
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, label: str, gru: nn.GRU) -> Gru:
        """The tensors of a module.

        Raises:
            ModelError: when it is bidirectional, or computes something of its own.
        """
        _check_forward(label, gru, nn.GRU)
        if gru.bidirectional:
            raise ModelError(BIDIRECTIONAL)
        kinds = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if gru.bias else ()))
        names = [f"{kind}_l{layer}" for layer in range(gru.num_layers) for kind in kinds]
        return cls(label, {name: getattr(gru, name) for name in names})

    @property
    def inputs(self) -> int:
        """Values that it takes."""
        return self.tensors["weight_ih_l0"].shape[1]

    @property
    def hidden(self) -> int:
        """Values that it gives."""
        return self.tensors["weight_hh_l0"].shape[1]


@dataclass(frozen=True, eq=False)
class Chain:
    """Layers in the order in which a frame meets them."""

    before: Sequence[Dense]
    gru: Gru
    after: Sequence[Dense]

    def model(self, name: str, outputs: Sequence[str] = ()) -> Model:
        """The model, of copies of the tensors.

        Raises:
            ModelError: the layers do not fit each other, a weight is not finite float32, or a name is not valid.
        """
        self._check_sizes()
        try:
            description = GruDescription(
                features=self.before[0].weight.shape[1] if self.before else self.gru.inputs,
                before=_descriptions(self.before),
                gru=GruLayers(
                    hidden_size=self.gru.hidden,
                    num_layers=sum(name.startswith("weight_ih") for name in self.gru.tensors),
                    bias="bias_ih_l0" in self.gru.tensors,
                ),
                after=_descriptions(self.after),
            )
        except ValidationError as error:
            raise ModelError(f"these layers do not make a network: {sentences(error)}") from None
        tensors = {f"gru.{tensor_name}": tensor for tensor_name, tensor in self.gru.tensors.items()}
        for place, layers in (("before", self.before), ("after", self.after)):
            for index, layer in enumerate(layers):
                tensors[f"{place}.{index}.weight"] = layer.weight
                if layer.bias is not None:
                    tensors[f"{place}.{index}.bias"] = layer.bias
        weights = {tensor_name: tensor.detach().cpu().clone() for tensor_name, tensor in tensors.items()}
        check_weights(weights, description, "the given network")
        weights = {tensor_name: weights[tensor_name] for tensor_name in description.tensor_shapes()}
        return model_of(check_name(name), description, weights, check_output_names(list(outputs), description))

    def _check_sizes(self) -> None:
        links = [(layer.label, layer.weight.shape[1], layer.weight.shape[0]) for layer in self.before]
        links.append((self.gru.label, self.gru.inputs, self.gru.hidden))
        links += [(layer.label, layer.weight.shape[1], layer.weight.shape[0]) for layer in self.after]
        for (giver, _, given), (taker, taken, _) in pairwise(links):
            if given != taken:
                raise ModelError(f"{taker} takes {taken} values but {giver} gives {given}; their sizes must be equal")


def _check_forward(label: str, module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module).forward is not kind.forward:
        raise ModelError(
            f"{label} is a {type(module).__name__} with a forward of its own, which cannot be served: hand over an "
            f"nn.{kind.__name__} that computes the same"
        )


def _descriptions(layers: Sequence[Dense]) -> tuple[DenseLayer, ...]:
    return tuple(
        DenseLayer(size=layer.weight.shape[0], activation=layer.activation, bias=layer.bias is not None)
        for layer in layers
    )
