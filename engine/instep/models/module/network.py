"""A step module on a device: its graph, staged contiguously, and the same graph in float64 as the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.models.base import Floats, StateSpec
from instep.models.errors import ModelError
from instep.models.model import Model
from instep.models.module.description import ModuleDescription
from instep.models.module.program import Program

ROWS: Final = 32


class ModuleNetwork:
    """A `RecurrentModel`.

    Raises:
        ModelError: when the graph cannot be run, or gives other shapes or dtypes than the description says.
    """

    row_multiple = ROWS
    """Elementwise functions end an array that does not fill their vectors with other code."""
    kernel = "graph"
    least_probes = 512
    """A graph may contain any kernel, and some differ in one of 2,000 values only."""

    def __init__(self, model: Model, device: torch.device) -> None:
        assert isinstance(model.description, ModuleDescription)
        self.model = model
        self.description: ModuleDescription = model.description
        self.fingerprint = model.fingerprint
        self.device = device
        self.state: StateSpec = self.description.state
        shapes = self.description.tensor_shapes().values()
        self.multiply_adds = max(sum(math.prod(shape) for shape in shapes if len(shape) > 1), 1)
        self._program = Program(self.description, model.weights, device)
        self._check()

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """There is one way."""

    def select_quickest(self) -> None:
        """There is one way."""

    def bind(self, rows: int) -> ModuleStep:
        """The step of a batch of `rows`."""
        return ModuleStep(self._program, self.description, rows, self.device)

    def sequence(self, x: F32, state: U8) -> None:
        """A step has no call for a whole sequence."""

    def reference(self, dtype: type[np.floating[Any]]) -> GraphReference:
        """The same graph with every float32 in it as float64."""
        return GraphReference(self.model, double=dtype is np.float64)

    def run_once(self, x: torch.Tensor, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs and the leaves after one frame of every row, in tensors of their own."""
        return tuple(value.clone() for value in self._program(x, [leaf.contiguous() for leaf in leaves]))

    def _check(self) -> None:
        for rows in (ROWS, 3 * ROWS):
            try:
                step = self.bind(rows)
                given = [step.x, *step.state.values(), *self._program.weights]
                before = [tensor._version for tensor in given]  # counts changes, those through a view included
                with torch.inference_mode(False), torch.no_grad():  # in inference mode it would miss some
                    step.run()
            except Exception as error:
                raise ModelError(
                    f"the graph of {self.model.name} does not run in a batch of {rows} rows "
                    f"({str(error).partition(chr(10))[0]:.200}); export the module again with "
                    "instep.models.export_step"
                ) from None
            if before != [tensor._version for tensor in given]:
                raise ModelError(
                    f"the graph of {self.model.name} changes its weights, its frames or its state in place, which "
                    "other frames need; export a step that returns new tensors"
                )


class ModuleStep:
    """A `BoundStep`. The new state has buffers of its own, since a graph may return a leaf as another one."""

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def __init__(self, program: Program, description: ModuleDescription, rows: int, device: torch.device) -> None:
        self._program = program
        self.x = torch.zeros(rows, description.features, device=device)
        self.y = torch.zeros(rows, description.outputs, device=device)
        self.state, self.new_state = (
            {
                leaf.name: torch.full(
                    (rows, *leaf.shape), leaf.initial, dtype=getattr(torch, leaf.dtype), device=device
                )
                for leaf in description.leaves
            }
            for _ in range(2)
        )
        self._leaves = list(self.state.values())
        self._results = [self.y, *self.new_state.values()]

    def run(self) -> None:
        """Step every row."""
        for result, value in zip(self._results, self._program(self.x, self._leaves), strict=True):
            if value.shape != result.shape or value.dtype != result.dtype:
                raise ModelError(
                    f"it gives {value.dtype} {list(value.shape)} where the description says {result.dtype} "
                    f"{list(result.shape)}"
                )
            result.copy_(value)


class GraphReference:
    """A `Reference` that shares the step's graph, but neither its precision nor its batch sizes."""

    independent = False

    def __init__(self, model: Model, *, double: bool) -> None:
        assert isinstance(model.description, ModuleDescription)
        self._leaves = model.description.leaves
        self._outputs = model.description.outputs
        self._dtypes = {"float32": np.float64 if double else np.float32, "float64": np.float64}
        self._program = Program(model.description, model.weights, torch.device("cpu"), double=double)

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        """Run sequences of different lengths, the longest first; see `Reference.run`."""
        dtypes = [self._dtypes.get(leaf.dtype, np.dtype(leaf.dtype)) for leaf in self._leaves]
        finals = {
            leaf.name: np.array(state[leaf.name], dtype) for leaf, dtype in zip(self._leaves, dtypes, strict=True)
        }
        frames = torch.from_numpy(np.ascontiguousarray(x, self._dtypes["float32"]))
        outputs = np.zeros((*x.shape[:2], self._outputs), self._dtypes["float32"])
        now = [torch.from_numpy(leaf.copy()) for leaf in finals.values()]
        with torch.inference_mode():
            for timestep, count in enumerate(active.tolist()):
                y, *now = self._program(frames[timestep, :count], [leaf[:count].contiguous() for leaf in now])
                outputs[timestep, :count] = y.numpy()
                for final, leaf in zip(finals.values(), now, strict=True):
                    final[:count] = leaf.numpy()
        return outputs, finals
