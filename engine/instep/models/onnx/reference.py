"""An independent reference: the graph computed by the `onnx` package, which defines in numpy what operators mean.

It shares the graph with the step, so it does not notice when the graph is not the network that was trained; it shares
no code with onnxruntime. In float64, every float32 of the graph is one: weights, constants and casts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from instep.core.typing import I64
from instep.models.base import Floats
from instep.models.onnx.description import ROWS, OnnxDescription
from instep.models.onnx.graph import subgraphs_of
from instep.models.stepping import scan

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto
    from onnx.reference import ReferenceEvaluator


class OnnxReference:
    """A `Reference`.

    Args:
        graph: the graph, which float64 changes into one of float64.
        description: which tensor is which.
        dtype: numpy's float64, or float32 for the graph as it is.
    """

    independent = False

    def __init__(self, graph: ModelProto, description: OnnxDescription, dtype: type[np.floating[Any]]) -> None:
        from onnx.reference import ReferenceEvaluator

        is_wide = dtype is np.float64
        self._evaluator: ReferenceEvaluator = ReferenceEvaluator(_in_float64(graph) if is_wide else graph)
        self._description = description
        self._dtype = np.dtype(dtype)
        self._dtypes = {
            tensor.name: np.dtype("float64" if is_wide and tensor.dtype == "float32" else tensor.dtype)
            for tensor in description.graph_inputs
        }

    @classmethod
    def of(cls, graph: ModelProto, description: OnnxDescription, dtype: type[np.floating[Any]]) -> OnnxReference | None:
        """The reference of a graph; None when it cannot compute one of the operators."""
        leaves = [leaf.of_row for leaf in description.leaves]
        state = {leaf.name: np.full((2, *leaf.shape), leaf.initial or 0, dtype) for leaf in leaves}
        try:
            reference = cls(graph, description, dtype)
            reference.run(np.zeros((1, 2, description.features), dtype), state, np.array([2]))
        except Exception:  # whatever an operator that is not finished raises
            return None
        return reference

    def run(self, x: Floats, state: Mapping[str, Any], active: I64) -> tuple[Floats, dict[str, Any]]:
        """Run sequences of different lengths, the longest first; see `Reference.run`."""
        with np.errstate(all="ignore"):  # infinity is a value like any other here
            return scan(self._step, x.astype(self._dtype, copy=False), state, active, self._description.outputs)

    def _step(self, x: Floats, state: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        description, rows = self._description, len(x)
        frame = description.frame.in_graph
        fed = {frame.name: x.reshape(frame.sized(rows))}
        fed |= {leaf.input: np.moveaxis(state[leaf.name], 0, leaf.shape.index(ROWS)) for leaf in description.leaves}
        fed |= {each.input: np.full(each.in_graph.sized(rows), each.value) for each in description.constants}
        fed = {name: values.astype(self._dtypes[name], copy=False) for name, values in fed.items()}
        results: Any = self._evaluator.run([tensor.name for tensor in description.graph_outputs], fed)
        answer, *leaves = results
        after = zip(description.leaves, leaves, strict=True)
        return answer.reshape(rows, -1), {
            leaf.name: np.moveaxis(values, leaf.shape.index(ROWS), 0) for leaf, values in after
        }


def _in_float64(graph: ModelProto) -> ModelProto:
    wide = type(graph)()
    wide.CopyFrom(graph)
    _widen(wide.graph)
    return wide


def _widen(graph: GraphProto) -> None:
    from onnx import TensorProto, numpy_helper

    def widened(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), name))

    for values in (*graph.input, *graph.output, *graph.value_info):
        if values.type.tensor_type.elem_type == TensorProto.FLOAT:
            values.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in graph.initializer:
        widened(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widened(attribute.t)
            if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.DOUBLE
            if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                floats = attribute.f if attribute.name == "value_float" else list(attribute.floats)
                attribute.CopyFrom(_value(np.array(floats, np.float64)))
        for subgraph in subgraphs_of(node):
            _widen(subgraph)


def _value(values: Any) -> Any:
    from onnx import helper, numpy_helper

    return helper.make_attribute("value", numpy_helper.from_array(values))
