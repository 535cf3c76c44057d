"""Code for one element of every row: a scalar program over vectors, with one row in each lane.

No operation crosses lanes, so the number of lanes does not change a bit. With one lane the values are plain scalars.
Operations have no fast-math flag, so LLVM may neither reorder nor contract them. `definition` computes the same with
other code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final, TypeAlias

from llvmlite import ir

Value: TypeAlias = Any
"""A value of llvmlite, which has no type annotations."""

F32, F64, I1, I8, I32, I64 = (
    ir.FloatType(),
    ir.DoubleType(),
    ir.IntType(1),
    ir.IntType(8),
    ir.IntType(32),
    ir.IntType(64),
)
VOID, POINTER = ir.VoidType(), ir.PointerType()
KINDS: Final[Mapping[str, Any]] = {"bool": I1, "int32": I32, "int64": I64, "float32": F32, "float64": F64}
"""The types of values in registers."""
STORED: Final[Mapping[str, Any]] = {**KINDS, "bool": I8}
SIZES: Final = {"bool": 1, "int32": 4, "int64": 8, "float32": 4, "float64": 8}
"""Sizes in memory, in bytes."""
FLOATS: Final = ("float32", "float64")
_BITS: Final = {"float32": "int32", "float64": "int64"}
_INFINITY: Final = {"float32": 0x7F800000, "float64": 0x7FF0 << 48}
_QUIET_NAN: Final = {"float32": 0x7FC00000, "float64": 0x7FF8 << 48}
_COMPARISONS: Final = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}

_INTRINSICS: Final = {"sqrt": "sqrt", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "round": "roundeven"}
"""LLVM's names for maps of floats."""
_INSTRUCTIONS: Final = {
    **{name: (f"f{name}", name) for name in ("add", "sub", "mul")},
    **{name: ("", f"{name}_") for name in ("and", "or")},
    "xor": ("", "xor"),
    "div": ("fdiv", ""),
    "fmod": ("frem", ""),
}
"""The builder's methods for floats, and for integers."""

_ROUNDS: Final = 12582912.0
"""1.5 · 2^23: adding it to a small float32 rounds that to an integer."""
_ROUNDS_WIDE: Final = 6755399441055744.0
"""1.5 · 2^52: adding it to a small float64 rounds that to an integer."""
_LARGEST_EXPONENT: Final = 88.72283935546875
"""The largest float32 whose exponential is finite."""
_EXP: Final = (
    0.000198527617612853646278381,
    0.00139304355252534151077271,
    0.00833336077630519866943359,
    0.0416664853692054748535156,
    0.166666671633720397949219,
    0.5,
)
_ERF_LARGE: Final = (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1)
_ERF_SMALL: Final = (4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
_ATAN: Final = (
    0.00292069139,
    -0.0163679253,
    0.0432118587,
    -0.0755221471,
    0.106660053,
    -0.142110556,
    0.199937731,
    -0.333331525,
)


class Lanes:
    """Writes one function; `b` is llvmlite's builder.

    Args:
        module: the module that the function is added to.
        name: of the function.
        arguments: the types of its arguments.
        count: the number of lanes.
    """

    def __init__(self, module: ir.Module, name: str, arguments: Sequence[Any], count: int) -> None:
        self.module, self.count = module, count
        self.function = ir.Function(module, ir.FunctionType(VOID, arguments), name)
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))

    # ── Values, memory and loops ───────────────────────────────────────────────────────────────────────────────────

    def vector(self, kind: Any) -> Any:
        """The vector type with lanes of a kind."""
        return ir.VectorType(kind, self.count) if self.count > 1 else kind

    def i(self, value: int) -> Value:
        """An integer for addresses and loops."""
        return ir.Constant(I64, value)

    def const(self, value: float, dtype: str = "float32") -> Value:
        """The same number in every lane."""
        kind = KINDS[dtype]
        number: float = float(value) if dtype in FLOATS else int(value)
        if dtype == "float32":
            number = _rounded(number)
        return ir.Constant(self.vector(kind), [number] * self.count if self.count > 1 else number)

    def splat(self, one: Value) -> Value:
        """Copy a scalar to every lane."""
        if self.count == 1:
            return one
        kind = ir.VectorType(one.type, self.count)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), one, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.count), [0] * self.count)
        return self.b.shuffle_vector(first, ir.Constant(kind, ir.Undefined), zeros)

    def lane(self, value: Value, number: int) -> Value:
        """One lane."""
        return value if self.count == 1 else self.b.extract_element(value, ir.Constant(I32, number))

    def room(self, kind: Any, count: int = 1) -> Value:
        """Reserve memory of the function."""
        with self.b.goto_entry_block():
            place = self.b.alloca(kind, count)
        place.align, place.type = 64, POINTER
        return place

    def at(self, pointer: Value, index: Value, kind: Any = I8) -> Value:
        """The address of an element."""
        return self.b.gep(pointer, [index], source_etype=kind, inbounds=True)

    def get(self, pointer: Value, kind: Any, align: int) -> Value:
        """Load."""
        return self.b.load(pointer, align=align, typ=kind)

    def put(self, value: Value, pointer: Value, align: int) -> None:
        """Store."""
        self.b.store(value, pointer, align=align)

    @contextmanager
    def loop(self, stop: Value, start: Value | None = None, step: int = 1) -> Iterator[Value]:
        """A loop; yields its index."""
        b, place = self.b, self.room(I64)
        b.store(self.i(0) if start is None else start, place)
        head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        index = b.load(place, typ=I64)
        b.cbranch(b.icmp_signed("<", index, stop), body, after)
        b.position_at_end(body)
        yield index
        b.store(b.add(index, self.i(step)), place)
        b.branch(head)
        b.position_at_end(after)

    @contextmanager
    def loops(self, dims: Sequence[tuple[int, tuple[int, ...]]], count: int) -> Iterator[tuple[Value, ...]]:
        """Nested loops, each with a size and `count` strides; yields the sums of index times stride."""
        with ExitStack() as stack:
            sums = [self.i(0)] * count
            for size, strides in dims:
                if size == 1:
                    continue
                index = stack.enter_context(self.loop(self.i(size)))
                moved = [self.b.mul(index, self.i(stride)) if stride else None for stride in strides]
                sums = [
                    each if more is None else self.b.add(each, more) for each, more in zip(sums, moved, strict=True)
                ]
            yield tuple(sums)

    def least(self, one: Value, other: Value) -> Value:
        """The smaller of two integers."""
        return self.b.select(self.b.icmp_signed("<", one, other), one, other)

    def intrinsic(self, name: str, *values: Value) -> Value:
        """Call one of LLVM's float functions that round as IEEE 754 says."""
        kind = values[0].type
        full = f"llvm.{name}.{_type_name(kind)}"
        known = self.module.globals.get(full) or ir.Function(
            self.module, ir.FunctionType(kind, [kind] * len(values)), full
        )
        return self.b.call(known, values)

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """The sum x · y + z, rounded once."""
        return self.intrinsic("fma", x, y, z)

    # ── Maps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def map(self, op: str, dtype: str, args: Sequence[Value], given: Sequence[str]) -> Value:
        """A primitive of `form.MAPS`, a comparison, `cast` or `where`.

        Args:
            op: its name.
            dtype: of the result.
            args: values.
            given: dtypes of the arguments.
        """
        if op in _COMPARISONS:
            return self.compare(_COMPARISONS[op], given[0], *args)
        if op == "cast":
            return self.cast(args[0], given[0], dtype)
        if op == "copy":
            return args[0]
        if op in _INTRINSICS:
            return self.intrinsic(_INTRINSICS[op], *args)
        if op in _INSTRUCTIONS:
            return self.binary(op, dtype, *args)
        write: Callable[..., Value] = getattr(self, f"_{op}")
        return write(dtype, *args)

    def binary(self, op: str, dtype: str, x: Value, y: Value) -> Value:
        """A map that consists of one instruction."""
        return getattr(self.b, _INSTRUCTIONS[op][dtype not in FLOATS])(x, y)

    def compare(self, sign: str, dtype: str, x: Value, y: Value) -> Value:
        """A comparison as IEEE 754 defines it; integers are signed."""
        if dtype in FLOATS:
            return (self.b.fcmp_unordered if sign == "!=" else self.b.fcmp_ordered)(sign, x, y)
        if dtype == "bool":
            return self.b.icmp_unsigned(sign, x, y)
        return self.b.icmp_signed(sign, x, y)

    def cast(self, value: Value, of: str, to: str) -> Value:
        """Convert to another dtype. Floats are truncated and limited to the integer's range; NaN becomes 0."""
        b, kind = self.b, self.vector(KINDS[to])
        if of == to:
            return value
        if to == "bool":
            return self.compare("!=", of, value, self.const(0, of))
        if of == "bool":
            return b.uitofp(value, kind) if to in FLOATS else b.zext(value, kind)
        if of in FLOATS and to in FLOATS:
            return b.fpext(value, kind) if to == "float64" else b.fptrunc(value, kind)
        if of in FLOATS:
            name = f"llvm.fptosi.sat.{_type_name(kind)}.{_type_name(value.type)}"
            known = self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(kind, [value.type]), name)
            return b.call(known, [value])
        if to in FLOATS:
            return b.sitofp(value, kind)
        return b.sext(value, kind) if to == "int64" else b.trunc(value, kind)

    def one_nan(self, dtype: str, x: Value) -> Value:
        """Replace every NaN by the one NaN that is stored."""
        if dtype not in FLOATS:
            return x
        # On integers: for LLVM one NaN of floats is as good as another, and it leaves out a choice between the two.
        b, bits = self.b, _BITS[dtype]
        whole = b.bitcast(x, self.vector(KINDS[bits]))
        magnitude = b.and_(whole, self.const(2 ** (8 * SIZES[bits] - 1) - 1, bits))
        is_nan = b.icmp_signed(">", magnitude, self.const(_INFINITY[dtype], bits))
        return b.bitcast(b.select(is_nan, self.const(_QUIET_NAN[dtype], bits), whole), x.type)

    def _is_nan(self, x: Value) -> Value:
        return self.b.fcmp_unordered("uno", x, x)

    def _where(self, dtype: str, condition: Value, x: Value, y: Value) -> Value:
        return self.b.select(condition, x, y)

    def _fma(self, dtype: str, x: Value, y: Value, z: Value) -> Value:
        return self.fma(x, y, z)

    def _neg(self, dtype: str, x: Value) -> Value:
        return self.b.fneg(x) if dtype in FLOATS else self.b.sub(self.const(0, dtype), x)

    def _abs(self, dtype: str, x: Value) -> Value:
        if dtype in FLOATS:
            return self.intrinsic("fabs", x)
        return self.b.select(self.b.icmp_signed("<", x, self.const(0, dtype)), self._neg(dtype, x), x)

    def _maximum(self, dtype: str, x: Value, y: Value) -> Value:
        return self._extreme(">", dtype, x, y)

    def _minimum(self, dtype: str, x: Value, y: Value) -> Value:
        return self._extreme("<", dtype, x, y)

    def _extreme(self, sign: str, dtype: str, x: Value, y: Value) -> Value:
        takes = self.compare(sign, dtype, x, y)
        return self.b.select(self.b.or_(takes, self._is_nan(x)) if dtype in FLOATS else takes, x, y)

    def _copysign(self, dtype: str, x: Value, y: Value) -> Value:
        # A processor chooses the sign of a NaN that it makes, so none may be seen.
        magnitude = self.intrinsic("fabs", x)
        return self.b.select(self._is_nan(y), magnitude, self._with_sign(dtype, magnitude, y))

    def _with_sign(self, dtype: str, magnitude: Value, of: Value) -> Value:
        """A non-negative number with the sign of another one."""
        b, bits = self.b, _BITS[dtype]
        kind = self.vector(KINDS[bits])
        sign = b.and_(b.bitcast(of, kind), self.const(-(2 ** (8 * SIZES[bits] - 1)), bits))
        return b.bitcast(b.or_(b.bitcast(magnitude, kind), sign), of.type)

    def _not(self, dtype: str, x: Value) -> Value:
        return self.b.xor(x, self.const(1 if dtype == "bool" else -1, dtype))

    def _divisor(self, dtype: str, y: Value) -> Value:
        """Replace divisors that would crash the process: 0, and -1 under the smallest number."""
        b = self.b
        bad = b.or_(b.icmp_signed("==", y, self.const(0, dtype)), b.icmp_signed("==", y, self.const(-1, dtype)))
        return b.select(bad, self.const(1, dtype), y)

    def _trunc_divide(self, dtype: str, x: Value, y: Value) -> Value:
        b, quotient = self.b, self.b.sdiv(x, self._divisor(dtype, y))
        return b.select(b.icmp_signed("==", y, self.const(-1, dtype)), self._neg(dtype, x), quotient)

    def _rest(self, dtype: str, x: Value, y: Value) -> tuple[Value, Value]:
        """The remainder with the sign of x, and whether that sign differs from y's."""
        b, zero = self.b, self.const(0, dtype)
        rest = b.srem(x, self._divisor(dtype, y))
        is_other = b.xor(b.icmp_signed("<", rest, zero), b.icmp_signed("<", y, zero))
        return rest, b.and_(b.icmp_signed("!=", rest, zero), is_other)

    def _floor_divide(self, dtype: str, x: Value, y: Value) -> Value:
        _, is_other = self._rest(dtype, x, y)
        quotient = self._trunc_divide(dtype, x, y)
        return self.b.select(is_other, self.b.sub(quotient, self.const(1, dtype)), quotient)

    def _remainder(self, dtype: str, x: Value, y: Value) -> Value:
        rest, is_other = self._rest(dtype, x, y)
        return self.b.select(is_other, self.b.add(rest, y), rest)

    # ── Functions of float32 ───────────────────────────────────────────────────────────────────────────────────────

    def _horner(self, x: Value, first: float | Value, *others: float) -> Value:
        total = self.const(first) if isinstance(first, float) else first
        for each in others:
            total = self.fma(total, x, self.const(each))
        return total

    def _exponent(self, t: Value, least: float, bias: int) -> tuple[Value, Value, Value]:
        """For e^t = 2^n · e^r: whether t is below `least`, n plus `bias` as an integer, and e^r - 1."""
        b = self.b
        below = b.fcmp_ordered("<", t, self.const(least))
        t = b.select(below, self.const(least), t)
        shifted = self.fma(t, self.const(1.4426950408889634), self.const(_ROUNDS))
        n = b.fsub(shifted, self.const(_ROUNDS))
        r = self.fma(n, self.const(-0.693145751953125), t)
        r = self.fma(n, self.const(-1.428606765330187e-06), r)
        whole = b.sub(b.bitcast(shifted, self.vector(I32)), self.const(0x4B400000 - bias, "int32"))
        return below, whole, self.fma(b.fmul(r, r), self._horner(r, *_EXP), r)

    def _power(self, biased: Value) -> Value:
        """2^n from n + 127."""
        shifted = self.b.shl(biased, self.const(23, "int32"))
        return self.b.bitcast(shifted, self.vector(F32))

    def _small_exp(self, t: Value, least: float) -> tuple[Value, Value]:
        """For t <= 0: 2^n, which is 0 if t is below `least`, and e^r - 1."""
        below, whole, rest = self._exponent(t, least, 127)
        return self.b.select(below, self.const(0), self._power(whole)), rest

    def _halves(self, t: Value) -> tuple[Value, Value, Value]:
        """Two factors of 2^n, which may be infinite where e^t is not, and e^r - 1."""
        b = self.b
        below, whole, rest = self._exponent(t, -87.0, 0)
        half = b.ashr(whole, self.const(1, "int32"))
        one, other = (self._power(b.add(each, self.const(127, "int32"))) for each in (half, b.sub(whole, half)))
        return b.select(below, self.const(0), one), other, rest

    def _sigmoid(self, dtype: str, x: Value) -> Value:
        b = self.b
        power, rest = self._small_exp(b.fneg(self.intrinsic("fabs", x)), -87.0)
        e = self.fma(power, rest, power)
        top = b.select(b.fcmp_ordered("<", x, self.const(0)), e, self.const(1))
        return b.fdiv(top, b.fadd(e, self.const(1)))

    def _tanh(self, dtype: str, x: Value) -> Value:
        b = self.b
        power, rest = self._small_exp(b.fmul(self.intrinsic("fabs", x), self.const(-2)), -40.0)
        top = self.fma(b.fneg(power), rest, b.fsub(self.const(1), power))  # 1 - e^(-2|x|)
        return self._with_sign(dtype, b.fdiv(top, b.fsub(self.const(2), top)), x)

    def _exp(self, dtype: str, x: Value) -> Value:
        b, most = self.b, self.const(_LARGEST_EXPONENT)
        over = b.fcmp_ordered(">", x, most)
        one, other, rest = self._halves(b.select(over, most, x))
        found = b.fmul(self.fma(one, rest, one), other)
        return b.select(self._is_nan(x), x, b.select(over, self.const(math.inf), found))

    def _expm1(self, dtype: str, x: Value) -> Value:
        b, most, minus_one = self.b, self.const(_LARGEST_EXPONENT), self.const(1)
        over = b.fcmp_ordered(">", x, most)
        t = b.select(over, most, x)
        one, other, rest = self._halves(t)
        power = b.fmul(one, other)
        small = self.fma(power, rest, b.fsub(power, minus_one))
        large = b.fsub(b.fmul(self.fma(one, rest, one), other), minus_one)
        found = b.select(b.fcmp_ordered(">", t, self.const(60)), large, small)
        return b.select(self._is_nan(x), x, b.select(over, self.const(math.inf), found))

    def _log(self, dtype: str, x: Value) -> Value:
        b, ints = self.b, self.vector(I32)
        tiny = b.fcmp_ordered("<", x, self.const(1.1754943508222875e-38))
        bits = b.bitcast(b.select(tiny, b.fmul(x, self.const(8388608.0)), x), ints)
        e = b.and_(b.sub(bits, self.const(0x3F2AAAAB, "int32")), self.const(-0x800000, "int32"))
        f = b.fsub(b.bitcast(b.sub(bits, e), x.type), self.const(1))
        i = self.fma(b.sitofp(e, x.type), self.const(2.0**-23), b.select(tiny, self.const(-23), self.const(0)))
        s = b.fmul(f, f)
        even = self._horner(s, -0.130310059, -0.121483512, -0.166846126, -0.249996200)
        odd = self._horner(s, 0.140869141, 0.139814854, 0.200120345)
        r = self.fma(self._horner(f, self.fma(odd, f, even), 0.333331972, -0.5), s, f)
        r = self.fma(i, self.const(0.693147182), r)
        r = b.select(b.fcmp_ordered("<", x, self.const(0)), self.const(math.nan), r)
        r = b.select(b.fcmp_ordered("==", x, self.const(0)), self.const(-math.inf), r)
        return b.select(b.or_(self._is_nan(x), b.fcmp_ordered("==", x, self.const(math.inf))), x, r)

    def _log1p(self, dtype: str, x: Value) -> Value:
        b, one = self.b, self.const(1)
        u = b.fadd(x, one)
        lost = b.fdiv(b.fsub(x, b.fsub(u, one)), u)
        found = b.fadd(self._log(dtype, u), lost)
        found = b.select(b.fcmp_ordered("==", u, self.const(0)), self.const(-math.inf), found)
        return b.select(b.fcmp_ordered("==", u, self.const(math.inf)), u, found)

    def _erf(self, dtype: str, x: Value) -> Value:
        b = self.b
        t, s = self.intrinsic("fabs", x), b.fmul(x, x)
        odd = self._horner(t, -1.72853470e-5, 3.83197126e-4)
        r = self.fma(odd, s, self._horner(t, -3.88396438e-3, 2.42546219e-2))
        r = self.fma(self._horner(t, r, *_ERF_LARGE), t, b.fneg(t))
        large = self._with_sign(dtype, b.fsub(self.const(1), self._exp(dtype, r)), x)
        small = self.fma(self._horner(s, -5.96761703e-4, *_ERF_SMALL), x, x)
        return b.select(b.fcmp_unordered(">", t, self.const(0.927734375)), large, small)

    def _atan(self, dtype: str, x: Value) -> Value:
        b, one = self.b, self.const(1)
        t = self.intrinsic("fabs", x)
        is_large = b.fcmp_ordered(">", t, one)
        z = b.select(is_large, b.fdiv(one, t), t)
        s = b.fmul(z, z)
        r = self.fma(b.fmul(self._horner(s, *_ATAN), s), z, z)
        away = self.fma(self.const(1.68325555), self.const(0.933189452), b.fneg(r))  # the product is π/2
        return self._with_sign(dtype, b.select(is_large, away, r), x)

    def _sin(self, dtype: str, x: Value) -> Value:
        return self._sine(x, 0)

    def _cos(self, dtype: str, x: Value) -> Value:
        return self._sine(x, 1)

    def _sine(self, x: Value, quarters: int) -> Value:
        """The sine of x and some quarter turns, which are subtracted in float64; NaN for x beyond 2^46."""
        b, of = self.b, "float64"
        wide = b.fpext(x, self.vector(F64))
        shifted = self.fma(wide, self.const(2 / math.pi, of), self.const(_ROUNDS_WIDE, of))
        j = b.fsub(shifted, self.const(_ROUNDS_WIDE, of))
        q = b.trunc(b.bitcast(shifted, self.vector(I64)), self.vector(I32))
        q = b.add(q, self.const(quarters, "int32"))
        r = self.fma(j, self.const(-math.pi / 2, of), wide)
        r = b.fptrunc(self.fma(j, self.const(-6.123233995736766e-17, of), r), self.vector(F32))
        s = b.fmul(r, r)
        u = self._horner(s, 2.86567956e-6, -1.98559923e-4, 8.33338592e-3, -1.66666672e-1)
        sine = self.fma(b.fmul(u, s), r, r)
        cosine = self._horner(s, 2.44677067e-5, -1.38877297e-3, 4.16666567e-2, -5.0e-1, 1.0)
        one, two, zero = (self.const(each, "int32") for each in (1, 2, 0))
        found = b.select(b.icmp_signed("!=", b.and_(q, one), zero), cosine, sine)
        found = b.select(b.icmp_signed("!=", b.and_(q, two), zero), b.fneg(found), found)
        far = b.fcmp_unordered(">", self.intrinsic("fabs", x), self.const(2.0**46))
        return b.select(far, self.const(math.nan), found)


def _rounded(value: float) -> float:
    import numpy as np

    with np.errstate(over="ignore"):
        return float(np.float32(value))


def _type_name(kind: Any) -> str:
    """A type as it appears in the names of LLVM's functions: `v16f32`."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_type_name(kind.element)}"
    return {F32: "f32", F64: "f64", I32: "i32", I64: "i64"}[kind]
