"""Translates a step written in torch to its normal form.

The step is traced at one row: sizes become numbers, and nothing can refer to another row. Operators that consist of
several primitives are replaced by the definitions in `OWN`, which are part of `portable-1`; torch's decompositions and
`LOWERINGS` translate the others.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.func import functionalize
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from instep.models.errors import ModelError, first_line
from instep.models.module import operators as allowed
from instep.models.module.description import Graph
from instep.models.module.operators import Operator, name_of, unknown, written
from instep.models.module.program import Program
from instep.models.numerics import dtype_name
from instep.models.portable.composites import OF_COMPLEX, OWN, SPECTRA, Complex
from instep.models.portable.form import (
    COMPARISONS,
    DTYPES,
    FLOATS,
    MAPS,
    MAX_NODES,
    Builder,
    Form,
    Number,
    Operand,
    Shape,
    View,
    broadcast,
    check,
    contiguous,
    narrow,
    permute,
)

aten: Final = torch.ops.aten
_WITHOUT_EFFECT: Final = frozenset(["dtype", "layout", "device", "pin_memory", "memory_format", "non_blocking"])
"""Arguments that the traced result already reflects."""
_OF_BOOLS: Final = {"add": "or", "mul": "and", "maximum": "or", "minimum": "and", "amax": "any", "amin": "all"}
_ROUNDING: Final = frozenset(["floor", "ceil", "trunc", "round"])
_EMPTY: Final = frozenset(["empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted"])
_REORDERED: Final = frozenset(["_unsafe_view", "_reshape_alias"])
"""Operators that return views, although their schemas do not say so."""

Value: TypeAlias = View | torch.Tensor | Number
"""A value computed by a row, a constant, or a number."""


class Located(fx.Interpreter):
    """Runs a graph; errors name the line of the user's code."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._node: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node.

        Raises:
            ModelError: when it has no portable form.
        """
        self._node = n
        try:
            return super().run_node(n)
        except ModelError:
            raise
        except Exception as error:  # such as torch's on a view of memory that is laid out in another way
            raise self.refuse(f"in a way that has no portable form ({first_line(error):.200})") from error

    @property
    def where(self) -> str:
        """The line of the user's code, if torch knows it."""
        return (self._node.stack_trace if self._node else None) or "the step"

    def refuse(self, why: str) -> ModelError:
        """The error for an operator without a portable form."""
        target = self._node.target if self._node else ""
        return ModelError(f"{self.where} calls {name_of(target) if isinstance(target, Operator) else target} {why}")


class Lowering(Located):
    """Adds the nodes of a traced graph to a form. It runs with views of the graph's arguments.

    Args:
        builder: of the form.
        module: a graph without in-place changes, whose sizes are numbers.
    """

    def __init__(self, builder: Builder, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.constants: Final[dict[str, torch.Tensor]] = {}
        """Arrays that the step creates itself, by their names in the form."""
        self.builder: Final = builder
        self._taken = {buffer.tensor for buffer in builder.buffers}
        self._placed: dict[tuple[int, torch.dtype], tuple[View, torch.Tensor]] = {}

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Add the nodes of an operator."""
        if target is operator.getitem:
            return args[0][args[1]]
        if not isinstance(target, Operator):
            raise ModelError(unknown(self.where, str(target)))
        assert self._node is not None
        name, results = name_of(target), self._node.meta["val"]
        if name in _EMPTY:
            return torch.zeros(results.shape, dtype=results.dtype)
        if written(target):
            raise ModelError(f"{self.where} changes what it is given in place; return a new tensor")
        if not any(isinstance(each, View) for each in _flat([args, list(kwargs.values())])):
            if torch.Tag.nondeterministic_seeded in target.tags:
                raise ModelError(unknown(self.where, name))
            return target(*args, **kwargs)
        for each in results if isinstance(results, list | tuple) else [results]:
            if isinstance(each, torch.Tensor) and dtype_of(each) not in DTYPES:
                raise self.refuse(f"for {dtype_of(each)}; use float32, float64, int64, int32 or bool")
        if name in _REORDERED or any(each.alias_info is not None for each in target._schema.returns):
            return self.seen(target, *args, **kwargs)
        if name not in LOWERINGS:
            raise ModelError(unknown(self.where, name))
        return LOWERINGS[name](
            self, results, *args, **{key: each for key, each in kwargs.items() if key not in _WITHOUT_EFFECT}
        )

    # Values

    def seen(self, target: Operator, of: View, *args: Any, **kwargs: Any) -> Any:
        """Apply an operator that returns a view. torch computes the strides."""
        of = self.view(of)
        size = self.builder.buffers[of.buffer].size
        memory = torch.empty(size, dtype=getattr(torch, self.dtype(of)), device="meta")
        found = target(memory.as_strided(of.shape, of.strides, of.offset), *args, **kwargs)
        views = [
            View(of.buffer, each.storage_offset(), tuple(each.shape), tuple(each.stride()))
            for each in (found if isinstance(found, list | tuple) else [found])
        ]
        return views if isinstance(found, list | tuple) else views[0]

    def dtype(self, value: Value) -> str:
        """The dtype of a view's or constant's elements."""
        if isinstance(value, View):
            return self.builder.dtype(value)
        return dtype_of(value) if isinstance(value, torch.Tensor) else dtype_of(torch.tensor(value))

    def fresh(self, like: torch.Tensor) -> View:
        """Memory for a traced result, with the strides that torch gave it, because views of it rely on them."""
        strides = torch.empty_like(like).stride()  # other ones where elements overlap
        return self.builder.fresh(dtype_of(like), tuple(like.shape), tuple(strides), int(like.storage_offset()))

    def view(self, value: Value, dtype: str = "") -> View:
        """A value as elements of a buffer, converted to a dtype if one is given."""
        if isinstance(value, bool | int | float):
            value = torch.tensor(value, dtype=getattr(torch, dtype) if dtype else None)
        view = self._constant(value) if isinstance(value, torch.Tensor) else value
        return self.builder.cast(view, dtype) if dtype else view

    def operand(self, value: Value, dtype: str) -> Operand:
        """A value as the argument of a map: converted to a dtype, and a number if all its elements are equal."""
        if isinstance(value, torch.Tensor):
            first = value.flatten()[:1]
            if not value.numel() or not bool((value == first).all()):
                return self.view(value, dtype)
            value = first.item()
        if isinstance(value, View):
            return self.view(value, dtype)
        return torch.tensor(value, dtype=getattr(torch, dtype)).item()  # rounded, as the primitive would

    def assign(self, out: View, value: Value) -> View:
        """Write a value to `out`, converted to its dtype and broadcast to its shape."""
        if isinstance(value, torch.Tensor):
            value = self.operand(value, self.dtype(out))
        if isinstance(value, View) and self.dtype(value) != self.dtype(out):
            return self.builder.emit("cast", out, broadcast(value, out.shape))
        return self.builder.map("copy", self.operand(value, self.dtype(out)), out=out)

    def map(self, op: str, like: torch.Tensor, *values: Value, out: View | None = None) -> View:
        """Add a map over values in the result's dtype."""
        dtype = dtype_of(like)
        if dtype == "bool":
            op = _OF_BOOLS.get(op, op)
        if op in _ROUNDING and dtype not in FLOATS:
            op = "copy"
        if dtype not in MAPS[op][1]:
            raise self.refuse(f"for {dtype}, in which there is no {op}; use float32")
        return self.builder.map(op, *(self.operand(each, dtype) for each in values), out=out or self.fresh(like))

    def compare(self, op: str, like: torch.Tensor, a: Value, b: Value) -> View:
        """Compare in the dtype that torch would use."""
        given: list[Any] = [self._typed(each) if isinstance(each, View) else each for each in (a, b)]
        dtype = dtype_name(torch.result_type(*given))
        return self.builder.map(op, self.operand(a, dtype), self.operand(b, dtype), out=self.fresh(like))

    def truth(self, value: Value) -> Operand:
        """Whether elements differ from 0."""
        if not isinstance(value, View) or self.dtype(value) == "bool":
            return self.operand(value, "bool")
        return self.builder.map("ne", value, self.operand(0, self.dtype(value)))

    def _typed(self, view: View) -> torch.Tensor:
        return torch.empty(view.shape, dtype=getattr(torch, self.dtype(view)), device="meta")

    def _constant(self, tensor: torch.Tensor) -> View:
        """A constant as a weights tensor; its views share one."""
        if dtype_of(tensor) not in DTYPES:
            raise self.refuse(f"with a constant of {dtype_of(tensor)}; use float32, float64, int64, int32 or bool")
        storage = tensor.untyped_storage()
        key = storage.data_ptr(), tensor.dtype
        if key not in self._placed:
            memory = tensor.as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            self._placed[key] = self._stored(memory), tensor
        whole, _ = self._placed[key]
        return replace(
            whole,
            offset=whole.offset + int(tensor.storage_offset()),
            shape=tuple(tensor.shape),
            strides=tuple(tensor.stride()),
        )

    def _stored(self, memory: torch.Tensor) -> View:
        if not bool(memory.isfinite().all()):  # such are not allowed in a weights file
            view = self._stored(memory.nan_to_num(0, 0, 0))
            for number in (math.inf, -math.inf, math.nan):
                place = memory.isnan() if math.isnan(number) else memory == number
                if bool(place.any()):
                    view = self.builder.map("where", self._stored(place), number, view)
            return view
        for name, each in self.constants.items():
            if each.dtype == memory.dtype and each.equal(memory):
                return self.builder.tensor(name, dtype_of(memory), memory.shape)
        names = (f"constant.{number}" for number in itertools.count(len(self.constants)))
        name = next(each for each in names if each not in self._taken | self.constants.keys())
        self.constants[name] = memory.clone()
        return self.builder.tensor(name, dtype_of(memory), memory.shape)


def dtype_of(tensor: torch.Tensor) -> str:
    """A dtype's name in forms."""
    return dtype_name(tensor.dtype)


def _flat(value: Any) -> list[Any]:
    return [each for part in value for each in _flat(part)] if isinstance(value, list | tuple) else [value]


# Each function below lowers the operators of aten for which `LOWERINGS` lists it. It takes the lowering, the traced
# result, and the operator's own arguments.

Lower: TypeAlias = Callable[..., View]


def _map(op: str) -> Lower:
    return lambda code, like, *args: code.map(op, like, *args)


def _compare(op: str) -> Lower:
    return lambda code, like, a, b: code.compare(op, like, a, b)


def _logic(op: str) -> Lower:
    return lambda code, like, *args: code.builder.map(op, *map(code.truth, args), out=code.fresh(like))


def _copy(code: Lowering, like: torch.Tensor, x: Value, *_: Any) -> View:
    return code.assign(code.fresh(like), x)


def _add(op: str) -> Lower:
    def lower(code: Lowering, like: torch.Tensor, a: Value, b: Value, alpha: Number = 1) -> View:
        return code.map(op, like, a, b if alpha == 1 else code.map("mul", like, b, alpha))

    return lower


def _fma(code: Lowering, like: torch.Tensor, a: Value, b: Value, c: Value, value: Number = 1) -> View:
    b = b if value == 1 else code.map("mul", like, b, value)
    if dtype_of(like) in FLOATS:
        return code.map("fma", like, b, c, a)
    return code.map("add", like, a, code.map("mul", like, b, c))


def _divide(code: Lowering, like: torch.Tensor, a: Value, b: Value, rounding_mode: str | None = None) -> View:
    if rounding_mode is not None and dtype_of(like) not in FLOATS:
        return code.map(f"{rounding_mode}_divide", like, a, b)
    quotient = code.map("div", like, a, b)
    if rounding_mode != "floor":
        return quotient if rounding_mode is None else code.map("trunc", like, quotient)
    rest, is_below = _rest(code, like, a, b)
    exact = code.map("round", like, code.map("div", like, code.map("sub", like, a, rest), b))
    exact = code.builder.map("where", is_below, code.map("sub", like, exact, 1), exact)
    is_zero = code.builder.map("eq", code.view(b, dtype_of(like)), 0.0)
    return code.builder.map("where", is_zero, quotient, exact, out=code.fresh(like))


def _fmod(code: Lowering, like: torch.Tensor, a: Value, b: Value) -> View:
    if dtype_of(like) in FLOATS:
        return code.map("fmod", like, a, b)
    return code.map("sub", like, a, code.map("mul", like, code.map("trunc_divide", like, a, b), b))


def _rest(code: Lowering, like: torch.Tensor, a: Value, b: Value) -> tuple[View, View]:
    """The remainder of truncated division, and whether floored division has another one."""
    rest, build = code.map("fmod", like, a, b), code.builder.map
    has_other_sign = build("ne", build("lt", rest, 0.0), build("lt", code.view(b, dtype_of(like)), 0.0))
    return rest, build("and", build("ne", rest, 0.0), has_other_sign)


def _remainder(code: Lowering, like: torch.Tensor, a: Value, b: Value) -> View:
    if dtype_of(like) not in FLOATS:
        return code.map("remainder", like, a, b)
    rest, is_off = _rest(code, like, a, b)
    return code.builder.map("where", is_off, code.map("add", like, rest, b), rest, out=code.fresh(like))


def _clamp(code: Lowering, like: torch.Tensor, x: Value, min: Value | None = None, max: Value | None = None) -> View:
    x = x if min is None else code.map("maximum", like, x, min)
    return code.assign(code.fresh(like), x) if max is None else code.map("minimum", like, x, max)


def _where(code: Lowering, like: torch.Tensor, condition: Value, a: Value, b: Value) -> View:
    dtype = dtype_of(like)
    values = code.operand(a, dtype), code.operand(b, dtype)
    return code.builder.map("where", code.view(condition, "bool"), *values, out=code.fresh(like))


def _cat(code: Lowering, like: torch.Tensor, parts: Sequence[Value], dim: int = 0) -> View:
    out, start = code.fresh(like), 0
    for part in map(code.view, parts):
        if part.shape != (0,):  # which torch lets pass with any other shapes
            code.assign(narrow(out, dim % like.dim(), start, part.shape[dim]), part)
            start += part.shape[dim]
    return out


def _scatter_into(target: Operator) -> Lower:
    def lower(code: Lowering, like: torch.Tensor, x: Value, source: Value, *args: Any, **kwargs: Any) -> View:
        out = code.assign(code.fresh(like), x)
        code.assign(code.seen(target, out, *args, **kwargs), source)
        return out

    return lower


def _pad(code: Lowering, like: torch.Tensor, x: Value, pad: Sequence[int], value: Number = 0) -> View:
    out = code.assign(code.fresh(like), value)
    inside, part = out, code.view(x)
    for place in range(len(pad) // 2):
        dim = like.dim() - 1 - place
        before, after = pad[2 * place : 2 * place + 2]
        length = part.shape[dim] + min(before, 0) + min(after, 0)
        inside = narrow(inside, dim, max(before, 0), length)
        part = narrow(part, dim, max(-before, 0), length)
    code.assign(inside, part)
    return out


def _flip(code: Lowering, like: torch.Tensor, x: Value, dims: Sequence[int]) -> View:
    view = code.view(x)
    backwards = {dim % len(view.shape) for dim in dims if view.elements}
    offset = view.offset + sum((view.shape[dim] - 1) * view.strides[dim] for dim in backwards)
    strides = tuple(-stride if dim in backwards else stride for dim, stride in enumerate(view.strides))
    return code.assign(code.fresh(like), replace(view, offset=offset, strides=strides))


def _reduce(op: str) -> Lower:
    def lower(
        code: Lowering, like: torch.Tensor, x: Value, dim: int | Sequence[int] | None = None, *_: Any, **__: Any
    ) -> View:
        dtype, view = dtype_of(like), code.view(x)
        if op in ("any", "all"):
            view = code.builder.map("copy", code.truth(view))
        elif op != "argmax":
            view = code.view(view, dtype)
        rank = len(view.shape)
        given = [dim] if isinstance(dim, int) else dim
        dims = [each % rank for each in given] if given and rank else list(range(rank))
        kept = [each for each in range(rank) if each not in dims]
        out = code.builder.fresh(dtype, [view.shape[each] for each in kept])
        code.builder.emit(_OF_BOOLS.get(op, op) if dtype == "bool" else op, out, permute(view, [*kept, *dims]))
        return replace(out, shape=tuple(like.shape), strides=contiguous(like.shape))

    return lower


def _scan(op: str) -> Lower:
    def lower(code: Lowering, like: torch.Tensor, x: Value, dim: int, **_: Any) -> View:
        out, view = code.fresh(like), code.view(x, dtype_of(like))
        if not view.shape:
            return code.assign(out, view)
        order = [*(d for d in range(like.dim()) if d != dim % like.dim()), dim % like.dim()]
        code.builder.emit(op, permute(out, order), permute(view, order))
        return out

    return lower


def _chain(code: Lowering, out: View, start: Value, a: View, b: View) -> View:
    """A chain of fused multiply-adds whose `start` is broadcast to the shape of `out`."""
    dtype = code.dtype(out)
    if dtype not in FLOATS:
        raise code.refuse(f"for {dtype}; convert to float32 before")
    operand = code.operand(start, dtype)
    code.builder.emit("fma_chain", out, broadcast(operand, out.shape) if isinstance(operand, View) else operand, a, b)
    return out


def _added_matrix(
    code: Lowering, like: torch.Tensor, start: Value, a: Value, b: Value, beta: Number = 1, alpha: Number = 1
) -> View:
    """`start` plus a [..., m, k] times b [..., k, n]."""
    x, y, out = code.view(a), code.view(b), code.fresh(like)
    if alpha != 1:
        x = code.builder.map("mul", x, code.operand(alpha, dtype_of(like)))
    if beta != 1:
        start = code.map("mul", like, start, beta) if beta else 0.0
    shape, (*of_x, x_m, x_k), (*of_y, y_k, y_n) = (*out.shape, x.shape[-1]), x.strides, y.strides
    left, right = (
        replace(x, shape=shape, strides=(*of_x, x_m, 0, x_k)),
        replace(y, shape=shape, strides=(*of_y, 0, y_n, y_k)),
    )
    return _chain(code, out, start, left, right)


def _convolution(
    code: Lowering,
    like: torch.Tensor,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> View:
    """A convolution as chains over input channels and taps in rising order.

    A transposed convolution is a normal one over an input with `stride` - 1 zeros between values and reversed taps.
    """
    values, taps, out = code.view(x), code.view(weight), code.fresh(like)
    kernel = taps.shape[2:]
    before, after = list(padding), list(padding)
    spread, step = [1] * len(kernel), list(stride)
    if transposed:
        spread, step = step, spread
        before = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
        after = [b + more for b, more in zip(before, output_padding, strict=True)]
        inputs, outputs = values.shape[1] // groups, taps.shape[1]
        offset = taps.offset + sum((k - 1) * s for k, s in zip(kernel, taps.strides[2:], strict=True))
        of_group, of_input, of_output = inputs * taps.strides[0], taps.strides[0], taps.strides[1]
        taps = replace(taps, offset=offset, strides=(*taps.strides[:2], *(-s for s in taps.strides[2:])))
    else:
        inputs, outputs = taps.shape[1], taps.shape[0] // groups
        of_group, of_input, of_output = outputs * taps.strides[0], taps.strides[1], taps.strides[0]
    values = _surrounded(code, values, spread, before, after)
    x_strides, places = values.strides[2:], like.shape[2:]
    shape = (values.shape[0], groups, outputs, *places)
    apart = (out.strides[0], outputs * out.strides[1], *out.strides[1:])
    whole = (*shape, inputs, *kernel)
    moved = (s * each for s, each in zip(step, x_strides, strict=True))
    within = (d * each for d, each in zip(dilation, x_strides, strict=True))
    x_whole = (values.strides[0], inputs * values.strides[1], 0, *moved, values.strides[1], *within)
    w_whole = (0, of_group, of_output, *(0 for _ in kernel), of_input, *taps.strides[2:])
    start: Value = 0.0
    if bias is not None:
        start = code.view(bias)
        (of_bias,) = start.strides
        start = replace(start, shape=shape, strides=(0, outputs * of_bias, of_bias, *(0 for _ in kernel)))
    _chain(
        code,
        replace(out, shape=shape, strides=apart),
        start,
        replace(values, shape=whole, strides=x_whole),
        replace(taps, shape=whole, strides=w_whole),
    )
    return out


def _surrounded(code: Lowering, x: View, spread: Sequence[int], before: Sequence[int], after: Sequence[int]) -> View:
    """Put zeros around and between the elements of the last dimensions; negative numbers remove elements."""
    if not any([*before, *after, *(s - 1 for s in spread)]):
        return x
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], spread, strict=True)]
    room = [n + max(b, 0) + max(a, 0) for n, b, a in zip(sizes, before, after, strict=True)]
    padded = code.builder.fresh(code.dtype(x), (*x.shape[:2], *room))
    code.assign(padded, 0.0)
    inside = padded
    for dim, (start, size) in enumerate(zip(before, sizes, strict=True), 2):
        inside = narrow(inside, dim, max(start, 0), size)
    strides = (*padded.strides[:2], *(stride * s for stride, s in zip(padded.strides[2:], spread, strict=True)))
    code.assign(replace(inside, shape=x.shape, strides=strides), x)
    for dim, (start, end, size) in enumerate(zip(before, after, room, strict=True), 2):
        padded = narrow(padded, dim, max(-start, 0), size + min(start, 0) + min(end, 0))
    return padded


def _line(view: View, dim: int, shape: Shape) -> View:
    """A table for each element of `shape` that contains the elements of one dimension."""
    strides = (0 if d == dim else stride for d, stride in enumerate(view.strides))
    return replace(view, shape=(*shape, view.shape[dim]), strides=(*strides, view.strides[dim]))


def _gather(code: Lowering, like: torch.Tensor, x: Value, dim: int, index: Value, **_: Any) -> View:
    of, place = code.view(x), code.view(index, "int64")
    if not of.shape:
        return code.assign(code.fresh(like), of)
    return code.builder.emit("take", code.fresh(like), _line(of, dim % len(of.shape), place.shape), place)


def _index_select(code: Lowering, like: torch.Tensor, x: Value, dim: int, index: Value) -> View:
    of, place = code.view(x), code.view(index, "int64")
    if not of.shape:
        return code.assign(code.fresh(like), of)
    dim, shape = dim % len(of.shape), tuple(like.shape)
    strides = tuple((*place.strides, 0)[0] if d == dim else 0 for d in range(len(shape)))
    return code.builder.emit(
        "take", code.fresh(like), _line(of, dim, shape), replace(place, shape=shape, strides=strides)
    )


def _scatter(op: str) -> Lower:
    def lower(
        code: Lowering, like: torch.Tensor, x: Value, dim: int, index: Value, source: Value, *reduce: Any, **more: Any
    ) -> View:
        if reduce or more:
            raise code.refuse("with a reduction; use scatter_add")
        out, place = code.assign(code.fresh(like), x), code.view(index, "int64")
        value = code.operand(source, dtype_of(like))
        if isinstance(value, View):
            value = replace(value, shape=place.shape)
        code.builder.emit(op, _line(out, dim % like.dim(), place.shape), place, value)
        return out

    return lower


LOWERINGS: Final[dict[str, Lower]] = {
    **{name: _map(name) for name in MAPS if name not in ("copy", "add", "sub", "div", "fmod", "fma")},
    **{f"bitwise_{name}": _map(name) for name in ("and", "or", "xor", "not")},
    **{f"logical_{name}": _logic(name) for name in ("and", "or", "xor", "not")},
    **{name: _compare(name) for name in COMPARISONS},
    **{name: _add(name) for name in ("add", "sub")},
    **{name: _reduce(name) for name in ("sum", "prod", "amax", "amin", "any", "all", "argmax")},
    **{name: _scan(name) for name in ("cumsum", "cumprod")},
    **dict.fromkeys(("clone", "_to_copy", "expand_copy", "copy_strided", "lift_fresh_copy"), _copy),
    **dict.fromkeys(
        ("copy", "fill", "full_like"), lambda code, like, x, value, *_: code.assign(code.fresh(like), value)
    ),
    **dict.fromkeys(("mm", "bmm"), lambda code, like, a, b: _added_matrix(code, like, 0.0, a, b)),
    **dict.fromkeys(("addmm", "baddbmm"), _added_matrix),
    "max": _reduce("amax"),
    "min": _reduce("amin"),
    "relu": lambda code, like, x: code.map("maximum", like, x, 0),
    "reciprocal": lambda code, like, x: code.map("div", like, 1, x),
    "addcmul": _fma,
    "div": _divide,
    "floor_divide": lambda code, like, a, b: _divide(code, like, a, b, "floor"),
    "fmod": _fmod,
    "remainder": _remainder,
    "clamp": _clamp,
    "where": _where,
    "cat": _cat,
    "constant_pad_nd": _pad,
    "flip": _flip,
    "slice_scatter": _scatter_into(aten.slice.Tensor),
    "select_scatter": _scatter_into(aten.select.int),
    "diagonal_scatter": _scatter_into(aten.diagonal.default),
    "as_strided_scatter": _scatter_into(aten.as_strided.default),
    "convolution": _convolution,
    "gather": _gather,
    "index_select": _index_select,
    "scatter": _scatter("put"),
    "scatter_add": _scatter("put_add"),
}
"""Functions by the names of operators."""


# From a step to a traced graph, and on to its normal form.

Step: TypeAlias = Callable[..., Sequence[Tensor]]
_NO_LINES: Final[Mapping[str, str]] = MappingProxyType({})


@dataclass(frozen=True)
class Traced:
    """The normal form of a step."""

    form: Form
    constants: dict[str, Tensor]
    """Arrays that the step creates itself, for the weights file, by their names in the form."""


def trace(step: Step, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Traced:
    """Trace `step(list of tensors, *inputs) -> (y, *new leaves)` to its normal form.

    Args:
        step: it is called at one row.
        tensors: by the names in the weights file.
        inputs: a frame and the leaves of one row, in any shape; only shapes and dtypes count. The form's inputs have
            the same elements in the same order.

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
        where: lines of the user's code, by the names of the graph's nodes.

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
    """The decomposed graph of a step. Some decompositions still change their own results in place."""
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
"""Operators that `operators` defines with fewer nodes than torch's decompositions."""
