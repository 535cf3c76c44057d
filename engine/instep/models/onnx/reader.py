"""From a step graph in ONNX that nobody has vouched for to the normal form.

The graph is read at one row, so all shapes are numbers. What does not depend on the frame or the state, such as shapes,
conditions and prepared weights, is computed once by ONNX's own reference. Everything else becomes operators of torch,
which are then traced. A graph computes and nothing else: operators that are not part of ONNX and tensors in other files
are refused, so no library is loaded and no other file is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch.fx import traceback

from instep.models.base import Shape
from instep.models.errors import ModelError
from instep.models.onnx.operators import OPERATORS, Array, OnnxNode, UnservedOperator, Value
from instep.models.portable.form import DTYPES
from instep.models.portable.trace import Traced, trace

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

ROWS: Final = "rows"
Extents: TypeAlias = tuple[int | Literal["rows"], ...]
"""The shape of an input of the graph; `rows` is the axis that counts the rows of a batch, if the graph has one."""
_STANDARD: Final = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""
_OLDEST_OPSET: Final = 7
"""Before it, arithmetic broadcast in another way."""


class Tensor(NamedTuple):
    """An input of the graph."""

    name: str
    shape: Extents
    dtype: str

    @property
    def axis(self) -> int | None:
        """The axis that counts rows."""
        return self.shape.index(ROWS) if ROWS in self.shape else None

    @property
    def of_row(self) -> Shape:
        """Without that axis. A graph of one row does not say which it is, so all axes of extent 1 are left out."""
        return tuple(extent for extent in self.shape if extent != ROWS and (extent != 1 or ROWS in self.shape))

    @property
    def elements(self) -> int:
        """Of a row."""
        return math.prod(self.of_row)

    def sized(self, rows: int) -> Shape:
        """The shape in a batch of `rows`."""
        return tuple(rows if extent == ROWS else extent for extent in self.shape)

    def filled(self, rows: int, value: float) -> Array:
        """A batch with one value everywhere."""
        return np.full(self.sized(rows), value).astype(self.dtype)


@dataclass(frozen=True)
class StepGraph:
    """Which inputs and outputs of a graph are the frame, the answer, the state and constants."""

    source: str
    """How sentences call the graph."""
    frame: Tensor
    answer: str
    state: Mapping[Tensor, str]
    """Each input with the output that takes its place in the next step."""
    constants: Mapping[Tensor, float]
    """Inputs that are always the same, with the value of every element."""

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs that are the state."""
        return list(self.state)


def parse(content: bytes, source: str) -> ModelProto:
    """The graph of a file.

    Raises:
        ModelError: it is not a whole ONNX graph, keeps tensors in other files, or has functions of its own.
    """
    try:
        import onnx
        import onnxruntime as onnxruntime
    except ImportError as error:
        raise ModelError(f'{source} needs {error.name}, which is not installed: pip install "instep[onnx]"') from None
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError:
        raise ModelError(f"{source} is not an ONNX graph, or is damaged; export it again") from None
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{source} is not an ONNX graph, or is damaged: it has no operators; export it again")
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ModelError(
                f"{source} keeps the tensor {tensor.name!r:.80} in another file: save it as one file, with "
                "onnx.save_model(onnx.load(path), new_path)"
            )
    if model.functions:
        raise ModelError(
            f"{source} has functions of its own: write them out, with "
            "onnx.save_model(onnx.inliner.inline_local_functions(onnx.load(path)), new_path)"
        )
    return model


def _tensors(message: Any) -> Iterator[TensorProto]:
    """Every tensor in a message of protobuf, however deep."""
    from onnx import TensorProto

    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _tensors(part)


def open_session(content: bytes, source: str) -> Any:
    """An onnxruntime session on the CPU, with one thread.

    Raises:
        ModelError: when onnxruntime cannot compute the graph.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised; warnings of a graph's author are no user's business
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never by what the bytes look like
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes of errors have no common one
        raise ModelError(f"onnxruntime cannot load {source}: {explain(error)}; export it again, or report it") from None


def explain(error: Exception) -> str:
    """What onnxruntime said, on one line of bounded length."""
    text = " ".join(str(error).split())
    _, marker, last = text.rpartition("[ONNXRuntimeError]")  # then come a number, its name, and what is wrong
    return (last.split(" : ", 3)[-1] if marker else text)[:200]


def read_onnx(graph: ModelProto, step: StepGraph) -> Traced:
    """The normal form of a step graph, with the constants that it uses.

    Raises:
        ModelError: naming the operator that cannot be served.
    """
    inputs = [torch.zeros(step.frame.sized(1))]
    inputs += [torch.zeros(leaf.sized(1), dtype=getattr(torch, leaf.dtype)) for leaf in step.leaves]
    first = _GraphReader(graph, step)
    with torch.no_grad():
        first.run([each.to("meta") for each in inputs])
    names = list(first.constants)

    def run(tensors: Sequence[torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
        with traceback.preserve_node_meta():  # for `trace` to name the node where something has no portable form
            return _GraphReader(graph, step, dict(zip(names, tensors, strict=True))).run(inputs)

    tensors = {name: torch.tensor(values) for name, values in first.constants.items()}
    try:
        traced = trace(run, tensors, inputs)
    except ModelError as error:
        raise ModelError(f"{step.source} cannot be served: {error}") from None
    used = {buffer.tensor for buffer in traced.form.buffers}
    return Traced(traced.form, {name: values for name, values in (tensors | traced.constants).items() if name in used})


class _GraphReader:
    """Computes a graph at one row, once.

    Attributes:
        constants: what it used that does not depend on the frame or the state, by name.
        opset: the version of ONNX's operators.
    """

    def __init__(self, graph: ModelProto, step: StepGraph, given: Mapping[str, torch.Tensor] | None = None) -> None:
        self._graph, self._step, self._given = graph.graph, step, given
        self._opsets = {each.domain: each.version for each in graph.opset_import}
        self.opset: Final = max(self._opsets.get(domain, 0) for domain in _STANDARD)
        self.constants: Final[dict[str, Array]] = {}
        if self.opset < _OLDEST_OPSET:
            raise ModelError(
                f"{step.source} has opset {self.opset}, and {_OLDEST_OPSET} is the oldest that can be served: convert "
                "it with onnx.version_converter, or export it again"
            )

    def run(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs and the new leaves, from a frame and the leaves."""
        step = self._step
        values: dict[str, Value] = _initializers(self._graph) | {"": None}
        values |= {constant.name: constant.filled(1, value) for constant, value in step.constants.items()}
        for tensor, x in zip((step.frame, *step.leaves), inputs, strict=True):
            values[tensor.name] = x.to(getattr(torch, tensor.dtype))
        self._compute(self._graph, values)
        answer, *leaves = [self._result(values, name) for name in (step.answer, *step.state.values())]
        for (leaf, after), found in zip(step.state.items(), leaves, strict=True):
            if tuple(found.shape) != leaf.sized(1):
                raise ModelError(
                    f"a state changes its shape in {step.source}: {leaf.name!r:.80} is {list(leaf.sized(1))}, and "
                    f"{after!r:.80}, which takes its place, is {list(found.shape)}; keep its size, or pair others with "
                    "--state INPUT=OUTPUT"
                )
        return [answer.to(torch.float32), *leaves]

    def constant(self, name: str, values: Array) -> torch.Tensor:
        """The tensor of values that do not depend on the frame or the state."""
        if values.dtype.name not in DTYPES:
            raise UnservedOperator(f"{name!r:.80} is {values.dtype}: convert the graph to float32")
        name = name.replace("constant.", "constant_", 1)  # which is how `trace` calls its own
        while self.constants.setdefault(name, values) is not values:
            name += "'"  # two branches may use one name
        return torch.tensor(values, device="meta") if self._given is None else self._given[name]

    def _result(self, values: Mapping[str, Value], name: str) -> torch.Tensor:
        value = values[name]
        assert value is not None
        return self.constant(name, value) if isinstance(value, np.ndarray) else value

    def _compute(self, graph: GraphProto, values: dict[str, Value]) -> None:
        for proto in graph.node:
            label = f"{proto.op_type} ({(proto.name or ', '.join(proto.output))!r:.80})"
            traceback.set_stack_trace([label])
            try:
                results = self._results(proto, values)
                if any(proto.output[len(results) :]):
                    raise UnservedOperator(
                        f"its output {proto.output[len(results)]!r:.80} is not among those that are served"
                    )
            except ModelError:  # of a node in a branch
                raise
            except UnservedOperator as error:
                raise ModelError(f"{self._step.source}: {label} cannot be served: {error}") from None
            except Exception as error:  # whatever torch and the reference raise for shapes that do not fit
                raise ModelError(f"{self._step.source}: {label} fails with one row: {explain(error)}") from None
            values |= {name: value for name, value in zip(proto.output, results, strict=False) if name}

    def _results(self, proto: NodeProto, values: dict[str, Value]) -> Sequence[Value]:
        if proto.domain not in _STANDARD:
            raise UnservedOperator("it is not an operator of ONNX; export the graph without it")
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
        is_random = proto.op_type.startswith("Random") or proto.op_type in ("Bernoulli", "Multinomial")
        has_branches = any(each.HasField("g") or each.graphs for each in proto.attribute)
        if not (is_random or has_branches or any(isinstance(each, torch.Tensor) for each in given)):
            return self._fold(proto, values)
        if proto.op_type not in OPERATORS:
            raise UnservedOperator("write it with other operators, or hand over the torch module instead")
        results = OPERATORS[proto.op_type](node)
        return [results] if isinstance(results, torch.Tensor) else results

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
