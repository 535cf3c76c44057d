"""A step's graph run by torch, and the same in float64 as the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from instep.core.typing import I64
from instep.models.base import Floats, scan
from instep.models.errors import ModelError
from instep.models.model import Model
from instep.models.module.description import ModuleDescription
from instep.models.module.program import Program
from instep.models.torch_network import Leaves


class GraphModule:
    """A `Forward`: frame after frame.

    Raises:
        ModelError: when the graph cannot be run.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self._names = [leaf.name for leaf in model.state.leaves]
        self._program = _tried(model, device, double=False)

    def __call__(self, x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # noqa: D102
        state, outputs = [leaves[name] for name in self._names], []
        for frame in x:
            y, *state = self._program(frame, state)
            outputs.append(y)
        return torch.stack(outputs), dict(zip(self._names, state, strict=True))


class GraphReference:
    """A `Reference` that shares the step's graph, but neither its precision nor its operators' code.

    Raises:
        ModelError: when the graph cannot be run.
    """

    independent = False

    def __init__(self, model: Model, dtype: type[np.floating[Any]]) -> None:
        is_wide = dtype is np.float64
        self._outputs = model.description.outputs
        self._dtype = np.dtype(np.float64 if is_wide else np.float32)
        self._dtypes = {
            leaf.name: self._dtype if leaf.dtype == np.float32 else leaf.dtype for leaf in model.state.leaves
        }
        self._program = _tried(model, torch.device("cpu"), double=is_wide)

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        """See `Reference`."""
        leaves = {name: np.asarray(state[name], dtype) for name, dtype in self._dtypes.items()}
        return scan(self._step, np.ascontiguousarray(x, self._dtype), leaves, active, self._outputs)

    @torch.inference_mode()
    def _step(self, x: Floats, state: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        y, *leaves = self._program(torch.from_numpy(x), [torch.from_numpy(leaf) for leaf in state.values()])
        return y.numpy(), {name: leaf.numpy() for name, leaf in zip(state, leaves, strict=True)}


@torch.inference_mode()
def _tried(model: Model, device: torch.device, *, double: bool) -> Program:
    """The program of a graph, which may come from a stranger, once a step of two rows has fitted the description."""
    description = model.description
    assert isinstance(description, ModuleDescription)
    assert description.graph is not None
    program = Program(description.graph, model.weights, device, double=double)
    wide = {"float32": "float64"} if double else {}
    shapes = [((2, description.features), "float32"), *(((2, *leaf.shape), leaf.dtype) for leaf in description.leaves)]
    x, *leaves = (
        torch.zeros(shape, dtype=getattr(torch, wide.get(each, each)), device=device) for shape, each in shapes
    )
    found = [tuple(each.shape) for each in program(x, leaves)]
    wanted = [(2, description.outputs), *(shape for shape, _ in shapes[1:])]
    if found != wanted:
        raise ModelError(
            f"the graph of {model.name} gives the shapes {found} where the description says {wanted}; export the "
            "module again with instep.models.export_step"
        )
    return program
