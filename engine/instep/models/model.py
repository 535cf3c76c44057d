"""A model (a description with its weights), and the weights file, a safetensors file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from instep.models.base import LEARNED, Description, Shape, StateSpec
from instep.models.errors import ModelError
from instep.models.numerics import dtype_name


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A description with weights that have been checked against it."""

    name: str
    description: Description
    weights: Mapping[str, torch.Tensor]
    """On the CPU, by the names of `Description.tensor_shapes`."""
    output_names: tuple[str, ...] = ()
    """One for each output, in order; empty where they have none."""

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 in hex of the description and every tensor; the names of model and outputs are not part of it."""
        text = json.dumps(self.description.as_json(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode())
        for name in self.description.tensor_shapes():
            values = self.weights[name].numpy()
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    @property
    def state(self) -> StateSpec:
        """The state of the description, with the arrays of learned initial states filled in."""
        found = {name.removeprefix(LEARNED): each for name, each in self.weights.items() if name.startswith(LEARNED)}
        return self.description.state.with_learned({name: tensor.numpy() for name, tensor in found.items()})

    @property
    def weight_count(self) -> int:
        """The number of weights; for a step module this includes buffers and constants."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def __repr__(self) -> str:
        """One line, without the weights."""
        words, short = self.description.in_words(), self.fingerprint[:12]
        return f"<Model {self.name!r}: {words}; {self.size_in_words}, fingerprint {short}>"

    @property
    def size_in_words(self) -> str:
        """`77,507 weights`."""
        return f"{self.weight_count:,} weights"


def load_weights(path: Path, description: Description) -> dict[str, torch.Tensor]:
    """Read every tensor of the description from a safetensors file, to the CPU; the file may change afterwards.

    Raises:
        ModelError: the file cannot be read or is not safetensors, or as `check_weights`.
    """
    shapes = description.tensor_shapes()
    try:
        with safe_open(path, framework="pt") as file:
            _check_names(file.keys(), shapes, str(path))
            # Cloned: what is served must not change when the file under the mapping does.
            tensors = {name: file.get_tensor(name).clone() for name in shapes}
    except OSError as error:
        raise ModelError(f"cannot read the weights {path}: {error}; make the folder again, or put them there") from None
    except SafetensorError as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}); save the weights again") from None
    check_weights(tensors, description, str(path))
    return tensors


def weights_bytes(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The content of a weights file with these tensors."""
    return save({name: tensor.contiguous() for name, tensor in tensors.items()})


def check_weights(tensors: Mapping[str, torch.Tensor], description: Description, source: str) -> None:
    """Check tensors; `source` names them in error messages.

    Raises:
        ModelError: a tensor is missing, not in the description, of another shape or dtype, or not finite.
    """
    shapes = description.tensor_shapes()
    _check_names(tensors, shapes, source)
    for name, shape in shapes.items():
        tensor, wanted = tensors[name], description.tensor_dtype(name)
        dtype = dtype_name(tensor.dtype)
        if tensor.shape != shape:
            raise ModelError(
                f"tensor {name} of {source} has shape {list(tensor.shape)}, the network's description asks for "
                f"{list(shape)}: correct the description, or save the weights that belong to it"
            )
        if dtype != wanted:
            raise ModelError(f"tensor {name} of {source} is {dtype}; convert the weights to {wanted}")
        if bad := int(tensor.numel() - torch.isfinite(tensor).sum()):
            raise ModelError(
                f"tensor {name} of {source} holds NaN or infinity in {bad} of {tensor.numel()} places; "
                "weights must be finite: save those of an earlier epoch"
            )


def _check_names(found: Iterable[str], shapes: Mapping[str, Shape], source: str) -> None:
    found = set(found)
    missing = [f"{name} {list(shape)}" for name, shape in shapes.items() if name not in found]
    if missing:
        raise ModelError(f"{source} lacks what the network's description asks for: {_listed(missing)}; add them")
    extra = [f"{name!r:.80}" for name in sorted(found - set(shapes))]
    if extra:
        raise ModelError(
            f"{source} holds what the network's description does not have: {_listed(extra)}; leave them out"
        )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return "tensor " + ", ".join(names[:4]) + more
