"""Turns a graph of plain data into a function, and into a network in torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx, nn

from instep.models.errors import ModelError, first_line
from instep.models.model import Model
from instep.models.module.description import Graph, ModuleDescription, OperatorCall
from instep.models.module.operators import Operator, resolve
from instep.models.torch_network import Leaves

_DTYPES: Final = {
    name: getattr(torch, name) for name in ("float32", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_MEMORY_FORMATS: Final = {"contiguous_format": torch.contiguous_format, "preserve_format": torch.preserve_format}


class Program:
    """A graph on a device.

    Args:
        graph: it is checked, since it may come from a stranger.
        weights: by name, on the CPU.
        device: where it runs.

    Raises:
        ModelError: when the graph calls an operator that is not allowed, or refers to a value that does not exist.
    """

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
    ) -> None:
        self._device = device
        self.graph: Final = fx.Graph()
        """A function of (*tensors, x, *leaves, rows) that returns the outputs and the leaves of the new state."""
        names = [
            *(("tensor", tensor.name) for tensor in graph.tensors),
            ("x", ""),
            *(("state", leaf) for leaf in graph.new_state),
            ("rows", ""),
        ]
        self._values = {name: self.graph.placeholder(f"v{at}") for at, name in enumerate(names)}
        for node in graph.nodes:
            self._add_call(node)
        self.graph.output(tuple(self._decoded(each) for each in (graph.y, *graph.new_state.values())))
        forward: Callable[..., tuple[torch.Tensor, ...]] = fx.GraphModule(nn.Module(), self.graph).forward
        self._forward = forward
        self.weights: Final = [weights[tensor.name].to(device) for tensor in graph.tensors]

    def __call__(self, x: torch.Tensor, leaves: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Step every row: the outputs [rows, outputs], and each leaf of the new state [rows, *shape].

        Args:
            x: frames [rows, features].
            leaves: of the state [rows, *shape].

        Raises:
            ModelError: when an operator cannot compute them.
        """
        try:
            return self._forward(*self.weights, x, *leaves, len(x))
        except Exception as error:  # of whatever kind the operator raises
            raise ModelError(
                f"an operator of the step fails ({first_line(error):.200}): keep numbers that choose elements in "
                "range, as with .clamp(0, size - 1)"
            ) from error

    def _add_call(self, node: OperatorCall) -> None:
        function = resolve(node.op)
        args, kwargs = tuple(map(self._decoded, node.args)), {k: self._decoded(v) for k, v in node.kwargs.items()}
        declared = {each.name for each in function._schema.arguments} if isinstance(function, Operator) else set()
        if not set(kwargs) <= declared:  # whose names would become part of the generated code
            raise ModelError(f"the graph calls {node.op} with arguments that it does not have; make the folder again")
        if ("node", node.name) in self._values:
            raise ModelError(f"the graph has two nodes called {node.name!r:.80}; make the folder again")
        self._values["node", node.name] = self.graph.call_function(function, args, kwargs)

    def _decoded(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._decoded(each) for each in value]
        if not isinstance(value, dict):
            return value
        match tuple(value.items()):
            case ((("tensor" | "state" | "node") as kind, str(name)),) if (kind, name) in self._values:
                return self._values[kind, name]
            case ((("x" | "rows") as kind, True),):
                return self._values[kind, ""]
            case (("float", ("inf" | "-inf" | "nan") as number),):
                return float(number)
            case (("dtype", str(name)),) if name in _DTYPES:
                return _DTYPES[name]
            case (("memory_format", str(name)),) if name in _MEMORY_FORMATS:
                return _MEMORY_FORMATS[name]
            case (("device", True),):
                return self._device
        raise ModelError(f"the graph has the argument {value!r:.120}, which means nothing; make the folder again")


def encoded(value: Any) -> Any:
    """Encode a plain argument of an operator as JSON.

    Raises:
        TypeError: when JSON has no form for it.
    """
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case list() | tuple():
            return [encoded(each) for each in value]
        case torch.dtype() if (name := str(value).removeprefix("torch.")) in _DTYPES:
            return {"dtype": name}
        case torch.memory_format() if (name := str(value).removeprefix("torch.")) in _MEMORY_FORMATS:
            return {"memory_format": name}
        case torch.device():
            return {"device": True}
        case _:
            raise TypeError(f"{type(value).__name__} {value!s:.60}")


class GraphModule:
    """A `Forward` that steps frame after frame.

    Raises:
        ModelError: when the graph cannot be run.
    """

    def __init__(self, model: Model, device: torch.device) -> None:
        self._names = [leaf.name for leaf in model.state.leaves]
        self._program = _tried(model, device)

    def __call__(self, x: torch.Tensor, leaves: Leaves) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # noqa: D102
        state, outputs = [leaves[name] for name in self._names], []
        for frame in x:
            y, *state = self._program(frame, state)
            outputs.append(y)
        return torch.stack(outputs), dict(zip(self._names, state, strict=True))


@torch.inference_mode()
def _tried(model: Model, device: torch.device) -> Program:
    """The program of a graph, tried with two rows to check shapes, because the graph may come from a stranger."""
    description = model.description
    assert isinstance(description, ModuleDescription)
    assert description.graph is not None
    program = Program(description.graph, model.weights, device)
    shapes = [((2, description.features), "float32"), *(((2, *leaf.shape), leaf.dtype) for leaf in description.leaves)]
    x, *leaves = (torch.zeros(shape, dtype=getattr(torch, each), device=device) for shape, each in shapes)
    found = [tuple(each.shape) for each in program(x, leaves)]
    wanted = [(2, description.outputs), *(shape for shape, _ in shapes[1:])]
    if found != wanted:
        raise ModelError(
            f"the graph of {model.name} gives the shapes {found} where the description says {wanted}; export the "
            "module again with instep.models.export_step"
        )
    return program
