"""Compiles a form to machine code: a function for each group of nodes, and `run`, which calls them for all rows.

The same arithmetic is written in two ways: for `lanes` rows at once, where each element is a vector with one row per
lane, and for a few rows one by one, where LLVM may put neighbouring elements of a row into the lanes. `run` steps as
many rows as possible in the first way, and a small remainder in the second.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir

from instep.core.typing import F32, U8
from instep.core.typing import I64 as Slots
from instep.models.base import StateSpec
from instep.models.errors import ModelError
from instep.models.portable import kernels
from instep.models.portable.form import COMPARISONS, DTYPES, REDUCTIONS, SCANS, Form, Node, Operand, View, check
from instep.models.portable.lanes import I32, I64, KINDS, POINTER, SIZES, STORED, VOID, Lanes, Value
from instep.models.portable.machine import Library, Processor, cached, host, object_code
from instep.models.portable.plan import ONE_NAN, WeightPanel, is_map, plan, same_place

MAX_UNITS: Final = 5000
MAX_REPEATED: Final = 16
"""The most that the panels of a step may exceed its tensors in size; padding alone can make them 4 times as large."""
_USUAL_MODE: Final = 0x1F80
"""The x86 mode that rounds to nearest, keeps denormals, and does not trap."""
_STEPS: Final = {
    **dict.fromkeys(("sum", "cumsum"), "add"),
    **dict.fromkeys(("prod", "cumprod"), "mul"),
    "amax": "maximum",
    "amin": "minimum",
    "any": "or",
    "all": "and",
}
"""By reduction, the map that combines a total with the next element."""
PORT: Final = 3
"""The numbers for each input and output: address of the first row, bytes between rows, address of the row numbers."""


class Compiled:
    """A compiled step with its weights.

    Any number of threads may `run` it, each with its own memory.
    """

    def __init__(self, form: Form, tensors: Mapping[str, npt.NDArray[Any]], processor: Processor | None = None) -> None:
        """`tensors` have the dtypes and sizes that the form names. Code for another `processor` must run on this one.

        Raises:
            ModelError: when it is too large to be compiled.
        """
        code = StepCode(form, processor or host())
        library = _host_library(code, form.digest) if processor is None else _whole_library(code, form.digest)
        self.input_sizes = [form.buffers[index].size for index in form.inputs]
        self.dtypes = [DTYPES[form.buffers[index].dtype] for index in form.inputs]
        self.output_sizes = [view.elements for view in form.outputs]
        self.memory_bytes = code.memory_bytes
        """The working memory that each thread needs for `run`."""
        self._library = library
        self._weights = code.weights(tensors, library.function("once", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long))
        self._run = library.function(
            "run", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long, ctypes.c_long
        )

    def run(self, memory: int, ports: int, first: int, rows: int) -> None:
        """Step rows.

        Args:
            memory: the address of `memory_bytes` bytes, a multiple of 64.
            ports: the address of `PORT` int64 for each input, then for each output.
            first: the row to begin with.
            rows: the number of rows.
        """
        self._run(memory, self._weights.ctypes.data, ports, first, rows)


def _host_library(code: StepCode, key: str) -> Library:
    made = cached(key, code.processor, lambda: object_code(code.text(), code.processor))
    return Library(made, kernels.symbols())


def _whole_library(code: StepCode, key: str) -> Library:
    """The step with its own copy of the routines, for a processor other than the host."""
    text = str(code.module(with_kernels=True))
    return Library(cached(f"{key} and kernels", code.processor, lambda: object_code(text, code.processor)), {})


class StepCode:
    """The code that computes a form on a processor.

    Raises:
        ModelError: when it is too large to be compiled.
    """

    def __init__(self, form: Form, processor: Processor) -> None:
        self.plan = plan(form)
        self._form, self._processor = form, processor
        if (units := len(self.plan.groups) + len(self.plan.once)) > MAX_UNITS:
            raise ModelError(
                f"the step takes {units:,} parts, of which {MAX_UNITS:,} at most are compiled: make it smaller, or let "
                "loops in it run over fewer elements"
            )
        self.places, at = dict[WeightPanel, int](), self.plan.weight_bytes
        for panel in self.plan.panels:
            self.places[panel], at = at, at + panel.size(processor.columns)
        if at > MAX_REPEATED * self.plan.weight_bytes + 2**26:
            raise ModelError(
                f"the step's products use each weight many times over, which takes {at / 1e9:,.1f} GB: store what they "
                "use as a tensor, or repeat less of it"
            )
        self.weight_bytes = at
        self.memory_bytes = self.plan.row_bytes * max(processor.lanes, processor.few)

    def text(self) -> str:
        """The module in LLVM's intermediate language."""
        return str(self.module())

    def module(self, *, with_kernels: bool = False) -> ir.Module:
        """All functions; for a processor other than this one, with those of `kernels`."""
        processor, found = self._processor, ir.Module("step")
        found.triple = processor.triple
        for name, arguments in () if with_kernels else kernels.names().items():
            ir.Function(found, ir.FunctionType(VOID, arguments), kernels.symbol(name, processor))
        if with_kernels:
            kernels.write_all(found, processor)
        self._write_once(found)
        units: dict[int, list[Any]] = {}
        for lanes in {processor.lanes, 1}:
            units[lanes] = [
                _Unit(self, found, f"unit_{lanes}_{number}", lanes).write(number, group)
                for number, group in enumerate(self.plan.groups)
            ]
        _RunFunction(self, found).write(units)
        return found

    @property
    def processor(self) -> Processor:
        """The target."""
        return self._processor

    @property
    def ports(self) -> list[tuple[int, int, str]]:
        """For each input, then each output: its offset in a row's memory in bytes, number of elements, and dtype."""
        buffers = [*self._form.inputs, *(view.buffer for view in self.plan.outputs)]
        return [(self.plan.places[b], self.plan.buffers[b].size, self.plan.buffers[b].dtype) for b in buffers]

    def _write_once(self, module: ir.Module) -> None:
        # Arithmetic is never written next to a change of its mode: LLVM does not know that their order matters.
        once = Lanes(module, "once", _UNIT, 1)
        restore = _in_usual_mode(once, self._processor)
        for number, node in enumerate(self.plan.once):
            unit = _Unit(self, module, f"once_{number}", 1)
            unit.write_node(node)
            unit.b.ret_void()
            once.b.call(unit.function, once.function.args)
        restore()
        once.b.ret_void()

    def weights(
        self, tensors: Mapping[str, npt.NDArray[Any]], once: Callable[[int, int, int], object]
    ) -> npt.NDArray[np.uint8]:
        """The memory of the weights: tensors, values that depend only on them (computed by `once`), and panels."""
        memory = aligned_bytes(self.weight_bytes)
        for index, buffer in enumerate(self.plan.buffers):
            if buffer.tensor:
                values = np.ascontiguousarray(tensors[buffer.tensor]).reshape(-1)
                place = self.plan.places[index]
                memory[place : place + values.nbytes] = values.view(np.uint8)
        once(0, memory.ctypes.data, 1)
        for panel, place in self.places.items():
            self._pack(panel, memory, place)
        return memory

    def _pack(self, panel: WeightPanel, memory: npt.NDArray[np.uint8], place: int) -> None:
        columns, others = self._processor.columns, math.prod(panel.others)
        weights = self._array(panel.weight, memory)
        outputs = weights.shape[-1]
        inputs = weights.reshape(others, -1, outputs)
        begins = self._array(panel.start, memory) if isinstance(panel.start, View) else float(panel.start or "0")
        blocks = -(-outputs // columns)
        lines = np.zeros((others, 1 + inputs.shape[1], blocks * columns), np.float32)
        with np.errstate(over="ignore"):
            lines[:, 0, :outputs] = begins.reshape(others, outputs) if isinstance(begins, np.ndarray) else begins
        lines[:, 1:, :outputs] = inputs
        packed = lines.reshape(others, -1, blocks, columns).transpose(0, 2, 1, 3)
        memory[place : place + packed.nbytes] = np.ascontiguousarray(packed).view(np.uint8).reshape(-1)

    def _array(self, view: View, memory: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        start = self.plan.places[view.buffer] + 4 * view.offset
        strides = [4 * stride for stride in view.strides]
        return np.ndarray(view.shape, np.float32, memory.data, start, strides)


def aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
    """Zeros at a multiple of 64 bytes."""
    found = np.zeros(size + 64, np.uint8)
    start = -found.ctypes.data % 64
    return found[start : start + size]


_UNIT: Final = (POINTER, POINTER, I64)
"""The arguments: the memory of the rows, the memory of the weights, the number of rows."""


class _Unit(Lanes):
    """The function of a group: for `lanes` rows at once or, if that is 1, for one row after another."""

    def __init__(self, code: StepCode, module: ir.Module, name: str, lanes: int) -> None:
        super().__init__(module, name, _UNIT, lanes)
        self._code, self._plan = code, code.plan
        self._memory, self._weights, self._rows = self.function.args
        for argument in self.function.args[:2]:
            argument.add_attribute("noalias")
        self.function.attributes.add("noinline")
        self._row = self._memory

    def write(self, number: int, group: Sequence[Node]) -> Any:
        """Write the function and return it."""
        product = self._plan.products.get(number)
        if product is not None:
            self._write_product(number)
        else:
            with self._each_row():
                if is_map(group[0]):
                    self._write_maps(group)
                else:
                    self.write_node(group[0])
        self.b.ret_void()
        return self.function

    @contextmanager
    def _each_row(self) -> Iterator[None]:
        if self.count > 1:
            yield
            return
        with self.loop(self._rows) as row:
            self._row = self.at(self._memory, self.b.mul(row, self.i(self._plan.row_bytes)))
            yield

    # ── Elements ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _dtype(self, view: View) -> str:
        return self._plan.buffers[view.buffer].dtype

    def _place(self, view: View, index: Value) -> Value:
        """The address of an element, in its first lane."""
        size, place = SIZES[self._dtype(view)], self._plan.places[view.buffer]
        if view.buffer in self._plan.shared:
            return self.at(self._weights, self._bytes(index, size, place + view.offset * size))
        return self.at(self._row, self._bytes(index, size * self.count, (place + view.offset * size) * self.count))

    def _bytes(self, index: Value, size: int, start: int) -> Value:
        return self.b.add(self.b.mul(index, self.i(size)), self.i(start))

    def _load(self, view: View, index: Value) -> Value:
        dtype, place = self._dtype(view), self._place(view, index)
        if view.buffer in self._plan.shared:
            return self._as_value(self.splat(self.get(place, STORED[dtype], SIZES[dtype])), dtype)
        align = min(64, SIZES[dtype] * self.count)
        return self._as_value(self.get(place, self.vector(STORED[dtype]), align), dtype)

    def _as_value(self, stored: Value, dtype: str) -> Value:
        if dtype != "bool":
            return stored
        zero = [0] * self.count if self.count > 1 else 0
        return self.b.icmp_unsigned("!=", stored, ir.Constant(stored.type, zero))

    def _store(self, value: Value, view: View, index: Value) -> None:
        dtype, place = self._dtype(view), self._place(view, index)
        if dtype == "bool":
            value = self.b.zext(value, self.vector(STORED["bool"]))
        self.put(value, place, min(64, SIZES[dtype] * self.count))

    def _operand(self, operand: Operand, index: Value, dtype: str) -> Value:
        return self._load(operand, index) if isinstance(operand, View) else self.const(operand, dtype)

    # ── Nodes ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def write_node(self, node: Node) -> None:
        """Write a node on its own."""
        if is_map(node):
            self._write_maps([node])
        elif node.op == "fma_chain":
            self._write_chain(node)
        elif node.op in REDUCTIONS:
            self._write_reduction(node)
        elif node.op in SCANS:
            self._write_scan(node)
        elif node.op == "take":
            self._write_take(node)
        else:
            self._write_put(node)

    def _write_maps(self, group: Sequence[Node]) -> None:
        """Write maps of one shape as one loop that passes results on in registers."""
        made = {node.out.buffer: node.out for node in group}
        stored = [node for node in group if node.out.buffer in self._plan.kept or node.out.buffer in self._plan.shared]
        given = [view for node in group for view in node.views if not self._is_made(view, made)]
        views = [*(node.out for node in stored), *dict.fromkeys(given)]
        strides = [[s for n, s in zip(view.shape, view.strides, strict=True) if n != 1] for view in views]
        sizes = [n for n in group[0].out.shape if n != 1]
        outer_first = sorted(range(len(sizes)), key=lambda dim: -abs(strides[0][dim]))
        dims = _neighbours_joined([(sizes[dim], tuple(each[dim] for each in strides)) for dim in outer_first])
        with self.loops(dims, len(views)) as indices:
            at = dict(zip(views, indices, strict=True))
            loaded: dict[View, Value] = {}
            values: dict[int, Value] = {}
            for node in group:
                dtypes = [self._dtype(each) for each in node.views] or [self._dtype(node.out)]
                of_numbers = dtypes[0] if node.op in COMPARISONS else self._dtype(node.out)
                arguments = []
                for each in node.args:
                    if isinstance(each, View) and self._is_made(each, made):
                        arguments.append(values[each.buffer])
                    elif isinstance(each, View):
                        if each not in loaded:
                            loaded[each] = self._load(each, at[each])
                        arguments.append(loaded[each])
                    else:
                        arguments.append(self.const(each, of_numbers))
                value = self._mapped(node, arguments, dtypes)
                values[node.out.buffer] = value
                if node in stored:
                    self._store(value, node.out, at[node.out])

    def _is_made(self, view: View, made: Mapping[int, View]) -> bool:
        return view.buffer in made and same_place(view, made[view.buffer])

    def _mapped(self, node: Node, arguments: Sequence[Value], dtypes: Sequence[str]) -> Value:
        dtype = self._dtype(node.out)
        if node.op == ONE_NAN:
            return self.one_nan(dtype, arguments[0])
        return self.map(node.op, dtype, arguments, dtypes)

    def _write_chain(self, node: Node) -> None:
        """Write a chain; several outputs with a common factor are computed together."""
        start, a, b = node.args
        assert isinstance(a, View)
        assert isinstance(b, View)
        dtype, rank, sizes = self._dtype(node.out), len(node.out.shape), node.out.shape
        shared = [dim for dim in range(rank) if sizes[dim] > 1 and 0 in (a.strides[dim], b.strides[dim])]
        block = max(shared, key=lambda dim: sizes[dim], default=None)
        if block is not None and a.strides[block] != 0:
            a, b = b, a
        views = [node.out, a, b, *([start] if isinstance(start, View) else [])]
        outer = [(sizes[dim], tuple(view.strides[dim] for view in views)) for dim in range(rank) if dim != block]
        reduced = [(a.shape[dim], (a.strides[dim], b.strides[dim])) for dim in range(rank, len(a.shape))]
        count = 1 if block is None else sizes[block]
        width = min(count, 8)
        with self.loops(outer, len(views)) as indices:
            for begin, stop, many in (
                (0, count // width * width, width),
                (count // width * width, count, count % width),
            ):
                if begin == stop:
                    continue
                with self.loop(self.i(stop), start=self.i(begin), step=many) as first:
                    self._write_block(node, (start, a, b), views, indices, reduced, (block, first, many), dtype)

    def _write_block(
        self,
        node: Node,
        args: tuple[Operand, View, View],
        views: Sequence[View],
        indices: Sequence[Value],
        reduced: Sequence[tuple[int, tuple[int, ...]]],
        block: tuple[int | None, Value, int],
        dtype: str,
    ) -> None:
        (start, a, b), (dim, first, many), builder = args, block, self.b

        def moved(which: int, column: int) -> Value:
            stride = 0 if dim is None else views[which].strides[dim]
            if not stride:
                return indices[which]
            return builder.add(indices[which], builder.mul(builder.add(first, self.i(column)), self.i(stride)))

        kind = self.vector(KINDS[dtype])
        sums = [self.room(kind) for _ in range(many)]
        for column, total in enumerate(sums):
            builder.store(self._operand(start, moved(3, column) if len(views) > 3 else indices[0], dtype), total)
        others = [moved(2, column) for column in range(many)]
        with self.loops(reduced, 2) as (of_a, of_b):
            value = self._load(a, builder.add(indices[1], of_a))
            for other, total in zip(others, sums, strict=True):
                factor = self._load(b, builder.add(other, of_b))
                builder.store(self.fma(value, factor, builder.load(total, typ=kind)), total)
        for column, total in enumerate(sums):
            self._store(builder.load(total, typ=kind), node.out, moved(0, column))

    def _write_reduction(self, node: Node) -> None:
        (x,) = node.views
        rank, dtype = len(node.out.shape), self._dtype(x)
        outer = [(n, (x.strides[dim], node.out.strides[dim])) for dim, n in enumerate(node.out.shape)]
        sizes = x.shape[rank:]
        reduced = [(n, (x.strides[rank + dim], math.prod(sizes[dim + 1 :]))) for dim, n in enumerate(sizes)]
        kind, b = self.vector(KINDS[dtype]), self.b
        with self.loops(outer, 2) as (of_x, of_out):
            total, best = self.room(kind), self.room(self.vector(I64))
            first = (
                self.const(0 if node.op == "sum" else 1, dtype) if node.op in ("sum", "prod") else self._load(x, of_x)
            )
            b.store(first, total)
            b.store(self.const(0, "int64"), best)
            with self.loops(reduced, 2) as (at, number):
                value, before = self._load(x, b.add(of_x, at)), b.load(total, typ=kind)
                if node.op == "argmax":
                    takes = self._is_larger(dtype, value, before)
                    b.store(b.select(takes, value, before), total)
                    b.store(b.select(takes, self.splat(number), b.load(best, typ=self.vector(I64))), best)
                else:
                    b.store(self.map(_STEPS[node.op], dtype, (before, value), ()), total)
            found = b.load(best, typ=self.vector(I64)) if node.op == "argmax" else b.load(total, typ=kind)
            self._store(found, node.out, of_out)

    def _is_larger(self, dtype: str, value: Value, before: Value) -> Value:
        """Whether an element replaces the largest so far; NaN is the largest."""
        larger = self.compare(">", dtype, value, before)
        if dtype not in ("float32", "float64"):
            return larger
        is_first_nan = self.b.and_(self._is_nan(value), self.b.fcmp_ordered("ord", before, before))
        return self.b.or_(larger, is_first_nan)

    def _write_scan(self, node: Node) -> None:
        (x,), dtype, b = node.views, self._dtype(node.out), self.b
        pairs = [(n, (x.strides[dim], node.out.strides[dim])) for dim, n in enumerate(x.shape)]
        kind = self.vector(KINDS[dtype])
        with self.loops(pairs[:-1], 2) as (of_x, of_out):
            total = self.room(kind)
            b.store(self.const(0 if node.op == "cumsum" else 1, dtype), total)
            with self.loops(pairs[-1:], 2) as (from_x, to_out):
                given = b.load(total, typ=kind), self._load(x, b.add(of_x, from_x))
                value = self.map(_STEPS[node.op], dtype, given, ())
                b.store(value, total)
                self._store(value, node.out, b.add(of_out, to_out))

    def _bounded(self, index: Value, count: int) -> Value:
        """Limit an index to the valid range; a negative one counts from the end."""
        b, zero, most = self.b, self.const(0, "int64"), self.const(count - 1, "int64")
        below = b.icmp_signed("<", index, zero)
        index = b.select(below, b.add(index, self.const(count, "int64")), index)
        return self._minimum("int64", self._maximum("int64", index, zero), most)

    def _write_take(self, node: Node) -> None:
        table, index = node.views
        views = (table, index, node.out)
        dims = [(n, tuple(view.strides[dim] for view in views)) for dim, n in enumerate(node.out.shape)]
        dtype, b = self._dtype(table), self.b
        with self.loops(dims, 3) as (of_table, of_index, of_out):
            chosen = self._bounded(self._load(index, of_index), table.shape[-1])
            stored = self.vector(STORED[dtype])
            found = ir.Constant(stored, ir.Undefined)
            for lane in range(self.count):
                one = self._load_lane(
                    table, b.add(of_table, b.mul(self.lane(chosen, lane), self.i(table.strides[-1]))), lane
                )
                found = one if self.count == 1 else b.insert_element(found, one, ir.Constant(I32, lane))
            self._store(self._as_value(found, dtype), node.out, of_out)

    def _load_lane(self, view: View, index: Value, lane: int) -> Value:
        dtype = self._dtype(view)
        return self.get(self._lane_place(view, index, lane), STORED[dtype], SIZES[dtype])

    def _lane_place(self, view: View, index: Value, lane: int) -> Value:
        place = self._place(view, index)
        if view.buffer in self._plan.shared:
            return place
        return self.at(place, self.i(lane * SIZES[self._dtype(view)]))

    def _write_put(self, node: Node) -> None:
        index, value = node.args
        assert isinstance(index, View)
        views = [node.out, index, *([value] if isinstance(value, View) else [])]
        dims = [(n, tuple(view.strides[dim] for view in views)) for dim, n in enumerate(node.out.shape[:-1])]
        dtype, b = self._dtype(node.out), self.b
        with self.loops(dims, len(views)) as (of_out, of_index, *of_value):
            chosen = self._bounded(self._load(index, of_index), node.out.shape[-1])
            given = self._operand(value, of_value[0] if of_value else of_out, dtype)
            for lane in range(self.count):
                at = b.add(of_out, b.mul(self.lane(chosen, lane), self.i(node.out.strides[-1])))
                place, one = self._lane_place(node.out, at, lane), self.lane(given, lane)
                if node.op == "put_add":
                    before = self.get(place, STORED[dtype], SIZES[dtype])
                    one = b.fadd(before, one) if dtype in ("float32", "float64") else b.add(before, one)
                if dtype == "bool":
                    one = b.zext(one, STORED["bool"])
                self.put(one, place, SIZES[dtype])

    def _write_product(self, number: int) -> None:
        product, code, b = self._plan.products[number], self._code, self.b
        panel, processor = product.panel, code.processor
        each = panel.size(processor.columns) // max(1, math.prod(panel.others))
        count = len(product.out.shape) - 1
        inputs = list(zip(product.x.shape[count:], product.x.strides[count:], strict=True))
        inputs = [(1, 0)] * (kernels.LEVELS - len(inputs)) + inputs
        views = [product.x, product.out, *([product.start] if product.start else [])]
        dims = [
            (n, (*(view.strides[dim] for view in views), product.strides[dim]))
            for dim, n in enumerate(product.out.shape[:-1])
        ]
        with self.loops(dims, len(views) + 1) as (of_x, of_out, *of_start, of_panel):
            x, out = self._place(product.x, of_x), self._place(product.out, of_out)
            start = self._place(product.start, of_start[0]) if product.start else ir.Constant(POINTER, None)
            weights = self.at(self._weights, self._bytes(of_panel, each, code.places[panel]))
            numbers = [
                *(number for pair in inputs for number in pair),
                product.out.shape[-1],
                product.out.strides[-1],
                product.start.strides[-1] if product.start else 0,
            ]
            arguments = [x, weights, out, start, *map(self.i, numbers)]
            if self.count > 1:
                b.call(self._routine("dense_many"), arguments)
            else:
                b.call(self._routine("dense_few"), [*arguments, self.i(self._plan.row_bytes), self._rows])

    def _routine(self, name: str) -> Any:
        return self.module.globals[kernels.symbol(name, self._code.processor)]


def _neighbours_joined(dims: Sequence[tuple[int, tuple[int, ...]]]) -> list[tuple[int, tuple[int, ...]]]:
    """Join loops over elements that are adjacent in memory."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in dims:
        if found and all(outer == inner * size for outer, inner in zip(found[-1][1], strides, strict=True)):
            found[-1] = (found[-1][0] * size, strides)
        else:
            found.append((size, strides))
    return found


class _RunFunction(Lanes):
    """`run(memory, weights, ports, first, rows)`. It sets the usual mode of arithmetic and restores the former one."""

    def __init__(self, code: StepCode, module: ir.Module) -> None:
        super().__init__(module, "run", (POINTER, POINTER, POINTER, I64, I64), 1)
        self._code = code

    def write(self, units: Mapping[int, Sequence[Any]]) -> None:
        """Write the function; `units` are the functions of all groups, by their number of lanes."""
        _, _, _, first, rows = self.function.args
        restore = _in_usual_mode(self, self._code.processor)
        processor, b = self._code.processor, self.b
        end = b.add(first, rows)
        place = self.room(I64)
        b.store(first, place)
        head, body, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
        b.branch(head)
        b.position_at_end(head)
        at = b.load(place, typ=I64)
        left = b.sub(end, at)
        b.cbranch(b.icmp_signed(">", left, self.i(0)), body, after)
        b.position_at_end(body)
        with b.if_else(b.icmp_signed("<=", left, self.i(processor.few))) as (few, many):
            with few:
                self._write_pass(units[1], 1, at, left)
                b.store(end, place)
            with many:
                here = self.least(left, self.i(processor.lanes))
                self._write_pass(units[processor.lanes], processor.lanes, at, here)
                b.store(b.add(at, here), place)
        b.branch(head)
        b.position_at_end(after)
        restore()
        b.ret_void()

    def _write_pass(self, units: Sequence[Any], lanes: int, first: Value, rows: Value) -> None:
        memory, weights = self.function.args[:2]
        ports = self._code.ports
        inputs = len(ports) // 2
        for number in range(inputs):
            self._move(number, lanes, first, rows, into=True)
        for unit in units:
            self.b.call(unit, [memory, weights, rows])
        for number in range(inputs, len(ports)):
            self._move(number, lanes, first, rows, into=False)

    def _move(self, number: int, lanes: int, first: Value, rows: Value, *, into: bool) -> None:
        memory, _, ports = self.function.args[:3]
        place, count, dtype = self._code.ports[number]
        base, stride, numbers = (
            self.get(self.at(ports, self.i(PORT * number + field), I64), kind, 8)
            for field, kind in enumerate((POINTER, I64, POINTER))
        )
        b, size = self.b, SIZES[dtype]
        addresses = self.room(I64, self._code.processor.lanes)
        has_numbers = b.icmp_unsigned("!=", b.ptrtoint(numbers, I64), self.i(0))
        with self.loop(rows) as r:
            row = b.add(first, r)
            index = self.room(I64)
            b.store(row, index)
            with b.if_then(has_numbers):
                b.store(self.get(self.at(numbers, row, I64), I64, 8), index)
            address = self.at(base, b.mul(b.load(index, typ=I64), stride))
            if lanes > 1:
                self.put(address, self.at(addresses, r, I64), 8)
            else:
                mine = self.at(memory, b.add(b.mul(r, self.i(self._code.plan.row_bytes)), self.i(place)))
                self._copy_bytes(*((mine, address) if into else (address, mine)), count * size)
        if lanes > 1:
            routine = self.module.globals[
                kernels.symbol(f"{'to_lanes' if into else 'to_rows'}_{size}", self._code.processor)
            ]
            lanes_at = self.at(memory, self.i(place * lanes))
            b.call(routine, [addresses, lanes_at, self.i(count), rows])

    def _copy_bytes(self, to: Value, of: Value, count: int) -> None:
        name = "llvm.memcpy.p0.p0.i64"
        kind = ir.FunctionType(VOID, [POINTER, POINTER, I64, ir.IntType(1)])
        known = self.module.globals.get(name) or ir.Function(self.module, kind, name)
        self.b.call(known, [to, of, self.i(count), ir.Constant(ir.IntType(1), 0)])


def _in_usual_mode(code: Lanes, processor: Processor) -> Callable[[], None]:
    """Round to nearest and keep denormals, whatever other libraries have set. Returns a function that restores it."""
    b = code.b

    def function(kind: Any, name: str) -> Any:
        return code.module.globals.get(name) or ir.Function(code.module, kind, name)

    if processor.is_x86:
        before, usual = code.room(I32), code.room(I32)
        read, write = (
            function(ir.FunctionType(VOID, [POINTER]), f"llvm.x86.sse.{name}") for name in ("stmxcsr", "ldmxcsr")
        )
        b.call(read, [before])
        b.store(ir.Constant(I32, _USUAL_MODE), usual)
        b.call(write, [usual])
        return lambda: b.call(write, [before])
    read = function(ir.FunctionType(I64, []), "llvm.aarch64.get.fpcr")
    write = function(ir.FunctionType(VOID, [I64]), "llvm.aarch64.set.fpcr")
    mode = b.call(read, [])
    b.call(write, [code.i(0)])
    return lambda: b.call(write, [mode])


class CompiledStep:
    """A compiled form with its weights. Any number of threads may use it, each with its own `Rows`.

    Args:
        form: it is checked, since it may come from a stranger.
        tensors: of the weights file, by name.
        state: the leaves, in the order of the form's inputs after the frame.
        source: the form's name in error messages.

    Raises:
        ModelError: when the form cannot be computed.
    """

    def __init__(
        self, form: Form, tensors: Mapping[str, npt.NDArray[Any]], state: StateSpec, source: str = "the step"
    ) -> None:
        check(form, {name: (tensor.dtype.name, tensor.size) for name, tensor in tensors.items()}, source)
        self.form, self.state = form, state
        self._code = Compiled(form, tensors)
        self.features, *_ = self._code.input_sizes
        self.outputs, *_ = self._code.output_sizes

    def bind(self, inputs: F32, states: U8, outputs: F32) -> Rows:
        """Prepare to step rows of three tables.

        Args:
            inputs: float32 [any, features].
            states: uint8 [any, row_bytes], changed in place.
            outputs: float32 [any, outputs].

        Raises:
            ValueError: for tables of other dtypes or widths.
        """
        for table, dtype, width in (
            (inputs, np.float32, self.features),
            (states, np.uint8, self.state.row_bytes),
            (outputs, np.float32, self.outputs),
        ):
            if table.dtype != dtype or table.ndim != 2 or table.shape[1] != width or table.strides[1] != table.itemsize:
                raise ValueError(
                    f"a table of {table.dtype} {table.shape}, where rows of {width} {dtype.__name__} belong"
                )
        return Rows(self._code, self.state, inputs, states, outputs)

    def run(self, x: F32, states: U8) -> tuple[F32, U8]:
        """Step rows of states, uint8 [R, row_bytes], with one frame each, float32 [R, features].

        Returns:
            Copies of the outputs [R, outputs] and of the new states.
        """
        if len(states) != len(x):
            raise ValueError(f"{len(x)} frames for {len(states)} states")
        y, after = np.empty((len(x), self.outputs), np.float32), states.copy()
        self.bind(np.ascontiguousarray(x), after, y).run_all(len(x))
        return y, after


class Rows:
    """Working memory for stepping rows of three tables; only one thread at a time may use it."""

    def __init__(self, code: Compiled, state: StateSpec, inputs: F32, states: U8, outputs: F32) -> None:
        self._code, self._tables = code, (inputs, states, outputs)
        self._memory = aligned_bytes(code.memory_bytes)
        self._memory_address: int = self._memory.ctypes.data
        leaves = [(states.ctypes.data + offset, states.strides[0]) for offset in state.offsets]
        ports = [(inputs.ctypes.data, inputs.strides[0]), *leaves, (outputs.ctypes.data, outputs.strides[0]), *leaves]
        self._ports: Slots = np.array([(*port, 0) for port in ports], np.int64)
        """The ports of `Compiled.run`; each run sets the addresses of the row numbers in them."""
        self._ports_address: int = self._ports.ctypes.data
        self._numbers = self._ports[:, 2]
        self._of_rows = self._numbers[:: 1 + len(leaves)]

    def run(self, slots: Slots, rows: Slots) -> None:
        """Step the states of `slots` with the frames in `rows` of the inputs; outputs go to the same rows.

        Both are int64 [R] and contiguous, and slots are distinct.
        """
        self._numbers[:] = slots.ctypes.data
        self._of_rows[:] = rows.ctypes.data
        self._code.run(self._memory_address, self._ports_address, 0, len(rows))

    def run_all(self, count: int) -> None:
        """Step the first `count` rows of all tables."""
        self._numbers[:] = 0
        self._code.run(self._memory_address, self._ports_address, 0, count)


def as_arrays(tensors: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
    """Convert tensors of torch to arrays."""
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in tensors.items()}


def unpacked(state: StateSpec, rows: U8) -> list[npt.NDArray[Any]]:
    """Each leaf of rows of states, [R, elements], contiguous."""
    return [np.ascontiguousarray(leaf).reshape(len(rows), -1) for leaf in state.unpack(rows).values()]


def shaped(state: StateSpec, leaves: Sequence[npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
    """Leaves [R, elements] by name, [R, *shape]."""
    return {leaf.name: values.reshape(-1, *leaf.shape) for leaf, values in zip(state.leaves, leaves, strict=True)}
