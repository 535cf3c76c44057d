"""A step graph in ONNX, computed by onnxruntime on the CPU.

One session serves every batch size. Each bound step has buffers of its own that onnxruntime reads and writes in place,
in the layout of the graph; the state's leaves are views into them with the axis of rows first.
"""
# ruff: noqa: D102 - see the protocols in `base`

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from instep.core.typing import F32, U8
from instep.models.base import Reference, StateSpec
from instep.models.errors import ModelError
from instep.models.model import Model
from instep.models.onnx.description import ROWS, Dtype, OnnxDescription, Tensor
from instep.models.onnx.graph import explain, open_session, parse, tensors_of
from instep.models.onnx.reference import OnnxReference
from instep.models.onnx.rows import check_rows

DTYPE_NAMES: Final[dict[str, Dtype]] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}
"""Names of dtypes by onnxruntime's."""


class OnnxNetwork:
    """A `RecurrentModel`.

    Raises:
        ModelError: the extra is missing, the graph cannot be served, or the description does not fit it.
    """

    kernel = "onnxruntime"
    row_multiple = 1
    least_probes = 512
    """Any operator may be in a graph, and differences at the ends of vectors are rare."""

    def __init__(self, model: Model, device: torch.device) -> None:
        assert isinstance(model.description, OnnxDescription)
        self.model = model
        self.description: OnnxDescription = model.description
        self.fingerprint = model.fingerprint
        self.device = torch.device("cpu")  # whichever is asked for
        self.state: StateSpec = model.state
        source = f"the graph of {model.name}"
        self._graph = parse(model.graph, source)
        per_row = {self.description.frame.tensor, *(leaf.input for leaf in self.description.leaves)}
        check_rows(self._graph, per_row, source, self.description)
        self._session = open_session(model.graph, source)
        check_tensors(self._session, self.description, source)
        try:
            self.bind(2).run()
        except Exception as error:  # onnxruntime's errors have no common class
            raise ModelError(
                f"onnxruntime cannot run {source} with the shapes of its description: {explain(error)}; correct that"
            ) from None
        weights = [tensor.dims for tensor in tensors_of(self._graph) if len(tensor.dims) > 1]
        self.multiply_adds = max(sum(map(math.prod, weights)), 1)

    def select_step(self, buckets: Sequence[int], rows: int) -> None:
        """There is one way to step."""

    def select_quickest(self) -> None:
        """There is one way to step."""

    def bind(self, rows: int) -> OnnxStep:
        return OnnxStep(self._session, self.description, rows)

    def sequence(self, x: F32, state: U8) -> tuple[F32, U8] | None:
        """None: the graph takes one frame at a time."""
        return None

    def reference(self, dtype: type[np.floating[Any]]) -> Reference | None:
        """The graph computed by ONNX's own reference in numpy; None where that does not know one of its operators."""
        return OnnxReference.of(self._graph, self.description, dtype)


class OnnxStep:
    """A `BoundStep`."""

    @torch.inference_mode(False)  # what is made in that mode can only be changed in it
    def __init__(self, session: Any, description: OnnxDescription, rows: int) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._buffers = {tensor.name: _buffer(tensor, rows) for tensor in description.graph_inputs}
        results = {tensor.name: _buffer(tensor, rows) for tensor in description.graph_outputs}
        for bind, buffers in ((self._binding.bind_input, self._buffers), (self._binding.bind_output, results)):
            for name, buffer in buffers.items():
                bind(name, "cpu", 0, buffer.numpy().dtype, buffer.shape, buffer.data_ptr())
        for constant in description.constants:
            self._buffers[constant.input].fill_(constant.value)
        self._frames = self._buffers[description.frame.tensor].view(rows, -1)
        self._answers = results[description.answer.tensor].view(rows, -1)
        self.x, self.y = (
            each if each.dtype == torch.float32 else each.float() for each in (self._frames, self._answers)
        )
        axes = {leaf.name: leaf.shape.index(ROWS) for leaf in description.leaves}
        self.state = {leaf.name: self._buffers[leaf.input].movedim(axes[leaf.name], 0) for leaf in description.leaves}
        self.new_state = {leaf.name: results[leaf.output].movedim(axes[leaf.name], 0) for leaf in description.leaves}

    def run(self) -> None:
        if self.x is not self._frames:
            self._frames.copy_(self.x)
        self._session.run_with_iobinding(self._binding)
        if self.y is not self._answers:
            self.y.copy_(self._answers)


def _buffer(tensor: Tensor, rows: int) -> torch.Tensor:
    return torch.zeros(tensor.sized(rows), dtype=getattr(torch, tensor.dtype))


def check_tensors(session: Any, description: OnnxDescription, source: str) -> None:
    """Check that the graph has the tensors of the description.

    Raises:
        ModelError: naming the first that differs.
    """
    for what, wanted, has in (
        ("input", description.graph_inputs, session.get_inputs()),
        ("output", description.graph_outputs, session.get_outputs()),
    ):
        found = {each.name: each for each in has}
        for tensor in wanted:
            if tensor.name not in found:
                raise ModelError(f"{source} has no {what} {tensor.name!r:.80}; it has {', '.join(found):.300}")
            _check_tensor(f"{what} {tensor.name!r:.80} of {source}", found[tensor.name], tensor)
    mapped = {tensor.name for tensor in description.graph_inputs}
    if missing := [each.name for each in session.get_inputs() if each.name not in mapped]:
        raise ModelError(
            f"{source} has an input {missing[0]!r:.80} that its description does not mention: add it to leaves, with "
            "the output that takes its place in the next step, or to constants"
        )


def _check_tensor(what: str, found: Any, wanted: Tensor) -> None:
    dtype = DTYPE_NAMES.get(found.type, found.type)
    if dtype != wanted.dtype:
        raise ModelError(f"{what} is {dtype}, but {wanted.dtype} in the description; correct that")
    extents = wanted.shape if found.shape is None else found.shape
    if len(extents) != len(wanted.shape) or any(
        isinstance(extent, int) and extent != other for extent, other in zip(extents, wanted.shape, strict=True)
    ):
        shapes = (f"[{', '.join(str(extent or '?') for extent in shape)}]" for shape in (found.shape, wanted.shape))
        raise ModelError(f"{what} has the shape {', but in the description '.join(shapes)}; correct that")
