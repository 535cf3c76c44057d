"""From an exported program to a graph of plain data, through the gate.

The gate refuses what would make a stream's frames depend on what ran before: numbers drawn at random, sizes that depend
on values, statistics and changes that outlive the call. It sees what the graph shows; `trial` runs the step to find
some of what it does not show, such as rows that influence one another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from instep.models.errors import ModelError
from instep.models.module import operators
from instep.models.module.graph import references
from instep.models.module.operators import Operator, argument, is_allowed, may_alias, name_of, trains, written
from instep.models.module.program import encoded

_DROPPED: Final = frozenset(
    [
        "_assert_async",
        "_assert_scalar",
        "_assert_tensor_metadata",
        "sym_constrain_range",
        "sym_constrain_range_for_size",
    ]
)
"""They check, and compute nothing; what they check either holds for every batch or depends on values."""
_COMPARISONS: Final = frozenset(["ge", "le", "gt", "lt", "eq", "ne"])
"""Of sizes, for those checks."""
_IDENTITIES: Final = frozenset(
    ["alias", "alpha_dropout", "detach", "detach_", "dropout", "dropout_", "feature_dropout", "lift_fresh"]
)
"""Where nothing is trained."""
_NOT_KEPT: Final = _IDENTITIES | {"sym_size", "lift_fresh_copy"}
"""They are allowed in a step, and something else takes their place in the graph."""
_VALUES_AS_SIZES: Final = frozenset(
    [
        *("item", "_local_scalar_dense", "nonzero", "nonzero_numpy", "nonzero_static", "masked_select", "unique_dim"),
        *("unique_consecutive", "_unique2"),
    ]
)
_SEEDED: Final = frozenset(["gru", "lstm", "rnn_relu", "rnn_tanh", "scaled_dot_product_attention"]) | _IDENTITIES
"""They would draw random numbers only for dropout, which is looked at by itself."""
_NUMBERS: Final[dict[Any, str]] = {function: name for name, function in operators.NUMBERS.items()}
_TORCH: Final = os.path.dirname(torch.__file__) + os.sep
_SOURCE: Final = re.compile(r'\s*File "([^"]+)", line (\d+), in ')
_IN_PLACE: Final = re.compile(r"aten\.\w*[a-z0-9]_\.\w+")


class Capture:
    """A graph of an exported step `forward(x, *leaves) -> (y, *leaves)`.

    Args:
        program: what torch.export made of it, with a dynamic batch.
        leaves: the names of the state's leaves.

    Raises:
        ModelError: when the gate refuses it.
    """

    def __init__(self, program: ExportedProgram, leaves: Sequence[str]) -> None:
        self.outputs: int
        """Values per row of `y`."""
        self.y: Any
        """What the graph's `y` and, in the order of the leaves, its `new_state` refer to."""
        self.new_state: list[Any]
        self.tensors: dict[str, torch.Tensor] = {}
        self.nodes: list[dict[str, Any]] = []
        self._references: dict[fx.Node, Any] = {}
        self._given: dict[fx.Node, str] = {}
        """What may share memory with an argument or a tensor, and how sentences call that."""
        self.lines: dict[str, str] = {}
        """The lines of the user's code that make the calls, by the names of nodes."""
        self._add_inputs(program, leaves)
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._add(node)
        for spec in program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:  # how older versions of torch show a change in place
                raise ModelError(changes(f"its own {spec.target}"))
        (output,) = (node for node in program.graph.nodes if node.op == "output")
        results: Any = output.args[0]
        self.y, *self.new_state = [self._reference(each) for each in results]
        self.outputs = int(results[0].meta["val"].shape[1])
        self._drop_unused()

    def _add_inputs(self, program: ExportedProgram, leaves: Sequence[str]) -> None:
        inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
        self._batch = inputs[program.graph_signature.user_inputs[0]].meta["val"].shape[0]
        names = iter(["", *leaves])
        for spec in program.graph_signature.input_specs:
            node = inputs[spec.arg.name]
            if spec.kind == InputKind.USER_INPUT:
                leaf = next(names)
                self._references[node] = {"state": leaf} if leaf else {"x": True}
                self._given[node] = f"leaf {leaf} of the state" if leaf else "its frames x"
                continue
            name = (spec.target or spec.arg.name).removeprefix("step.")
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                raise ModelError(f"the step uses {name}, which is no tensor; leave it out")
            held = program.constants if spec.kind == InputKind.CONSTANT_TENSOR or not spec.persistent else {}
            tensor = {**program.state_dict, **held}[spec.target]
            kind = {InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer"}.get(spec.kind, "constant")
            self._given[node] = f"its own {kind} {name}"
            if node.users:
                self._references[node] = {"tensor": name}
                self.tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)

    def _add(self, node: fx.Node) -> None:
        target: Any = node.target
        if isinstance(target, Operator):
            name = name_of(target)
            if name in _DROPPED:
                return
            _check_call(node, target, name)
            self._check_written(node, target)
            if name == "sym_size" and str(node.meta["val"]) == str(self._batch):
                self._references[node] = {"rows": True}
                return
            if name in _IDENTITIES:
                of = node.args[0]
                assert isinstance(of, fx.Node)
                self._references[node] = self._references[of]
                self._follow(node, of)
                return
            if name == "lift_fresh_copy":
                target, name = torch.ops.aten.clone.default, "clone"
            if may_alias(target) and node.args and isinstance(node.args[0], fx.Node):
                self._follow(node, node.args[0])
            called = f"aten.{name}.{target._overloadname}"
        elif target in _NUMBERS:
            called = _NUMBERS[target]
            if called == "getitem" and isinstance(node.args[0], fx.Node):
                self._follow(node, node.args[0])
            elif _depends_on_values(node):
                raise ModelError(_by_value(_where(node)))
        elif getattr(target, "__name__", "") in _COMPARISONS:
            return
        else:
            raise ModelError(unknown(_where(node), getattr(target, "__name__", str(target))))
        self._references[node] = {"node": node.name}
        self.lines[node.name] = _where(node)
        self.nodes.append({"name": node.name, "op": called, **self._arguments(node, target)})

    def _arguments(self, node: fx.Node, target: Any) -> dict[str, Any]:
        kwargs = dict(node.kwargs)
        kwargs.pop("pin_memory", None)
        if kwargs.get("layout") in (None, torch.strided):
            kwargs.pop("layout", None)
        if isinstance(target, Operator) and name_of(target) in operators.CREATION:
            kwargs["dtype"] = node.meta["val"].dtype  # torch's default dtype is the process's
        try:
            return {
                "args": [self._reference(each) for each in node.args],
                "kwargs": {name: self._reference(value) for name, value in kwargs.items()},
            }
        except TypeError as error:
            raise ModelError(
                f"{_where(node)} gives an operator {error}, for which a model folder has no form; "
                "use float32, float64, int64 and bool tensors"
            ) from None

    def _reference(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value not in self._references:
                raise ModelError(unknown(_where(value), str(value.target)))
            return self._references[value]
        if isinstance(value, list | tuple):
            return [self._reference(each) for each in value]
        return encoded(value)

    def _check_written(self, node: fx.Node, op: Operator) -> None:
        for at in written(op):
            target = node.args[at]
            if isinstance(target, fx.Node) and target in self._given and name_of(op) not in _IDENTITIES:
                raise ModelError(changes(self._given[target], _where(node)))

    def _follow(self, node: fx.Node, of: fx.Node) -> None:
        """Note that a node may share the memory of another one."""
        if of in self._given:
            self._given[node] = self._given[of]

    def _drop_unused(self) -> None:
        """Leave out what no result needs, and tensors that only this would use."""
        kept: list[dict[str, Any]] = []
        needed = set(references([self.y, self.new_state], "node"))
        for node in reversed(self.nodes):
            if node["name"] in needed or _IN_PLACE.fullmatch(node["op"]):
                kept.append(node)
                needed.update(references([node["args"], node["kwargs"]], "node"))
        self.nodes = kept[::-1]
        used = set(references([self.y, self.new_state, [[n["args"], n["kwargs"]] for n in self.nodes]], "tensor"))
        self.tensors = {name: tensor for name, tensor in self.tensors.items() if name in used}


def _check_call(node: fx.Node, op: Operator, name: str) -> None:
    """Refuse an operator that no step may call, or not with these arguments."""
    where, args, kwargs = _where(node), node.args, node.kwargs
    if _depends_on_values(node) or name in _VALUES_AS_SIZES:
        raise ModelError(_by_value(where))
    if torch.Tag.nondeterministic_seeded in op.tags and name not in _SEEDED:
        raise ModelError(
            f"{where} draws random numbers ({name}), so a frame could never be computed again; "
            "take the noise from the frame, or leave it out"
        )
    if trains(op, args, kwargs):
        raise ModelError(
            f"{where} runs {name} as in training, over the batch or at random; use training=False, or leave it out"
        )
    if name == "scaled_dot_product_attention" and argument(op, "dropout_p", args, kwargs):
        raise ModelError(f"{where} runs attention with dropout; set dropout_p to 0")
    if name.startswith(("empty", "new_empty")):
        raise ModelError(f"{where} makes a tensor of whatever the memory holds ({name}); use zeros")
    is_ours = op.namespace == "aten" and not any(each.is_out for each in op._schema.arguments)
    if not is_ours or not (is_allowed(name) or name in _NOT_KEPT):
        raise ModelError(unknown(where, f"{op.namespace}.{name}"))


def _symbols(size: Any) -> set[str]:
    return {str(symbol) for symbol in size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()


def _depends_on_values(node: fx.Node) -> bool:
    """Whether a size of the result, or the number that it is, depends on values in tensors."""
    value = node.meta.get("val")
    sizes = [
        size
        for each in (value if isinstance(value, list | tuple) else [value])
        for size in (each.shape if isinstance(each, torch.Tensor) else [each])
    ]
    return any(symbol.startswith(("u", "zu")) for size in sizes for symbol in _symbols(size))


def _where(node: fx.Node) -> str:
    """How sentences call the line of the user's code that a call comes from."""
    lines = pairwise(node.meta.get("stack_trace", "").split("\n"))
    found = [(*match.groups(), code) for line, code in lines if (match := _SOURCE.match(line))]
    if not found:
        return "the step"
    of_user = [each for each in found if not each[0].startswith(_TORCH)]
    file, line, code = (of_user or found)[-1]
    return f"the step ({Path(file).name}, line {line}: {code.strip():.80})"


def _by_value(where: str) -> str:
    return (
        f"{where} lets values in a tensor decide how many elements there are or which way to go, as a mask, "
        "nonzero and .item() do, and rows of other streams would decide along: use torch.where over all elements"
    )


def changes(what: str, where: str = "the step") -> str:
    """Why a change in place cannot be served."""
    advice = (
        "return a new tensor, or clone it before"
        if what.startswith(("leaf", "its frames"))
        else "all streams would share it: keep what a stream must remember in the state, and return the new one"
    )
    return f"{where} changes {what} in place; {advice}"


def unknown(where: str, name: str) -> str:
    """Why a call cannot be served."""
    hint = {
        "wrap_with_autocast": "export without torch.autocast: float32 is what is served",
        "cond": "torch.cond decides by a value: use torch.where",
        "wrap_with_set_grad_enabled": "leave torch.enable_grad out",
        "while_loop": "a loop that runs until values converge mixes streams: run a fixed number of rounds",
    }.get(name, "write it with other functions of torch")
    return f"{where} calls {name}, which cannot be served; {hint}"


def checked_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The dtypes of tensors.

    Raises:
        ModelError: for one that no model folder can hold.
    """
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    for name, dtype in dtypes.items():
        if dtype not in ("float32", "float64", "int64", "int32", "bool"):
            raise ModelError(
                f"{name} of the step is {dtype}, and tensors may be float32, float64, int64, int32 or bool; "
                "convert it, as with .float()"
            )
        if not bool(tensors[name].isfinite().all()):
            raise ModelError(
                f"{name} of the step holds NaN or infinity, and tensors in a folder are finite: save the weights of an "
                "earlier epoch, and use -1e30 instead of -inf in a mask"
            )
    return dtypes
