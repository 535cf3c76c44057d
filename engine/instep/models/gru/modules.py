"""A model folder from torch modules: an `nn.GRU` and the dense layers around it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TypeAlias

from pydantic import ValidationError
from torch import nn

from instep.models.errors import ModelError
from instep.models.folder import check_name, write_model
from instep.models.gru.description import ACTIVATIONS, BIDIRECTIONAL, Activation, DenseLayer, GruDescription, GruLayers
from instep.models.model import Model, model_of
from instep.models.registry import sentences
from instep.models.weights import check_weights

DenseModules: TypeAlias = Sequence[tuple[nn.Linear, Activation]]


def save_model(
    folder: str | Path,
    gru: nn.GRU,
    before: DenseModules = (),
    after: DenseModules = (),
    name: str | None = None,
    *,
    overwrite: bool = False,
) -> Model:
    """Write torch modules as a model folder; each dense layer comes with the activation that follows it.

    The weights are copied. `batch_first` says nothing about the weights and is ignored, and so is `dropout`, which
    acts in training only.

    Args:
        folder: where to write it; made if it does not exist.
        gru: an `nn.GRU` of one direction.
        before: `(nn.Linear, activation)` for each dense layer before the GRU, in order.
        after: the same for those after it.
        name: what clients are told; the folder's name if None.
        overwrite: replace a model that the folder holds.

    Raises:
        ModelError: the modules are not of these kinds or do not fit each other, weights are not finite float32, the
            folder holds a model, or it cannot be written.
    """
    folder = Path(folder)
    _check_gru(gru)
    _check_dense("before", before)
    _check_dense("after", after)
    _check_chain(before, gru, after)
    try:
        description = GruDescription(
            features=before[0][0].in_features if before else gru.input_size,
            before=_dense_layers(before),
            gru=GruLayers(hidden_size=gru.hidden_size, num_layers=gru.num_layers, bias=bool(gru.bias)),
            after=_dense_layers(after),
        )
    except ValidationError as error:
        raise ModelError(f"these modules do not make a network: {sentences(error)}") from None
    modules: dict[str, nn.Module] = {"gru": gru}
    modules |= {f"before.{index}": linear for index, (linear, _) in enumerate(before)}
    modules |= {f"after.{index}": linear for index, (linear, _) in enumerate(after)}
    weights = {}
    for tensor_name in description.tensor_shapes():
        module, _, attribute = tensor_name.rpartition(".")
        weights[tensor_name] = getattr(modules[module], attribute).detach().cpu().clone()
    check_weights(weights, description, "the given modules")
    model = model_of(check_name(folder.resolve().name if name is None else name), description, weights)
    write_model(folder, model, overwrite=overwrite)
    return model


def _check_gru(gru: object) -> None:
    if not isinstance(gru, nn.GRU):
        kind = type(gru).__name__
        raise ModelError(_NOT_GRUS.get(kind, f"{kind} is not a GRU: give the network's torch.nn.GRU itself"))
    if gru.bidirectional:
        raise ModelError(BIDIRECTIONAL)


_NOT_GRUS: Final = {
    "LSTM": "an nn.LSTM is not a GRU, and cannot be served yet: train a torch.nn.GRU",
    "RNN": "an nn.RNN is not a GRU, and cannot be served yet: train a torch.nn.GRU",
    "GRUCell": "an nn.GRUCell is one step of a GRU: make an nn.GRU of the same sizes and copy the cell's weights to it "
    "(weight_ih to weight_ih_l0, and so on)",
    "Sequential": "an nn.Sequential is not a GRU: give its nn.GRU as gru, and its nn.Linear layers in before and after",
}


def _check_dense(place: str, modules: Sequence[Any]) -> None:
    """`modules` is what a user gave, who may not run a type checker."""
    form = f'{place} must be a list of pairs of an nn.Linear and its activation, as in [(linear, "none")]'
    if not isinstance(modules, Sequence) or isinstance(modules, str):
        raise ModelError(f"{form}; it is one {type(modules).__name__}")
    for index, pair in enumerate(modules):
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ModelError(f"{form}; {place}[{index}] is one {type(pair).__name__}")
        linear, activation = pair
        if not isinstance(linear, nn.Linear):
            raise ModelError(f"{form}; {place}[{index}] begins with one {type(linear).__name__}")
        if activation not in ACTIVATIONS:
            allowed = ", ".join(map(repr, ACTIVATIONS))
            raise ModelError(f"the activation of {place}[{index}] is {activation!r:.80}; it must be one of {allowed}")


def _check_chain(before: DenseModules, gru: nn.GRU, after: DenseModules) -> None:
    links = [(f"before[{index}]", linear.in_features, linear.out_features) for index, (linear, _) in enumerate(before)]
    links.append(("the GRU", gru.input_size, gru.hidden_size))
    links += [(f"after[{index}]", linear.in_features, linear.out_features) for index, (linear, _) in enumerate(after)]
    for (giver, _, given), (taker, taken, _) in pairwise(links):
        if given != taken:
            raise ModelError(f"{taker} takes {taken} values but {giver} gives {given}; their sizes must be equal")


def _dense_layers(modules: DenseModules) -> tuple[DenseLayer, ...]:
    return tuple(
        DenseLayer(size=linear.out_features, activation=activation, bias=linear.bias is not None)
        for linear, activation in modules
    )
