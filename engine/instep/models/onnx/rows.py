"""Where the rows of a batch are in the values of a graph, and which operators let one row see another.

Some operators choose elements, or weigh them, by values. A row that does so only with rare values of its own passes
every trial, so these operators are refused unless the axis that counts the rows is known and stays by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from instep.models.errors import ModelError
from instep.models.onnx.description import OnnxDescription
from instep.models.onnx.graph import label, nodes_of, open_session, subgraphs_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

_CHOOSING: Final = frozenset(("Einsum", "GatherElements", "GatherND", "Gemm", "MatMul", "ScatterElements", "ScatterND"))
"""Operators that may combine rows by their values."""
_ALL_ROWS: Final = frozenset(("Compress", "DynamicQuantizeLinear", "NonMaxSuppression", "NonZero", "Unique"))
"""Operators whose results for a row, or their number, depend on the values of other rows."""
_EXTENTS: Final = {
    "ConstantOfShape": 0,
    "Expand": 1,
    "If": 0,
    "Loop": 0,
    "Pad": 1,
    "Range": 0,
    "Reshape": 1,
    "Slice": 1,
    "Split": 1,
    "Tile": 1,
    "TopK": 1,
}
"""Operators with inputs that all rows share, such as a new shape, from this index on."""
_SHARED_INPUTS: Final = {"If": 1, "Loop": 2, "Pad": 2, "Reshape": 2}
"""Where those inputs end before the last one."""
_ROWS: Final = (13, 17)
"""Sizes of a batch in which shapes are compared."""


class RowAxis(NamedTuple):
    """The axis of a value that counts the rows."""

    axis: int
    rank: int
    times: int
    """Count of elements for each row: heads, for instance, may be in the same axis."""

    @property
    def from_last(self) -> int:
        """Its place as an index from the end: -1 for the last axis."""
        return self.axis - self.rank


RowAxes = Mapping[str, RowAxis]


def check_rows(
    model: ModelProto, per_row: set[str], source: str, description: OnnxDescription | None = None
) -> set[str]:
    """Check that no operator lets one row decide something for the others, or see them.

    Args:
        model: the graph.
        per_row: the inputs that hold values of rows.
        source: how sentences call it.
        description: of a step; None for a graph of which it is not known where rows are.

    Returns:
        The names of all tensors that hold values of rows.

    Raises:
        ModelError: naming the operator.
    """
    found = set(per_row)
    chooses = any(node.op_type in _CHOOSING for node in nodes_of(model.graph))
    _follow(model.graph, found, source, _row_axes(model, description) if chooses and description else {})
    return found


def _follow(graph: GraphProto, per_row: set[str], source: str, axes: RowAxes) -> None:
    """Add to `per_row` what holds values of rows; shapes do not."""
    for node in graph.node:
        captured = {name for sub in subgraphs_of(node) for inner in nodes_of(sub) for name in inner.input}
        captured |= {output.name for sub in subgraphs_of(node) for output in sub.output}
        depends = bool(per_row & (captured | {*node.input}))
        first = _EXTENTS.get(node.op_type)
        shared = () if first is None else node.input[first : _SHARED_INPUTS.get(node.op_type)]
        chooses_rows = node.op_type == "Gather" and per_row >= {*node.input}
        if (depends and node.op_type in _ALL_ROWS) or per_row & {*shared} or chooses_rows:
            raise ModelError(
                f"{source}: with {label(node)}, values of one row decide what happens to the others in the batch; "
                "write that with Where, or as arithmetic"
            )
        if _may_combine(node, per_row, axes):
            raise ModelError(
                f"{source}: with {label(node)}, one row may choose or weigh values of the others in the batch, each of "
                "which is another stream; let the axis of rows be known and stay by itself, or write that with Where "
                "or as a sum of products along the other axes"
            )
        for subgraph in subgraphs_of(node):
            inner = set(per_row)
            if depends:
                inner |= {each.name for each in subgraph.input[2 if node.op_type == "Loop" else 0 :]}
            _follow(subgraph, inner, source, axes)
            if node.op_type == "Loop" and subgraph.output[0].name in inner:
                raise ModelError(
                    f"{source}: {label(node)} runs until values of rows end it, so one row decides for the others; "
                    "give it a fixed number of turns"
                )
        if depends and node.op_type not in ("Shape", "Size"):
            per_row |= {*node.output}


def _row_axes(model: ModelProto, description: OnnxDescription) -> RowAxes:
    """The axes of rows of all values in the outermost graph, found by running it with two sizes of a batch.

    Args:
        model: the graph.
        description: what it is given.
    """
    few, many = _shapes(model, description)
    found = {}
    for name in few.keys() & many.keys():
        one, other = few[name], many[name]
        differ = [axis for axis, (a, b) in enumerate(zip(one, other, strict=False)) if a != b]
        if len(one) != len(other) or len(differ) != 1:
            continue
        (axis,) = differ
        times, rest = divmod(one[axis], _ROWS[0])
        if not rest and other[axis] == times * _ROWS[1]:
            found[name] = RowAxis(axis, len(one), times)
    return found


def _may_combine(node: NodeProto, per_row: set[str], axes: RowAxes) -> bool:
    """Whether an operator may let a row see another one: unless its axes are known and keep rows apart.

    Args:
        node: one of `_CHOOSING`, or any other.
        per_row: the names of what depends on rows.
        axes: those of rows, as far as they are known.
    """
    given = list(node.input)
    if node.op_type in ("Gemm", "MatMul", "Einsum"):
        weighed = [name for name in given[: 2 if node.op_type == "Gemm" else None] if name in per_row]
        if len(weighed) < 2:
            return False
        found = [axes.get(name) for name in weighed]
        if node.op_type == "Einsum":
            return not _einsum_keeps(node, per_row, axes)
        places = {None if each is None else (each.from_last, each.times) for each in found}
        return len(places) != 1 or None in places or any(each is not None and each[0] >= -2 for each in places)
    if node.op_type not in _CHOOSING or given[1] not in per_row:
        return False
    if node.op_type == "ScatterND":
        return True
    if node.op_type.startswith("Gather") and given[0] not in per_row:
        return False  # a table that all rows share
    of_each = {axes.get(name) for name in given if name}
    places = {None if each is None else (each.axis, each.times) for each in of_each}
    if len(places) != 1 or None in places:
        return True
    ((axis, _),) = (place for place in places if place is not None)
    if node.op_type == "GatherND":
        return bool(axis >= _attribute(node, "batch_dims", 0))
    rank = next(each.rank for each in of_each if each is not None)
    return bool(axis == _attribute(node, "axis", 0) % rank)


def _einsum_keeps(node: NodeProto, per_row: set[str], axes: RowAxes) -> bool:
    """Whether all values of rows have them under one letter, which the result has, too."""
    left, arrow, right = _attribute(node, "equation", b"").decode().replace(" ", "").partition("->")
    letters = set()
    for term, name in zip(left.split(","), node.input, strict=False):
        if name in per_row:
            letters.add("" if "." in term or name not in axes else term[axes[name].axis])
    return bool(arrow) and len(letters) == 1 and letters <= {*right}


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    from onnx import helper

    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _shapes(model: ModelProto, description: OnnxDescription) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of values in a batch of either size; nothing where the graph does not run."""
    from onnx import ModelProto, ValueInfoProto

    shown = ModelProto()
    shown.CopyFrom(model)
    outputs = {value.name for value in model.graph.output}
    names = [name for node in model.graph.node for name in node.output if name]
    shown.graph.output.extend(ValueInfoProto(name=name) for name in names if name not in outputs)
    constants = {constant.input: constant.value for constant in description.constants}
    try:
        session = open_session(shown.SerializeToString(), "the graph")
        found = []
        for rows in _ROWS:
            given = {
                tensor.name: np.full(tensor.sized(rows), constants.get(tensor.name, 0), tensor.dtype)
                for tensor in description.graph_inputs
            }
            values = dict(zip(names, session.run(names, given), strict=True)) | given
            found.append({name: value.shape for name, value in values.items() if isinstance(value, np.ndarray)})
    except Exception:  # its errors have no common class; running the graph itself says what is wrong
        return [{}, {}]
    return found
