"""Calls of a graph that let one row of a batch see another, or see where it is and how many there are.

Every value that depends on a row has one axis of rows, whose size is the batch size B or a multiple of it. `Rows` looks
at each call with the axes of what it takes and gives.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import fx

from instep.models.module.operators import ELEMENTWISE, Operator, argument

_ALONG: Final = frozenset(
    [
        *("argsort", "chunk", "cummax", "cummin", "cumprod", "cumsum", "diff", "fft_fft", "fft_ifft", "fft_irfft"),
        *("fft_rfft", "flip", "gather", "glu", "index_add", "index_copy", "index_fill", "index_select", "log_softmax"),
        *("logcumsumexp", "narrow", "repeat_interleave", "roll", "scatter", "scatter_add", "scatter_reduce", "select"),
        *("select_scatter", "slice", "slice_scatter", "softmax", "sort", "split", "split_with_sizes", "take_along_dim"),
        *("tensor_split", "topk", "unfold", "unsafe_chunk", "unsafe_split"),
    ]
)
"""Along a dimension they combine or move elements, without removing it."""
_PARTS: Final = frozenset(["narrow", "slice"])
"""Of those, the ones that are harmless where they take everything."""
_TRAILING: Final = {"pixel_shuffle": 3, "scaled_dot_product_attention": 2, "tril": 2, "triu": 2}
"""They work over so many of the last dimensions."""
_FIRST: Final = frozenset(
    [
        *("adaptive_avg_pool1d", "adaptive_max_pool1d", "avg_pool1d", "avg_pool2d", "batch_norm", "conv1d", "conv2d"),
        *("conv3d", "conv_transpose1d", "convolution", "group_norm", "gru_cell", "instance_norm", "lstm_cell"),
        *("max_pool1d", "max_pool2d", "rnn_relu_cell", "rnn_tanh_cell", "upsample_bilinear2d", "upsample_linear1d"),
        *("upsample_nearest1d", "upsample_nearest2d"),
    ]
)
"""They keep what is apart in the first dimension."""
_CONTRACTED: Final = {
    **dict.fromkeys(("bmm", "dot", "matmul", "mm", "mv"), ((0, -1), (1, -2))),
    **dict.fromkeys(("addbmm", "addmm", "addmv", "baddbmm"), ((1, -1), (2, -2))),
    **dict.fromkeys(("bilinear", "inner", "linear"), ((0, -1), (1, -1))),
}
"""Positions of the arguments of products, and the dimension over which each is summed."""
_SAME_FOR_ALL: Final = {"_weight_norm": 0, "bucketize": 1, "embedding": 0}
"""The position of an argument that all rows share."""
_RESHAPES: Final = frozenset(["flatten", "reshape", "reshape_as", "unflatten", "view", "view_as", "_unsafe_view"])
_NUMBERED: Final = frozenset(["arange", "eye", "linspace"])
"""Their values count along a dimension."""
_FILLS: Final = frozenset(["fill", "full", "full_like", "new_full", "scalar_tensor"])


class Rows:
    """Knowledge about the rows in the values of a graph.

    Args:
        batch: the size of a batch.
    """

    def __init__(self, batch: Any) -> None:
        self._batch = batch.node.expr
        self._slower: dict[fx.Node, int] = {}
        """For axes of several times B: how many of these times change more slowly than the row; others none."""
        self._numbers: set[fx.Node] = set()
        """The numbers of the rows, as `arange` gives them, as a column or as it is."""
        self._numbered: set[fx.Node] = set()
        """Values that depend on the places of rows, which no result may."""

    def note(self, node: fx.Node, op: Operator, name: str) -> bool:
        """Note a call that depends on no row; whether it computes with the number of rows."""
        given = node.all_input_nodes
        if name in _NUMBERED and row_axes(node.meta["val"]):
            self._numbered.add(node)
            start, step = (argument(op, each, node.args, node.kwargs) for each in ("start", "step"))
            if name == "arange" and not start and step in (None, 1) and self._times(node) == 1:
                self._numbers.add(node)
        elif any(each in self._numbered for each in given):
            self._numbered.add(node)
            if name.endswith("_") and isinstance(node.args[0], fx.Node):
                self._numbered.add(node.args[0])
            is_column = name in _RESHAPES | {"clone", "to", "unsqueeze"} and given[0] in self._numbers
            if is_column and self._times(node) == 1 and math.prod(_others(node.meta["val"])) == 1:
                self._numbers.add(node)
        return self._takes_number(node, name)

    def follow(self, node: fx.Node, of: fx.Node) -> None:
        """Note that a node is another one, or one of its results."""
        self._slower[node] = self._slower.get(of, 1)
        if of in self._numbered:
            self._numbered.add(node)

    def mix(self, node: fx.Node, op: Operator, name: str) -> bool:
        """Whether a call that depends on rows, each with one axis, lets one see another or its place."""
        name = name.removesuffix("_")
        given = {each: row_axes(each.meta["val"])[0] for each in node.all_input_nodes if row_axes(each.meta.get("val"))}
        first = node.args[0] if node.args else None
        axis = given.get(first) if isinstance(first, fx.Node) else None
        if name in ("index", "index_put"):
            return self._index_mixes(node, name) or not self._keep(node, name)
        if (
            any(each in self._numbered for each in given)
            or self._takes_number(node, name)
            or not self._keep(node, name)
        ):
            return True
        if name in _SAME_FOR_ALL and node.args[_SAME_FOR_ALL[name]] in given:
            return True
        if name in ("cat", "concat", "hstack", "vstack"):
            return any(self._times(node) != self._times(each) for each in given)
        if name == "einsum":
            equation, operands = node.args[:2]
            return _einsum_mixes(equation, operands)
        for at, dimension in _CONTRACTED.get(name, ()):
            operand = node.args[at]
            if isinstance(operand, fx.Node) and operand in given:
                rank = operand.meta["val"].dim()
                if given[operand] == rank - 1 + (dimension + 1 if rank > 1 else 0):
                    return True
        if name in ("gru", "lstm", "rnn_relu", "rnn_tanh"):
            return axis != (0 if argument(op, "batch_first", node.args, node.kwargs) else 1)
        if name in _FIRST:
            weights = node.args[1] if "conv" in name else None
            return axis != 0 or weights in given
        if axis is None or not isinstance(first, fx.Node):
            return False
        rank = first.meta["val"].dim()
        trailing = _TRAILING.get(name, 0)
        if name in ("layer_norm", "rms_norm"):
            trailing = len(argument(op, "normalized_shape", node.args, node.kwargs))
        if name == "searchsorted":
            trailing = 1
        if axis >= rank - trailing:
            return True
        if name in _ALONG:
            whole = name in _PARTS and node.meta["val"].shape == first.meta["val"].shape
            return not whole and axis in _dimensions(node, op, rank)
        return False

    def _times(self, node: fx.Node) -> Any:
        """The length of the axis of rows, in multiples of B; None where it is not a multiple."""
        value = node.meta["val"]
        value = value[0] if isinstance(value, list | tuple) else value
        times = value.shape[row_axes(value)[0]].node.expr / self._batch
        return int(times) if times.is_Integer else None

    def _keep(self, node: fx.Node, name: str) -> bool:
        """Whether the axis of rows of the result holds whole rows in the order of the arguments."""
        times = self._times(node)
        given = [each for each in node.all_input_nodes if row_axes(each.meta.get("val"))]
        if times is None:
            return False
        if name in _RESHAPES:
            before, after = given[0].meta["val"], node.meta["val"]
            slower = math.prod(before.shape[: row_axes(before)[0]]) * self._slower.get(given[0], 1)
            outside = math.prod(after.shape[: row_axes(after)[0]])
            self._slower[node] = slower // outside
            return slower % outside == 0 and bool(times % self._slower[node] == 0)
        known = {self._slower.get(each, 1) for each in given if self._times(each) == times}
        if len(known) != 1:
            return False
        self._slower[node] = known.pop()
        return True

    def _takes_number(self, node: fx.Node, name: str) -> bool:
        """Whether a call computes with the number of rows, or with another that comes of it."""
        given: list[Any] = [*node.args, *node.kwargs.values()]
        numbers = [each for each in given if isinstance(each, fx.Node) and isinstance(each.meta["val"], torch.SymInt)]
        return bool(numbers) and name.removesuffix("_") in ELEMENTWISE | _FILLS

    def _index_mixes(self, node: fx.Node, name: str) -> bool:
        arguments: Any = node.args
        target, indices, *rest = arguments
        axes, at = row_axes(target.meta["val"]), 0
        for index in indices:
            is_mask = isinstance(index, fx.Node) and index.meta["val"].dtype == torch.bool
            covered = range(at, at + (index.meta["val"].dim() if is_mask else 1))
            if index is not None and axes and axes[0] in covered and index not in self._numbers:
                return not (is_mask and name == "index_put" and not rest[0].meta["val"].dim())
            at = covered.stop
            is_ours = index is None or not axes or axes[0] in covered
            if not is_ours and row_axes(index.meta["val"]) and not any(each in self._numbers for each in indices):
                return True
        others = {each for each in node.all_input_nodes if each not in indices}
        return bool(others & self._numbered)


def row_axes(value: Any) -> list[int]:
    """The dimensions of a value whose sizes depend on the number of rows."""
    if isinstance(value, list | tuple):
        return row_axes(value[0]) if value else []
    if not isinstance(value, torch.Tensor):
        return []
    return [at for at, size in enumerate(value.shape) if isinstance(size, torch.SymInt) and size.node.expr.free_symbols]


def _others(value: torch.Tensor) -> list[int]:
    axes = row_axes(value)
    return [size for at, size in enumerate(value.shape) if at not in axes]


def _dimensions(node: fx.Node, op: Operator, rank: int) -> set[int]:
    """The dimensions that a call works along; all of them where it names none."""
    for name in ("dim", "dims", "dimension"):
        given = argument(op, name, node.args, node.kwargs)
        if given is not None and given != []:
            return {each % max(rank, 1) for each in (given if isinstance(given, list | tuple) else [given])}
    return set(range(rank))


def _einsum_mixes(equation: Any, operands: Any) -> bool:
    """Whether rows have another letter in one operand than in another, or are summed."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    found = set()
    for letters, operand in zip(left.split(","), operands, strict=True):
        value = operand.meta["val"]
        for axis in row_axes(value):
            before, dots, after = letters.partition("...")
            named = before if axis < len(before) or not dots else after
            at = axis if axis < len(before) else axis - value.dim()
            found.add(named[at] if -len(named) <= at < len(named) else f"...{axis - value.dim() + len(after)}")
    return not arrow or len(found) > 1 or not all(each in right or (each[:3] in right) for each in found)
