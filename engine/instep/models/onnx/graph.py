"""Reading an ONNX graph that nobody has vouched for, and making a session of it.

A graph computes and nothing else: operators that are not part of ONNX and tensors kept in other files are refused, so
that no library is loaded and no other file is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

from instep.models.errors import ModelError

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

STANDARD: Final = ("", "ai.onnx")
"""Names of the domain of ONNX's own operators."""
MAX_NODES: Final = 100_000
_RANDOM: Final = frozenset(
    ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
)


def require(what: str) -> None:
    """Check that the extra is installed.

    Raises:
        ModelError: when it is not.
    """
    try:
        import onnx as onnx
        import onnxruntime as onnxruntime
    except ImportError as error:
        raise ModelError(f'{what} needs {error.name}, which is not installed: pip install "instep[onnx]"') from None


def parse(content: bytes, source: str) -> ModelProto:
    """The graph of a file, with its functions written out.

    Raises:
        ModelError: it is not a whole ONNX graph, keeps tensors in other files, or has operators that are random or not
            part of ONNX.
    """
    require(source)
    import onnx
    from google.protobuf.message import DecodeError
    from onnx.inliner import inline_local_functions

    try:
        model = onnx.load_model_from_string(content)
    except DecodeError:
        raise ModelError(f"{source} is not an ONNX graph, or is damaged; export it again") from None
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{source} is not an ONNX graph, or is damaged: it has no operators; export it again")
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ModelError(
                f"{source} keeps the tensor {tensor.name!r:.80} in another file: save it as one file, with "
                "onnx.save_model(onnx.load(path), new_path)"
            )
    if model.functions:
        _check_functions(model, source)
        model = inline_local_functions(model)
    _check_operators(model, source)
    return model


def open_session(content: bytes, source: str) -> Any:
    """An onnxruntime session on the CPU, with one thread: it computes in the thread that runs it.

    Raises:
        ModelError: when onnxruntime cannot compute the graph.
    """
    require(source)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what goes wrong is raised; warnings of a graph's author are no user's business
    options.add_session_config_entry("session.load_model_format", "ONNX")  # never by what the bytes look like
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its classes of errors have no common one
        raise ModelError(f"onnxruntime cannot load {source}: {explain(error)}; export it again, or report it") from None


def nodes_of(graph: GraphProto) -> Iterator[NodeProto]:
    """All nodes, those of subgraphs included."""
    for node in graph.node:
        yield node
        for subgraph in subgraphs_of(node):
            yield from nodes_of(subgraph)


def subgraphs_of(node: NodeProto) -> Iterator[GraphProto]:
    """The branches of an If, the body of a Loop or Scan."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def label(node: NodeProto) -> str:
    """How sentences call a node: `GRU ('/rnn/GRU')`."""
    return f"{node.op_type} ({(node.name or ', '.join(node.output))!r:.80})"


def _check_functions(model: ModelProto, source: str) -> None:
    """Refuse functions that call each other so often that their nodes, written out, would fill the memory."""
    bodies = {(each.domain, each.name): each.node for each in model.functions}
    counts: dict[tuple[str, str], int] = {}

    def count(nodes: Iterable[NodeProto]) -> int:
        found = 0
        for node in nodes:
            key = node.domain, node.op_type
            if key in bodies and key not in counts:
                counts[key] = count(bodies[key])
            found += counts.get(key, 1) + sum(count(graph.node) for graph in subgraphs_of(node))
        return found

    try:
        total = count(model.graph.node)
    except RecursionError:
        raise ModelError(f"{source} has functions that call themselves, or too deeply; export it again") from None
    if total > MAX_NODES:
        raise ModelError(
            f"{source} has more than {MAX_NODES:,} operators once its functions are written out, which is the most "
            "that can be served; export it without functions"
        )


def _check_operators(model: ModelProto, source: str) -> None:
    from onnx import defs

    newest = defs.onnx_opset_version()
    for opset in model.opset_import:
        if opset.domain in STANDARD and opset.version > newest:
            raise ModelError(
                f"{source} has opset {opset.version}, and {newest} is the newest that is known here: export it with "
                f"opset_version={newest}, or update onnx and onnxruntime"
            )
    for node in nodes_of(model.graph):
        if node.domain not in STANDARD or not defs.has(node.op_type):
            name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise ModelError(
                f"{source} uses {name:.80}, which is not an operator of ONNX: export the graph without it, and without "
                "optimisations of a particular runtime"
            )
        if node.op_type in _RANDOM or _is_training(model, node):
            raise ModelError(
                f"{source}: {label(node)} gives random values or is in training mode, so that a frame's output would "
                "not be decided by the frame and the state; call eval() on the module and export it again"
            )


def _is_training(model: ModelProto, node: NodeProto) -> bool:
    from onnx import numpy_helper

    if any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute):
        return True
    if node.op_type != "Dropout" or len(node.input) < 3 or not node.input[2]:
        return False
    constants = {each.output[0]: each.attribute[0].t for each in nodes_of(model.graph) if each.op_type == "Constant"}
    constants |= {tensor.name: tensor for tensor in model.graph.initializer}
    mode = constants.get(node.input[2])
    return mode is None or bool(numpy_helper.to_array(mode))


def tensors_of(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that a graph or one of its functions holds."""
    nodes = [node for function in model.functions for node in function.node]
    graphs = [model.graph, *(info.algorithm for info in model.training_info)]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
            continue
        for attribute in nodes.pop().attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            yield from attribute.tensors
            graphs += [attribute.g] if attribute.HasField("g") else []
            graphs += attribute.graphs


def explain(error: Exception) -> str:
    """What onnxruntime said, on one line of bounded length."""
    text = " ".join(str(error).split())
    _, marker, last = text.rpartition("[ONNXRuntimeError]")  # then come a number, its name, and what is wrong
    return (last.split(" : ", 3)[-1] if marker else text)[:200]
