"""A pipeline: the steps around a network of another kind, in its normal form, in torch, and as a reference."""
# ruff: noqa: D102 - see the protocols in `base`

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from instep.core.typing import I64
from instep.models import registry
from instep.models.base import Floats, Reference
from instep.models.model import Model
from instep.models.pipeline.description import PLACES, PipelineDescription, leaf_name
from instep.models.pipeline.steps import FrameStep, States
from instep.models.portable.builder import Builder
from instep.models.portable.form import Form, View
from instep.models.stepping import scan
from instep.models.torch_network import Leaves, TorchNetwork


def inside(model: Model) -> Model:
    """The network of a pipeline, as a model."""
    assert isinstance(model.description, PipelineDescription)
    return Model(model.name, model.description.network, model.weights)


def form_of(model: Model) -> tuple[Form, dict[str, torch.Tensor]]:
    """The normal form, and the tensors of steps."""
    description = model.description
    assert isinstance(description, PipelineDescription)
    b = Builder()
    x = b.input("float32", (description.features,))
    leaves = {leaf.name: b.input(leaf.dtype.name, leaf.shape) for leaf in description.state.leaves}
    network = inside(model)
    form, constants = registry.normal_form(network)
    tensors = dict(constants)
    new: dict[str, View] = {}

    def through(place: str, x: View) -> View:
        for at, index, step, inputs in description.steps():
            if at == place:
                names = {leaf.name: leaf_name(place, index, leaf.name) for leaf in step.leaves(inputs)}
                own = {leaf_name(place, index, key): value for key, value in step.tensors(inputs).items()}
                tensors.update({name: torch.from_numpy(value) for name, value in own.items()})
                views = [b.tensor(name, value.dtype.name, value.shape) for name, value in own.items()]
                x, after = step.write(b, x, {name: leaves[full] for name, full in names.items()}, *views)
                new.update({names[name]: leaf for name, leaf in after.items()})
        return x

    x = through("before", x)
    of_network = [leaf.name for leaf in network.state.leaves]
    y, *after = b.inline(form, [x, *(leaves[name] for name in of_network)])
    new.update(zip(of_network, after, strict=True))
    y = through("after", y)
    return b.form([y, *(new[name] for name in leaves)]), tensors


class PipelineModule:
    """A `Forward`; the network inside computes frame after frame only where its kind does."""

    def __init__(self, model: Model, network: TorchNetwork) -> None:
        assert isinstance(model.description, PipelineDescription)
        self._network = network
        self._names = [leaf.name for leaf in network.state.leaves]
        self._steps: dict[str, list[tuple[FrameStep, dict[str, str], tuple[torch.Tensor, ...]]]] = {
            place: [] for place in PLACES
        }
        for place, index, step, inputs in model.description.steps():
            names = {leaf.name: leaf_name(place, index, leaf.name) for leaf in step.leaves(inputs)}
            tensors = tuple(torch.from_numpy(each).to(network.device) for each in step.tensors(inputs).values())
            self._steps[place].append((step, names, tensors))

    def __call__(self, x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        state = dict(leaves)
        x = self._through("before", x, state)
        y, after = self._network.forward(x, {name: state[name] for name in self._names})
        state |= after
        return self._through("after", y, state), state

    def _through(self, place: str, x: torch.Tensor, state: dict[str, torch.Tensor]) -> torch.Tensor:
        for step, names, tensors in self._steps[place]:
            own = {name: state[full] for name, full in names.items()}
            found = []
            for frame in x:
                y, own = step.run(frame, own, *tensors)
                found.append(y)
            x = torch.stack(found)
            state |= {names[name]: leaf for name, leaf in own.items()}
        return x


class PipelineReference:
    """A `Reference`."""

    def __init__(self, description: PipelineDescription, network: Reference, dtype: type[np.floating[Any]]) -> None:
        self.independent = network.independent
        self._network = network
        self._dtype = np.dtype(dtype)
        self._steps: dict[str, list[tuple[str, FrameStep]]] = {place: [] for place in PLACES}
        for place, index, step, _ in description.steps():
            self._steps[place].append((leaf_name(place, index, ""), step))

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        found = dict(state)
        before, after = (self._steps[place] for place in PLACES)
        with np.errstate(over="ignore", invalid="ignore"):
            frames = self._through(before, x.astype(self._dtype, copy=False), found, active)
            inside = {name: leaf for name, leaf in found.items() if not name.startswith(tuple(f"{p}." for p in PLACES))}
            outputs, states = self._network.run(frames, inside, active)
            found |= states
            return self._through(after, outputs, found, active), found

    def _through(self, steps: Sequence[tuple[str, FrameStep]], x: Floats, state: States, active: I64) -> Floats:
        for prefix, step in steps:
            leaves = {name.removeprefix(prefix): leaf for name, leaf in state.items() if name.startswith(prefix)}
            x, leaves = scan(step.refer, x, leaves, active, step.outputs(x.shape[2]))
            state |= {prefix + name: leaf for name, leaf in leaves.items()}
        return x
