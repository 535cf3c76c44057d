from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from instep.models.portable.definition import Definition, exact_fma, fma
from instep.models.portable.form import Builder, Form, Operand, View, broadcast, check, permute, reshape
from instep.models.portable.self_check import sample_form, sample_inputs

Values = npt.NDArray[Any]
NAN, INF = math.nan, math.inf
LEAST32, LEAST64 = -(2**31), -(2**63)


def run(form: Form, arrays: Sequence[Values], tensors: dict[str, Values] | None = None) -> list[Values]:
    tensors = tensors or {}
    check(form, {name: (tensor.dtype.name, tensor.size) for name, tensor in tensors.items()}, "the form")
    frame = np.zeros((len(arrays[0]) if arrays else 1, 1), np.float32)
    return Definition(form, tensors).step([frame, *arrays])[1:]


def compute(emit: Callable[..., View], *given: Values) -> Values:
    """What nodes make of arrays [rows, ...]: `emit` gets a builder and views of one row."""
    builder = Builder()
    frame = builder.input("float32", (1,))
    views = [builder.input(each.dtype.name, each.shape[1:]) for each in given]
    result = emit(builder, *views)
    # the outputs of a form are like its inputs, so the result becomes another leaf
    leaf = builder.input(builder.dtype(result), result.shape)
    form = builder.form([frame, *views, result])
    rows = len(given[0]) if given else 1
    added = np.zeros((rows, leaf.elements), builder.dtype(result))
    found = run(form, [*(each.reshape(rows, -1) for each in given), added])[-1]
    assert found.flags.c_contiguous
    return found.reshape(rows, *result.shape)


def mapped(op: str, *given: Values | float | int | bool) -> Values:
    """A map of arrays of one element for each row, and of numbers."""

    def emit(builder: Builder, *views: View) -> View:
        left = list(views)
        args: list[Operand] = [left.pop(0) if isinstance(each, np.ndarray) else each for each in given]
        return builder.map(op, *args)

    return compute(emit, *(each.reshape(-1, 1) for each in given if isinstance(each, np.ndarray))).reshape(-1)


def f4(*values: Any) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def assert_same(found: Values, expected: Values) -> None:
    """The same bits, of which every NaN has one kind."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if expected.dtype.kind == "f":
        expected = np.where(np.isnan(expected), expected.dtype.type(np.nan), expected)
    assert found.tobytes() == np.ascontiguousarray(expected).tobytes(), f"{found} is not {expected}"


def rounded(exact: Fraction, kind: type[Any]) -> Any:
    """The nearest float by search among neighbours, the even one of two."""
    near = kind(float(exact))
    around = [np.nextafter(near, kind(-INF)), near, np.nextafter(near, kind(INF))]
    bits = "<I" if kind is np.float32 else "<Q"
    code = "<f" if kind is np.float32 else "<d"
    return min(
        around, key=lambda a: (abs(Fraction(float(a)) - exact), struct.unpack(bits, struct.pack(code, a))[0] % 2)
    )


HARD = [
    (1 + 2.0**-23, 1 + 2.0**-23, -1 - 2.0**-22),  # the last bit of the product is all that remains
    (2.0**-75, 2.0**-75, 0.0),  # half of the least denormal, which rounds to even
    (2.0**-75, 2.0**-75 * (1 + 2.0**-23), 0.0),  # a bit more than half
    (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60),  # in double, the sum would be halfway between two floats
    (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60)),
    (-(1 + 2.0**-12), 1 + 2.0**-12, 2.0**-60),
    (1 + 2.0**-12, 1 + 2.0**-12, 0.75 * 2.0**-52),  # next to halfway
    (2.0**-126, 0.5 + 2.0**-24, 2.0**-149),  # denormal
    (3.0, 2.0**-149, -(2.0**-149)),
    (2.0**127, 1.5, 2.0**104 - 2.0**127),
    (16777215.0, 16777215.0, -281474943156225.0),  # cancels to +0
    (-1.0, 5.0, 5.0),
]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_fma_rounds_once(kind: type[Any]) -> None:
    a, b, c = (np.array(column, kind) for column in zip(*HARD, strict=True))
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    expected = np.array([rounded(each, kind) for each in exact], kind)
    assert_same(mapped("fma", a, b, c), expected)
    assert_same(np.array([exact_fma(*each) for each in zip(a, b, c, strict=True)]), expected)
    if kind is np.float32:
        with np.errstate(all="ignore"):
            assert (a * b + c != expected).any()
            assert ((a.astype(float) * b + c).astype(kind) != expected).any()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_fma_of_zeros_infinities_and_nan(kind: type[Any]) -> None:
    most = float(np.finfo(kind).max)
    cases = [
        (0.0, -1.0, 0.0, 0.0),
        (0.0, -1.0, -0.0, -0.0),
        (INF, 0.0, 1.0, NAN),
        (INF, 1.0, -INF, NAN),
        (-INF, 2.0, 1.0, -INF),
        (NAN, 1.0, 1.0, NAN),
        (most, most, -INF, -INF),
        (-most, most, 1.0, -INF),
        (most, 2.0, -most, most),
    ]
    a, b, c, expected = (np.array(column, kind) for column in zip(*cases, strict=True))
    assert_same(mapped("fma", a, b, c), expected)
    assert_same(mapped("copy", np.array([exact_fma(*each) for each in zip(a, b, c, strict=True)])), expected)


@given(*[st.floats(width=32)] * 3)
def test_compiled_fma_is_the_exact_one(a: float, b: float, c: float) -> None:
    for kind in (np.float32, np.float64):
        scalars = kind(a), kind(b), kind(c)
        assert np.array_equal(fma(*scalars), exact_fma(*scalars), equal_nan=True)


def chain(start: Values, a: Values, b: Values) -> Values:
    """Of [outputs], [outputs, k] and [outputs, k], in exact fractions."""
    total = start.copy()
    for k in range(a.shape[-1]):
        for at in np.ndindex(*total.shape):
            exact = Fraction(float(a[(*at, k)])) * Fraction(float(b[(*at, k)])) + Fraction(float(total[at]))
            total[at] = rounded(exact, total.dtype.type)
    return total


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("shared", ["a", "b", "both", "neither"])
def test_fma_chain_of_every_kind_of_factor(kind: type[Any], rows: int, shared: str) -> None:
    random = np.random.default_rng(5)
    x, w, start = (random.standard_normal(shape).astype(kind) for shape in ((rows, 4), (rows, 3, 4), (rows, 3)))
    tensors = {"x": x[0], "w": w[0]}
    builder = Builder()
    frame, dtype = builder.input("float32", (1,)), np.dtype(kind).name
    first, row_x, row_w = (builder.input(dtype, each.shape[1:]) for each in (start, x, w))
    a = builder.tensor("x", dtype, (4,)) if shared in ("a", "both") else row_x
    b = builder.tensor("w", dtype, (3, 4)) if shared in ("b", "both") else row_w
    result = builder.dense(a, b, first)
    form = builder.form([frame, result, row_x, row_w])
    used = {buffer.tensor for buffer in form.buffers} - {""}
    found = run(form, [start, x, w.reshape(rows, -1)], {name: tensors[name] for name in used})[0]
    for row in range(rows):
        own_x = x[0] if "x" in used else x[row]
        own_w = w[0] if "w" in used else w[row]
        assert_same(found[row], chain(start[row], np.broadcast_to(own_x, (3, 4)), own_w))


def test_fma_chain_sums_over_windows_in_row_major_order() -> None:
    """A convolution: overlapping windows of the input, two reduced dimensions."""
    random = np.random.default_rng(6)
    x, w = random.standard_normal((2, 2, 6)).astype(np.float32), random.standard_normal((1, 3, 2, 3)).astype(np.float32)

    def emit(builder: Builder, x: View, w: View) -> View:
        windows = View(x.buffer, 0, (3, 4, 2, 3), (0, 1, 6, 1))
        weights = broadcast(reshape(w, (3, 1, 2, 3)), (3, 4, 2, 3))
        return builder.emit("fma_chain", builder.fresh("float32", (3, 4)), 0.5, windows, weights)

    found = compute(emit, x, np.repeat(w, 2, 0))
    for row in range(2):
        windows = np.stack([x[row, :, t : t + 3].reshape(6) for t in range(4)])
        a, b = np.broadcast_arrays(windows[None], w.reshape(3, 1, 6))
        assert_same(found[row], chain(np.full((3, 4), 0.5, np.float32), a, b))


def test_sums_are_one_chain_from_positive_zero() -> None:
    x = f4(1.0, 2.0**-24, 2.0**-24, 2.0**-23, -1.0, 2.0**-24).reshape(1, 2, 3)
    total = compute(lambda b, v: b.reduce("sum", v, [0, 1]), x)
    assert_same(total, f4(2.0**-23 + 2.0**-24))  # the second and third are lost; exact: 5 * 2**-24
    transposed = compute(lambda b, v: b.reduce("sum", permute(v, [1, 0]), [0, 1]), x)
    assert_same(transposed, f4(2.0**-22 + 2.0**-23))
    columns = compute(lambda b, v: b.reduce("sum", v, [0], keep=True), x)
    assert_same(columns, x[:, :1] + x[:, 1:])
    negative = np.full((1, 1), -0.0, np.float32)
    assert_same(compute(lambda b, v: b.reduce("sum", v, [0]), negative), f4(0.0))
    assert_same(compute(lambda b, v: b.emit("cumsum", b.fresh("float32", (1,)), v), negative), f4(0.0).reshape(1, 1))
    empty = np.zeros((2, 3, 0), np.float32)
    assert_same(compute(lambda b, v: b.reduce("sum", v, [1]), empty), np.zeros((2, 3), np.float32))
    assert_same(compute(lambda b, v: b.reduce("prod", v, [1]), empty), np.ones((2, 3), np.float32))


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32", "float64"])
def test_reductions_and_scans(dtype: str) -> None:
    x = np.random.default_rng(7).integers(-9, 10, (4, 3, 5)).astype(dtype)
    x[0, 0, 0] = 2 ** (31 if dtype == "int32" else 63) - 1 if "int" in dtype else 2**20
    with np.errstate(over="ignore"):
        for op, theirs in (("sum", np.add), ("prod", np.multiply), ("amax", np.maximum), ("amin", np.minimum)):
            found = compute(lambda b, v, op=op: b.reduce(op, v, [1]), x)
            assert_same(found, theirs.reduce(x, axis=2, dtype=dtype))
        for op, theirs in (("cumsum", np.add), ("cumprod", np.multiply)):
            found = compute(lambda b, v, op=op: b.emit(op, b.fresh(dtype, v.shape), v), x)
            assert_same(found, theirs.accumulate(x, axis=2, dtype=dtype))
    assert_same(compute(lambda b, v: b.reduce("argmax", v, [0, 1]), x), x.reshape(4, 15).argmax(1))


def test_the_largest_of_nan_and_of_equals() -> None:
    x = f4(1, 3, 3, 0, 1, NAN, 5, NAN, NAN, 1, 2, 3, 0.0, -0.0, -0.0, -1).reshape(4, 4)
    assert_same(compute(lambda b, v: b.reduce("argmax", v, [0]), x), np.array([1, 1, 0, 0]))
    assert_same(compute(lambda b, v: b.reduce("amax", v, [0]), x), f4(3, NAN, NAN, -0.0))
    assert_same(compute(lambda b, v: b.reduce("amin", v, [0]), x), f4(0, NAN, NAN, -1))
    a, b = f4(0.0, -0.0, NAN, 1.0, 2.0, -INF), f4(-0.0, 0.0, 1.0, NAN, 1.0, INF)
    assert_same(mapped("maximum", a, b), f4(-0.0, 0.0, NAN, NAN, 2.0, INF))
    assert_same(mapped("minimum", a, b), f4(-0.0, 0.0, NAN, NAN, 1.0, -INF))


_FLOATS = [0.0, -0.0, 1.0, -1.5, 2.5, -0.5, 0.5, 3e38, -7.25, 2.0**-149, 2.0**23 + 1, INF, -INF, NAN]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_float_maps_are_those_of_ieee(kind: type[Any]) -> None:
    pairs = np.array([(a, b) for a in _FLOATS for b in _FLOATS], kind)
    a, b = pairs.T
    ours = torch.from_numpy(a.copy()), torch.from_numpy(b.copy())
    with np.errstate(all="ignore"):
        for op, theirs in (("add", torch.add), ("sub", torch.sub), ("mul", torch.mul), ("div", torch.div)):
            assert_same(mapped(op, a, b), theirs(*ours).numpy())
        expected = [math.fmod(x, y) if math.isfinite(x) and y and y == y else NAN for x, y in pairs.tolist()]
        assert_same(mapped("fmod", a, b), np.array(expected, kind))
    comparisons = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt}
    for op, compared in {**comparisons, "ge": operator.ge}.items():
        assert_same(mapped(op, a, b), np.array([compared(x, y) for x, y in pairs.tolist()]))
    signed = [math.copysign(x, 1.0 if math.isnan(y) else y) for x, y in pairs.tolist()]
    assert_same(mapped("copysign", a, b), np.array(signed, kind))
    for op in ("neg", "abs", "floor", "ceil", "trunc", "round"):
        assert_same(mapped(op, a), getattr(torch, op)(ours[0]).numpy())
    roots = [math.copysign(math.sqrt(abs(x)), x) if x >= 0 else NAN for x in a.tolist()]
    assert_same(mapped("sqrt", a), np.array(roots, kind))


def test_the_sign_of_a_nan_is_not_to_be_seen() -> None:
    nans = np.array([0x7FC00000, 0xFFC00001, 0xFF800001], np.uint32).view(np.float32)
    one = f4(1, 1, 1)
    assert mapped("copysign", one, nans).tolist() == [1, 1, 1]
    for op in ("copy", "neg", "abs"):
        assert mapped(op, nans).view(np.uint32).tolist() == [0x7FC00000] * 3
    assert mapped("mul", nans, one).view(np.uint32).tolist() == [0x7FC00000] * 3
    wide = np.array([0xFFF8000000000001], np.uint64).view(np.float64)
    assert mapped("copy", wide).view(np.uint64).tolist() == [0x7FF8000000000000]


@pytest.mark.parametrize(("dtype", "least"), [("int32", LEAST32), ("int64", LEAST64)])
def test_integer_division(dtype: str, least: int) -> None:
    values = [0, 1, -1, 2, -2, 7, -7, 100, least, least + 1, -least - 1]
    pairs = [(a, b) for a in values for b in values]
    a, b = np.array(pairs, dtype).T

    def wrapped(exact: list[int]) -> Values:
        return np.array([(each - least) % (-2 * least) + least for each in exact], dtype)

    assert_same(mapped("floor_divide", a, b), wrapped([x // (y or 1) for x, y in pairs]))
    assert_same(mapped("remainder", a, b), wrapped([x % (y or 1) for x, y in pairs]))
    truncated = [abs(x) // abs(y or 1) * (1 if (x < 0) == ((y or 1) < 0) else -1) for x, y in pairs]
    assert_same(mapped("trunc_divide", a, b), wrapped(truncated))
    for op, exactly in (("add", operator.add), ("sub", operator.sub), ("mul", operator.mul)):
        assert_same(mapped(op, a, b), wrapped([exactly(*pair) for pair in pairs]))
    assert_same(mapped("neg", a), wrapped([-x for x, _ in pairs]))
    assert_same(mapped("abs", a), wrapped([abs(x) for x, _ in pairs]))
    assert_same(mapped("not", a), wrapped([~x for x, _ in pairs]))
    for op, exactly in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        assert_same(mapped(op, a, b), wrapped([exactly(*pair) for pair in pairs]))
    assert_same(mapped("maximum", a, b), wrapped([max(pair) for pair in pairs]))
    assert_same(mapped("minimum", a, b), wrapped([min(pair) for pair in pairs]))


def test_logic_of_bools() -> None:
    a, b = np.array([False, False, True, True]), np.array([False, True, False, True])
    assert_same(mapped("and", a, b), a & b)
    assert_same(mapped("or", a, b), a | b)
    assert_same(mapped("xor", a, b), a ^ b)
    assert_same(mapped("not", a), ~a)
    assert_same(mapped("lt", a, b), np.array([False, True, False, False]))
    assert_same(mapped("eq", a, True), a)
    assert_same(mapped("where", a, f4(1, NAN, 3, -0.0), f4(5, -0.0, 7, 8)), f4(5, -0.0, 3, -0.0))
    assert_same(mapped("where", a, f4(1, 2, 3, 4), 0.1), f4(0.1, 0.1, 3, 4))


@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [
        (f4(1.9, -1.9, NAN, -0.5), "int32", [1, -1, 0, 0]),
        (f4(3e9, -3e9, INF, -INF), "int32", [-LEAST32 - 1, LEAST32, -LEAST32 - 1, LEAST32]),
        (f4(2.0**31, -(2.0**31), 2147483520.0), "int32", [-LEAST32 - 1, LEAST32, 2147483520]),
        (f4(1e19, -1e19, NAN, 2.0**40), "int64", [-LEAST64 - 1, LEAST64, 0, 2**40]),
        (np.array([2.0**63, 2.0**62, -1e300, -INF]), "int64", [-LEAST64 - 1, 2**62, LEAST64, LEAST64]),
        (np.array([2147483647.5, 2147483648.0, -2147483648.9]), "int32", [-LEAST32 - 1, -LEAST32 - 1, LEAST32]),
        (f4(0.0, -0.0, NAN, 1e-45, INF), "bool", [False, False, True, True, True]),
        (np.array([0, -1, 2**40]), "bool", [False, True, True]),
        (np.array([2**32 + 5, 2**31, -(2**31) - 1]), "int32", [5, LEAST32, -LEAST32 - 1]),
        (np.array([-5, 7], np.int32), "int64", [-5, 7]),
        (np.array([True, False]), "float32", [1.0, 0.0]),
        (np.array([True, False]), "int64", [1, 0]),
        (np.array([2**24 + 1, 2**24 + 3]), "float32", [2.0**24, 2.0**24 + 4]),
        (np.array([2**54 + 2**30 + 1]), "float32", [2.0**54 + 2.0**31]),  # not by way of float64
        (np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50]), "float32", [1, 1 + 2.0**-23]),
        (np.array([1e39, 2.0**-150, NAN]), "float32", [INF, 0.0, NAN]),
        (f4(0.1, 2.0**-149), "float64", [float(np.float32(0.1)), 2.0**-149]),
    ],
)  # fmt: skip
def test_casts(given: Values, dtype: str, expected: list[Any]) -> None:
    found = compute(lambda builder, view: builder.cast(view, dtype), given.reshape(-1, 1)).reshape(-1)
    assert_same(found, np.array(expected, dtype))


def test_numbers_are_rounded_to_the_dtype() -> None:
    assert_same(mapped("add", f4(0.0), 0.1), f4(np.float32(0.1)))
    assert_same(mapped("mul", 1e300, f4(2.0)), f4(INF))
    assert_same(mapped("gt", f4(0.1, 0.2), 0.1), np.array([False, True]))
    assert_same(mapped("sub", np.array([1], np.int64), 2), np.array([-1]))
    filled = compute(lambda builder: builder.emit("add", builder.fresh("float32", (2,)), 1.5, 2.25))
    assert_same(filled, f4(3.75, 3.75).reshape(1, 2))


def test_an_index_out_of_range_is_the_nearest_in_range() -> None:
    table = np.arange(6, dtype=np.float32).reshape(1, 2, 3).repeat(6, 0)
    index = np.array([0, 2, 3, -1, -3, LEAST64]).reshape(6, 1).repeat(2, 1)
    at = np.array([0, 2, 2, 2, 0, 0])

    def take(builder: Builder, table: View, index: View) -> View:
        return builder.emit("take", builder.fresh("float32", (2,)), table, index)

    assert_same(compute(take, table, index), np.stack([table[0, :, each] for each in at]))

    def put(builder: Builder, table: View, index: View) -> View:
        out = builder.map("copy", table, out=builder.fresh("float32", (2, 3)))
        return builder.emit("put", out, index, -1.0)

    expected = table.copy()
    for row, each in enumerate(at):
        expected[row, :, each] = -1
    assert_same(compute(put, table, index), expected)


def test_of_equal_indices_the_last_is_put_and_all_are_added() -> None:
    index, value = np.array([[0, 1, 0, 5], [2, 2, 2, 0]]), f4(1e8, 2, 3, 4, 5, 1e8, 7, 8).reshape(2, 4)

    def emit(builder: Builder, index: View, value: View, op: str) -> View:
        out = builder.emit("copy", builder.fresh("float32", (3,)), -1.0)
        builder.emit(op, broadcast(reshape(out, (1, 3)), (4, 3)), index, value)
        return out

    assert_same(compute(lambda b, i, v: emit(b, i, v, "put"), index, value), f4(3, 2, 4, 8, -1, 7).reshape(2, 3))
    added = f4(np.float32(1e8) - 1 + 3, 1, 3, 7, -1, np.float32(np.float32(4) + np.float32(1e8)) + np.float32(7))
    assert_same(compute(lambda b, i, v: emit(b, i, v, "put_add"), index, value), added.reshape(2, 3))


def test_in_float64_it_is_what_the_form_approximates() -> None:
    form, tensors = sample_form()
    inputs = sample_inputs(16)
    values = np.random.default_rng(0).standard_normal(inputs[0].shape).astype(np.float32)
    narrow = Definition(form, tensors).step([values, *inputs[1:]])
    wide = Definition(form, tensors, double=True).step([values.astype(np.float64), *inputs[1:]])
    assert [each.dtype for each in wide] == [np.float64, np.float64, np.int64]
    np.testing.assert_allclose(narrow[0][:, :400], wide[0][:, :400], rtol=3e-6, atol=3e-6)
