"""`export_step`: writes a model folder from a user's step module."""

from __future__ import annotations

import copy
import io
import logging
import os
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

import instep
from instep.models.base import LEARNED
from instep.models.errors import ModelError, first_line
from instep.models.folder import check_free, check_name, check_output_names, write_model
from instep.models.model import Model, check_weights
from instep.models.module import operators
from instep.models.module.description import Graph, ModuleDescription, StateLeaf, TensorType
from instep.models.module.operators import Operator, is_allowed, name_of, unknown
from instep.models.module.program import encoded
from instep.models.network import PortableNetwork
from instep.models.numerics import difference, dtype_name, evaluating, magnitude
from instep.models.portable.trace import form_of_module
from instep.models.registry import KINDS, sentences
from instep_client.protocol.state_spec import DTYPES, InvalidStateSpec, Leaf
from instep_tools.words import counted

MOST_ROWS: Final = 4096
_STEPS: Final = 6
_TOLERANCE: Final = 2e-5
"""A fraction of the largest value (at least 1): far above rounding, and far below the effect of a real difference."""


def export_step(
    module: nn.Module,
    example_x: torch.Tensor,
    example_state: Any,
    path: str | Path,
    *,
    initial_state: Literal["zeros", "example"] = "zeros",
    name: str | None = None,
    outputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Model:
    """Write the model folder of a step module, `y, new_state = module(x, state)`.

    The module is exported as a graph, which is checked and compared with the module over some steps. Only the graph and
    its tensors are written, and loading the folder runs none of the module's code.

    Args:
        module: the step of a batch: frames x, float32 [rows, features], and the state before them; it returns outputs,
            float32 [rows, outputs], and the state after them. Several outputs, as a tuple or dict, are concatenated.
        example_x: frames of any number of rows; only the shape counts.
        example_state: a tuple or dict of tensors [rows, …], float32, float64, int64 or bool, with equal rows.
        path: the folder; made if it does not exist.
        initial_state: the state that every stream begins with. `zeros`: the example must be zeros, and is refused
            otherwise. `example`: a row of the example, such as a learned state.
        name: the name that clients see; the folder's name if None.
        outputs: a name for each output; those of the dict if the step returns one.
        overwrite: replace an existing model in the folder.

    Raises:
        ModelError: the step does something that cannot be served, and the message says what; the folder holds a model,
            or cannot be written. Nothing is written then.
    """
    folder = Path(path)
    if not overwrite:
        check_free(folder, KINDS["module"])  # before the export, which takes seconds
    name = folder.resolve().name if name is None else name
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):
        kind = "TorchScript" if isinstance(module, nn.Module) else f"one {type(module).__name__}"
        raise ModelError(f"the step is {kind}; give an nn.Module whose forward is y, new_state = step(x, state)")
    if initial_state not in ("zeros", "example"):
        raise ModelError(f'initial_state is {initial_state!r:.80}: expected "zeros" or "example"')
    module = getattr(module, "_orig_mod", module)  # of torch.compile
    with evaluating(module), _in_silence():
        mine = copied(module, "the step").cpu()
        with _remembering_nothing(mine):
            example = example_of(mine, example_x, example_state)
        if initial_state == "zeros" and (given := [leaf.name for leaf in example.leaves if leaf.initial != 0]):
            raise ModelError(
                f"the example state is not zeros in {', '.join(given)}, and every stream would begin with it: say so "
                'with initial_state="example", or give zeros'
            )
        model = _model(_exported_step(example), example, name, outputs)
        with _remembering_nothing(mine):
            _compare(example, PortableNetwork(model))
    write_model(folder, model, overwrite=overwrite)
    return model


def _model(program: ExportedProgram, example: Example, name: str, outputs: Sequence[str]) -> Model:
    try:
        capture = captured(program, [leaf.name for leaf in example.leaves])
        frame = [torch.zeros(1, example.features), *example.initial(1)]
        traced = form_of_module(capture.graph, capture.tensors, frame, capture.lines)
        description = ModuleDescription(
            features=example.features, state=example.leaves, form=traced.form, graph=capture.graph
        )
    except ValidationError as error:
        raise ModelError(f"the step cannot be served: {sentences(error)}") from None
    tensors = capture.tensors | traced.constants | example.learned()
    check_weights(tensors, description, "the step")
    names = check_output_names(list(outputs) or list(example.output_names), description)
    return Model(check_name(name), description, tensors, names)


def _exported_step(example: Example) -> ExportedProgram:
    batch = Dim("B", min=1, max=MOST_ROWS)
    arguments = (example.frames(ROWS, torch.Generator().manual_seed(0)), *example.initial(ROWS))
    shapes = {"x": {0: batch}, "leaves": tuple({0: batch} for _ in example.leaves)}
    try:
        return exported(example.flat, arguments, shapes)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(_refusal(error)) from error


def exported(module: nn.Module, arguments: tuple[Any, ...], dynamic_shapes: Any) -> ExportedProgram:
    """The graph of a module's forward, in which nothing changes in place."""
    # While it fails, torch.export prints the graph so far.
    with _in_silence(), redirect_stderr(io.StringIO()):
        program = export(module, arguments, dynamic_shapes=dynamic_shapes, strict=False)
        # With no operator to decompose, this only makes new tensors of changes in place.
        return program.run_decompositions({})  # type: ignore[no-any-return]


def _refusal(error: Exception) -> str:
    text = str(error)
    if "data-dependent" in text:
        return (
            f"the step{where(error)} decides by a value in a tensor (if, while, int(), float(), bool() or .item()), "
            "and one way would be taken for all streams of a batch: use torch.where"
        )
    if "specialized it to be a constant" in text:
        return (
            f"the step fixes the batch size (it was exported with {ROWS} rows): use x.shape[0] where a number of rows "
            "is written, and work on all rows at once where a loop runs over them; where a layer takes a sequence, as "
            "nn.GRU does, give it x.unsqueeze(1), since x alone would be one sequence of as many timesteps"
        )
    if "Not all values of B" in text:
        return (
            "the step takes another way at some batch sizes (an if on x.shape[0], or a function such as torch.cdist "
            "that chooses by it); do the same at every size"
        )
    return (
        f"torch.export cannot follow the step ({type(error).__name__}: {first_line(error):.200}); write it with "
        "functions of torch, from x and the state to y and the new state"
    )


def where(error: Exception) -> str:
    """The line of the user's code that raised an error, in parentheses; empty if there is none."""
    packages = tuple(str(Path(module.__file__).parent) for module in (torch, instep) if module.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(packages)]
    if not frames or not frames[-1].line:
        return ""
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}: {frames[-1].line.strip():.80})"


def copied(module: nn.Module, subject: str) -> nn.Module:
    """A copy, so the user's module is not changed; `subject` is its name in error messages.

    Raises:
        ModelError: when it cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except Exception as error:
        raise ModelError(
            f"{subject} cannot be copied ({type(error).__name__}: {first_line(error)}); make it of parameters, buffers "
            "and plain values"
        ) from error


@contextmanager
def _remembering_nothing(module: nn.Module) -> Iterator[None]:
    """Refuse a step that changes an attribute, because the graph would keep the attribute's first value."""

    def attributes() -> dict[str, str]:
        parts = [(f"self.{path}.".replace("..", "."), vars(part)) for path, part in module.named_modules()]
        return {path + key: repr(value) for path, own in parts for key, value in own.items() if key not in usual}

    usual = vars(nn.Module())
    before = attributes()
    yield
    for name, value in attributes().items():
        if before.get(name) != value:
            raise ModelError(
                f"the step changes its own attribute {name}, which all streams would share and a graph does not keep: "
                "put it into the state, a count as an int64 leaf"
            )


@contextmanager
def _in_silence() -> Iterator[None]:
    """Silence the warnings and logs of torch.export."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _compare(example: Example, network: PortableNetwork) -> None:
    """Run the step next to its folder and its graph: with 1 row, where nothing can be mixed, and with 32.

    The graph alone does not reveal a Python counter that became a constant, or rows of a batch that mix.
    """
    generator = torch.Generator().manual_seed(1)
    names = [leaf.name for leaf in example.leaves]
    for rows in (1, ROWS):
        state = example.initial(rows)
        for _ in range(_STEPS):
            x = example.frames(rows, generator)
            try:
                y, *after = example.flat(x.clone(), *(leaf.clone() for leaf in state))
            except Exception as error:  # whatever the user's code raises
                raise ModelError(
                    f"the step fails in a batch of {counted(rows, 'row')} ({first_line(error):.200}), and batches have "
                    "any number of rows"
                ) from error
            before = network.state.pack({name: leaf.numpy() for name, leaf in zip(names, state, strict=True)})
            whole = network.sequence(x[None].numpy(), before)
            assert whole is not None
            for outputs, packed in (network.step(x.numpy(), before), (whole[0][0], whole[1])):
                _check_equal("y", y, outputs)
                leaves = network.state.unpack(packed)
                for name, leaf in zip(names, after, strict=True):
                    _check_equal(f"leaf {name}", leaf, leaves[name])
            state = after


def _check_equal(name: str, of_step: torch.Tensor, found: npt.NDArray[Any]) -> None:
    expected = of_step.numpy()
    within = _TOLERANCE if expected.dtype.kind == "f" else 0
    if difference(found, expected) <= within * magnitude(expected):
        return
    if len(expected) == 1:
        raise ModelError(
            f"{name} of the step and of what would be served differ after some frames: the step depends on something "
            "besides x and the state, such as a count or the time in Python; put it into the state or the frames"
        )
    raise ModelError(
        f"the rows of a batch influence one another in the step, and each row is another stream: {name} of a row is "
        f"another in a batch of {ROWS} than alone. Work along the other dimensions only; a layer that takes a sequence "
        "wants x.unsqueeze(1), since it takes [rows, features] for one sequence"
    )


# The user's module as a function of frames and leaves.

ROWS: Final = 32
"""The batch sizes of the export and of the comparison."""
FORM: Final = "step(x, state) must return (y, new_state)"


def _structure_of(state: Any) -> tuple[list[torch.Tensor], TreeSpec, tuple[str, ...]]:
    """The leaves of the example state, the structure that contains them, and their names."""
    leaves, spec = tree_flatten(state)
    is_flat = isinstance(state, torch.Tensor) or spec.num_children == len(leaves)
    if not leaves or not is_flat or not all(isinstance(each, torch.Tensor) for each in leaves):
        raise ModelError("example_state must be a tuple or dict of tensors, at least one and none inside another")
    if isinstance(state, torch.Tensor | dict):
        return leaves, spec, tuple(state) if isinstance(state, dict) else ("state",)
    return leaves, spec, getattr(state, "_fields", tuple(f"s{at}" for at in range(len(leaves))))


class Flat(nn.Module):
    """The user's step as `forward(x, *leaves) -> (y, *leaves)`, y as [rows, outputs]."""

    def __init__(self, step: nn.Module, spec: TreeSpec) -> None:
        super().__init__()
        self.step, self.spec = step, spec

    def forward(self, x: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs [rows, outputs] and the new leaves."""
        y, state = _split(self.step(x, tree_unflatten(leaves, self.spec)))
        return _joined_outputs(y), *self.leaves(state)

    def leaves(self, state: Any) -> list[Any]:
        """The leaves of a state that the step has returned.

        Raises:
            ModelError: when they differ from those of the example state.
        """
        if isinstance(state, dict) and set(state) == set(names := self.spec.context or ()):
            state = {name: state[name] for name in names}
        leaves, spec = tree_flatten(state)
        if spec != self.spec:
            raise ModelError(
                f"the new state is {spec}, and the state before the frame {self.spec}: return the same leaves in the "
                "same form"
            )
        return leaves


@dataclass(frozen=True, slots=True)
class Example:
    """A step with the sizes of its frames, leaves and outputs."""

    flat: Flat
    features: int
    leaves: tuple[StateLeaf, ...]
    begins_with: tuple[torch.Tensor, ...]
    """The leaves [*shape] that a stream has before its first frame."""
    output_names: tuple[str, ...]
    """The keys if the step returns outputs in a dict; otherwise empty."""

    def initial(self, rows: int) -> list[torch.Tensor]:
        """The initial state of `rows` streams."""
        return [leaf.repeat(rows, *[1] * leaf.dim()) for leaf in self.begins_with]

    def learned(self) -> dict[str, torch.Tensor]:
        """The initial arrays of learned leaves, as the weights file stores them."""
        both = zip(self.leaves, self.begins_with, strict=True)
        return {LEARNED + leaf.name: values for leaf, values in both if leaf.initial == "learned"}

    def frames(self, rows: int, generator: torch.Generator) -> torch.Tensor:
        """Random frames."""
        return torch.randn(rows, self.features, generator=generator)


def example_of(module: nn.Module, x: Any, state: Any) -> Example:
    """Run a step once and check what it returns.

    Raises:
        ModelError: naming the value that does not fit.
    """
    if not isinstance(x, torch.Tensor) or x.dim() != 2 or x.dtype != torch.float32 or not x.numel():
        shown = f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ModelError(
            f"example_x must be a float32 tensor of frames [rows, features], not {shown}".replace("torch.", "")
        )
    given, spec, names = _structure_of(state)
    leaves = tuple(_leaf(name, leaf, len(x)) for name, leaf in zip(names, given, strict=True))
    begins_with = tuple(leaf[0].detach().cpu().clone() for leaf in given)
    plain = Example(Flat(module, spec), x.shape[1], leaves, begins_with, ())
    frames = plain.frames(ROWS, torch.Generator().manual_seed(0))
    try:
        result = module(frames, tree_unflatten(plain.initial(ROWS), spec))
    except Exception as error:
        raise ModelError(
            f"the step fails on frames [{ROWS}, {plain.features}] and a state like the example's "
            f"({type(error).__name__}: {first_line(error)}); correct it or the example, and convert weights of other "
            "dtypes with .float()"
        ) from error
    y, after = _split(result)
    parts = _outputs_of(y)
    for leaf, new in zip(leaves, plain.flat.leaves(after), strict=True):
        _check_leaf(leaf, new)
    return replace(plain, output_names=_output_names(parts))


def _split(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        shown = f"{len(result)} values" if isinstance(result, tuple | list) else f"one {type(result).__name__}"
        raise ModelError(f"{FORM}, and it returns {shown}; several outputs go into y, as a tuple or dict of them")
    return result[0], result[1]


def _joined_outputs(y: Any) -> torch.Tensor:
    parts = [part if part.dim() > 1 else part.unsqueeze(1) for _, part in _outputs_of(y)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _outputs_of(y: Any) -> list[tuple[str, torch.Tensor]]:
    unnamed = y if isinstance(y, tuple | list) else [y]
    parts = list(y.items()) if isinstance(y, Mapping) else [("", each) for each in unnamed]
    for name, part in parts or [("", None)]:
        shown = f"one {type(part).__name__}"
        if isinstance(part, torch.Tensor):
            if part.dtype == torch.float32 and part.dim() in (1, 2) and 0 not in part.shape[1:]:
                continue
            shown = f"{dtype_name(part.dtype)} {list(part.shape)}"
        words = f"the output {name}" if name else "y"
        raise ModelError(f"{words} is {shown}; return float32 [rows, outputs], as with .float() or .flatten(1)")
    return parts


def _output_names(parts: Sequence[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
    names: list[str] = []
    for name, part in parts:
        width = part.shape[1] if part.dim() > 1 else 1
        names += [str(name)] if width == 1 else [f"{name}.{at}" for at in range(width)]
        if part.shape[0] != ROWS:
            raise ModelError(f"y has the shape {list(part.shape)} for {ROWS} frames; return one row for each row of x")
    return tuple(names) if all(name for name, _ in parts) else ()


def _leaf(name: Any, leaf: torch.Tensor, rows: int) -> StateLeaf:
    dtype = dtype_name(leaf.dtype)
    if dtype not in DTYPES:
        raise ModelError(f"leaf {name} of the example state is {dtype}; a state is made of {', '.join(DTYPES)}")
    if leaf.dim() < 1 or leaf.shape[0] != rows:
        raise ModelError(
            f"leaf {name} of the example state has the shape {list(leaf.shape)} for {counted(rows, 'row')} of "
            "example_x; the first dimension of both must be the batch"
        )
    first = leaf[:1]
    if not first.numel() or not bool((leaf == first).all()):
        raise ModelError(
            f"leaf {name} of the example state is empty, differs from row to row, or holds NaN, and it is what every "
            "stream begins with: give all rows the same finite values, and open a stream with another state where it "
            "needs one"
        )
    shape, value = tuple(leaf.shape[1:]), float(first.flatten()[0].item())
    is_learned = not bool((first == first.flatten()[0]).all())
    try:
        Leaf(name, shape, DTYPES[dtype], None if is_learned else value)
    except InvalidStateSpec as error:
        raise ModelError(f"{error}; correct the example state") from None
    return StateLeaf.model_validate(
        {"name": name, "shape": shape, "dtype": dtype, "initial": "learned" if is_learned else value}
    )


def _check_leaf(leaf: StateLeaf, new: Any) -> None:
    shown = f"{dtype_name(new.dtype)} {list(new.shape)}" if isinstance(new, torch.Tensor) else type(new).__name__
    before = f"{leaf.dtype} {[ROWS, *leaf.shape]}"
    if shown != before:
        raise ModelError(
            f"leaf {leaf.name} is {before} before a frame and {shown} after it; keep dtype and shape: a window of "
            "fixed length, as torch.cat([old[:, 1:], new], 1), does not grow"
        )


# From an exported program to a graph of plain data.

_NUMBERS: Final[dict[Any, str]] = {function: name for name, function in operators.NUMBERS.items()}
_TORCH: Final = os.path.dirname(torch.__file__) + os.sep
_SOURCE: Final = re.compile(r'\s*File "([^"]+)", line (\d+), in ')


@dataclass(frozen=True)
class Capture:
    """An exported step `forward(x, *leaves) -> (y, *leaves)` as plain data."""

    graph: Graph
    tensors: dict[str, torch.Tensor]
    """Parameters, buffers and constants by name."""
    lines: dict[str, str]
    """By name of a node, the line of the user's code that makes the call."""


def captured(program: ExportedProgram, leaves: Sequence[str]) -> Capture:
    """The graph of a step.

    Args:
        program: the result of torch.export, with a dynamic batch and without in-place changes.
        leaves: the names of the state's leaves.

    Raises:
        ModelError: naming the operation that no step may use.
        ValidationError: where the graph is too large.
    """
    inputs = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    output: Any = program.graph.output_node().args[0]
    results = []
    for spec, result in zip(program.graph_signature.output_specs, output, strict=True):
        if spec.kind == OutputKind.BUFFER_MUTATION:
            raise ModelError(
                f"the step changes its own buffer {_own_name(spec.target)} in place, which all streams would share: "
                "keep what a stream must remember in the state, and return the new one"
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
        node, name = inputs[spec.arg.name], _own_name(spec.target or spec.arg.name)
        if spec.kind == InputKind.USER_INPUT:
            found[node] = next(given)
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
            raise ModelError(f"the step uses {name}, which is no tensor; leave it out")
        elif node in needed:
            found[node] = {"tensor": name}
            tensor = {**program.state_dict, **program.constants}[spec.target]
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            if dtype_name(tensor.dtype) not in get_args(TensorType):
                raise ModelError(f"{name} of the step is {dtype_name(tensor.dtype)}; convert it, as with .float()")
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
        found[node], lines[node.name] = {"node": node.name}, _line_of(node)
    y, *new_state = [found[each] for each in results]
    described = [
        {"name": name, "shape": tuple(tensor.shape), "dtype": dtype_name(tensor.dtype)}
        for name, tensor in tensors.items()
    ]
    after = dict(zip(leaves, new_state, strict=True))
    graph = Graph.model_validate({"tensors": described, "nodes": nodes, "y": y, "new_state": after})
    return Capture(graph, tensors, lines)


def _own_name(name: str) -> str:
    return name.removeprefix("step.")


def _called(node: fx.Node) -> str:
    target: Any = node.target
    if target in _NUMBERS:
        return _NUMBERS[target]
    name = name_of(target) if isinstance(target, Operator) else getattr(target, "__name__", str(target))
    if not isinstance(target, Operator) or not (is_allowed(target) or name == "sym_size"):
        raise ModelError(unknown(_line_of(node), name))
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
            f"{_line_of(node)} gives an operator {error}, for which a model folder has no form; use float32, float64, "
            "int64 and bool tensors, and no torch.autocast"
        ) from None


def _line_of(node: fx.Node) -> str:
    lines = pairwise(node.meta.get("stack_trace", "").split("\n"))
    found = [(*match.groups(), code) for line, code in lines if (match := _SOURCE.match(line))]
    of_user = [each for each in found if not each[0].startswith(_TORCH)]
    if not found:
        return "the step"
    file, line, code = (of_user or found)[-1]
    return f"the step ({Path(file).name}, line {line}: {code.strip():.80})"
