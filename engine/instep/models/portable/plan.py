"""The plan of a form's computation: what is computed once and what for each row, in which order, and where."""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from instep.models.portable.form import COMPARISONS, MAPS, Buffer, Form, Node, View, contiguous
from instep.models.portable.lanes import SIZES

ONE_NAN: Final = "one_nan"
"""A map that exists only in plans: a copy in which one NaN replaces all others."""
_IS_MAP: Final = MAPS.keys() | COMPARISONS | {"cast", "where", ONE_NAN}
_ALIGNED: Final = 64
MOST_MAPS: Final = 64
"""The most maps in one loop. LLVM's time grows faster than their number."""
DENSE_LEAST: Final = 4
"""The fewest outputs for which a product with weights uses a panel."""


def is_map(node: Node) -> bool:
    """Whether each element of the result depends only on elements at the same index."""
    return node.op in _IS_MAP


def same_place(one: View, other: View) -> bool:
    """Whether two views of one shape have the same elements at each index."""
    strides = [[s for n, s in zip(v.shape, v.strides, strict=True) if n > 1] for v in (one, other)]
    return (one.buffer, one.offset, one.shape) == (other.buffer, other.offset, other.shape) and strides[0] == strides[1]


@dataclass(frozen=True)
class WeightPanel:
    """Weights of a product in the layout of `kernels`."""

    weight: View
    """The weights, [others…, inputs…, outputs]."""
    start: View | str | None
    """Initial values, [others…, outputs], or one number for all, as text because -0.0 equals 0.0. None if rows have
    their own.
    """
    inputs: int
    """The number of input dimensions."""

    def size(self, columns: int) -> int:
        """The size in bytes."""
        *others, outputs = (*self.others, self.weight.shape[-1])
        lines = 1 + math.prod(self.weight.shape[len(self.others) : -1])
        return 4 * math.prod(others) * -(-outputs // columns) * columns * lines

    @property
    def others(self) -> tuple[int, ...]:
        """The sizes of the dimensions that are neither inputs nor outputs."""
        return self.weight.shape[: -1 - self.inputs]


@dataclass(frozen=True)
class Product:
    """A product of rows with weights, as a call of `kernels` for every index of the dimensions `others`."""

    x: View
    """The inputs, [others…, inputs…]."""
    out: View
    """The outputs, [others…, outputs]."""
    start: View | None
    """Initial values in the shape of `out`; None if the panel contains them."""
    panel: WeightPanel
    strides: tuple[int, ...]
    """The stride of each of the dimensions `others` within the panel."""


@dataclass
class StepPlan:
    """The result of `plan`."""

    buffers: list[Buffer]
    places: dict[int, int]
    """For each buffer that has memory, its offset in a row's memory or in that of the weights, in bytes."""
    shared: frozenset[int]
    """Buffers of tensors, and of values that depend only on tensors."""
    once: list[Node]
    """Nodes that depend only on tensors."""
    groups: list[list[Node]]
    """Nodes of each row in order; maps of one shape form a group."""
    kept: frozenset[int]
    """Buffers of groups that are read elsewhere and therefore need memory."""
    outputs: list[View]
    row_bytes: int
    weight_bytes: int
    """The size of the weights' memory before the panels."""
    products: dict[int, Product] = field(default_factory=dict)
    """Products by the index of their group."""
    panels: dict[WeightPanel, None] = field(default_factory=dict)
    """Panels in order."""


def plan(form: Form) -> StepPlan:
    """Plan the computation of a checked form."""
    buffers, nodes, outputs = list(form.buffers), list(form.nodes), list[View]()
    for view in form.outputs:
        buffers.append(Buffer(form.dtype(view), view.elements))
        outputs.append(View(len(buffers) - 1, 0, view.shape, contiguous(view.shape)))
        nodes.append(Node(ONE_NAN, outputs[-1], (view,)))
    shared = {index for index, buffer in enumerate(buffers) if buffer.tensor}
    written = defaultdict[int, list[Node]](list)
    for node in nodes:
        written[node.out.buffer].append(node)
    results = {view.buffer for view in outputs}
    varying = set(form.inputs) | results
    for node in nodes:
        if any(view.buffer in varying for view in node.views):
            varying.add(node.out.buffer)
    once = [node for node in nodes if node.out.buffer not in varying]
    shared |= {node.out.buffer for node in once}
    each = [node for node in nodes if node.out.buffer in varying]
    groups = _grouped(each, written)
    kept = frozenset(_kept(groups, written)) | results
    places, weight_bytes = dict[int, int](), 0
    for index in sorted(shared):
        places[index], weight_bytes = weight_bytes, weight_bytes + _bytes(buffers[index])
    row_places, row_bytes = _placed(groups, buffers, kept, form.inputs, results)
    found = StepPlan(
        buffers, places | row_places, frozenset(shared), once, groups, kept, outputs, row_bytes, weight_bytes
    )
    for number, group in enumerate(groups):
        if group[0].op == "fma_chain" and (product := _product(found, group[0])) is not None:
            found.products[number] = product
    return found


def _bytes(buffer: Buffer) -> int:
    return -(-max(1, buffer.size) * SIZES[buffer.dtype] // _ALIGNED) * _ALIGNED


def _grouped(nodes: Sequence[Node], written: dict[int, list[Node]]) -> list[list[Node]]:
    """Order nodes so that maps of one shape are adjacent."""
    numbers = {id(node): number for number, node in enumerate(nodes)}
    waits: list[set[int]] = [set() for _ in nodes]
    before: dict[int, int] = {}
    for number, node in enumerate(nodes):
        for view in node.views:
            waits[number] |= {numbers[id(each)] for each in written[view.buffer] if id(each) in numbers}
        if node.out.buffer in before:
            waits[number].add(before[node.out.buffer])
        before[node.out.buffer] = number
    followers = defaultdict[int, list[int]](list)
    for number, earlier in enumerate(waits):
        for each in earlier:
            followers[each].append(number)
    left = [len(each) for each in waits]
    ready = [number for number, count in enumerate(left) if count == 0]
    groups = []
    while ready:
        group = [heapq.heappop(ready)]
        _release(group[0], followers, left, ready)
        if is_map(nodes[group[0]]):
            _grow(group, nodes, written, followers, left, ready)
        groups.append([nodes[number] for number in group])
    return groups


def _release(number: int, followers: dict[int, list[int]], left: list[int], ready: list[int]) -> None:
    for each in followers[number]:
        left[each] -= 1
        if left[each] == 0:
            heapq.heappush(ready, each)


def _grow(
    group: list[int],
    nodes: Sequence[Node],
    written: dict[int, list[Node]],
    followers: dict[int, list[int]],
    left: list[int],
    ready: list[int],
) -> None:
    made = {nodes[group[0]].out.buffer: nodes[group[0]]}
    shape = _space(nodes[group[0]])
    grew = True
    while grew and len(group) < MOST_MAPS:
        grew = False
        for number in sorted(ready):
            node = nodes[number]
            if not is_map(node) or _space(node) != shape or node.out.buffer in made:
                continue
            inside = [view for view in node.views if view.buffer in made]
            if all(len(written[view.buffer]) == 1 and same_place(view, made[view.buffer].out) for view in inside):
                ready.remove(number)
                heapq.heapify(ready)
                group.append(number)
                made[node.out.buffer] = node
                _release(number, followers, left, ready)
                grew = True
                break


def _space(node: Node) -> list[int]:
    return [n for n in node.out.shape if n != 1]


def _kept(groups: Sequence[Sequence[Node]], written: dict[int, list[Node]]) -> set[int]:
    kept = {buffer for buffer, nodes in written.items() if len(nodes) > 1}
    for group in groups:
        made = {node.out.buffer for node in group} if is_map(group[0]) else set()
        kept |= {view.buffer for node in group for view in node.views if view.buffer not in made}
        kept |= set() if made else {group[0].out.buffer}
    return kept


def _placed(
    groups: Sequence[Sequence[Node]],
    buffers: Sequence[Buffer],
    kept: frozenset[int],
    inputs: Sequence[int],
    results: set[int],
) -> tuple[dict[int, int], int]:
    """Place buffers in a row's memory; memory is reused after a buffer's last read."""
    last: dict[int, int] = {}
    for number, group in enumerate(groups):
        for node in group:
            for view in (node.out, *node.views):
                last[view.buffer] = number
    places: dict[int, int] = {}
    free: list[tuple[int, int]] = []
    top = 0

    def take(size: int) -> int:
        nonlocal top
        fitting = min((each for each in free if each[0] >= size), default=None)
        if fitting is None:
            top += size
            return top - size
        free.remove(fitting)
        if fitting[0] > size:
            free.append((fitting[0] - size, fitting[1] + size))
        return fitting[1]

    live: list[int] = []
    for index in inputs:
        places[index] = take(_bytes(buffers[index]))
    for number, group in enumerate(groups):
        for node in group:
            index = node.out.buffer
            if index in kept and index not in places:
                places[index] = take(_bytes(buffers[index]))
                live.append(index)
        for index in [each for each in live if last[each] <= number and each not in results]:
            live.remove(index)
            free.append((_bytes(buffers[index]), places[index]))
    return places, top + _ALIGNED


def _product(plan: StepPlan, node: Node) -> Product | None:
    """The product as a call of `kernels`, if one factor is a weight matrix with enough outputs."""
    start, one, other = node.args
    assert isinstance(one, View)
    assert isinstance(other, View)
    if plan.buffers[node.out.buffer].dtype != "float32" or (one.buffer in plan.shared) == (other.buffer in plan.shared):
        return None
    x, weight = (other, one) if one.buffer in plan.shared else (one, other)
    if not (node.out.elements and weight.elements):
        return None
    rank = len(node.out.shape)
    columns = [dim for dim in range(rank) if x.strides[dim] == 0 and weight.strides[dim] != 0]
    if not columns:
        return None
    column = max(columns, key=lambda dim: node.out.shape[dim])
    if node.out.shape[column] < DENSE_LEAST:
        return None
    others = [dim for dim in range(rank) if dim != column and node.out.shape[dim] != 1]
    inputs = _merged(x, weight, rank)
    if len(inputs) > 3:
        return None
    is_fixed = not isinstance(start, View) or start.buffer in plan.shared
    starts = start if isinstance(start, View) and is_fixed else None
    mine = [dim for dim in others if weight.strides[dim] or (starts is not None and starts.strides[dim])]

    def view(of: View, dims: Sequence[int], more: Sequence[tuple[int, int]] = ()) -> View:
        sizes = [(node.out.shape[dim], of.strides[dim]) for dim in dims]
        return replace(of, shape=tuple(n for n, _ in (*sizes, *more)), strides=tuple(s for _, s in (*sizes, *more)))

    of_weights = [(n, s) for n, _, s in inputs]
    last = (node.out.shape[column], weight.strides[column])
    begin = (
        None if not is_fixed else repr(float(start)) if not isinstance(start, View) else view(start, [*mine, column])
    )
    panel = WeightPanel(view(weight, mine, [*of_weights, last]), begin, len(inputs))
    plan.panels.setdefault(panel)
    return Product(
        view(x, others, [(n, s) for n, s, _ in inputs]),
        view(node.out, [*others, column]),
        view(start, [*others, column]) if isinstance(start, View) and not is_fixed else None,
        panel,
        tuple(
            math.prod(node.out.shape[d] for d in mine[mine.index(dim) + 1 :]) if dim in mine else 0 for dim in others
        ),
    )


def _merged(x: View, weight: View, rank: int) -> list[tuple[int, int, int]]:
    """The reduced dimensions (size, stride in x, stride in the weights), with adjacent ones joined."""
    found: list[tuple[int, int, int]] = []
    for dim in range(rank, len(x.shape)):
        size, of_x, of_weight = x.shape[dim], x.strides[dim], weight.strides[dim]
        if size == 1:
            continue
        if found and found[-1][1:] == (size * of_x, size * of_weight):
            found[-1] = (found[-1][0] * size, of_x, of_weight)
        else:
            found.append((size, of_x, of_weight))
    return found
