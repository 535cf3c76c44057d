"""Machine code computes what the definition does: each primitive with each dtype, and forms of unusual shapes."""

from __future__ import annotations

import numpy as np
import pytest

from instep.models.portable.form import (
    COMPARISONS,
    DTYPES,
    FLOATS,
    MAPS,
    REDUCTIONS,
    SCANS,
    Builder,
    Form,
    View,
    broadcast,
    contiguous,
    narrow,
    permute,
    reshape,
)
from tests.models.portable.guarded import Values, check_form, hard_inputs

SIZE = 12
ROWS = 37
"""Some are computed in lanes, and a rest one by one."""
PARTS = (1, 2, 5)


class Sample:
    """A form over two leaves of each dtype, whose results become two more, since each leaf takes long to compile."""

    def __init__(self) -> None:
        self.b = Builder()
        self.frame = self.b.input("float32", (SIZE,))
        self.leaves = {dtype: self.b.input(dtype, (SIZE,)) for dtype in DTYPES}
        self.others = {dtype: self.b.input(dtype, (SIZE,)) for dtype in DTYPES}
        self._results: dict[tuple[str, int], list[View]] = {}

    def add(self, result: View) -> None:
        """Every second result goes to one leaf, so that neighbours can be computed in one loop."""
        dtype = self.b.dtype(result)
        number = sum(len(each) for (of, _), each in self._results.items() if of == dtype)
        self._results.setdefault((dtype, number % 2), []).append(result)

    def map(self, op: str, dtype: str) -> None:
        """With views, with repeated ones, and with a number on either side."""
        b, x, y = self.b, self.leaves[dtype], self.others[dtype]
        number = True if dtype == "bool" else 1 if dtype not in FLOATS else -1.75
        backwards = View(y.buffer, SIZE - 1, (SIZE,), (-1,))
        count = 2 if op in COMPARISONS else MAPS[op][0]
        if count == 1:
            self.add(b.map(op, x))
            self.add(b.map(op, View(x.buffer, 1, (5,), (2,))))
        elif count == 2:
            for pair in ((x, backwards), (number, x), (narrow(y, 0, 3, 1), number)):
                self.add(b.map(op, *pair))
        else:
            z = self.frame if dtype == "float32" else narrow(x, 0, 2, 1)
            for three in ((x, backwards, z), (number, x, number)):
                self.add(b.map(op, *three))

    def check(self, tensors: dict[str, Values] | None = None) -> None:
        b, given = self.b, [self.frame, *self.leaves.values(), *self.others.values()]
        for (dtype, _), results in self._results.items():
            total = sum(each.elements for each in results)
            b.input(dtype, (total,))
            given.append(b.fresh(dtype, (total,)))
            at = 0
            for each in results:
                b.map("copy", each, out=View(given[-1].buffer, at, each.shape, contiguous(each.shape)))
                at += each.elements
        form = b.form(given)
        check_form(form, tensors or {}, hard_inputs(form, ROWS), PARTS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps(dtype: str) -> None:
    sample = Sample()
    for op, (_, dtypes) in MAPS.items():
        if dtype in dtypes:
            sample.map(op, dtype)
    for op in sorted(COMPARISONS):
        sample.map(op, dtype)
    sample.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_and_scans(dtype: str) -> None:
    sample = Sample()
    b, x = sample.b, sample.leaves[dtype]
    grid = reshape(x, (3, 4))
    windows = View(x.buffer, 0, (3, 2, 5), (3, 1, 1))
    for view, dims in ((x, [0]), (grid, [0]), (grid, [1]), (permute(grid, (1, 0)), [0, 1]), (windows, [1, 2])):
        for op, dtypes in REDUCTIONS.items():
            if dtype in dtypes:
                sample.add(b.reduce(op, view, dims))
        for op, dtypes in SCANS.items():
            if dtype in dtypes:
                sample.add(b.emit(op, b.fresh(dtype, view.shape), view))
    sample.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_take_and_put(dtype: str) -> None:
    """Indices are of all sizes; those out of range are the nearest in range."""
    sample = Sample()
    b, x, y = sample.b, sample.leaves[dtype], sample.others[dtype]
    index = sample.leaves["int64"]
    fixed, table = b.tensor("fixed", "int64", (4,)), b.tensor("table", dtype, (3, 5))
    tensors = {"fixed": np.array([-1, 2, 7, -9]), "table": _some((3, 5), dtype)}
    sample.add(b.emit("take", b.fresh(dtype, (SIZE,)), broadcast(x, (SIZE, SIZE)), index))
    backwards = View(x.buffer, SIZE - 1, (3, 4), (-4, -1))
    sample.add(b.emit("take", b.fresh(dtype, (3,)), backwards, narrow(index, 0, 0, 3)))
    sample.add(b.emit("take", b.fresh(dtype, (4,)), broadcast(x, (4, SIZE)), fixed))
    sample.add(b.emit("take", b.fresh(dtype, (3,)), table, narrow(index, 0, 2, 3)))
    sample.add(b.emit("take", b.fresh(dtype, (3,)), table, narrow(fixed, 0, 1, 3)))
    for op in ("put", "put_add")[: 1 if dtype == "bool" else 2]:
        number = {"bool": True, "float32": 0.3, "float64": 0.3}.get(dtype, 7)
        for value in (y, number):
            out = b.map("copy", x)
            sample.add(out)
            b.emit(op, broadcast(reshape(out, (1, SIZE)), (SIZE, SIZE)), index, value)
        turned = b.map("copy", x)
        sample.add(turned)
        b.emit(op, permute(reshape(turned, (3, 4)), (1, 0)), narrow(index, 0, 4, 4), narrow(y, 0, 4, 4))
        given = b.map("copy", x)
        sample.add(given)
        b.emit(op, broadcast(reshape(given, (1, SIZE)), (4, SIZE)), fixed, narrow(y, 0, 0, 4))
    sample.check(tensors)


def _some(shape: tuple[int, ...], dtype: str) -> Values:
    values = np.random.default_rng(3).standard_normal(shape) * 4
    return (values > 0) if dtype == "bool" else values.astype(dtype)


# ── Unusual forms ────────────────────────────────────────────────────────────────────────────────────────────────────


def check_built(b: Builder, outputs: list[View], tensors: dict[str, Values] | None = None) -> Form:
    form = b.form(outputs)
    check_form(form, tensors or {}, hard_inputs(form, ROWS), PARTS)
    return form


def test_views_that_run_backwards_and_results_in_parts() -> None:
    b = Builder()
    x, h = b.input("float32", (6,)), b.input("float32", (6,))
    y = b.fresh("float32", (13,))
    b.map("sub", View(x.buffer, 5, (6,), (-1,)), h, out=View(y.buffer, 11, (6,), (-2,)))
    b.map("mul", x, View(h.buffer, 5, (6,), (-1,)), out=View(y.buffer, 0, (6,), (2,)))
    b.emit("copy", View(y.buffer, 12, (), ()), -7.5)
    grid = b.map("tanh", View(y.buffer, 12, (2, 3), (-6, -2)))
    check_built(b, [y, reshape(b.map("add", grid, View(x.buffer, 1, (2, 3), (-1, 2))), (6,))])


def test_products_and_sums_are_not_contracted() -> None:
    b = Builder()
    x, h = b.input("float32", (32,)), b.input("float32", (32,))
    check_built(b, [b.map("add", b.map("mul", x, h), x), b.map("sub", b.map("mul", x, 0.3), h)])


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("op", ["sqrt", "sub", "div", "mul", "fmod", "fma", "copy", "neg"])
def test_a_nan_that_was_just_computed_is_the_one_nan_and_has_no_sign(op: str, dtype: str) -> None:
    """Whatever NaN a processor makes of infinities and roots, alone in a loop with what follows."""
    b = Builder()
    frame, x, y = b.input("float32", (2,)), b.input(dtype, (23,)), b.input(dtype, (23,))
    made = [b.map(op, *(x, y, x)[: MAPS[op][0]]) for _ in range(2)]
    check_built(b, [frame, made[0], b.map("copysign", 1.0, made[1])])
