"""From a step written in torch to its normal form.

The step is traced at one row: sizes become numbers, and nothing can refer to another row. Operators that are more than
one primitive are replaced by the definitions in `OWN`, which are part of `portable-1`; torch's decompositions and
`operators` do the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.func import functionalize
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from instep.models.errors import ModelError
from instep.models.module import operators as allowed
from instep.models.module.description import Graph
from instep.models.module.operators import Operator, name_of, written
from instep.models.module.program import Program
from instep.models.portable.composites import OF_COMPLEX, OWN, SPECTRA, Complex
from instep.models.portable.form import MAX_NODES, Builder, Form, View, check
from instep.models.portable.operators import Located, Lowering, Value, dtype_of

aten: Final = torch.ops.aten
Step: TypeAlias = Callable[..., Sequence[Tensor]]
_NO_LINES: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True)
class Traced:
    """The normal form of a step."""

    form: Form
    constants: dict[str, Tensor]
    """Arrays that the step makes by itself, for the weights file, by the names that the form gives them."""


def trace(step: Step, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Traced:
    """The normal form of `step(list of tensors, *inputs) -> (y, *new leaves)`.

    Args:
        step: it is called at one row.
        tensors: what it computes with, by the names in the weights file.
        inputs: a frame and the leaves, of one row and in any shape; only shapes and dtypes count. Their elements, in
            order, are those of the form's inputs.

    Raises:
        ModelError: when the step does something that has no portable form.
    """
    weights, leaves = [_like(each) for each in tensors.values()], [_like(each) for each in inputs]
    with torch.no_grad():
        whole = make_fx(step, pre_dispatch=True, tracing_mode="fake")(weights, *leaves)
    return _traced(whole, tensors, [*weights, *leaves])


def form_of_module(
    graph: Graph, weights: Mapping[str, Tensor], inputs: Sequence[Tensor], where: Mapping[str, str] = _NO_LINES
) -> Traced:
    """The normal form of a step module.

    Args:
        graph: its calls.
        weights: by name.
        inputs: a frame and the leaves, of one row; only shapes and dtypes count.
        where: the lines of the user's code, by the names of the graph's nodes.

    Raises:
        ModelError: when the step does something that has no portable form; it names the line.
    """
    program = Program(graph, weights, torch.device("cpu"))
    copied = fx.Graph()
    copied.output(copied.graph_copy(program.graph, {}))
    calls = [node for node in copied.nodes if node.op == "call_function"]
    for call, node in zip(calls, graph.nodes, strict=True):
        call.stack_trace = where.get(node.name)
    module = fx.GraphModule(nn.Module(), copied)
    tensors = [*map(_like, program.weights)]
    return _traced(module, {each.name: weights[each.name] for each in graph.tensors}, [*tensors, *inputs, 1])


def _like(tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


class _WithDefinitions(Located):
    """Replaces operators by their definitions in `composites`."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(target, Operator):
            return super().call_function(target, args, kwargs)
        name = name_of(target)
        if any(isinstance(each, Complex) for each in (*args, *kwargs.values())):
            if name in allowed.SHAPES:
                parts = (target(each, *args[1:], **kwargs) for each in (args[0].real, args[0].imag))
                return Complex(*parts)
            if name not in OF_COMPLEX:
                raise ModelError(f"{self.where} calls {name} with complex numbers; take their parts, or abs, before")
            return OF_COMPLEX[name](*args, **kwargs)
        return SPECTRA.get(name, OWN.get(target, target))(*args, **kwargs)


def _traced(module: fx.GraphModule, tensors: Mapping[str, Tensor], arguments: Sequence[Any]) -> Traced:
    """The normal form of a graph whose arguments are tensors of weights, a frame, leaves, and other values."""
    run = _WithDefinitions(module)
    given = [each for each in arguments if isinstance(each, Tensor)]
    rest = arguments[len(given) :]
    lowered = _decomposed(lambda *values: run.run(*values, *rest), given)
    if any(isinstance(node.target, Operator) and written(node.target) for node in lowered.graph.nodes):
        lowered = _decomposed(fx.Interpreter(lowered).run, given)  # some decompositions change what they have made
    builder = Builder()
    inputs = given[len(tensors) :]
    views = [builder.tensor(name, dtype_of(each), each.shape) for name, each in tensors.items()]
    views += [builder.input(dtype_of(each), each.shape) for each in inputs]
    lowering = Lowering(builder, lowered)
    form = builder.form([_result(lowering, each, views) for each in lowering.run(*views)])
    if len(form.nodes) > MAX_NODES:
        raise ModelError(
            f"the step takes {len(form.nodes):,} operations for one row, and {MAX_NODES:,} at most can be compiled: "
            "a loop over the elements of a frame is written out, so let it take fewer turns"
        )
    used = {buffer.tensor for buffer in form.buffers}
    constants = {name: each for name, each in lowering.constants.items() if name in used}
    known = {**tensors, **constants}
    check(form, {name: (dtype_of(each), each.numel()) for name, each in known.items()}, "the step")
    return Traced(form, constants)


def _decomposed(step: Callable[..., Any], given: Sequence[Tensor]) -> fx.GraphModule:
    """The decomposed graph of a step. Some decompositions still change in place what they made."""
    with torch.no_grad(), traceback.preserve_node_meta():
        module = make_fx(
            functionalize(step, remove="mutations"), decomposition_table=_decompositions(), tracing_mode="fake"
        )(*given)
    module.graph.eliminate_dead_code()
    return module


def _result(lowering: Lowering, value: Value, given: Sequence[View]) -> View:
    """Copy a result that shares memory with an input or a weight."""
    if isinstance(value, View) and value.buffer not in {each.buffer for each in given}:
        return value
    assert isinstance(value, View | Tensor)
    return lowering.assign(lowering.builder.fresh(lowering.dtype(value), tuple(value.shape)), value)


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = {**core_aten_decompositions(), **get_decompositions(_ALSO_DECOMPOSED)}
    for packet in _LOWERED:
        for overload in packet.overloads():  # type: ignore[no-untyped-call]
            table.pop(getattr(packet, overload), None)
    return table | OWN


_ALSO_DECOMPOSED: Final = [
    *(aten._adaptive_avg_pool2d, aten._log_softmax, aten._prelu_kernel, aten._softmax, aten.elu, aten.embedding),
    *(aten.gelu, aten.hardsigmoid, aten.hardswish, aten.hardtanh, aten.isinf, aten.isnan, aten.leaky_relu),
    *(aten.linalg_vector_norm, aten.log_sigmoid_forward, aten.mish, aten.rsub, aten.stack, aten.std),
    aten.upsample_bilinear2d,
]
_LOWERED: Final = [
    *(aten.addcmul, aten.all, aten.baddbmm, aten.constant_pad_nd, aten.fill, aten.floor_divide, aten.index_select),
    *(aten.select_scatter, aten.slice_scatter),
]
"""`operators` has them, while torch's decompositions would take more nodes."""
