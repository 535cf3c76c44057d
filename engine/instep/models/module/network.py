"""A step's graph run by torch, and the same in float64 as the reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import torch

from instep.core.typing import I64
from instep.models.base import Floats, scan
from instep.models.errors import ModelError, first_line
from instep.models.model import Model
from instep.models.module.description import GraphStep, ModuleDescription
from instep.models.module.program import Program
from instep.models.torch_network import Leaves

_ROWS: Final = 2
"""Of the step that shows whether a graph runs."""


class GraphModule:
    """A `Forward`: frame after frame.

    Raises:
        ModelError: when the graph cannot be run.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self._description = _description(model)
        self._program = _tried(model, Program(_graph_step(model), model.weights, device), device)

    def __call__(self, x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # noqa: D102
        names = [leaf.name for leaf in self._description.leaves]
        state, outputs = [leaves[name] for name in names], []
        for frame in x:
            y, *state = self._program(frame, state)
            outputs.append(y)
        return torch.stack(outputs), dict(zip(names, state, strict=True))


class GraphReference:
    """A `Reference` that shares the step's graph, but neither its precision nor its operators' code.

    Raises:
        ModelError: when the graph cannot be run.
    """

    independent = False

    def __init__(self, model: Model, dtype: type[np.floating[Any]]) -> None:
        is_wide, device = dtype is np.float64, torch.device("cpu")
        self._description = _description(model)
        self._dtypes = {"float32": np.float64 if is_wide else np.float32, "float64": np.float64}
        program = Program(_graph_step(model), model.weights, device, double=is_wide)
        self._program = _tried(model, program, device, double=is_wide)

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        """See `Reference`."""
        dtypes = {leaf.name: self._dtypes.get(leaf.dtype, np.dtype(leaf.dtype)) for leaf in self._description.leaves}
        leaves = {name: np.asarray(state[name], dtype) for name, dtype in dtypes.items()}
        frames = np.ascontiguousarray(x, self._dtypes["float32"])
        return scan(self._step, frames, leaves, active, self._description.outputs)

    @torch.inference_mode()
    def _step(self, x: Floats, state: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        y, *leaves = self._program(torch.from_numpy(x), [torch.from_numpy(leaf) for leaf in state.values()])
        return y.numpy(), {name: leaf.numpy() for name, leaf in zip(state, leaves, strict=True)}


def _description(model: Model) -> ModuleDescription:
    assert isinstance(model.description, ModuleDescription)
    return model.description


def _graph_step(model: Model) -> GraphStep:
    step = _description(model).graph_step
    assert step is not None
    return step


@torch.inference_mode(False)  # tensors that are made in that mode do not count changes
def _tried(model: Model, program: Program, device: torch.device, *, double: bool = False) -> Program:
    """The program after one step of `_ROWS` rows, which shows whether a stranger's graph can be run."""
    description, kind = _description(model), torch.float64 if double else torch.float32
    wide = {"float32": kind}
    x = torch.zeros(_ROWS, description.features, dtype=kind, device=device)
    leaves = [
        torch.zeros(_ROWS, *leaf.shape, dtype=wide.get(leaf.dtype, getattr(torch, leaf.dtype)), device=device)
        for leaf in description.leaves
    ]
    given = [x, *leaves, *program.weights]
    before = [tensor._version for tensor in given]  # counts changes, also through a view
    try:
        with torch.no_grad():
            results = program(x, leaves)
    except Exception as error:
        raise ModelError(
            f"the graph of {model.name} does not run ({first_line(error):.200}); export the module again with "
            "instep.models.export_step"
        ) from None
    if before != [tensor._version for tensor in given]:
        raise ModelError(
            f"the graph of {model.name} changes its weights, its frames or its state in place, which other frames "
            "need; export a step that returns new tensors"
        )
    wanted = [(_ROWS, description.outputs), *(leaf.shape for leaf in leaves)]
    dtypes = [kind, *(leaf.dtype for leaf in leaves)]
    for value, shape, dtype in zip(results, wanted, dtypes, strict=True):
        if value.shape != shape or (value.dtype != dtype and not double):
            raise ModelError(
                f"the graph of {model.name} gives {value.dtype} {list(value.shape)} where the description says "
                f"{dtype} {list(shape)}; export the module again with instep.models.export_step"
            )
    return program
