"""Random forms that are valid by construction: every primitive, over views with all kinds of strides."""

from __future__ import annotations

import math
from random import Random
from typing import Final

import numpy as np

from instep.models.portable.form import (
    COMPARISONS,
    DTYPES,
    FLOATS,
    MAPS,
    REDUCTIONS,
    SCANS,
    Builder,
    Form,
    Operand,
    Shape,
    View,
    contiguous,
)
from tests.models.portable.guarded import Values

_MAPS: Final = sorted(MAPS)
_COMPARISONS: Final = sorted(COMPARISONS)
_REDUCTIONS: Final = sorted(REDUCTIONS)
_SCANS: Final = sorted(SCANS)
_DTYPES: Final = sorted(DTYPES)
_FLOATS: Final = sorted(FLOATS)
_MOST: Final = 48
"""Elements of a buffer."""


class Grower:
    """Adds random nodes. Each buffer is written whole before it is read, so any view of it can be read.

    Attributes:
        tensors: of the form's weights, by name.
    """

    def __init__(self, random: Random) -> None:
        self.tensors: dict[str, Values] = {}
        self._random, self._b = random, Builder()
        self._leaves = [self._b.input("float32", self._shape())]
        for dtype in ("float32", *random.sample(_DTYPES, 3)):
            self._leaves.append(self._b.input(dtype, self._shape()))
        self._whole: dict[str, list[View]] = {dtype: [] for dtype in _DTYPES}
        for leaf in self._leaves:
            self._whole[self._b.dtype(leaf)].append(leaf)
        for dtype in ("float32", "float32", "int64", random.choice(_DTYPES)):
            self._add_tensor(dtype)

    def grow(self, nodes: int) -> Form:
        for _ in range(nodes):
            self._random.choice(
                [self._map, self._map, self._compare, self._cast, self._where, self._chain, self._product,
                 self._reduce, self._scan, self._take, self._put]
            )()  # fmt: skip
        leaves = [self._view(self._b.dtype(leaf), leaf.shape) for leaf in self._leaves[1:]]
        return self._b.form([self._view("float32", self._shape()), *leaves])

    # ── Views ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _shape(self, most: int = 3) -> Shape:
        random = self._random
        shape = tuple(random.choice([1, 2, 3, 4, 5, 7]) for _ in range(random.randint(0, most)))
        if random.random() < 0.03 and shape:
            shape = (0, *shape[1:])
        return shape if math.prod(shape) <= _MOST else shape[:1]

    def _add_tensor(self, dtype: str) -> None:
        name, random = f"tensor{len(self.tensors)}", np.random.default_rng(self._random.randrange(2**32))
        values = random.standard_normal(self._random.choice([1, 6, 30, 64])) * 3
        self.tensors[name] = (values > 0) if dtype == "bool" else values.astype(DTYPES[dtype])
        self._whole[dtype].append(self._b.tensor(name, dtype, values.shape))

    def _view(self, dtype: str, shape: Shape) -> View:
        """Of a buffer that was written, rather of a late one, or of constants."""
        random, sources = self._random, [each for each in self._whole[dtype] if each.elements]
        if not sources:
            sources = [self._b.emit("copy", self._b.fresh(dtype, (_MOST,)), self._number(dtype))]
            self._whole[dtype] += sources
        source = random.choice(sources[-3:] if random.random() < 0.7 else sources)
        if source.shape == shape and random.random() < 0.5:
            return source
        size, strides, low, high = self._b.buffers[source.buffer].size, list[int](), 0, 0
        for n in shape:
            limit = max(0, (size - 1 - (high - low)) // max(1, n - 1))
            stride = random.choice([0, 1, 1, 1, -1, 2, 3, -2, random.randint(0, 9)])
            stride = max(-limit, min(limit, stride))
            strides.append(stride)
            low, high = low + min(0, (n - 1) * stride), high + max(0, (n - 1) * stride)
        if 0 in shape:
            return View(source.buffer, random.randint(-3, 99), shape, tuple(strides))
        return View(source.buffer, random.randint(-low, size - 1 - high), shape, tuple(strides))

    def _number(self, dtype: str) -> float | int | bool:
        if dtype == "bool":
            return self._random.random() < 0.5
        if dtype in FLOATS:
            return self._random.choice([0.0, -0.0, 1.5, -0.3, 1e38, 1e300, math.inf, math.nan, 3, -1e-40])
        return self._random.choice([0, 1, -1, 5, -7, 2**31 - 1, -(2**31)])

    def _operand(self, dtype: str, shape: Shape) -> Operand:
        return self._number(dtype) if self._random.random() < 0.2 else self._view(dtype, shape)

    def _out(self, dtype: str, shape: Shape) -> View:
        """Contiguous, turned, backwards, or a part of a buffer that is filled before."""
        random, order = self._random, list(range(len(shape)))
        random.shuffle(order)
        steps = contiguous([shape[dim] for dim in order])
        strides = [0] * len(shape)
        for dim, step in zip(order, steps, strict=True):
            strides[dim] = step
        if random.random() < 0.6 or not math.prod(shape):
            return self._b.fresh(dtype, shape, strides)
        scale = random.choice([1, 2])
        strides = [scale * stride * random.choice([1, -1]) for stride in strides]
        reach = [(n - 1) * stride for n, stride in zip(shape, strides, strict=True)]
        first = -sum(min(0, each) for each in reach)
        size = first + sum(max(0, each) for each in reach) + 1 + random.randint(0, 3)
        whole = self._b.fresh(dtype, (size,))
        self._b.emit("copy", whole, self._number(dtype))
        return View(whole.buffer, first, shape, tuple(strides))

    def _emit(self, op: str, out: View, *args: Operand) -> None:
        """What was written may be read from now on."""
        self._b.emit(op, out, *args)
        if size := self._b.buffers[out.buffer].size:
            self._whole[self._b.dtype(out)].append(View(out.buffer, 0, (size,), (1,)))

    # ── Nodes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _map(self) -> None:
        op = self._random.choice(_MAPS)
        count, dtypes = MAPS[op]
        dtype, shape = self._random.choice(sorted(dtypes)), self._shape()
        args = [self._operand(dtype, shape) for _ in range(count)]
        self._emit(op, self._out(dtype, shape), *args)

    def _compare(self) -> None:
        dtype, shape = self._random.choice(_DTYPES), self._shape()
        args = [self._view(dtype, shape), self._operand(dtype, shape)]
        self._random.shuffle(args)
        self._emit(self._random.choice(_COMPARISONS), self._out("bool", shape), *args)

    def _cast(self) -> None:
        shape, (of, to) = self._shape(), self._random.choices(_DTYPES, k=2)
        self._emit("cast", self._out(to, shape), self._view(of, shape))

    def _where(self) -> None:
        dtype, shape = self._random.choice(_DTYPES), self._shape()
        args = [self._view("bool", shape), self._operand(dtype, shape), self._operand(dtype, shape)]
        self._emit("where", self._out(dtype, shape), *args)

    def _chain(self) -> None:
        dtype, shape, inner = self._random.choice(_FLOATS), self._shape(), self._shape(4)
        args = [self._operand(dtype, shape), *(self._view(dtype, (*shape, *inner)) for _ in range(2))]
        self._emit("fma_chain", self._out(dtype, shape), *args)

    def _product(self) -> None:
        """Of a row and a tensor that are both repeated, as those of layers are."""
        random = self._random
        outputs, inputs, others = random.choice([3, 4, 9, 17]), random.choice([1, 3, 6]), random.choice([(), (2,)])
        self._add_tensor("float32")
        tensor, shape = self._whole["float32"][-1], (*others, outputs)
        full = (*shape, inputs)
        x = self._view("float32", (*others, inputs))
        x = View(x.buffer, x.offset, full, (*x.strides[:-1], 0, x.strides[-1]))
        limit = (tensor.elements - 1) // max(1, outputs * inputs)
        turned = random.random() < 0.5
        strides = (limit, 1) if turned else (limit * inputs, limit)
        if (outputs - 1) * strides[0] + (inputs - 1) * strides[1] >= tensor.elements:
            strides = (0, 0)
        weight = View(tensor.buffer, 0, full, (*(0 for _ in others), *strides))
        args = [x, weight]
        random.shuffle(args)
        self._emit("fma_chain", self._out("float32", shape), self._operand("float32", shape), *args)

    def _reduce(self) -> None:
        op = self._random.choice(_REDUCTIONS)
        dtype, shape, inner = self._random.choice(sorted(REDUCTIONS[op])), self._shape(2), self._shape(2)
        if 0 in inner and op not in ("sum", "prod"):
            inner = (1,)
        view = self._view(dtype, (*shape, *inner))
        self._emit(op, self._out("int64" if op == "argmax" else dtype, shape), view)

    def _scan(self) -> None:
        op = self._random.choice(_SCANS)
        dtype, shape = self._random.choice(sorted(SCANS[op])), (*self._shape(2), self._random.randint(1, 6))
        self._emit(op, self._out(dtype, shape), self._view(dtype, shape))

    def _take(self) -> None:
        dtype, shape, count = self._random.choice(_DTYPES), self._shape(), self._random.randint(1, 6)
        args = [self._view(dtype, (*shape, count)), self._view("int64", shape)]
        self._emit("take", self._out(dtype, shape), *args)

    def _put(self) -> None:
        random, dtype, shape = self._random, self._random.choice(_DTYPES), self._shape(2)
        count = random.randint(1, 6)
        index, value = self._view("int64", shape), self._operand(dtype, shape)
        repeated = random.random() < 0.5
        whole = self._b.fresh(dtype, (count,) if repeated else (*shape, count))
        self._b.emit("copy", whole, self._operand(dtype, whole.shape))
        out = View(whole.buffer, 0, (*shape, count), (*(0 for _ in shape), 1)) if repeated else whole
        self._emit("put" if dtype == "bool" else random.choice(["put", "put_add"]), out, index, value)
