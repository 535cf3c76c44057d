"""`instep model import net.pt2`: the step in an archive of `torch.export.save` to a model folder.

The calls of the archive's graph become a module that makes them one after another. It calls only the operators that a
step may call, and `export` treats it as any other step: it is traced, checked and compared with its graph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.func import functional_call
from torch.fx import traceback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from instep.models.errors import ModelError
from instep.models.folder import check_free, graph_bytes, write_model
from instep.models.model import Model
from instep.models.module import operators
from instep.models.module.archive import (
    AGAIN,
    DTYPES,
    STRIDED,
    Argument,
    ExportArchive,
    SerializedCall,
    TensorMeta,
    Tree,
    read_archive,
)
from instep.models.module.capture import COMPARISONS, DROPPED, by_value, changes, check_call, source_line, unknown
from instep.models.module.example import ROWS
from instep.models.module.export import in_silence, model_of_step, refusal
from instep.models.module.operators import Operator
from instep.models.registry import KINDS
from instep_tools.words import counted

_MOST_BYTES: Final = 2**31
"""In all tensors together that a step of `ROWS` rows makes."""
_PATH: Final = re.compile(r"\w+(\.\w+)*", re.ASCII)
_MEMORY_FORMATS: Final = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}


def import_pt2(
    file: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Model:
    """Write the model folder of a step `y, new_state = step(x, state)` that torch.export.save wrote.

    Every stream begins with a state of zeros. Nothing in the file is executed.

    Args:
        file: the archive (`.pt2`), exported with a dynamic batch.
        folder: where to write it; made if it does not exist.
        name: what clients are told; the folder's name if None.
        outputs: a name for each output; those of the dict if the step returns one.
        overwrite: replace a model that the folder holds.

    Raises:
        ModelError: with what cannot be read or served, and what to do. Nothing is written then.
    """
    file, folder = Path(file), Path(folder)
    content = graph_bytes(file)
    if not overwrite:
        check_free(folder, KINDS["module"])  # before the export, which takes seconds
    try:
        step = ArchivedStep(read_archive(content))
        step.check_sizes()
        name = folder.resolve().name if name is None else name
        model = model_of_step(step, *step.example(1), name, outputs, "zeros", tensors_in="own.")
    except ModelError as error:
        sentence = "".join(filter(str.isprintable, str(error)))  # some words are the file's
        raise ModelError(f"{file}: {sentence}") from error
    write_model(folder, model, overwrite=overwrite)
    return model


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up what tensors would take, also those that operators make for themselves.

    Raises:
        ModelError: naming the line, when it is too much.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function and count the bytes of its results; a view must be of a size that could be computed with."""
        result = func(*args, **(kwargs or {}))
        size = sum(each.numel() * each.itemsize for each in tree_leaves(result) if isinstance(each, torch.Tensor))
        if not any(each.alias_info for each in func._schema.returns):
            self._total += size
        if max(self._total, size) > _MOST_BYTES:
            raise ModelError(
                f"{source_line(traceback.get_current_meta().get('stack_trace'))} takes more than {_MOST_BYTES:,} "
                f"bytes, together with what is before it, for {ROWS} rows, and cannot be served"
            )
        return result


@dataclass(frozen=True, slots=True)
class _Ref:
    """What an input of the graph or an earlier call gave."""

    name: str


@dataclass(frozen=True, slots=True)
class _Call:
    function: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    results: Any
    """A reference, or one for each of several results."""
    stack_trace: str


class ArchivedStep(nn.Module):
    """The step of an archive, which makes its calls one after another.

    Raises:
        ModelError: when it is not a step of frames and a state, or calls what no step may call.
    """

    def __init__(self, archive: ExportArchive) -> None:
        super().__init__()
        self.own = nn.Module()
        """The modules of the step, whose names may be those of attributes here."""
        program = archive.program
        self._users: list[str] = []
        """The inputs of the graph that are arguments of the step."""
        self._own: dict[str, str] = {}
        """The other inputs: names of parameters, buffers and constants."""
        kinds = {}
        for role, fields in (item for spec in program.input_specs for item in spec.items()):
            match role, fields:
                case "user_input", {"arg": {"as_tensor": {"name": str(name)}}}:
                    self._users.append(name)
                case (
                    ("parameter", {"arg": {"name": str(name)}, "parameter_name": str(own)})
                    | ("buffer", {"arg": {"name": str(name)}, "buffer_name": str(own)})
                    | ("tensor_constant", {"arg": {"name": str(name)}, "tensor_constant_name": str(own)})
                ):
                    self._own[name], kinds[own] = own, role
                case "user_input" | "constant_input", _:
                    raise ModelError("the step takes arguments besides tensors; leave them out of the call")
                case _:
                    what = fields.get("custom_obj_name", role)
                    raise ModelError(f"the step uses {what!s:.80}, which is no tensor; leave it out")
        for role, fields in (item for spec in program.output_specs for item in spec.items()):
            if role != "user_output":  # as run_decompositions() shows a change in place
                names = [value for key, value in fields.items() if key in ("buffer_name", "parameter_name")]
                raise ModelError(changes(f"its own {names[0]!s:.80}" if names else "its frames or its state"))
        self._state, self._results = _state(program.in_spec[1]), program.out_spec[1]
        self._arguments = [
            _argument(f"leaf {at} of the state" if at else "x", program.tensor_values.get(name))
            for at, name in enumerate(self._users)
        ]
        self._calls = [call for node in program.nodes if (call := _call(node)) is not None]
        self._outputs = [_value(each) for each in program.outputs]
        if len(self._users) != 1 + self._state.leaves() or len(self._outputs) != self._results.leaves():
            raise ModelError(f"the graph has other inputs or outputs than its signature; {AGAIN}")
        for own, role in kinds.items():
            if own not in archive.tensors:
                raise ModelError(f"the archive lacks the tensor {own!r:.80}; {AGAIN}")
            self._hold(own, archive.tensors[own], role == "parameter")

    def _hold(self, name: str, tensor: torch.Tensor, is_parameter: bool) -> None:
        *path, last = name.split(".")
        owner = self.own
        try:
            if not _PATH.fullmatch(name):  # torch.export generates code in which names occur
                raise KeyError(name)
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if is_parameter:
                owner.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
            else:
                owner.register_buffer(last, tensor)
        except (AttributeError, KeyError, TypeError):
            raise ModelError(
                f"a tensor of the step is called {name!r:.80}, which cannot be served; give it another "
                "name, of letters, digits and _"
            ) from None

    def example(self, rows: int) -> tuple[torch.Tensor, Any]:
        """Frames and a state of zeros."""
        x, *leaves = (torch.zeros(rows, *sizes, dtype=dtype) for sizes, dtype in self._arguments)
        return x, self._state.build(iter(leaves))

    def check_sizes(self) -> None:
        """Run the step on tensors without memory, to see what it would take.

        Raises:
            ModelError: when the step cannot be run, or is too large.
        """
        without_memory = FakeTensorMode()
        try:
            own: dict[str, torch.Tensor] = {
                name: without_memory.from_tensor(tensor) for name, tensor in self.state_dict().items()
            }
            with in_silence(), without_memory, _Counted(), torch.no_grad():
                functional_call(self, own, self.example(ROWS), tie_weights=False)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(refusal(error)) from error

    def forward(self, x: torch.Tensor, state: Any) -> Any:
        """Whatever the exported module returned."""
        leaves = [state] if isinstance(state, torch.Tensor) else state.values() if isinstance(state, dict) else state
        own = dict(
            [*self.own.named_parameters(remove_duplicate=False), *self.own.named_buffers(remove_duplicate=False)]
        )
        values: dict[str, Any] = {name: own[each] for name, each in self._own.items()}
        values.update(zip(self._users, [x, *leaves], strict=True))
        with traceback.preserve_node_meta():
            for call in self._calls:
                traceback.set_stack_trace([call.stack_trace])
                kwargs = {name: _resolved(each, values) for name, each in call.kwargs.items()}
                try:
                    result = call.function(*_resolved(call.args, values), **kwargs)
                except (DataDependentOutputException, DynamicOutputShapeException):  # on tensors without memory
                    raise ModelError(by_value(source_line(call.stack_trace))) from None
                _bind(call.results, result, values)
        return self._results.build(iter(_resolved(self._outputs, values)))


def _state(tree: Tree) -> Tree:
    """The state among the arguments of the exported module, which are args and kwargs."""
    match tree.children_spec:
        case [Tree(children_spec=[Tree(type=None), state]), Tree(children_spec=[])]:
            return state
    raise ModelError(
        "the step takes other arguments than (x, state); export it with these two, by place: the frames, and all of "
        "the state in a tensor, tuple or dict. Hand over a network of whole sequences as its module: "
        "instep.models.save_model(FOLDER, net)"
    )


def _call(node: SerializedCall) -> _Call | None:
    lines = node.stack_trace.split("\n")
    trace = "\n".join("".join(filter(str.isprintable, line)) for line in lines)
    function = _function(node.target, source_line(trace))
    if function is None:
        return None
    given = {each.name: _value(each.arg) for each in node.inputs}
    args: list[Any] = list(given.values())
    kwargs: dict[str, Any] = {}
    if isinstance(function, Operator):
        args, is_by_place = [], True
        for declared in function._schema.arguments:
            is_by_place &= declared.name in given and not declared.kwarg_only
            if is_by_place:
                args.append(given.pop(declared.name))
            elif declared.name in given:
                kwargs[declared.name] = given.pop(declared.name)
        if given:
            raise ModelError(f"the graph calls {node.target} with arguments that it does not have; {AGAIN}")
        check_call(function, args, kwargs, source_line(trace))
    results = [_value(each) for each in node.outputs]
    return _Call(function, args, kwargs, results[0] if len(results) == 1 else results, trace)


def _argument(words: str, meta: TensorMeta | None) -> tuple[list[int], torch.dtype]:
    """The sizes without the batch, and the dtype, of an argument."""
    dtype = DTYPES.get(meta.dtype) if meta else None
    if meta is None or dtype is None or not meta.sizes:
        raise ModelError(
            f"{words} is not a dense tensor with a batch as its first size; export the step with such ones"
        )
    batch, *others = meta.sizes
    sizes = [size for size in others if size is not None]
    if batch is not None:
        raise ModelError(
            f"the step fixes the batch size ({words} was exported with {counted(batch, 'row')}): export it with more "
            'than one row and dynamic_shapes, such as ({0: Dim("B")}, {"h": {0: Dim("B")}}) for x and the state'
        )
    if len(sizes) != len(others):
        raise ModelError(f"{words} has another dynamic size than the batch; give torch.export a fixed one")
    return sizes, dtype


def _function(target: str, where: str) -> Callable[..., Any] | None:
    """The function of a call; None for checks, which are dropped.

    Raises:
        ModelError: when there is none, or it cannot be served.
    """
    match target.split("."):
        case ["_operator", name] if f"int.{name}" in operators.NUMBERS:
            return operators.resolve(f"int.{name}")
        case ["_operator", name] if name in COMPARISONS:
            return None
        case ["torch", "ops", "aten", name, overload]:
            packet: Any = getattr(torch.ops.aten, name, None)
            is_operator = isinstance(packet, torch._ops.OpOverloadPacket)
            if not is_operator or overload not in packet.overloads():
                raise ModelError(
                    f"the graph calls {target}, which torch {torch.__version__} lacks; install a newer torch"
                )
            function: Operator = getattr(packet, overload)
            return None if name in DROPPED else function
        case ["torch", "ops", namespace, name, _]:
            raise ModelError(unknown(where, f"{namespace}.{name}"))
    raise ModelError(unknown(where, target.rpartition(".")[2]))


def _value(argument: Argument) -> Any:
    """A value of the schema; a reference to one that is computed.

    Raises:
        ModelError: when a step cannot have it.
    """
    for kind, value in argument.items():
        match kind, value:
            case "as_none", _:
                return None
            case "name" | "as_name", str():
                return _Ref(value)
            case ("as_int", int()) | ("as_bool", bool()) | ("as_float", float()):
                return value
            case "as_float", "Infinity" | "-Infinity" | "NaN":
                return float(value)
            case "as_string", str():
                return value
            case "as_ints" | "as_bools" | "as_floats", list():
                return [_value({kind.removesuffix("s"): each}) for each in value]
            case "as_tensor" | "as_optional_tensor" | "as_sym_int", dict():
                return _value(value)
            case "as_tensors" | "as_optional_tensors" | "as_sym_ints", list():
                return [_value(each) for each in value if isinstance(each, dict)]
            case "as_scalar_type", int() if value in DTYPES:
                return DTYPES[value]
            case "as_memory_format", int() if value in _MEMORY_FORMATS:
                return _MEMORY_FORMATS[value]
            case "as_layout", int() if value == STRIDED:
                return torch.strided
            case "as_device", _:
                return torch.device("cpu")
    kinds = " or ".join(argument).removeprefix("as_").replace("_", " ")
    raise ModelError(f"an operator of the step takes or gives a {kinds!s:.80}, for which a model folder has no form")


def _resolved(value: Any, values: Mapping[str, Any]) -> Any:
    match value:
        case _Ref() if value.name not in values:
            raise ModelError(f"the graph uses {value.name!r:.80}, which nothing before it gives; {AGAIN}")
        case _Ref():
            return values[value.name]
        case list():
            return [_resolved(each, values) for each in value]
    return value


def _bind(results: Any, given: Any, values: dict[str, Any]) -> None:
    """Name what a call gave."""
    if isinstance(results, _Ref):
        values[results.name] = given
        return
    for name, each in zip(results or [], given or [], strict=True):
        _bind(name, each, values)
