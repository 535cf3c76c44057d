"""A model on disk: a folder with `model.yaml` (the description, and a name) and `weights.safetensors`.

`save_model` makes one from torch modules, `make_model` and `write_model` from a description alone; `load_model` reads
one.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
import yaml
from pydantic import ValidationError
from torch import nn

from instep.models.description import BIDIRECTIONAL, Activation, DenseLayer, GruLayers, NetworkDescription
from instep.models.errors import ModelError
from instep.models.weights import check_weights, load_weights, save_weights

DESCRIPTION_FILE: Final = "model.yaml"
WEIGHTS_FILE: Final = "weights.safetensors"
MAX_NAME_LENGTH: Final = 100

DenseModules: TypeAlias = Sequence[tuple[nn.Linear, Activation]]


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A description with weights that were checked against it."""

    name: str
    description: NetworkDescription
    weights: Mapping[str, torch.Tensor]
    """float32 on the CPU, by the names of `NetworkDescription.tensor_shapes`."""
    fingerprint: str
    """sha256, hex, over the description and every tensor; the name does not count."""

    @property
    def parameters(self) -> int:
        """How many numbers the weights are."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def __repr__(self) -> str:
        """One line, without the weights."""
        words, short = self.description.in_words(), self.fingerprint[:12]
        return f"<Model {self.name!r}: {words}; {self.parameters:,} parameters, fingerprint {short}>"


def load_model(folder: str | Path) -> Model:
    """Read a model folder; its name is the folder's where `model.yaml` gives none.

    Raises:
        ModelError: naming the file, and the key or tensor that is wrong.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION_FILE
    try:
        fields = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ModelError(
            f"cannot read {path}: {error.strerror}; a model folder holds {DESCRIPTION_FILE} and {WEIGHTS_FILE}"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ModelError(f"{path} must hold the keys of a network's description, such as features and gru")
    name = _check_name(fields.pop("name", folder.resolve().name))
    try:
        description = NetworkDescription.model_validate(fields)
    except ValidationError as error:
        raise ModelError(f"{path}: {_sentences(error)}") from None
    return model_from_parts(description, folder / WEIGHTS_FILE, name)


def model_from_parts(description: NetworkDescription, weights_path: Path, name: str) -> Model:
    """A model of a description that stands elsewhere and a weights file.

    Raises:
        ModelError: as `load_weights`, or for a name that is not 1 to 100 printable characters.
    """
    return _model(_check_name(name), description, load_weights(weights_path, description))


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
        description = NetworkDescription(
            features=before[0][0].in_features if before else gru.input_size,
            before=_dense_layers(before),
            gru=GruLayers(hidden_size=gru.hidden_size, num_layers=gru.num_layers, bias=bool(gru.bias)),
            after=_dense_layers(after),
        )
    except ValidationError as error:
        raise ModelError(f"these modules do not make a network: {_sentences(error)}") from None
    modules: dict[str, nn.Module] = {"gru": gru}
    modules |= {f"before.{index}": linear for index, (linear, _) in enumerate(before)}
    modules |= {f"after.{index}": linear for index, (linear, _) in enumerate(after)}
    weights = {}
    for tensor_name in description.tensor_shapes():
        module, _, attribute = tensor_name.rpartition(".")
        weights[tensor_name] = getattr(modules[module], attribute).detach().cpu().clone()
    check_weights(weights, description, "the given modules")
    model = _model(_check_name(folder.resolve().name if name is None else name), description, weights)
    write_model(folder, model, overwrite=overwrite)
    return model


def make_model(
    description: NetworkDescription,
    init: Literal["random", "constant"],
    *,
    name: str,
    seed: int = 0,
    weight: float = 0.5,
    bias: float = 0.0,
) -> Model:
    """A model that was never trained.

    `random` draws as torch does for a new module (uniform in ±1/√n, n the hidden size or the layer's inputs), from
    `seed` alone; `constant` sets every weight to `weight` and every bias to `bias`.

    Raises:
        ModelError: for a constant that is not finite, or a name that is not 1 to 100 printable characters.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = description.tensor_shapes()
    weights = {}
    for tensor_name, shape in shapes.items():
        layer, _, kind = tensor_name.rpartition(".")
        if init == "constant":
            weights[tensor_name] = torch.full(shape, bias if kind.startswith("bias") else weight, dtype=torch.float32)
        else:
            fan = description.gru.hidden_size if layer == "gru" else shapes[f"{layer}.weight"][1]
            bound = 1 / math.sqrt(fan)
            weights[tensor_name] = torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)
    check_weights(weights, description, "the initialisation")
    return _model(_check_name(name), description, weights)


def write_model(folder: str | Path, model: Model, *, overwrite: bool = False) -> None:
    """Write the model's two files.

    Raises:
        ModelError: when the folder holds a model and `overwrite` does not allow to replace it, or cannot be written.
    """
    folder = Path(folder)
    fields = {"name": model.name} | model.description.model_dump(mode="json", exclude_defaults=True)
    try:
        if not overwrite and any((folder / file).exists() for file in (DESCRIPTION_FILE, WEIGHTS_FILE)):
            raise ModelError(
                f"{folder} holds a model already; choose another folder, or allow to replace it: overwrite=True, or "
                "--overwrite on the command line"
            )
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION_FILE).write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True), "utf-8")
    except OSError as error:
        raise ModelError(f"cannot write the model folder {folder}: {error.strerror}") from None
    save_weights(folder / WEIGHTS_FILE, model.weights)


def _model(name: str, description: NetworkDescription, weights: Mapping[str, torch.Tensor]) -> Model:
    digest = hashlib.sha256(description.canonical_json().encode())
    for tensor_name in description.tensor_shapes():
        digest.update(weights[tensor_name].numpy().astype("<f4").tobytes())
    return Model(name, description, weights, digest.hexdigest())


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME_LENGTH or not name.isprintable():
        raise ModelError(
            f"a model's name must be 1 to {MAX_NAME_LENGTH} printable characters, not {name!r:.120}; "
            f"give one as name in {DESCRIPTION_FILE}"
        )
    return name


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
        if activation not in get_args(Activation):
            allowed = ", ".join(map(repr, get_args(Activation)))
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


def _sentences(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()
    )
