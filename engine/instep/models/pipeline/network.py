"""A pipeline on a device: the steps around a network of another kind, in one batch."""
# ruff: noqa: D102 - see the protocols in `base`

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.models.base import BoundStep, Floats, RecurrentModel, Reference, StateSpec
from instep.models.model import Model
from instep.models.pipeline.description import PLACES, PipelineDescription, leaf_name
from instep.models.pipeline.steps import FrameStep, Spectrum, States
from instep.models.stepping import scan

_SPECTRUM_ROWS = 32
"""Rows come in multiples of it where a logarithm or a root is taken: the last elements of an array that does not fill
its vectors go through other code."""


class PipelineNetwork:
    """A `RecurrentModel`. What certification chooses, it chooses for the network inside."""

    def __init__(self, model: Model, device: torch.device) -> None:
        from instep.models.registry import build

        assert isinstance(model.description, PipelineDescription)
        self.description: PipelineDescription = model.description
        self.fingerprint = model.fingerprint
        self.state: StateSpec = model.state
        inside = Model(model.name, self.description.network, model.weights, graph=model.graph)
        network: RecurrentModel = build(inside, device)
        self._network = network
        self.device = network.device
        takes_spectra = any(isinstance(step, Spectrum) for _, _, step, _ in self.description.steps())
        self.row_multiple = int(np.lcm(network.row_multiple, _SPECTRUM_ROWS if takes_spectra else 1))
        of_steps = sum(step.multiply_adds(inputs) for _, _, step, inputs in self.description.steps())
        self.least_probes = network.least_probes
        self.multiply_adds = network.multiply_adds + of_steps

    @property
    def kernel(self) -> str:
        return self._network.kernel

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """Let the network inside choose; the steps have one way."""
        self._network.select_step(buckets, rows)

    def select_quickest(self) -> None:
        """Let the network inside choose."""
        self._network.select_quickest()

    def bind(self, rows: int) -> PipelineStep:
        return PipelineStep(self.description, self._network.bind(rows), rows, self.device)

    def sequence(self, x: F32, state: U8) -> tuple[F32, U8] | None:
        """The steps frame by frame, the network in one call between them; see `RecurrentModel.sequence`."""
        count = x.shape[1]
        rows = -(-count // self.row_multiple) * self.row_multiple
        leaves = {name: leaf.copy() for name, leaf in self.state.unpack(state).items()}
        before, after = (_Parts(self.description, place, rows, self.device) for place in PLACES)
        before.load(leaves, count)
        after.load(leaves, count)
        inside = self._network.state
        whole = self._network.sequence(
            before.run_all(x, rows), inside.pack({each.name: leaves[each.name] for each in inside.leaves})
        )
        if whole is None:
            return None
        y = after.run_all(whole[0], rows)
        return y, self.state.pack(inside.unpack(whole[1]) | before.states(count) | after.states(count))

    def reference(self, dtype: type[np.floating[Any]]) -> Reference | None:
        """The definitions in numpy around the network's own reference.

        None where the network has none, and where a step makes a large difference of a small one: a value next to the
        threshold of `hysteresis` may differ by 1 after it, and nothing would be wrong.
        """
        inside = self._network.reference(dtype)
        if inside is None or not all(step.has_reference for _, _, step, _ in self.description.steps()):
            return None
        return PipelineReference(self.description, inside, dtype)


class _Parts:
    """The steps of one place on buffers for `rows` rows."""

    def __init__(self, description: PipelineDescription, place: str, rows: int, device: torch.device) -> None:
        self.out: torch.Tensor | None = None
        """[rows, values] after the last step; None where there is none."""
        self.state: dict[str, torch.Tensor] = {}
        self._parts: list[tuple[FrameStep, torch.Tensor, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]] = []
        for at, index, step, inputs in description.steps():
            if at == place:
                self.out = torch.zeros(rows, step.outputs(inputs), device=device)
                state = {
                    leaf.name: torch.zeros(rows, *leaf.shape, dtype=getattr(torch, leaf.dtype.name), device=device)
                    for leaf in step.leaves(inputs)
                }
                self.state |= {leaf_name(place, index, name): tensor for name, tensor in state.items()}
                self._parts.append((step, self.out, state, step.constants(inputs, device)))

    def run(self, x: torch.Tensor) -> torch.Tensor:
        for step, out, state, constants in self._parts:
            step.run(x, out, state, *constants)
            x = out
        return x

    def run_all(self, x: F32, rows: int) -> F32:
        """Frames [T, R, values], one after another, in batches that are padded to `rows`."""
        if self.out is None:
            return x
        timesteps, count, values = x.shape
        frame = torch.zeros(rows, values, device=self.out.device)
        found = np.empty((timesteps, count, self.out.shape[1]), np.float32)
        for given, taken in zip(x, found, strict=True):
            frame[:count] = torch.from_numpy(given).to(frame.device)
            taken[...] = self.run(frame)[:count].cpu().numpy()
        return found

    def load(self, leaves: States, count: int) -> None:
        for name, tensor in self.state.items():
            tensor[:count] = torch.from_numpy(leaves[name]).to(tensor.device)

    def states(self, count: int) -> States:
        return {name: tensor[:count].cpu().numpy().copy() for name, tensor in self.state.items()}


class PipelineStep:
    """A `BoundStep`; the states of the steps change in place."""

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def __init__(self, description: PipelineDescription, network: BoundStep, rows: int, device: torch.device) -> None:
        self._network = network
        self._before, self._after = (_Parts(description, place, rows, device) for place in PLACES)
        self.x = torch.zeros(rows, description.features, device=device) if description.before else network.x
        of_steps = self._before.state | self._after.state
        self.state = {**network.state, **of_steps}
        self.new_state = {**network.new_state, **of_steps}
        self._input = network.x[:, : description.network.features]
        self._output = network.y[:, : description.network.outputs]
        self.y = self._output if self._after.out is None else self._after.out

    def run(self) -> None:
        if self._before.out is not None:
            self._input.copy_(self._before.run(self.x))
        self._network.run()
        self._after.run(self._output)


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
