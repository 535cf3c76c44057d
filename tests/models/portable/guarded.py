"""Compiled steps on memory with marks around all of it: no write elsewhere goes unnoticed.

The marks are NaN as float32 and as float64 and -1 as integers, so that a read elsewhere changes results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final
from unittest import mock

import numpy as np
import numpy.typing as npt

from instep.models.portable import compiler
from instep.models.portable.compiler import PORT, Compiled
from instep.models.portable.definition import Definition
from instep.models.portable.form import DTYPES, Form, check
from instep.models.portable.machine import Processor

Values = npt.NDArray[Any]
_MARK: Final = 0xFF
_AROUND: Final = 4096
"""Bytes before and after."""
_GAP: Final = 24
"""Bytes between two rows of a table."""


class Guarded:
    """Bytes at a multiple of 64, all of them marks at first."""

    def __init__(self, size: int) -> None:
        everything = np.full(size + 2 * _AROUND + 64, _MARK, np.uint8)
        start = _AROUND + -(everything.ctypes.data + _AROUND) % 64
        self._before, self._after = everything[:start], everything[start + size :]
        self.bytes = everything[start : start + size]
        self.address: int = self.bytes.ctypes.data

    def check(self) -> None:
        assert (self._before == _MARK).all(), "it wrote before its memory"
        assert (self._after == _MARK).all(), "it wrote after its memory"


class _Table:
    """Rows with gaps between them, in an order of their own, and as many rows again that are not used."""

    def __init__(self, count: int, elements: int, dtype: np.dtype[Any], order: npt.NDArray[np.int64]) -> None:
        self._size, self._dtype, self._order = elements * dtype.itemsize, dtype, order
        self.stride = self._size + _GAP
        self._memory = Guarded(2 * count * self.stride)
        self._rows = self._memory.bytes.reshape(2 * count, self.stride)
        self.address = self._memory.address

    def write(self, values: Values) -> None:
        self._rows[self._order, : self._size] = _as_bytes(values)

    def read(self) -> Values:
        return np.ascontiguousarray(self._rows[self._order, : self._size]).view(self._dtype)

    def check(self, expected: Values) -> None:
        """That the table holds these rows, and marks everywhere else."""
        self._memory.check()
        other = self._rows.copy()
        assert np.array_equal(other[self._order, : self._size], _as_bytes(expected)), "it changed its inputs"
        other[self._order, : self._size] = _MARK
        assert (other == _MARK).all(), "it wrote between rows, or to other rows"


def _as_bytes(values: Values) -> npt.NDArray[np.uint8]:
    return np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)


def stepped(code: Compiled, arrays: Sequence[Values], *, first: int = 0) -> list[Values]:
    """The outputs and each leaf after the step, [R, elements], from the frame and each leaf [R, elements].

    The rows have numbers in a random order, of which the call begins with number `first`.
    """
    rows = len(arrays[0])
    order = np.random.default_rng(rows).permutation(2 * rows)[:rows].astype(np.int64)
    numbers = np.concatenate([np.full(first, 2**40), order])
    memory = Guarded(code.memory_bytes)
    sizes = [*code.input_sizes, *code.output_sizes]
    tables = [_Table(rows, size, dtype, order) for size, dtype in zip(sizes, 2 * code.dtypes, strict=True)]
    for table, array in zip(tables, arrays, strict=False):
        table.write(array)
    ports = np.array([(table.address, table.stride, numbers.ctypes.data) for table in tables], np.int64)
    assert ports.shape[1] == PORT
    code.run(memory.address, ports.ctypes.data, first, rows)
    memory.check()
    results = [table.read() for table in tables[len(arrays) :]]
    for table, expected in zip(tables, [*arrays, *results], strict=True):
        table.check(expected)
    return results


@contextmanager
def _guarded_weights() -> Iterator[None]:
    made: list[Guarded] = []

    def aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
        made.append(Guarded(size))
        return made[-1].bytes

    with mock.patch.object(compiler, "aligned_bytes", aligned_bytes):
        yield
    for each in made:
        each.check()


def compiled(form: Form, tensors: Mapping[str, Values], processor: Processor | None = None) -> Compiled:
    """A checked form, whose weights' memory has marks around it while they are made ready."""
    check(form, {name: (tensor.dtype.name, tensor.size) for name, tensor in tensors.items()}, "the form")
    with _guarded_weights():
        return Compiled(form, tensors, processor)


def assert_same(found: Sequence[Values], expected: Sequence[Values]) -> None:
    """That all bits are the same."""
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        different = (_as_bytes(one) != _as_bytes(other)).reshape(*one.shape, one.itemsize).any(-1)
        if different.any():
            places = np.argwhere(different)[:3].tolist()
            raise AssertionError(
                f"result {number} differs at {int(different.sum())} of {one.size} places, first of all "
                f"{places}: {one[different][:3]} instead of {other[different][:3]}"
            )


def check_form(form: Form, tensors: Mapping[str, Values], arrays: Sequence[Values], parts: Sequence[int] = ()) -> None:
    """That compiled code gives what the definition gives, for all rows together and for the first few of `parts`."""
    expected = Definition(form, tensors).step(arrays)
    code = compiled(form, tensors)
    for rows in (*parts, len(arrays[0])):
        assert_same(stepped(code, [each[:rows] for each in arrays], first=rows % 3), [each[:rows] for each in expected])


# ── Inputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_FLOATS: Final = (
    0.0, -0.0, 1.0, -1.0, 0.5, 2.5, -0.5, -2.0, 1e-45, -1e-40, 1.1754942e-38, 1e30, 3.4028235e38, -3.4028235e38,
    math.inf, -math.inf, math.nan, 12582913.0, 2.0**31, -(2.0**63), 1e5, 87.5, -88.0,
)  # fmt: skip


def hard_inputs(form: Form, rows: int, seed: int = 0) -> list[Values]:
    """Usual values, and in every third place of a row one that is not: zeros, the largest, denormals, NaN."""
    random = np.random.default_rng(seed)
    return [_hard(random, rows, form.buffers[index].size, form.buffers[index].dtype) for index in form.inputs]


def _hard(random: np.random.Generator, rows: int, size: int, dtype: str) -> Values:
    shape, kind = (rows, size), DTYPES[dtype]
    if dtype == "bool":
        return random.random(shape) < 0.5
    if kind.kind == "i":
        limits = np.iinfo(kind)
        extremes = np.array([limits.min, limits.min + 1, limits.max, 0, -1, 1], kind)
        usual = random.integers(-9, 10, shape).astype(kind)
    else:
        extremes = np.array(_FLOATS).astype(kind)
        usual = (random.standard_normal(shape) * 3).astype(kind)
    return np.where(random.random(shape) < 1 / 3, random.choice(extremes, shape), usual)
