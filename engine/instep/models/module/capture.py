"""From an exported program to a graph of plain data.

Only what `operators` allows gets through; none of it changes anything in place.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, get_args

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from instep.models.errors import ModelError
from instep.models.module import operators
from instep.models.module.description import Graph, TensorType
from instep.models.module.operators import Operator, is_allowed, name_of
from instep.models.module.program import encoded

_NUMBERS: Final[dict[Any, str]] = {function: name for name, function in operators.NUMBERS.items()}
_TORCH: Final = os.path.dirname(torch.__file__) + os.sep
_SOURCE: Final = re.compile(r'\s*File "([^"]+)", line (\d+), in ')
_HINTS: Final = {
    **dict.fromkeys(("cond", "while_loop"), "use torch.where, or a fixed number of rounds"),
    **dict.fromkeys(
        ("item", "_local_scalar_dense", "nonzero", "nonzero_numpy", "masked_select", "_unique2"),
        "rows of other streams would decide along: use torch.where over all elements",
    ),
    **dict.fromkeys(
        ("rand", "randn", "rand_like", "randn_like", "bernoulli", "native_dropout"),
        "a frame could never be computed again: leave noise out, or take it from the frame",
    ),
}


@dataclass(frozen=True)
class Capture:
    """An exported step `forward(x, *leaves) -> (y, *leaves)` as plain data."""

    graph: Graph
    tensors: dict[str, torch.Tensor]
    """Parameters, buffers and constants by name."""
    lines: dict[str, str]
    """The lines of the user's code that make the calls, by the names of nodes."""


def captured(program: ExportedProgram, leaves: Sequence[str]) -> Capture:
    """The graph of a step.

    Args:
        program: what torch.export made of it, with a dynamic batch, and without changes in place.
        leaves: the names of the state's leaves.

    Raises:
        ModelError: naming what no step may do.
        ValidationError: where the graph is too large.
    """
    inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    output: Any = program.graph.output_node().args[0]
    results = []
    for spec, result in zip(program.graph_signature.output_specs, output, strict=True):
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise ModelError(
                f"the step changes its own buffer {_plain(spec.target)} in place, which all streams would share: keep "
                "what a stream must remember in the state, and return the new one"
            )
        if spec.kind == OutputKind.USER_OUTPUT:
            results.append(result)
    needed = set(results)
    for node in reversed(program.graph.nodes):
        needed.update(node.all_input_nodes if node in needed else ())
    found: dict[fx.Node, Any] = {}
    tensors = {}
    given = iter([{"x": True}, *({"state": leaf} for leaf in leaves)])
    for spec in program.graph_signature.input_specs:
        node, name = inputs[spec.arg.name], _plain(spec.target or spec.arg.name)
        if spec.kind == InputKind.USER_INPUT:
            found[node] = next(given)
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise ModelError(f"the step uses {name}, which is no tensor; leave it out")
        elif node in needed:
            found[node] = {"tensor": name}
            tensor = {**program.state_dict, **program.constants}[spec.target]
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            if _dtype(tensor) not in get_args(TensorType):
                raise ModelError(f"{name} of the step is {_dtype(tensor)}; convert it, as with .float()")
    batch = inputs[program.graph_signature.user_inputs[0]].meta["val"].shape[0]
    nodes, lines = [], {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node not in needed:
            continue
        op = _called(node)
        if op == "aten.sym_size.int" and str(node.meta["val"]) == str(batch):
            found[node] = {"rows": True}
            continue
        nodes.append({"name": node.name, "op": op, **_arguments(node, found)})
        found[node], lines[node.name] = {"node": node.name}, _where(node)
    y, *new_state = [found[each] for each in results]
    described = [
        {"name": name, "shape": tuple(tensor.shape), "dtype": _dtype(tensor)} for name, tensor in tensors.items()
    ]
    after = dict(zip(leaves, new_state, strict=True))
    graph = Graph.model_validate({"tensors": described, "nodes": nodes, "y": y, "new_state": after})
    return Capture(graph, tensors, lines)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _plain(name: str) -> str:
    return name.removeprefix("step.")


def _called(node: fx.Node) -> str:
    target: Any = node.target
    if target in _NUMBERS:
        return _NUMBERS[target]
    name = name_of(target) if isinstance(target, Operator) else getattr(target, "__name__", str(target))
    if not isinstance(target, Operator) or not (is_allowed(target) or name == "sym_size"):
        raise ModelError(unknown(_where(node), name))
    return f"aten.{name}.{target._overloadname}"


def _arguments(node: fx.Node, found: Mapping[fx.Node, Any]) -> dict[str, Any]:
    kwargs = {name: value for name, value in node.kwargs.items() if name not in ("pin_memory", "layout")}
    if isinstance(node.target, Operator) and name_of(node.target) in operators.CREATION:
        kwargs["dtype"] = node.meta["val"].dtype  # torch's default dtype is the process's

    def reference(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return found[value]
        return [reference(each) for each in value] if isinstance(value, list | tuple) else encoded(value)

    try:
        return {
            "args": [reference(each) for each in node.args],
            "kwargs": {name: reference(value) for name, value in kwargs.items()},
        }
    except TypeError as error:
        raise ModelError(
            f"{_where(node)} gives an operator {error}, for which a model folder has no form; use float32, float64, "
            "int64 and bool tensors, and no torch.autocast"
        ) from None


def _where(node: fx.Node) -> str:
    """How sentences call the line of the user's code that a call comes from."""
    lines = pairwise(node.meta.get("stack_trace", "").split("\n"))
    found = [(*match.groups(), code) for line, code in lines if (match := _SOURCE.match(line))]
    of_user = [each for each in found if not each[0].startswith(_TORCH)]
    if not found:
        return "the step"
    file, line, code = (of_user or found)[-1]
    return f"the step ({Path(file).name}, line {line}: {code.strip():.80})"


def unknown(where: str, name: str) -> str:
    """Why a call cannot be served."""
    return f"{where} calls {name}, which cannot be served; {_HINTS.get(name, 'write it with other functions of torch')}"
