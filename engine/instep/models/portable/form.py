"""The normal form of a step: how one row of a batch is computed, as primitives over strided views of buffers.

Sizes are numbers, nothing changes in place, and nothing refers to another row. The form determines every bit of a
result; docs/exactness.md defines each primitive, `definition` computes them in plain loops, and `compiler` translates
them to machine code. The primitives:

* `MAPS` compute each element from the elements at the same index. All arguments have the shape of the result; a
  dimension over which one is repeated has the stride 0.
* `fma_chain(start, a, b)`: a and b have the shape of the result and, after it, the dimensions to sum over. Each element
  begins as its `start` and becomes `fma(a, b, it)` for every index of those dimensions, the last one fastest.
* `REDUCTIONS` take one argument of such a shape. `sum` begins at 0 and `prod` at 1, the others with the first element.
  `argmax` is the first index of the largest element, counted over all reduced dimensions; NaN is the largest.
* `SCANS` run along the last dimension: each result is that of the elements up to its own.
* `take(table, index)`: the table has the shape of the result and one more dimension, from which each index picks; an
  index below 0 counts from the end, and one that is out of range is the nearest in range.
* `put(index, value)` and `put_add`: the result is the view in which index picks, like a table, and has one dimension
  more than both arguments. What no index picks stays as it was; of equal indices the last one counts, or all are added.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from instep.models.errors import ModelError

ARITHMETIC: Final = "portable-1"
DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    name: np.dtype(name) for name in ("bool", "int32", "int64", "float32", "float64")
}
FLOATS: Final = frozenset(["float32", "float64"])
_NUMBERS: Final = FLOATS | {"int32", "int64"}
_WHOLE: Final = frozenset(["bool", "int32", "int64"])
_ALL: Final = frozenset(DTYPES)

MAPS: Final[Mapping[str, tuple[int, frozenset[str]]]] = {
    "copy": (1, _ALL),
    **dict.fromkeys(("add", "sub", "mul", "minimum", "maximum"), (2, _NUMBERS)),
    "div": (2, FLOATS),
    "fmod": (2, FLOATS),
    "copysign": (2, FLOATS),
    **dict.fromkeys(("floor_divide", "trunc_divide", "remainder"), (2, frozenset(["int32", "int64"]))),
    "fma": (3, FLOATS),
    **dict.fromkeys(("neg", "abs"), (1, _NUMBERS)),
    **dict.fromkeys(("sqrt", "floor", "ceil", "trunc", "round"), (1, FLOATS)),
    **dict.fromkeys(
        ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "erf", "sin", "cos", "atan"), (1, frozenset(["float32"]))
    ),
    **dict.fromkeys(("and", "or", "xor"), (2, _WHOLE)),
    "not": (1, _WHOLE),
}
"""For each map, the number and the dtypes of its arguments; the result has the dtype of the arguments."""
COMPARISONS: Final = frozenset(["eq", "ne", "lt", "le", "gt", "ge"])
"""Maps from two arguments of one dtype to bool."""
REDUCTIONS: Final[Mapping[str, frozenset[str]]] = {
    **dict.fromkeys(("sum", "prod", "amax", "amin", "argmax"), _NUMBERS),
    **dict.fromkeys(("any", "all"), frozenset(["bool"])),
}
SCANS: Final[Mapping[str, frozenset[str]]] = {"cumsum": _NUMBERS, "cumprod": _NUMBERS}

MAX_NODES: Final = 20_000
MAX_RANK: Final = 16
MAX_EXTENT: Final = 2**31 - 1
"""The limit of each size and stride of a view, and of its offset."""
MAX_ELEMENTS: Final = 2**40
"""The limit of a view's elements, so that no address overflows."""
MAX_ROW_ELEMENTS: Final = 2**24
"""The limit of the elements in all buffers of one row."""
MAX_ITERATIONS: Final = 2**32
"""The limit of iterations of all nodes together, for one row."""

Number: TypeAlias = float | int | bool
Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Buffer:
    """Memory of one row, or a weights tensor that all rows share."""

    dtype: str
    size: int
    """The number of elements."""
    tensor: str = ""
    """The tensor's name in the weights file; empty for memory of one row."""


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a buffer. Strides and offset count elements."""

    buffer: int
    offset: int
    shape: Shape
    strides: Shape

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


Operand: TypeAlias = View | Number


@dataclass(frozen=True, slots=True)
class Node:
    """One primitive."""

    op: str
    out: View
    args: tuple[Operand, ...]

    @property
    def views(self) -> tuple[View, ...]:
        """The arguments that are views."""
        return tuple(each for each in self.args if isinstance(each, View))


@dataclass(frozen=True, eq=False)
class Form:
    """A step. Two forms are equal if their JSON is, which makes one NaN equal to another.

    `check` ensures that all writes to a buffer come before its first read, and that only written elements are read.
    """

    buffers: tuple[Buffer, ...]
    inputs: tuple[int, ...]
    """The buffers of the frame and of each leaf of the state, in order: contiguous."""
    nodes: tuple[Node, ...]
    outputs: tuple[View, ...]
    """The outputs and each leaf of the new state, in order; a leaf has one element for every element of its buffer."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @cached_property
    def digest(self) -> str:
        """sha256, hex."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def dtype(self, view: View) -> str:
        """The dtype of a view's elements."""
        return self.buffers[view.buffer].dtype

    def to_json(self) -> str:
        """JSON with one buffer or node in each line."""
        buffers = [[b.dtype, b.size, *([b.tensor] if b.tensor else [])] for b in self.buffers]
        nodes = [[n.op, _view_json(n.out), *map(_operand_json, n.args)] for n in self.nodes]
        parts = [
            f' "arithmetic": "{ARITHMETIC}"',
            f' "buffers": {_lines(buffers)}',
            f' "inputs": {json.dumps(self.inputs)}',
            f' "nodes": {_lines(nodes)}',
            f' "outputs": {_lines([_view_json(each) for each in self.outputs])}',
        ]
        return "{\n" + ",\n".join(parts) + "\n}\n"


def iterations(node: Node) -> int:
    """The number of iterations of the innermost loop of a node for one row."""
    views = (node.out, *(view for view in node.views if node.op != "take"))
    return max(math.prod(max(n, 1) for n in view.shape) for view in views)


def _lines(values: Sequence[Any]) -> str:
    texts = [json.dumps(each, separators=(",", ":")) for each in values]
    return "[\n  " + ",\n  ".join(texts) + "\n ]" if texts else "[]"


def _view_json(view: View) -> list[Any]:
    return [view.buffer, view.offset, list(view.shape), list(view.strides)]


def _operand_json(operand: Operand) -> Any:
    if isinstance(operand, View):
        return _view_json(operand)
    return repr(operand) if isinstance(operand, float) and not math.isfinite(operand) else operand


class _Wrong(Exception):
    """Raised with the problem of a form."""


def form_of_values(values: Any, source: str) -> Form:
    """Build a form from the values of its JSON, unchecked; `source` is its name in error messages.

    Raises:
        ModelError: when the values are not a form.
    """
    try:
        match values:
            case {"arithmetic": found} if found != ARITHMETIC:
                raise _Wrong(f"its arithmetic is {found!r:.40} and not {ARITHMETIC!r}")
            case {"buffers": [*buffers], "inputs": [*inputs], "nodes": [*nodes], "outputs": [*outputs], **parts}:
                if set(parts) != {"arithmetic"} or not all(type(each) is int for each in inputs):
                    raise _Wrong("it has other parts, or inputs that are not numbers of buffers")
                return Form(
                    tuple(map(_parse_buffer, buffers)),
                    tuple(inputs),
                    tuple(map(_parse_node, nodes)),
                    tuple(map(_parse_view, outputs)),
                )
        raise _Wrong("it has not the parts arithmetic, buffers, inputs, nodes and outputs")
    except _Wrong as error:
        raise ModelError(f"{source} is not a normal form ({error}); make the folder again") from None


def _parse_buffer(value: Any) -> Buffer:
    match value:
        case [str(dtype), size] if type(size) is int:
            return Buffer(dtype, size)
        case [str(dtype), size, str(tensor)] if type(size) is int:
            return Buffer(dtype, size, tensor)
    raise _Wrong(f"{value!r:.60} is not a buffer")


def _parse_view(value: Any) -> View:
    match value:
        case [buffer, at, [*shape], [*strides]] if all(type(n) is int for n in (buffer, at, *shape, *strides)):
            return View(buffer, at, tuple(shape), tuple(strides))
    raise _Wrong(f"{value!r:.60} is not a view")


def _parse_node(value: Any) -> Node:
    match value:
        case [str(op), out, first, *others]:
            return Node(op, _parse_view(out), tuple(map(_parse_operand, (first, *others))))
    raise _Wrong(f"{value!r:.60} is not a node")


def _parse_operand(value: Any) -> Operand:
    match value:
        case [*_]:
            return _parse_view(value)
        case "inf" | "-inf" | "nan":
            return float(value)
        case bool() | int() | float():
            return value
    raise _Wrong(f"{value!r:.60} is not an argument")


def check(form: Form, tensors: Mapping[str, tuple[str, int]], source: str) -> None:
    """Check everything that compiled code relies on.

    Args:
        form: it may come from a stranger.
        tensors: dtype and elements of each tensor of the weights file.
        source: the form's name in error messages.

    Raises:
        ModelError: when it cannot be computed.
    """
    try:
        _Checker(form, tensors).run()
    except _Wrong as error:
        raise ModelError(f"{source} is not a valid normal form: {error}; make the folder again") from None


def _check_extents(view: View) -> None:
    """Check every number of a view by itself first: products of a stranger's numbers could take hours."""
    if len(view.shape) == len(view.strides) <= MAX_RANK and all(0 <= n <= MAX_EXTENT for n in view.shape):
        are_small = all(abs(n) <= MAX_EXTENT for n in (view.offset, *view.strides))
        if are_small and math.prod(max(n, 1) for n in view.shape) <= MAX_ELEMENTS:
            return
    raise _Wrong("a view has no valid shape")


class _Checker:
    def __init__(self, form: Form, tensors: Mapping[str, tuple[str, int]]) -> None:
        self._form, self._tensors = form, tensors
        self._written: list[npt.NDArray[np.bool_]] = []
        self._read: set[int] = set()
        self._begun: set[int] = set()
        """Buffers of a row that a node has written to, even if it wrote no elements."""

    def run(self) -> None:
        form = self._form
        if len(form.nodes) > MAX_NODES:
            raise _Wrong(f"it has {len(form.nodes):,} nodes, and {MAX_NODES:,} at most can be compiled")
        for view in (*form.outputs, *(view for node in form.nodes for view in (node.out, *node.views))):
            _check_extents(view)
        row = sum(b.size for b in form.buffers if not b.tensor and b.size > 0)
        if row + sum(view.elements for view in form.outputs) > MAX_ROW_ELEMENTS:
            raise _Wrong(f"a row would take more than {MAX_ROW_ELEMENTS:,} numbers")
        for index, buffer in enumerate(form.buffers):
            self._check_buffer(index, buffer)
        if len(set(form.inputs)) != len(form.inputs):
            raise _Wrong("two inputs are one buffer")
        for index in form.inputs:
            if not 0 <= index < len(form.buffers) or form.buffers[index].tensor:
                raise _Wrong(f"input {index} is not a buffer of a row")
            self._written[index][...] = True
            self._read.add(index)
            self._begun.add(index)
        left = MAX_ITERATIONS - sum(view.elements for view in form.outputs)
        for number, node in enumerate(form.nodes):
            try:
                self._check_node(node)
            except _Wrong as error:
                raise _Wrong(f"node {number} ({node.op:.20}): {error}") from None
            left -= iterations(node)
            if left < 0:
                raise _Wrong(f"a row takes more than {MAX_ITERATIONS:,} steps")
        if len(form.outputs) != len(form.inputs) or not form.inputs:
            raise _Wrong("it does not give the outputs and each leaf of the state")
        for view in form.outputs:
            self._check_read(view)
        for index, view in zip(form.inputs[1:], form.outputs[1:], strict=True):
            buffer = form.buffers[index]
            if view.elements != buffer.size or form.dtype(view) != buffer.dtype:
                raise _Wrong("a leaf of the new state is not like that of the state")
        if form.dtype(form.outputs[0]) != "float32" or form.buffers[form.inputs[0]].dtype != "float32":
            raise _Wrong("frames and outputs must be float32")

    def _check_buffer(self, index: int, buffer: Buffer) -> None:
        if buffer.dtype not in DTYPES or buffer.size < 0:
            raise _Wrong(f"buffer {index} has the dtype {buffer.dtype:.20} and the size {buffer.size}")
        if buffer.tensor and self._tensors.get(buffer.tensor) != (buffer.dtype, buffer.size):
            raise _Wrong(f"buffer {index} is not like the tensor {buffer.tensor:.80} of the weights")
        self._written.append(np.full(0 if buffer.tensor else buffer.size, False))

    def _elements(self, view: View) -> npt.NDArray[np.bool_]:
        """The part of the written-elements mask that a view covers, with repeated dimensions reduced to one."""
        size = self._form.buffers[view.buffer].size
        if view.elements == 0:
            return np.empty(0, bool)
        reach = [(n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True)]
        first = view.offset + sum(each for each in reach if each < 0)
        last = view.offset + sum(each for each in reach if each > 0)
        if first < 0 or last >= size:
            raise _Wrong(f"elements {first} to {last} of a buffer of {size} are used")
        mask = self._written[view.buffer]
        if not len(mask):
            return mask
        shape = [1 if stride == 0 else n for n, stride in zip(view.shape, view.strides, strict=True)]
        if math.prod(shape) > MAX_ROW_ELEMENTS:
            raise _Wrong("a view has more elements than a row may have")
        return np.lib.stride_tricks.as_strided(mask[view.offset :], shape, view.strides)

    def _check_read(self, view: View) -> None:
        self._check_place(view)
        self._read.add(view.buffer)
        elements, buffer = self._elements(view), self._form.buffers[view.buffer]
        if not elements.all() or not (buffer.tensor or view.buffer in self._begun):
            raise _Wrong("it reads what was not written")

    def _check_write(self, node: Node, view: View) -> None:
        self._check_place(view)
        if self._form.buffers[view.buffer].tensor or view.buffer in self._read:
            raise _Wrong("it writes to what is given, or was read before")
        elements = self._elements(view)
        self._begun.add(view.buffer)
        reach, is_put = 0, node.op in ("put", "put_add")
        strides = [(abs(stride), n) for n, stride in zip(view.shape, view.strides, strict=True) if n > 1]
        for stride, n in sorted(each for each in strides if each[0] or not is_put):
            if stride <= reach and view.elements:
                raise _Wrong("it may write to one element twice")
            reach += (n - 1) * stride
        if is_put:
            if not elements.all():
                raise _Wrong("it puts into what was not written")
        else:
            elements[...] = True

    def _check_place(self, view: View) -> None:
        if not 0 <= view.buffer < len(self._form.buffers):
            raise _Wrong(f"there is no buffer {view.buffer}")

    def _check_node(self, node: Node) -> None:
        for view in node.views:
            self._check_read(view)
        if node.op in ("put", "put_add"):
            self._check_place(node.out)
        self._check_write(node, node.out)
        dtypes = [self._form.dtype(view) for view in node.views]
        check_types(node, self._form.dtype(node.out), dtypes)
        _check_shapes(node)


def check_types(node: Node, out: str, views: Sequence[str]) -> None:
    """Check the dtypes of a node's result and of its arguments that are views."""
    op, numbers = node.op, [each for each in node.args if not isinstance(each, View)]
    kinds, given = set(views), len(node.args)
    if op in MAPS:
        count, allowed = MAPS[op]
        fits = given == count and out in allowed and kinds <= {out}
    elif op in COMPARISONS:
        fits = given == 2 and out == "bool" and len(kinds) == 1
        out = next(iter(kinds), "")
    elif op == "cast":
        fits = given == 1 and len(views) == 1
    elif op == "where":
        fits = given == 3 and isinstance(node.args[0], View) and views[0] == "bool" and set(views[1:]) <= {out}
    elif op == "fma_chain":
        fits = given == 3 and all(isinstance(each, View) for each in node.args[1:]) and out in FLOATS and kinds == {out}
    elif op in REDUCTIONS:
        fits = given == len(views) == 1 and kinds <= REDUCTIONS[op]
        fits = fits and out == ("int64" if op == "argmax" else views[0])
    elif op in SCANS:
        fits = given == len(views) == 1 and out in SCANS[op] and kinds == {out}
    elif op == "take":
        fits = given == len(views) == 2 and views[0] == out and views[1] == "int64"
    elif op in ("put", "put_add"):
        value = views[1] if isinstance(node.args[-1], View) and len(views) > 1 else out
        fits = given == 2 and isinstance(node.args[0], View) and views[0] == "int64" and value == out
        fits = fits and (op == "put" or out in _NUMBERS)
    else:
        raise _Wrong("there is no such primitive")
    if not fits:
        raise _Wrong(f"it cannot compute {out} from {', '.join(views)} and {len(numbers)} numbers")
    most = 2**31 if out == "int32" else 2**63
    for number in numbers:
        is_fitting = type(number) is bool if out == "bool" else type(number) is int or out in FLOATS
        if not is_fitting or (type(number) is int and not -most <= number < most):
            raise _Wrong(f"{number!r:.40} is not a number of the dtype {out}")


def _check_shapes(node: Node) -> None:
    out, shapes = node.out.shape, [view.shape for view in node.views]
    rank = len(out)
    if node.op == "fma_chain":
        start, a, b = node.args
        assert isinstance(a, View)
        assert isinstance(b, View)
        fits = a.shape == b.shape and a.shape[:rank] == out and (not isinstance(start, View) or start.shape == out)
    elif node.op in REDUCTIONS:
        fits = shapes[0][:rank] == out and (node.op in ("sum", "prod") or math.prod(shapes[0][rank:]) > 0)
    elif node.op == "take":
        table, index = shapes
        fits = table[:-1] == out == index and table != () and table[-1] > 0
    elif node.op in ("put", "put_add"):
        fits = all(shape == out[:-1] for shape in shapes) and rank > 0 and out[-1] > 0
    else:
        fits = all(shape == out for shape in shapes) and (node.op not in SCANS or rank > 0)
    if not fits:
        raise _Wrong(f"it cannot compute the shape {list(out)} from {shapes!r:.200}")


# Writing forms.


def contiguous(shape: Sequence[int]) -> Shape:
    """The strides of a contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def broadcast(view: View, shape: Sequence[int]) -> View:
    """Repeat along leading dimensions and those of size 1, as numpy does."""
    extra = len(shape) - len(view.shape)
    strides = (0 if n == 1 else stride for n, stride in zip(view.shape, view.strides, strict=True))
    return replace(view, shape=tuple(shape), strides=(*(0,) * extra, *strides))


def permute(view: View, dims: Sequence[int]) -> View:
    """Reorder the dimensions."""
    return replace(view, shape=tuple(view.shape[d] for d in dims), strides=tuple(view.strides[d] for d in dims))


def narrow(view: View, dim: int, start: int, length: int) -> View:
    """A part of one dimension."""
    shape = tuple(length if d == dim else n for d, n in enumerate(view.shape))
    return replace(view, offset=view.offset + start * view.strides[dim], shape=shape)


def select(view: View, dim: int, index: int) -> View:
    """Fix the index of one dimension and remove that dimension."""
    return drop(narrow(view, dim, index, 1), dim)


def drop(view: View, dim: int) -> View:
    """Remove a dimension of size 1."""
    keep = [d for d in range(len(view.shape)) if d != dim]
    return permute(view, keep)


def reshape(view: View, shape: Sequence[int]) -> View:
    """A contiguous view in another shape."""
    assert view.strides == contiguous(view.shape), "only contiguous views are reshaped"
    return replace(view, shape=tuple(shape), strides=contiguous(shape))


class Builder:
    """Collects the parts of a form.

    Attributes:
        buffers: so far.
        nodes: so far, in the order in which they run.
    """

    def __init__(self) -> None:
        self.buffers: Final[list[Buffer]] = []
        self.nodes: Final[list[Node]] = []
        self._inputs: list[int] = []
        self._tensors: dict[str, View] = {}

    def input(self, dtype: str, shape: Sequence[int]) -> View:
        """Add an input: first the frame, then each leaf of the state in order."""
        view = self.fresh(dtype, shape)
        self._inputs.append(view.buffer)
        return view

    def tensor(self, name: str, dtype: str, shape: Sequence[int]) -> View:
        """Add a weights tensor."""
        if name not in self._tensors:
            self.buffers.append(Buffer(dtype, math.prod(shape), name))
            self._tensors[name] = View(len(self.buffers) - 1, 0, tuple(shape), contiguous(shape))
        return self._tensors[name]

    def fresh(self, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None, offset: int = 0) -> View:
        """Add unwritten memory of a row; contiguous unless (non-negative) strides are given."""
        strides = contiguous(shape) if strides is None else strides
        reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else -1
        self.buffers.append(Buffer(dtype, offset + reach + 1))
        return View(len(self.buffers) - 1, offset, tuple(shape), tuple(strides))

    def dtype(self, view: View) -> str:
        """The dtype of a view's elements."""
        return self.buffers[view.buffer].dtype

    def emit(self, op: str, out: View, *args: Operand) -> View:
        """Add a node and return its result."""
        self.nodes.append(Node(op, out, args))
        return out

    def map(self, op: str, *args: Operand, out: View | None = None) -> View:
        """Add a node that computes element by element; its arguments are broadcast to one shape."""
        views = [each for each in args if isinstance(each, View)]
        shape = out.shape if out else _broadcast_shape([view.shape for view in views])
        if out is None:
            out = self.fresh("bool" if op in COMPARISONS else self.dtype(views[-1]), shape)
        return self.emit(op, out, *(broadcast(each, shape) if isinstance(each, View) else each for each in args))

    def cast(self, view: View, dtype: str) -> View:
        """Convert values to another dtype."""
        assert dtype in DTYPES
        return view if self.dtype(view) == dtype else self.emit("cast", self.fresh(dtype, view.shape), view)

    def reduce(self, op: str, view: View, dims: Sequence[int], *, keep: bool = False) -> View:
        """Reduce dimensions; they stay with size 1 where `keep` is set."""
        dims = [dim % len(view.shape) for dim in dims]
        kept = [dim for dim in range(len(view.shape)) if dim not in dims]
        out = self.fresh("int64" if op == "argmax" else self.dtype(view), [view.shape[dim] for dim in kept])
        self.emit(op, out, permute(view, [*kept, *dims]))
        return reshape(out, [1 if d in dims else n for d, n in enumerate(view.shape)]) if keep else out

    def dense(self, x: View, weight: View, start: Operand) -> View:
        """`weight` [outputs, inputs] times `x` [inputs], added to `start` in one chain."""
        outputs, inputs = weight.shape
        out = self.fresh(self.dtype(weight), (outputs,))
        return self.emit("fma_chain", out, start, broadcast(x, (outputs, inputs)), weight)

    def inline(self, form: Form, inputs: Sequence[View]) -> list[View]:
        """Add a form whose inputs are these views of whole buffers, and return its outputs."""
        moved = {index: view.buffer for index, view in zip(form.inputs, inputs, strict=True)}
        for index, buffer in enumerate(form.buffers):
            if buffer.tensor:
                moved[index] = self.tensor(buffer.tensor, buffer.dtype, (buffer.size,)).buffer
            elif index not in moved:
                moved[index] = len(self.buffers)
                self.buffers.append(buffer)
        for node in form.nodes:
            args = [replace(each, buffer=moved[each.buffer]) if isinstance(each, View) else each for each in node.args]
            self.emit(node.op, replace(node.out, buffer=moved[node.out.buffer]), *args)
        return [replace(view, buffer=moved[view.buffer]) for view in form.outputs]

    def form(self, outputs: Sequence[View]) -> Form:
        """The form that computes these results; unused nodes are left out and buffers renumbered."""
        needed, kept = {view.buffer for view in outputs}, list[Node]()
        for node in reversed(self.nodes):
            if node.out.buffer in needed:
                kept.append(node)
                needed |= {view.buffer for view in node.views}
        needed |= set(self._inputs)
        numbers = {old: new for new, old in enumerate(sorted(needed))}

        def moved(each: Operand) -> Operand:
            return replace(each, buffer=numbers[each.buffer]) if isinstance(each, View) else each

        return Form(
            tuple(self.buffers[old] for old in numbers),
            tuple(numbers[each] for each in self._inputs),
            tuple(Node(n.op, moved(n.out), tuple(map(moved, n.args))) for n in reversed(kept)),  # type: ignore[arg-type]
            tuple(replace(view, buffer=numbers[view.buffer]) for view in outputs),
        )


def _broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    rank = max(len(shape) for shape in shapes)
    aligned = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    return tuple(max(sizes) if 0 not in sizes else 0 for sizes in zip(*aligned, strict=True))
