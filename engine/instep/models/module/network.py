"""A step module on a device: its graph, staged contiguously, and the same graph in float64 as the reference."""
# ruff: noqa: D102 - see the protocols in `base`

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

import numpy as np
import torch

from instep.core.typing import F32, I64, U8
from instep.models.base import Floats, StateSpec
from instep.models.errors import ModelError, first_line
from instep.models.model import Model
from instep.models.module.cells import BoundCell, cell_calls
from instep.models.module.description import ModuleDescription
from instep.models.module.program import Program
from instep.models.recurrent.cell import BY_HAND, Kernel
from instep.models.stepping import Trial, scan

ROWS: Final = 32


class ModuleNetwork:
    """A `RecurrentModel`.

    Raises:
        ModelError: when the graph cannot be run, or gives other shapes or dtypes than the description says.
    """

    row_multiple = ROWS
    """Elementwise functions end an array that does not fill their vectors with other code."""
    kernel: Literal["graph"] | Kernel = "graph"
    """Or how the graph's recurrent cells are stepped, where that is by hand; `select_step` decides."""
    least_probes = 512
    """A graph may contain any kernel, and some differ in one of 2,000 values only."""

    def __init__(self, model: Model, device: torch.device) -> None:
        assert isinstance(model.description, ModuleDescription)
        self.model = model
        self.description: ModuleDescription = model.description
        self.fingerprint = model.fingerprint
        self.device = device
        self.state: StateSpec = model.state
        shapes = self.description.tensor_shapes().values()
        self.multiply_adds = max(sum(math.prod(shape) for shape in shapes if len(shape) > 1), 1)
        self._program = Program(self.description, model.weights, device)
        self._check()
        self._cells = cell_calls(self.description.graph, model.weights) if device.type == "cpu" else {}
        if self._cells:
            self._with_cells = Program(self.description, model.weights, device, cells=self._cells)

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """Step cells by hand where at least `rows` frames get the bits of torch's own in each bucket."""
        ways = BY_HAND if self._cells else ()
        self.kernel = next((each for each in ways if self._is_same(each, buckets, rows)), "graph")

    def select_quickest(self) -> None:
        """Step cells by hand where there are any."""
        self.kernel = BY_HAND[0] if self._cells else "graph"

    def bind(self, rows: int) -> ModuleStep:
        return self._bound(self.kernel, rows)

    def sequence(self, x: F32, state: U8) -> None:
        """A step has no call for a whole sequence."""

    def reference(self, dtype: type[np.floating[Any]]) -> GraphReference:
        """The same graph with every float32 in it as float64."""
        return GraphReference(self.model, double=dtype is np.float64)

    def run_once(self, x: torch.Tensor, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """The outputs and the leaves after one frame of every row, in tensors of their own."""
        return tuple(value.clone() for value in self._program(x, [leaf.contiguous() for leaf in leaves]))

    def _bound(self, kernel: Literal["graph"] | Kernel, rows: int) -> ModuleStep:
        if kernel == "graph":
            return ModuleStep(self._program, self.description, rows, self.device)
        cells = [BoundCell(call, adds_biases=kernel == "fused") for call in self._cells.values()]
        return ModuleStep(self._with_cells, self.description, rows, self.device, cells)

    def _is_same(self, kernel: Kernel, buckets: Sequence[int], rows: int) -> bool:
        """Whether steps by hand give `rows` random frames the bits that torch's cells give them in these buckets."""
        trial = Trial(self.state, self.description.features, self.description.outputs, rows)
        both = ((trial.answers(self._bound(each, bucket)) for each in ("graph", kernel)) for bucket in buckets)
        return all(np.array_equal(one, other) for one, other in both)

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
                    f"({first_line(error):.200}); export the module again with "
                    "instep.models.export_step"
                ) from None
            if before != [tensor._version for tensor in given]:
                raise ModelError(
                    f"the graph of {self.model.name} changes its weights, its frames or its state in place, which "
                    "other frames need; export a step that returns new tensors"
                )


class ModuleStep:
    """A `BoundStep`. The new state has memory of its own, since a graph may return a leaf as another one.

    Args:
        program: with weights.
        description: of the step.
        rows: of the batch.
        device: where it runs.
        cells: those that are stepped by hand, in the program's order.

    Raises:
        ModelError: when there are cells and the program does not run.
    """

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def __init__(
        self,
        program: Program,
        description: ModuleDescription,
        rows: int,
        device: torch.device,
        cells: Sequence[BoundCell] = (),
    ) -> None:
        self._program = program
        self._cells = cells
        self.x = torch.zeros(rows, description.features, device=device)
        initial = {
            leaf.name: torch.full(
                (rows, *leaf.shape), leaf.of_row.initial or 0, dtype=getattr(torch, leaf.dtype), device=device
            )
            for leaf in description.leaves
        }
        self.state = {name: leaf.clone() for name, leaf in initial.items()}
        self._leaves = list(self.state.values())
        self.results = [torch.zeros(rows, description.outputs, device=device), *initial.values()]
        """`y` and the leaves of `new_state`."""
        self._copied = list(range(len(self.results)))
        """Those that are not where they are computed."""
        if cells:
            self._leave_where_computed()
            for name, leaf in self.state.items():
                leaf.copy_(initial[name])
        self.y, *after = self.results
        self.new_state = dict(zip(initial, after, strict=True))

    def run(self) -> None:
        values = self._program(self.x, self._leaves, self._cells)
        for place in self._copied:
            value, result = values[place], self.results[place]
            if value.shape != result.shape or value.dtype != result.dtype:
                raise ModelError(
                    f"it gives {value.dtype} {list(value.shape)} where the description says {result.dtype} "
                    f"{list(result.shape)}"
                )
            result.copy_(value)

    def _leave_where_computed(self) -> None:
        """Use the memory of cells for results that are no more than what a cell returns."""
        values = self._program(self.x, self._leaves, self._cells)
        held = [memory for cell in self._cells for memory in cell.leaves]
        for leaf, value in zip(self._leaves, values[1:], strict=True):
            if not _is(value, leaf):  # then another result must not be there, which ends with the next state
                held = [memory for memory in held if memory is not leaf]
        for place, (value, result) in enumerate(zip(values, self.results, strict=True)):
            memory = next((each for each in held if _is(value, each)), None)
            if memory is not None and memory.shape == result.shape:
                self.results[place] = memory
                self._copied.remove(place)


def _is(value: torch.Tensor, memory: torch.Tensor) -> bool:
    """Whether a value is all of some memory."""
    return (
        value.data_ptr() == memory.data_ptr()
        and (value.shape, value.dtype) == (memory.shape, memory.dtype)
        and value.is_contiguous()
    )


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
        dtypes = {leaf.name: self._dtypes.get(leaf.dtype, np.dtype(leaf.dtype)) for leaf in self._leaves}
        leaves = {name: np.asarray(state[name], dtype) for name, dtype in dtypes.items()}
        frames = np.ascontiguousarray(x, self._dtypes["float32"])
        return scan(self._step, frames, leaves, active, self._outputs)

    @torch.inference_mode()
    def _step(self, x: Floats, state: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        y, *leaves = self._program(torch.from_numpy(x), [torch.from_numpy(leaf) for leaf in state.values()])
        return y.numpy(), {name: leaf.numpy() for name, leaf in zip(state, leaves, strict=True)}
