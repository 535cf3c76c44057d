"""`instep model import net.onnx`: makes a model folder from a step graph in ONNX, which is not trusted.

The graph is read at one row, so all shapes are numbers. Values that do not depend on the frame or the state, such as
shapes, conditions and prepared weights, are computed once by ONNX's own reference. Everything else becomes operators of
torch, which are then traced. Operators that are not part of ONNX and tensors in other files are refused, so a graph
cannot load a library or read another file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from pydantic import ValidationError
from torch.fx import traceback

from instep.models.base import RecurrentModel, Shape
from instep.models.errors import ModelError
from instep.models.folder import check_name, check_output_names, graph_bytes, write_model
from instep.models.model import Model, check_weights
from instep.models.module.description import ModuleDescription
from instep.models.network import PortableNetwork
from instep.models.numerics import difference, magnitude
from instep.models.onnx.operators import OPERATORS, Array, OnnxNode, UnservedOperator, Value
from instep.models.portable.compiler import shaped, unpacked
from instep.models.portable.form import DTYPES
from instep.models.portable.trace import Traced, trace
from instep.models.registry import sentences
from instep_client.protocol.state_spec import DTYPES as LEAF_DTYPES
from instep_tools.words import counted

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

ROWS: Final = "rows"
Extents: TypeAlias = tuple[int | Literal["rows"], ...]
"""The shape of an input of the graph; `rows` marks the batch axis, if the graph has one."""
_STANDARD: Final = ("", "ai.onnx")
_OLDEST_OPSET: Final = 7
"""Earlier versions broadcast in another way."""


class Tensor(NamedTuple):
    """An input of the graph."""

    name: str
    shape: Extents
    dtype: str

    @property
    def axis(self) -> int | None:
        """The batch axis."""
        return self.shape.index(ROWS) if ROWS in self.shape else None

    @property
    def of_row(self) -> Shape:
        """The shape without the batch axis; in a graph of a single row, without the axes of extent 1."""
        return tuple(extent for extent in self.shape if extent != ROWS and (extent != 1 or ROWS in self.shape))

    @property
    def elements(self) -> int:
        """The number of elements in a row."""
        return math.prod(self.of_row)

    def sized(self, rows: int) -> Shape:
        """The shape in a batch of `rows`."""
        return tuple(rows if extent == ROWS else extent for extent in self.shape)

    def filled(self, rows: int, value: float) -> Array:
        """A batch with one value everywhere."""
        return np.full(self.sized(rows), value).astype(self.dtype)


@dataclass(frozen=True)
class StepGraph:
    """The roles of the inputs and outputs of a graph."""

    source: str
    """The name of the graph in error messages."""
    frame: Tensor
    answer: str
    state: Mapping[Tensor, str]
    """Each input of the state, with the output that replaces it in the next step."""
    constants: Mapping[Tensor, float]
    """Inputs that never change, with the value of every element."""

    @property
    def leaves(self) -> list[Tensor]:
        """The inputs that make up the state."""
        return list(self.state)


def parse(content: bytes, source: str) -> ModelProto:
    """Parse a graph file.

    Raises:
        ModelError: it is not a complete ONNX graph, keeps tensors in other files, or defines functions.
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
    """The message of onnxruntime on one line of bounded length."""
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
        constants: by name, the values it used that do not depend on the frame or the state.
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
        """Compute the outputs and the new leaves from a frame and the leaves."""
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
        """The tensor for values that do not depend on the frame or the state."""
        if values.dtype.name not in DTYPES:
            raise UnservedOperator(f"{name!r:.80} is {values.dtype}: convert the graph to float32")
        name = name.replace("constant.", "constant_", 1)  # `trace` names its own constants `constant.N`
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


_IN: Final = "in|input|prev|previous|past|old|init|initial"
_OUT: Final = "out|output|next|new|present|updated"
_BEFORE: Final = re.compile(rf"^(?:{_IN})_|_(?:{_IN})$|(?<=[a-z])(?:In|Prev)$|_?0$")
_AFTER: Final = re.compile(rf"^(?:{_OUT})_|_(?:{_OUT})$|(?<=[a-z])(?:Out|Next|New)$|_?[nN1]$")
"""Suffixes that mark the name of an input, and of an output."""
_LOOPS: Final = frozenset(["GRU", "LSTM", "RNN", "Loop", "Scan"])
_TRIALS: Final = ((1, 4), (32, 2))
"""The numbers of rows and frames for which a step is compared with onnxruntime."""
_TOLERANCE: Final = 2e-4
"""A fraction of the largest value of an output or leaf, or of 1 if that is larger."""


def import_onnx(
    file: str | Path,
    folder: str | Path,
    *,
    state: Mapping[str, str] | None = None,
    answer: str | None = None,
    constants: Mapping[str, float] | None = None,
    shapes: Mapping[str, Extents] | None = None,
    name: str | None = None,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Model:
    """Write a step graph in ONNX as a model folder of kind `module`, compared with onnxruntime.

    Args:
        file: the graph, which computes outputs and the next state from a frame and the state; it is not trusted.
        folder: where to write it; made if it does not exist.
        state: each input of the state with the output that replaces it in the next step; matched by name if not given.
        answer: the output that clients get, if several outputs are not state.
        constants: inputs that never change, with the value of every element.
        shapes: shapes of inputs that the graph leaves open; without `rows` for a graph of one row.
        name: the name that clients see; the folder's name if None.
        outputs: a name for each output; none if they have no names.
        overwrite: replace an existing model in the folder.

    Raises:
        ModelError: naming the part that cannot be served, and what to do. Nothing is written then.
    """
    file, folder = Path(file), Path(folder)
    content, source = graph_bytes(file), str(file)
    graph = parse(content, source)
    session = open_session(content, source)
    _refuse_sequences(graph, session, source, constants or {})
    step = describe(session, source, state, answer, constants or {}, shapes or {})
    traced = read_onnx(graph, step)
    leaves = [
        {"name": name, "shape": leaf.of_row, "dtype": leaf.dtype}
        for name, leaf in zip(_leaf_names(step), step.leaves, strict=True)
    ]
    try:
        description = ModuleDescription.model_validate(
            {"features": step.frame.elements, "state": leaves, "form": traced.form}
        )
    except ValidationError as error:
        raise ModelError(f"{source} cannot be served: {sentences(error)}") from None
    weights = {tensor: values.reshape(-1) for tensor, values in traced.constants.items()}
    check_weights(weights, description, source)
    name = check_name(folder.resolve().name if name is None else name)
    model = Model(name, description, weights, check_output_names(list(outputs), description))
    _compare(PortableNetwork(model), session, step)
    write_model(folder, model, overwrite=overwrite)
    return model


def _refuse_sequences(graph: ModelProto, session: Any, source: str, constants: Mapping[str, float]) -> None:
    """Refuse a graph that gets only frames, and loops over them."""
    loops = [node for node in graph.graph.node if node.op_type in _LOOPS]
    if loops and len(session.get_inputs()) <= 1 + len(constants):
        raise ModelError(
            f"{source} computes whole sequences and keeps the state inside ({loops[0].op_type} "
            f"{loops[0].name or loops[0].output[0]!r:.80}): export one step, with the state as inputs and outputs, or "
            "give save_model the module"
        )


def describe(
    session: Any,
    source: str,
    state: Mapping[str, str] | None,
    answer: str | None,
    constants: Mapping[str, float],
    shapes: Mapping[str, Extents],
) -> StepGraph:
    """Find the frame, the answer and the state among inputs and outputs; see `import_onnx`.

    Raises:
        ModelError: naming the argument to give.
    """
    inputs, outputs = ({each.name: each for each in all_of} for all_of in (session.get_inputs(), session.get_outputs()))
    named = {
        "input": [*(state or {}), *constants, *shapes],
        "output": [*(state or {}).values(), *filter(None, [answer])],
    }
    for (what, names), there in zip(named.items(), (inputs, outputs), strict=True):
        if unknown := [name for name in names if name not in there]:
            raise ModelError(f"{source} has no {what} {unknown[0]!r:.80}; it has {', '.join(there):.300}")
    if state is None:
        candidates = [each for name, each in inputs.items() if name not in constants]
        state = _pairs(candidates, [each for name, each in outputs.items() if name != answer])
    frames = [name for name in inputs if name not in state and name not in constants]
    answers = [name for name in outputs if name not in state.values()] if answer is None else [answer]
    if not state or len(frames) != 1 or len(answers) != 1 or len({*state.values(), *answers}) <= len(state):
        found = ", ".join(f"{before}={after}" for before, after in state.items())
        raise ModelError(
            f"{source} has the inputs {', '.join(inputs):.300} and the outputs {', '.join(outputs):.300}, of which "
            f"{found or 'none'} are known to be a state: name every state with --state INPUT=OUTPUT, inputs that are "
            "always the same with --constant INPUT=NUMBER, and the answer with --answer OUTPUT, so that one input is "
            "left, which is the frame"
        )
    frame, *leaves = [_tensor(inputs[name], shapes, source) for name in (*frames, *state)]
    given = {_tensor(inputs[name], shapes, source): value for name, value in constants.items()}
    odd = [each for each in leaves if (ROWS in each.shape) != (ROWS in frame.shape)]
    before_rows = frame.shape[: frame.shape.index(ROWS)] if ROWS in frame.shape else frame.shape[:1]
    if odd or {*before_rows} - {1}:
        shown = ", ".join(f"{each.name} {_in_words(each.shape)}" for each in (frame, *leaves))
        raise ModelError(
            f"the inputs of {source} have the shapes {shown:.300}: export it with a dynamic batch in all of them "
            "(dynamic_axes or dynamic_shapes of torch.onnx.export), first of their axes in frames, or all for one row"
        )
    return StepGraph(source, frame, answers[0], dict(zip(leaves, state.values(), strict=True)), given)


def _pairs(inputs: Sequence[Any], outputs: Sequence[Any]) -> dict[str, str]:
    """Pair each input with the output of the same shape whose name is most similar."""
    found: dict[str, str] = {}
    for each in inputs:
        keys = _keys(each.name, _BEFORE)
        shared = {
            other.name: max(map(len, keys & _keys(other.name, _AFTER)), default=0)
            for other in outputs
            if _fit(each.shape, other.shape)
        }
        most = max(shared.values(), default=0)
        fitting = [name for name, length in shared.items() if length == most > 0]
        if len(fitting) == 1 and fitting[0] not in found.values():
            found[each.name] = fitting[0]
    return found


def _fit(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether the extents that the graph fixes are equal."""
    both = zip(one, other, strict=False)
    return len(one) == len(other) and all(a == b for a, b in both if isinstance(a, int) and isinstance(b, int))


def _keys(name: str, affix: re.Pattern[str]) -> set[str]:
    """A name in lower case, and the same without each affix that marks an input or output."""
    keys, left = set[str](), name
    while left and left.lower() not in keys:
        keys.add(left.lower())
        left = affix.sub("", left, count=1)
    return keys


def _leaf_names(step: StepGraph) -> list[str]:
    """A valid name for each leaf, from the part that the names of its input and output have in common."""
    names: list[str] = []
    for at, (leaf, after) in enumerate(step.state.items()):
        shared = max(_keys(leaf.name, _BEFORE) & _keys(after, _AFTER), key=len, default=leaf.name)
        name = re.sub(r"[^A-Za-z0-9_.]", "_", shared).lstrip("0123456789.")[:32]
        names.append(name if name and name not in names else f"state_{at}")
    return names


def _tensor(info: Any, shapes: Mapping[str, Extents], source: str) -> Tensor:
    given: tuple[Any, ...] = tuple(info.shape)
    shape = shapes.get(info.name, tuple(each if isinstance(each, int) else ROWS for each in given))
    if (
        len(shape) != len(given)
        or shape.count(ROWS) > 1
        or 0 in shape
        or (info.name in shapes and not {ROWS, 1} & {*shape})
    ):
        raise ModelError(
            f"input {info.name!r:.80} of {source} has the shape {_in_words(given)}: give an extent for each axis, and "
            "for the one that counts the rows of a batch `rows`, or 1 where the graph computes only one row, as in "
            f"--shape {info.name}={','.join([ROWS, *('1' * (len(given) - 2)), '40'])}"
        )
    dtype = {"tensor(float)": "float32", "tensor(double)": "float64"}.get(info.type, info.type[7:-1])
    if dtype not in LEAF_DTYPES:
        raise ModelError(
            f"input {info.name!r:.80} of {source} is {dtype:.80}: convert it to one of {', '.join(LEAF_DTYPES)}"
        )
    return Tensor(info.name, shape, dtype)


def _in_words(shape: Sequence[Any]) -> str:
    return f"[{', '.join(str(extent or '?') for extent in shape)}]"


def _compare(network: RecurrentModel, session: Any, step: StepGraph) -> None:
    """Compare a step with the graph, which onnxruntime computes for random frames.

    Raises:
        ModelError: naming the output that differs most, and by how much.
    """
    random = np.random.default_rng(0)
    names = [step.answer, *step.state.values()]
    for rows, frames in _TRIALS if ROWS in step.frame.shape else _TRIALS[:1]:
        fed = {each.name: each.filled(rows, value) for each, value in step.constants.items()}
        fed |= {leaf.name: leaf.filled(rows, 0) for leaf in step.leaves}
        states = network.state.initial(rows)
        for _ in range(frames):
            x = random.standard_normal((rows, step.frame.elements)).astype(np.float32)
            fed[step.frame.name] = x.reshape(step.frame.sized(rows)).astype(step.frame.dtype)
            try:
                answer, *after = session.run(names, fed)
            except Exception as error:  # onnxruntime's errors have no common class
                raise ModelError(
                    f"onnxruntime cannot run {step.source} with {counted(rows, 'row')}, so another --shape or a "
                    f"dynamic batch is needed: {explain(error)}"
                ) from None
            fed |= {leaf.name: values for leaf, values in zip(step.leaves, after, strict=True)}
            for leaf, values in zip(step.leaves, after, strict=True):
                if values.shape != leaf.sized(rows):
                    raise ModelError(
                        f"{step.state[leaf]!r:.80} of {step.source} is {list(values.shape)}, unlike its input"
                    )
            axis = next((at for at, extent in enumerate(answer.shape) if extent == rows > 1), None)
            wanted = [_by_row(answer, axis), *map(_by_row, after, (leaf.axis for leaf in step.leaves))]
            y, states = network.step(x, states)
            for name, one, other in zip(names, [y, *unpacked(network.state, states)], wanted, strict=True):
                _check(one, other, f"output {name!r:.80} of {step.source}")
            states = network.state.pack(shaped(network.state, wanted[1:]))


def _by_row(values: Array, axis: int | None) -> Array:
    return values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _check(found: Array, wanted: Array, output: str) -> None:
    if found.shape != wanted.shape:
        raise ModelError(
            f"{output} has not {counted(found.shape[1], 'value')} for each row; name another with --answer"
        )
    tolerance = _TOLERANCE if wanted.dtype.kind == "f" else 0.0
    worst, largest = difference(found, wanted), magnitude(wanted)
    if worst > tolerance * largest:
        raise ModelError(
            f"{output} differs by {worst:.1e} from onnxruntime's, whose values reach {largest:.1e}: the results of a "
            "row may depend on the rows beside it; if they do not, please report this"
        )
