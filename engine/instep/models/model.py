"""A model: a description with its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from instep.models.base import LEARNED, Description, StateSpec


@dataclass(frozen=True, eq=False, repr=False)
class Model:
    """A description with weights that were checked against it."""

    name: str
    description: Description
    weights: Mapping[str, torch.Tensor]
    """On the CPU, by the names of `Description.tensor_shapes`."""
    output_names: tuple[str, ...] = ()
    """One for each output, in order; empty where they have none."""

    @cached_property
    def fingerprint(self) -> str:
        """sha256, hex, over the description and every tensor; names do not count."""
        text = json.dumps(self.description.as_json(), sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode())
        for name in self.description.tensor_shapes():
            values = self.weights[name].numpy()
            digest.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    @property
    def state(self) -> StateSpec:
        """The state of the description, with the arrays that its learned leaves begin with."""
        found = {name.removeprefix(LEARNED): each for name, each in self.weights.items() if name.startswith(LEARNED)}
        return self.description.state.with_learned({name: tensor.numpy() for name, tensor in found.items()})

    @property
    def weight_count(self) -> int:
        """How many numbers the weights are; those of a step module include buffers and constants."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def __repr__(self) -> str:
        """One line, without the weights."""
        words, short = self.description.in_words(), self.fingerprint[:12]
        return f"<Model {self.name!r}: {words}; {self.size_in_words}, fingerprint {short}>"

    @property
    def size_in_words(self) -> str:
        """`77,507 weights`."""
        return f"{self.weight_count:,} weights"
