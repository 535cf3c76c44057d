"""Writes normal forms: buffers, views of them, and nodes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from instep.models.portable.form import (
    COMPARISONS,
    DTYPES,
    Buffer,
    Form,
    Node,
    Operand,
    Shape,
    View,
)


def contiguous(shape: Sequence[int]) -> Shape:
    """The strides of a contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


def broadcast(view: View, shape: Sequence[int]) -> View:
    """Repeated along leading dimensions and those of size 1, as numpy does."""
    extra = len(shape) - len(view.shape)
    strides = (0 if n == 1 else stride for n, stride in zip(view.shape, view.strides, strict=True))
    return replace(view, shape=tuple(shape), strides=(*(0,) * extra, *strides))


def permute(view: View, dims: Sequence[int]) -> View:
    """The dimensions in another order."""
    return replace(view, shape=tuple(view.shape[d] for d in dims), strides=tuple(view.strides[d] for d in dims))


def narrow(view: View, dim: int, start: int, length: int) -> View:
    """A part of one dimension."""
    shape = tuple(length if d == dim else n for d, n in enumerate(view.shape))
    return replace(view, offset=view.offset + start * view.strides[dim], shape=shape)


def select(view: View, dim: int, index: int) -> View:
    """One index of a dimension, without that."""
    return drop(narrow(view, dim, index, 1), dim)


def drop(view: View, dim: int) -> View:
    """Without a dimension of size 1."""
    keep = [d for d in range(len(view.shape)) if d != dim]
    return permute(view, keep)


def reshape(view: View, shape: Sequence[int]) -> View:
    """A contiguous view in another shape."""
    assert view.strides == contiguous(view.shape), "only contiguous views are reshaped"
    return replace(view, shape=tuple(shape), strides=contiguous(shape))


class Builder:
    """Collects what a form consists of.

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
        """The frame, and then each leaf of the state, in order."""
        view = self.fresh(dtype, shape)
        self._inputs.append(view.buffer)
        return view

    def tensor(self, name: str, dtype: str, shape: Sequence[int]) -> View:
        """A tensor of the weights file."""
        if name not in self._tensors:
            self.buffers.append(Buffer(dtype, math.prod(shape), name))
            self._tensors[name] = View(len(self.buffers) - 1, 0, tuple(shape), contiguous(shape))
        return self._tensors[name]

    def fresh(self, dtype: str, shape: Sequence[int], strides: Sequence[int] | None = None, offset: int = 0) -> View:
        """Memory of a row that nothing was written to; contiguous, unless strides (not negative) are given."""
        strides = contiguous(shape) if strides is None else strides
        reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if math.prod(shape) else -1
        self.buffers.append(Buffer(dtype, offset + reach + 1))
        return View(len(self.buffers) - 1, offset, tuple(shape), tuple(strides))

    def dtype(self, view: View) -> str:
        """The dtype of a view's elements."""
        return self.buffers[view.buffer].dtype

    def emit(self, op: str, out: View, *args: Operand) -> View:
        """Add a node; returns its result."""
        self.nodes.append(Node(op, out, args))
        return out

    def map(self, op: str, *args: Operand, out: View | None = None) -> View:
        """Add a node that computes each element by itself, with its arguments repeated to one shape."""
        views = [each for each in args if isinstance(each, View)]
        shape = out.shape if out else _broadcast_shape([view.shape for view in views])
        if out is None:
            out = self.fresh("bool" if op in COMPARISONS else self.dtype(views[-1]), shape)
        return self.emit(op, out, *(broadcast(each, shape) if isinstance(each, View) else each for each in args))

    def cast(self, view: View, dtype: str) -> View:
        """Values in another dtype."""
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
        """Add a form whose inputs are these views, of whole buffers; returns its outputs."""
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
        """The form of everything that these results need; buffers are numbered anew."""
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
