"""The arithmetic `portable-1` in plain loops: the definition that compiled steps are compared with.

It shares the normal form with the compiler and nothing else. Memory has one column for each row of the batch, so every
line computes all rows at once; a weights tensor has a single column, which numpy broadcasts.

Every operation is rounded once, as IEEE 754 says, and denormals are kept. Points that may surprise:

* `fma` and `fma_chain` round once for a multiplication and an addition together. Sums are one chain in row-major order:
  `sum` and `cumsum` begin at +0, so the sum of a single -0 is +0.
* `maximum(a, b)` is a where a > b or a is NaN, and otherwise b: of two zeros it is the second one. `amax` is
  `maximum(so far, next)`. `minimum` and `amin` are alike.
* NaN has neither sign nor payload: the outputs and the new state hold 0x7FC00000 (float64: 0x7FF8000000000000) for
  each, and `copysign` treats the sign of a NaN as positive.
* Integers wrap. A divisor of 0 counts as 1, and division by -1 negates, so the least number stays as it is.
* `cast` from float to integer cuts the fraction off and saturates; NaN becomes 0. NaN as a bool is true.
* `exp` is 0 below -87, and so is the exponential within expm1 and sigmoid; within tanh it is 0 below -40. Beyond 2^46,
  sin and cos are NaN. expm1, log1p and sin of -0 are +0.
* Comparisons order False before True.
* A number among the arguments is first rounded to the dtype of the views: `np.float32(number)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final, TypeAlias

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.extending import intrinsic

from instep.core.compiled import kernel
from instep.core.typing import F32, I64
from instep.models.portable.form import COMPARISONS, DTYPES, REDUCTIONS, SCANS, Form, Node, View

Values: TypeAlias = npt.NDArray[Any]
Memory: TypeAlias = list[Values]
"""One array for each buffer, [size, rows], or [size, 1] for a weights tensor."""
_CONFIG: Final[Any] = numba.config
F: Final = np.float32


def exact_fma(a: Any, b: Any, c: Any) -> Any:
    """A fused multiply-add of numpy scalars of one dtype, computed with fractions."""
    with np.errstate(all="ignore"):
        if np.isfinite([a, b, c]).all():
            exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
            if exact != 0:
                return _rounded(exact, type(c))
        elif np.isfinite([a, b]).all():
            return c  # although a * b may be an infinity of the other sign
        return type(c)(float(a) * float(b) + float(c))


def _rounded(exact: Fraction, kind: Any) -> Any:
    try:
        value = float(exact)
    except OverflowError:
        value = math.inf if exact > 0 else -math.inf
    if kind is F and value != exact and np.float64(value).view(np.int64) % 2 == 0:
        # Made odd: a double halfway between two floats would lose on which side the exact value is.
        value = math.nextafter(value, math.inf if exact > value else -math.inf)
    return kind(value)


def _fused(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = arguments[0].type
        function = builder.module.declare_intrinsic("llvm.fma", [kind], ir.FunctionType(kind, [kind] * 3))
        return builder.call(function, arguments)

    return a(a, b, c), emit


_fma: Final[Any] = exact_fma if _CONFIG.DISABLE_JIT else intrinsic(_fused)


@kernel
def _chain(totals: Values, a: Values, a_outer: I64, a_inner: I64, b: Values, b_outer: I64, b_inner: I64) -> None:
    """Chains of fused multiply-adds that begin at `totals` [elements, rows].

    The factors of an element are a[a_outer[element] + a_inner[k]] and b[...] for every k, in order. `a` has one column
    per row; `b` has one column per row, or a single one.
    """
    for element in range(len(totals)):
        total = totals[element]
        for k in range(len(a_inner)):
            x, y = a[a_outer[element] + a_inner[k]], b[b_outer[element] + b_inner[k]]
            if len(y) == 1:
                weight = y[0]
                for row in range(len(total)):
                    total[row] = _fma(x[row], weight, total[row])
            else:
                for row in range(len(total)):
                    total[row] = _fma(x[row], y[row], total[row])


_FIRST: Final = np.zeros(1, np.int64)


def fma(a: Any, b: Any, c: Any) -> Values:
    """An elementwise fused multiply-add; all arguments have one dtype."""
    if np.size(a) < np.size(b):
        a, b = b, a
    shape = np.broadcast(a, b, c).shape
    total = np.array(np.broadcast_to(c, shape), order="C").reshape(1, -1)
    first = np.array(np.broadcast_to(a, shape), order="C").reshape(1, -1)
    second = np.array(b if np.size(b) == 1 else np.broadcast_to(b, shape), order="C").reshape(1, -1)
    _chain(total, first, _FIRST, _FIRST, second, _FIRST, _FIRST)
    return total.reshape(shape)


# Functions of float32, as polynomials in Horner's form. The order of operations and all coefficients are part of
# `portable-1`; each constant is the float32 nearest to its decimal.

_ROUNDER: Final = F(12582912)  # 1.5 * 2**23: adding it rounds to a whole number, which the low bits then hold
_WIDE_ROUNDER: Final = np.float64(6755399441055744)  # 1.5 * 2**52
_MOST: Final = F(88.72283935546875)  # whose exponential is the largest that is finite
_EXP: Final = (1.98527617612853646e-4, 1.39304355252534151e-3, 8.33336077630519867e-3, 4.16664853692054749e-2,
               1.66666671633720398e-1, 0.5)  # fmt: skip
_SIN: Final = (2.86567956e-6, -1.98559923e-4, 8.33338592e-3, -1.66666672e-1)
_COS: Final = (2.44677067e-5, -1.38877297e-3, 4.16666567e-2, -0.5, 1.0)
_LOG_EVEN: Final = (-0.130310059, -0.121483512, -0.166846126, -0.249996200)
_LOG_ODD: Final = (0.140869141, 0.139814854, 0.200120345)
_ERF_SMALL: Final = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
_ATAN: Final = (0.00292069139, -0.0163679253, 0.0432118587, -0.0755221471, 0.106660053, -0.142110556, 0.199937731,
                -0.333331525)  # fmt: skip


def _polynomial(x: F32, coefficients: Sequence[float]) -> F32:
    value: Any = F(coefficients[0])
    for each in coefficients[1:]:
        value = fma(value, x, F(each))
    return value  # type: ignore[no-any-return]


def _exp_parts(t: F32, least: float) -> tuple[Values, Values, F32]:
    """Whether t is below `least`, and for the other t: n and e^r - 1, where e^t = 2^n * e^r."""
    below = t < F(least)
    t = np.where(below, F(least), t)
    n = fma(t, F(1.4426950408889634), _ROUNDER) - _ROUNDER
    r = fma(n, F(-0.693145751953125), t)
    r = fma(n, F(-1.428606765330187e-06), r)
    return below, np.where(np.isnan(n), F(0), n).astype(np.int32), fma(r * r, _polynomial(r, _EXP), r)


def _power(n: Values) -> F32:
    """2^n for the exponents of normal numbers, and infinity for 128."""
    return np.left_shift(n + np.int32(127), 23, dtype=np.int32).view(F)


def _exp_halves(t: F32) -> tuple[F32, F32, F32]:
    """2^n as two factors, since 2^128 is not a finite float (the first is 0 below -87), and e^r - 1."""
    below, n, rest = _exp_parts(t, -87)
    half = n >> np.int32(1)
    return np.where(below, F(0), _power(half)), _power(n - half), rest


def exp(x: F32) -> F32:
    """e^x; 0 below -87."""
    first, second, rest = _exp_halves(np.where(x > _MOST, _MOST, x))
    return np.where(np.isnan(x), x, np.where(x > _MOST, F(np.inf), fma(first, rest, first) * second))


def expm1(x: F32) -> F32:
    """e^x - 1."""
    first, second, rest = _exp_halves(np.where(x > _MOST, _MOST, x))
    power = first * second
    large = fma(first, rest, first) * second - F(1)
    value = np.where(x > F(60), large, fma(power, rest, power - F(1)))
    return np.where(np.isnan(x), x, np.where(x > _MOST, F(np.inf), value))


def sigmoid(x: F32) -> F32:
    """1 / (1 + e^-x)."""
    below, n, rest = _exp_parts(-np.abs(x), -87)
    power = np.where(below, F(0), _power(n))
    e = fma(power, rest, power)
    return np.divide(np.where(x < F(0), e, F(1)), e + F(1), dtype=F)


def tanh(x: F32) -> F32:
    """Hyperbolic tangent."""
    below, n, rest = _exp_parts(np.abs(x) * F(-2), -40)
    power = np.where(below, F(0), _power(n))
    top = fma(-power, rest, F(1) - power)  # 1 - e^(-2|x|)
    return np.copysign(top / (F(2) - top), x)


def log(x: F32) -> F32:
    """Natural logarithm."""
    tiny = x < F(2.0**-126)
    bits = np.where(tiny, x * F(2.0**23), x).view(np.int32)
    e = (bits - np.int32(0x3F2AAAAB)) & np.int32(-0x800000)  # the exponent of a number between 2/3 and 4/3, in place
    exponent = fma(e.astype(F), F(2.0**-23), np.where(tiny, F(-23), F(0)))
    f = (bits - e).view(F) - F(1)
    s = f * f
    r = fma(_polynomial(s, _LOG_ODD), f, _polynomial(s, _LOG_EVEN))
    r = fma(fma(fma(r, f, F(0.333331972)), f, F(-0.5)), s, f)
    r = fma(exponent, F(0.693147182), r)
    r = np.where(x < F(0), F(np.nan), np.where(x == F(0), F(-np.inf), r))
    return np.where(np.isnan(x) | (x == F(np.inf)), x, r)


def log1p(x: F32) -> F32:
    """log(1 + x)."""
    u = x + F(1)
    value = log(u) + (x - (u - F(1))) / u
    return np.where(u == F(np.inf), u, np.where(u == F(0), F(-np.inf), value))


def erf(x: F32) -> F32:
    """Error function."""
    t, s = np.abs(x), x * x
    r = fma(fma(F(-1.72853470e-5), t, F(3.83197126e-4)), s, fma(F(-3.88396438e-3), t, F(2.42546219e-2)))
    for each in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = fma(r, t, F(each))
    large = np.copysign(F(1) - exp(fma(r, t, -t)), x)
    return np.where(t <= F(0.927734375), fma(_polynomial(s, _ERF_SMALL), x, x), large)


def _sine(x: F32, quarters: int) -> F32:
    """The sine of x plus `quarters` quarter turns; multiples of pi/2 are subtracted in float64, in two parts."""
    wide = x.astype(np.float64)
    shifted = fma(wide, np.float64(0.6366197723675814), _WIDE_ROUNDER)
    n = shifted - _WIDE_ROUNDER
    quadrant = shifted.view(np.int64) + quarters
    rest = fma(n, np.float64(-6.123233995736766e-17), fma(n, np.float64(-1.5707963267948966), wide))
    r = rest.astype(F)
    s = r * r
    value = np.where(quadrant & 1, _polynomial(s, _COS), fma(_polynomial(s, _SIN) * s, r, r))
    return np.where(np.abs(x) <= F(2.0**46), np.where(quadrant & 2, -value, value), F(np.nan))


def sin(x: F32) -> F32:
    """Sine; NaN beyond 2^46."""
    return _sine(x, 0)


def cos(x: F32) -> F32:
    """Cosine; NaN beyond 2^46."""
    return _sine(x, 1)


def atan(x: F32) -> F32:
    """Arc tangent."""
    t = np.abs(x)
    z = np.where(t > F(1), F(1) / t, t)
    s = z * z
    r = fma(_polynomial(s, _ATAN) * s, z, z)
    away = fma(F(1.68325555), F(0.933189452), -r)  # the product is pi/2, with an error below 2e-14
    return np.copysign(np.where(t > F(1), away, r), x)


def maximum(a: Values, b: Values) -> Values:
    """The larger of two values: b if they are equal, NaN if either is NaN."""
    return np.where((a > b) | (a != a), a, b)


def minimum(a: Values, b: Values) -> Values:
    """The smaller of two values: b if they are equal, NaN if either is NaN."""
    return np.where((a < b) | (a != a), a, b)


def floor_divide(a: Values, b: Values) -> Values:
    """Quotients of integers, rounded down."""
    return np.where(b == -1, -a, a // _divisor(b))


def remainder(a: Values, b: Values) -> Values:
    """The remainder of `floor_divide`, with the sign of b."""
    return np.asarray(a % _divisor(b))


def trunc_divide(a: Values, b: Values) -> Values:
    """Quotients of integers, rounded towards 0."""
    is_up = (remainder(a, b) != 0) & ((a < 0) != (b < 0))
    return np.asarray(floor_divide(a, b) + is_up.astype(a.dtype))


def _divisor(b: Values) -> Values:
    return np.where((b == 0) | (b == -1), b.dtype.type(1), b)


def copysign(a: Values, b: Values) -> Values:
    """The magnitude of a with the sign of b; a NaN as b counts as positive."""
    return np.copysign(a, np.where(np.isnan(b), b.dtype.type(0), b))


def _cast(values: Values, dtype: np.dtype[Any]) -> Values:
    if dtype == np.bool_:
        return np.not_equal(values, 0)
    if values.dtype.kind != "f" or dtype.kind == "f":
        return values.astype(dtype)
    limits, power = np.iinfo(dtype), 2.0 ** (8 * dtype.itemsize - 1)
    is_inside = (values >= -power) & (values < power)
    whole = np.where(is_inside, values, values.dtype.type(0)).astype(dtype)
    return np.where(values >= power, dtype.type(limits.max), np.where(values < -power, dtype.type(limits.min), whole))


_NUMPY: Final = (np.add, np.fmod, np.sqrt, np.floor, np.ceil, np.trunc, np.where)
_OWN: Final = (fma, exp, expm1, log, log1p, sigmoid, tanh, erf, sin, cos, atan, minimum, maximum, copysign,
               floor_divide, trunc_divide, remainder)  # fmt: skip
_MAPS: Final[Mapping[str, Callable[..., Any]]] = {
    **{each.__name__: each for each in (*_NUMPY, *_OWN)},
    "copy": np.asarray,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "round": np.rint,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
"""Functions of arrays of any shape, element by element."""
_FOLDS: Final[Mapping[str, tuple[int | None, Callable[..., Any]]]] = {
    **dict.fromkeys(("sum", "cumsum"), (0, np.add)),
    **dict.fromkeys(("prod", "cumprod"), (1, np.multiply)),
    "amax": (None, maximum),
    "amin": (None, minimum),
    "any": (0, np.logical_or),
    "all": (1, np.logical_and),
}
"""The initial total (None for the first element), and the function that adds the next element."""


_WIDE: Final[Mapping[str, Callable[..., Any]]] = {
    **{each.__name__: each for each in (np.exp, np.expm1, np.log, np.log1p, np.tanh, np.sin, np.cos)},
    "atan": np.arctan,
    "erf": np.vectorize(math.erf, otypes=[np.float64]),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
}
"""Replacements for the functions of float32 when everything is computed in float64."""


class Definition:
    """Computes steps by a form that `check` has accepted.

    Args:
        form: the steps.
        tensors: of the weights file, by name.
        double: compute float32 values in float64, with numpy's functions. This is not the arithmetic defined here, but
            the function that it approximates.
    """

    def __init__(self, form: Form, tensors: Mapping[str, Values], *, double: bool = False) -> None:
        self._form = form
        self._dtypes = [DTYPES["float64" if double and b.dtype == "float32" else b.dtype] for b in form.buffers]
        self._maps = {**_MAPS, **_WIDE} if double else _MAPS
        self._tensors = {
            index: np.array(tensors[buffer.tensor], self._dtypes[index], order="C").reshape(-1, 1)
            for index, buffer in enumerate(form.buffers)
            if buffer.tensor
        }

    def step(self, arrays: Sequence[Values]) -> list[Values]:
        """Compute the outputs and each new leaf, [rows, elements], from the frame and each leaf, [rows, size]."""
        rows = len(arrays[0])
        memory = [
            self._tensors[index] if buffer.tensor else np.empty((buffer.size, rows), self._dtypes[index])
            for index, buffer in enumerate(self._form.buffers)
        ]
        for index, array in zip(self._form.inputs, arrays, strict=True):
            memory[index][...] = array.T
        with np.errstate(all="ignore"):
            for node in self._form.nodes:
                _compute(node, memory, self._maps)
        return [_result(_elements(memory, view), rows) for view in self._form.outputs]


def _result(values: Values, rows: int) -> Values:
    """A contiguous array [rows, elements] in which every NaN is numpy's own: positive, without a payload."""
    columns = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    result = np.array(np.broadcast_to(columns.T, (rows, len(columns))), order="C")
    return np.where(np.isnan(result), result.dtype.type(np.nan), result) if result.dtype.kind == "f" else result


def _elements(memory: Memory, view: View) -> Values:
    """The elements of a view, [*shape, rows]."""
    buffer = memory[view.buffer]
    columns = buffer.shape[1]
    strides = (*(stride * columns * buffer.itemsize for stride in view.strides), buffer.itemsize)
    return np.lib.stride_tricks.as_strided(buffer[view.offset :], (*view.shape, columns), strides)


def _offsets(shape: Sequence[int], strides: Sequence[int], first: int = 0) -> I64:
    """The offsets of a view's elements in their buffer, in row-major order."""
    found = np.full(1, first, np.int64)
    for n, stride in zip(shape, strides, strict=True):
        found = np.add.outer(found, stride * np.arange(n, dtype=np.int64)).reshape(-1)
    return found


def _compute(node: Node, memory: Memory, maps: Mapping[str, Callable[..., Any]]) -> None:
    op, out, rank = node.op, _elements(memory, node.out), len(node.out.shape)
    kind = memory[node.views[0].buffer].dtype if op in COMPARISONS else out.dtype
    args: list[Any] = [_elements(memory, each) if isinstance(each, View) else kind.type(each) for each in node.args]
    if op in maps:
        out[...] = maps[op](*args)
    elif op == "cast":
        out[...] = _cast(args[0], out.dtype)
    elif op == "fma_chain":
        out[...] = _fma_chain(args[0], node, memory).reshape(out.shape)
    elif op == "argmax":
        out[...] = _argmax(args[0], rank)
    elif op in REDUCTIONS:
        out[...] = _fold(op, args[0], rank)
    elif op in SCANS:
        _fold(op, args[0], rank - 1, out)
    elif op == "take":
        out[...] = np.take_along_axis(args[0], _in_range(args[1], args[0].shape[-2])[..., None, :], -2)[..., 0, :]
    else:
        _put(op, out, *args)


def _fma_chain(start: Any, node: Node, memory: Memory) -> Values:
    out, (a, b) = node.out, (each for each in node.args[1:] if isinstance(each, View))
    if memory[a.buffer].shape[1] == 1:
        a, b = b, a
    rows, rank = memory[out.buffer].shape[1], len(out.shape)
    totals = np.array(np.broadcast_to(start, (*out.shape, rows)), order="C").reshape(out.elements, rows)
    first = memory[a.buffer]
    if first.shape[1] != rows:  # two tensors
        first = np.array(np.broadcast_to(first, (len(first), rows)), order="C")
    a_outer = _offsets(a.shape[:rank], a.strides[:rank], a.offset)
    b_outer = _offsets(b.shape[:rank], b.strides[:rank], b.offset)
    a_inner, b_inner = (_offsets(each.shape[rank:], each.strides[rank:]) for each in (a, b))
    _chain(totals, first, a_outer, a_inner, memory[b.buffer], b_outer, b_inner)
    return totals


def _fold(op: str, values: Values, rank: int, running: Values | None = None) -> Values:
    """Reduce the dimensions from `rank` on, except the rows, in row-major order; `running` gets each running total."""
    start, combined = _FOLDS[op]
    kept: tuple[Any, ...] = (slice(None),) * rank
    inner = values.shape[rank:-1]
    if start is None:  # the loop combines the first element with itself, which changes nothing
        total: Values = values[(*kept, *(0,) * len(inner))]
    else:
        total = np.full((*values.shape[:rank], values.shape[-1]), start, values.dtype)
    for index in np.ndindex(*inner):
        total = combined(total, values[(*kept, *index)])
        if running is not None:
            running[(*kept, *index)] = total
    return total


def _argmax(values: Values, rank: int) -> Values:
    kept: tuple[Any, ...] = (slice(None),) * rank
    inner = values.shape[rank:-1]
    best = values[(*kept, *(0,) * len(inner))]
    found = np.zeros(best.shape, np.int64)
    for number, index in enumerate(np.ndindex(*inner)):
        each = values[(*kept, *index)]
        is_larger = (each > best) | ((each != each) & (best == best))
        best, found = np.where(is_larger, each, best), np.where(is_larger, np.int64(number), found)
    return found


def _in_range(index: I64, count: int) -> I64:
    return np.clip(np.where(index < 0, index + count, index), 0, count - 1)


def _put(op: str, out: Values, index: I64, value: Any) -> None:
    index, value = _in_range(index, out.shape[-2]), np.broadcast_to(value, (*out.shape[:-2], out.shape[-1]))
    rows = np.arange(out.shape[-1])
    for position in np.ndindex(*out.shape[:-2]):
        target, place = out[position], (index[position], rows)
        target[place] = value[position] if op == "put" else target[place] + value[position]
