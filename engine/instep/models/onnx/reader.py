"""From a step graph in ONNX to the normal form.

The graph is read at one row, so all shapes are numbers. What does not depend on the frame or the state, such as shapes,
conditions and prepared weights, is computed once by ONNX's own reference. Everything else becomes operators of torch,
which are then traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.fx import traceback

from instep.models.errors import ModelError
from instep.models.onnx.description import ROWS, OnnxDescription
from instep.models.onnx.description import Tensor as _Tensor
from instep.models.onnx.graph import STANDARD, explain, label, open_session, parse, subgraphs_of
from instep.models.onnx.operators import OPERATORS, Array, OnnxNode, UnservedOperator, Value
from instep.models.portable.form import DTYPES
from instep.models.portable.trace import Traced, trace
from instep_tools.words import counted

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Step: TypeAlias = Callable[[Sequence[Array]], Sequence[Array]]
"""From frames and leaves [rows, elements] to outputs and new leaves [rows, elements]."""

_OLDEST_OPSET: Final = 7
"""Before it, arithmetic broadcast in another way."""
_TRIALS: Final = ((1, 4), (32, 2))
"""Rows and frames for which a step is compared with onnxruntime."""
_TOLERANCE: Final = 2e-4
"""Of the largest value of an output or leaf, or of 1 if that is larger."""


def read_onnx(content: bytes | ModelProto, description: OnnxDescription, source: str) -> Traced:
    """The normal form of a step graph, with the constants that it uses.

    Args:
        content: the graph; nothing in bytes is trusted, a `ModelProto` was made by `parse`.
        description: which tensor is which.
        source: how sentences call the graph.

    Raises:
        ModelError: naming the operator that cannot be served.
    """
    graph = parse(content, source) if isinstance(content, bytes) else content
    frame, *leaves = description.graph_inputs[: 1 + len(description.leaves)]
    inputs = [torch.zeros(frame.sized(1))]
    inputs += [torch.zeros(leaf.sized(1), dtype=getattr(torch, leaf.dtype)) for leaf in leaves]
    first = _GraphReader(graph, description, source)
    with torch.no_grad():
        first.run([each.to("meta") for each in inputs])
    names = list(first.constants)

    def step(tensors: Sequence[Tensor], *inputs: Tensor) -> list[Tensor]:
        with traceback.preserve_node_meta():  # for `trace` to name the node where something has no portable form
            return _GraphReader(graph, description, source, dict(zip(names, tensors, strict=True))).run(inputs)

    tensors = {name: torch.tensor(values) for name, values in first.constants.items()}
    try:
        traced = trace(step, tensors, inputs)
    except ModelError as error:
        raise ModelError(f"{source} cannot be served: {error}") from None
    used = {buffer.tensor for buffer in traced.form.buffers}
    return Traced(traced.form, {name: values for name, values in (tensors | traced.constants).items() if name in used})


def compare(step: Step, content: bytes, description: OnnxDescription, source: str) -> None:
    """Compare a step with the graph, computed by onnxruntime for random frames.

    Args:
        step: what was made of the graph.
        content: the graph.
        description: which tensor is which.
        source: how sentences call the graph.

    Raises:
        ModelError: naming the output that differs most, and by how much.
    """
    session = open_session(content, source)
    frame, *leaves = description.graph_inputs[: 1 + len(description.leaves)]
    random = np.random.default_rng(0)
    for rows, frames in _TRIALS if description.is_batched else _TRIALS[:1]:
        fed = {each.input: _full(each.in_graph, rows, each.value) for each in description.constants}
        fed |= {leaf.name: _full(leaf, rows, 0) for leaf in leaves}
        for _ in range(frames):
            x = random.standard_normal((rows, description.features)).astype(np.float32)
            fed[frame.name] = x.reshape(frame.sized(rows)).astype(frame.dtype)
            try:
                wanted = session.run([tensor.name for tensor in description.graph_outputs], fed)
            except Exception as error:  # onnxruntime's errors have no common class
                raise ModelError(
                    f"onnxruntime cannot run {source} with {counted(rows, 'row')}: {explain(error)}"
                ) from None
            found = step([x, *(_by_row(leaf, fed[leaf.name]) for leaf in leaves)])
            for tensor, one, other in zip(description.graph_outputs, found, wanted, strict=True):
                _check(one, _by_row(tensor, other), tensor.name, source)
            fed |= {leaf.name: values for leaf, values in zip(leaves, wanted[1:], strict=True)}


def _full(tensor: _Tensor, rows: int, value: float) -> Array:
    return np.full(tensor.sized(rows), value).astype(tensor.dtype)


def _by_row(tensor: _Tensor, values: Array) -> Array:
    """Values [rows, elements]."""
    if ROWS not in tensor.shape:
        return values.reshape(1, -1)
    axis = tensor.shape.index(ROWS)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _check(found: Array, wanted: Array, name: str, source: str) -> None:
    tolerance = _TOLERANCE if wanted.dtype.kind == "f" else 0.0
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(all="ignore"):
        away = np.where((found == wanted) | (np.isnan(found) & np.isnan(wanted)), 0, np.abs(found - wanted))
    largest = np.abs(wanted).max(initial=1, where=np.isfinite(wanted))
    worst = float(np.nan_to_num(away, nan=np.inf).max(initial=0))
    if worst > tolerance * largest:
        raise ModelError(
            f"output {name!r:.80} of {source} differs by {worst:.1e} from onnxruntime's, whose values reach "
            f"{largest:.1e}: the results of a row may depend on the rows beside it; if they do not, please report this"
        )


class _GraphReader:
    """Computes a graph at one row, once.

    Attributes:
        constants: what it used that does not depend on the frame or the state, by name.
        opset: the version of ONNX's operators.
    """

    def __init__(
        self, graph: ModelProto, description: OnnxDescription, source: str, given: Mapping[str, Tensor] | None = None
    ) -> None:
        self._graph, self._description, self._source = graph.graph, description, source
        self._given = given
        self._opsets = {each.domain: each.version for each in graph.opset_import}
        self.opset: Final = max(self._opsets.get(domain, 0) for domain in STANDARD)
        self.constants: Final[dict[str, Array]] = {}
        if self.opset < _OLDEST_OPSET:
            raise ModelError(
                f"{source} has opset {self.opset}, and {_OLDEST_OPSET} is the oldest that can be served: convert it "
                "with onnx.version_converter, or export it again"
            )

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs and the new leaves, from a frame and the leaves."""
        described = self._description
        values: dict[str, Value] = _initializers(self._graph) | {"": None}
        for constant in described.constants:
            values[constant.input] = np.full(constant.in_graph.sized(1), constant.value, constant.dtype)
        for tensor, x in zip(described.graph_inputs, inputs, strict=False):  # the constants come last
            values[tensor.name] = x.to(getattr(torch, tensor.dtype))
        self._compute(self._graph, values)
        answer, *leaves = [self._result(values, tensor.name) for tensor in described.graph_outputs]
        return [answer.to(torch.float32), *leaves]

    def constant(self, name: str, values: Array) -> Tensor:
        """The tensor of values that do not depend on the frame or the state."""
        if values.dtype.name not in DTYPES:
            raise UnservedOperator(f"{name!r:.80} is {values.dtype}: convert the graph to float32")
        name = name.replace("constant.", "constant_", 1)  # which is how `trace` calls its own
        while self.constants.setdefault(name, values) is not values:
            name += "'"  # two branches may use one name
        return torch.tensor(values, device="meta") if self._given is None else self._given[name]

    def _result(self, values: Mapping[str, Value], name: str) -> Tensor:
        value = values.get(name)
        if value is None:
            raise ModelError(f"{self._source} has no output {name!r:.80}; correct its description")
        return self.constant(name, value) if isinstance(value, np.ndarray) else value

    def _compute(self, graph: GraphProto, values: dict[str, Value]) -> None:
        for proto in graph.node:
            traceback.set_stack_trace([label(proto)])
            try:
                if missing := [name for name in proto.input if name not in values]:
                    raise UnservedOperator(f"nothing gives its input {missing[0]!r:.80}")
                results = self._results(proto, values)
                if any(proto.output[len(results) :]):
                    raise UnservedOperator(
                        f"its output {proto.output[len(results)]!r:.80} is not among those that are served"
                    )
            except ModelError:  # of a node in a branch
                raise
            except UnservedOperator as error:
                raise ModelError(f"{self._source}: {label(proto)} cannot be served: {error}") from None
            except Exception as error:  # whatever torch and the reference raise for shapes that do not fit
                raise ModelError(f"{self._source}: {label(proto)} fails with one row: {explain(error)}") from None
            values |= {name: value for name, value in zip(proto.output, results, strict=False) if name}

    def _results(self, proto: NodeProto, values: dict[str, Value]) -> Sequence[Value]:
        given = [values[name] for name in proto.input]
        node = OnnxNode(proto, self.opset, given, self.constant)
        if proto.op_type == "If":
            branch = node.get("then_branch" if node.array(0).item() else "else_branch")
            values |= _initializers(branch)
            self._compute(branch, values)
            return [values[output.name] for output in branch.output]
        if proto.op_type == "Shape":
            return [np.array(node.given(0).shape[node.get("start", 0) : node.get("end")], np.int64)]
        if proto.op_type == "Size":
            return [np.array(math.prod(node.given(0).shape))]
        if not any(isinstance(each, Tensor) for each in given) and next(subgraphs_of(proto), None) is None:
            return self._fold(proto, values)
        if proto.op_type not in OPERATORS:
            raise UnservedOperator("write it with other operators, or hand over the torch module instead")
        results = OPERATORS[proto.op_type](node)
        return [results] if isinstance(results, Tensor) else results

    def _fold(self, proto: NodeProto, values: Mapping[str, Value]) -> list[Value]:
        from onnx import TypeProto, helper
        from onnx.reference import ReferenceEvaluator

        given = {name: values[name] for name in proto.input if name}
        inputs, outputs = (
            [helper.make_value_info(name, TypeProto()) for name in names if name] for names in (given, proto.output)
        )
        graph = helper.make_graph([proto], "node", inputs, outputs)
        results: Any = iter(ReferenceEvaluator(graph, opsets=self._opsets).run(None, given))
        return [np.asarray(next(results)) if name else None for name in proto.output]


def _initializers(graph: GraphProto) -> dict[str, Value]:
    from onnx import numpy_helper

    return {each.name: numpy_helper.to_array(each) for each in graph.initializer}
