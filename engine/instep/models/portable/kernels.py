"""Routines that every compiled step calls: products with weights, and moves of rows into lanes and back.

Weights are stored in panels of `columns` outputs. A panel begins with a line of initial values of the sums, and has a
line of weights for every input. `dense_many` and `dense_few` use the same layout: in `dense_many` each lane is a row,
and a weight is copied to every lane; in `dense_few` each lane is an output, and a few rows are computed together so
that each weight is read once. Either way a sum is one chain in the order of the inputs. Inputs have up to three
dimensions, each with a stride, as for a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

from llvmlite import ir

from instep.models.portable.lanes import F32, I8, I32, I64, POINTER, Lanes, Value
from instep.models.portable.machine import Library, Processor, cached, host, object_code

LEVELS: Final = 3
"""The number of dimensions of a product's inputs."""
_MEMORY: Final = {"1": I8, "4": F32, "8": I64}
FEW_ROWS: Final = (1, 2, 3, 4, 6, 8)
"""Numbers of rows for which there is code. Other numbers use the next larger one, and the extra rows are ignored."""
DENSE: Final = (POINTER, POINTER, POINTER, POINTER, *(I64,) * (2 * LEVELS + 3))
"""Arguments: x, panels, out, start (null if the panels contain it), the size and stride of each input dimension, the
number of outputs, the strides of out and start.
"""
DENSE_FEW: Final = (*DENSE, I64, I64)
"""The arguments of `DENSE`, the bytes between rows, and the number of rows."""
MOVE: Final = (POINTER, POINTER, I64, I64)
"""Arguments: addresses of rows, lanes, elements of a row, number of rows."""


def names() -> dict[str, Sequence[object]]:
    """The routines by name, with the types of their arguments."""
    return {
        "dense_many": DENSE,
        "dense_few": DENSE_FEW,
        **{f"{way}_{size}": MOVE for way in ("to_lanes", "to_rows") for size in _MEMORY},
    }


def symbol(name: str, processor: Processor) -> str:
    """A routine's name in machine code, which differs for each way to compile it."""
    return f"instep_{name}_{processor.lanes}x{processor.columns}"


@cache
def routines() -> Library:
    """The routines for the processor that runs this."""
    processor = host()
    text = str(module(processor))
    return Library(cached("kernels", processor, lambda: object_code(text, processor)), {})


def symbols() -> dict[str, int]:
    """Addresses of the routines, by the names that compiled code uses."""
    library, processor = routines(), host()
    return {symbol(name, processor): library.address(symbol(name, processor)) for name in names()}


def module(processor: Processor) -> ir.Module:
    """All routines, for any processor."""
    found = ir.Module("kernels")
    found.triple = processor.triple
    write_all(found, processor)
    return found


def write_all(module: ir.Module, processor: Processor) -> None:
    """Add the routines to a module."""
    _write_many(module, processor)
    _write_few(module, processor)
    for size in _MEMORY:
        for way in ("to_lanes", "to_rows"):
            _write_move(module, processor, way, size)


class _Dense(Lanes):
    """A product with weights, with the arguments that both kinds share."""

    def __init__(
        self, module: ir.Module, name: str, processor: Processor, arguments: Sequence[object], count: int
    ) -> None:
        super().__init__(module, symbol(name, processor), arguments, count)
        self.panel = processor.columns
        (self.x, self.w, self.out, self.start, *numbers) = self.function.args[: len(DENSE)]
        self.dims = list(zip(numbers[0 : 2 * LEVELS : 2], numbers[1 : 2 * LEVELS : 2], strict=True))
        self.outputs, self.out_stride, self.start_stride = numbers[2 * LEVELS :]
        b, inputs = self.b, self.i(1)
        self.has_start = b.icmp_unsigned("!=", b.ptrtoint(self.start, I64), self.i(0))
        for size, _ in self.dims:
            inputs = b.mul(inputs, size)
        self.panel_size = b.mul(b.add(inputs, self.i(1)), self.i(self.panel))

    def chain(self, line: Value, add: Callable[[Value, Value], None]) -> None:
        """Call `add` for each input in order, with the offset in x and the address of its line of weights."""
        b, place = self.b, self.room(POINTER)
        b.store(line, place)
        (outer, outer_stride), (middle, middle_stride), (inner, inner_stride) = self.dims
        with self.loop(outer) as i, self.loop(middle) as j:
            offset = b.add(b.mul(i, outer_stride), b.mul(j, middle_stride))
            begin = b.load(place, typ=POINTER)
            with self.loop(inner) as k:
                add(b.add(offset, b.mul(k, inner_stride)), self.at(begin, b.mul(k, self.i(self.panel)), F32))
            b.store(self.at(begin, b.mul(inner, self.i(self.panel)), F32), place)


def _write_many(module: ir.Module, processor: Processor) -> None:
    """Write the product with rows in lanes; strides count elements, each of which is a vector."""
    code = _Dense(module, "dense_many", processor, DENSE, processor.lanes)
    b, width, align = code.b, code.panel, min(64, 4 * processor.lanes)
    vector = code.vector(F32)
    with code.loop(code.outputs, step=width) as first:
        panel = code.at(code.w, b.mul(b.sdiv(first, code.i(width)), code.panel_size), F32)
        sums = [code.room(vector) for _ in range(width)]
        is_whole = b.icmp_signed(">=", b.sub(code.outputs, first), code.i(width))

        def each_column(base: Value, stride: Value, write: Callable[[Value, Value], None]) -> None:
            """Call `write` with the sum and the address of each column that exists."""

            def one(j: int) -> None:
                write(sums[j], code.at(base, b.mul(b.add(first, code.i(j)), stride), vector))

            with b.if_else(is_whole) as (whole, part):
                with whole:
                    for j in range(width):
                        one(j)
                with part:
                    for j in range(width):
                        with b.if_then(b.icmp_signed("<", b.add(first, code.i(j)), code.outputs)):
                            one(j)

        for j, total in enumerate(sums):
            b.store(code.splat(code.get(code.at(panel, code.i(j), F32), F32, 4)), total)
        with b.if_then(code.has_start):
            each_column(
                code.start,
                code.start_stride,
                lambda total, place: b.store(code.get(place, vector, align), total),
            )

        def add(offset: Value, line: Value) -> None:
            value = code.get(code.at(code.x, offset, vector), vector, align)
            for j, total in enumerate(sums):
                weight = code.splat(code.get(code.at(line, code.i(j), F32), F32, 4))
                b.store(code.fma(weight, value, b.load(total, typ=vector)), total)

        code.chain(code.at(panel, code.i(width), F32), add)
        each_column(code.out, code.out_stride, lambda total, place: code.put(b.load(total, typ=vector), place, align))
    b.ret_void()


def _write_few(module: ir.Module, processor: Processor) -> None:
    """Write the dispatch to the function for this number of rows, or for the next larger one."""
    tiles = {rows: _write_rows(module, processor, rows) for rows in FEW_ROWS if rows <= processor.few}
    code = Lanes(module, symbol("dense_few", processor), DENSE_FEW, 1)
    *arguments, count = code.function.args
    done = code.b.append_basic_block("done")
    switch = code.b.switch(count, done)
    for rows in range(1, processor.few + 1):
        case = code.b.append_basic_block(f"rows{rows}")
        switch.add_case(code.i(rows), case)
        code.b.position_at_end(case)
        code.b.call(tiles[min(each for each in tiles if each >= rows)], arguments)
        code.b.branch(done)
    code.b.position_at_end(done)
    code.b.ret_void()


def _write_rows(module: ir.Module, processor: Processor, rows: int) -> Any:
    """Write the product of a few rows with outputs in lanes, in tiles of as many panels as registers allow."""
    code = _Dense(module, f"rows_{rows}", processor, DENSE_FEW[:-1], processor.columns)
    code.function.linkage = "internal"
    b, vector = code.b, code.vector(F32)
    row_bytes = code.function.args[len(DENSE)]
    xs = [code.at(code.x, b.mul(row_bytes, code.i(r))) for r in range(rows)]
    most = min(8, max(1, processor.registers // rows))
    room = code.room(vector, most * rows)

    def tile(block: Value, panels: int) -> None:
        lines = [code.at(code.w, b.mul(b.add(block, code.i(g)), code.panel_size), F32) for g in range(panels)]
        sums = [code.room(vector) for _ in range(panels * rows)]
        for number, total in enumerate(sums):
            first = code.get(lines[number // rows], vector, 4)
            b.store(first, total)
            b.store(first, code.at(room, code.i(number), vector))
        with b.if_then(code.has_start):
            _move_columns(code, (code.start, code.start_stride, row_bytes), block, (panels, rows), room, load=True)
            for number, total in enumerate(sums):
                b.store(b.load(code.at(room, code.i(number), vector), typ=vector), total)
        others = [b.sub(b.ptrtoint(line, I64), b.ptrtoint(lines[0], I64)) for line in lines]

        def add(offset: Value, line: Value) -> None:
            values = [code.splat(code.get(code.at(x, offset, F32), F32, 4)) for x in xs]
            for g, other in enumerate(others):
                weights = code.get(code.at(line, other), vector, 4)
                for value, total in zip(values, sums[g * rows :], strict=False):
                    b.store(code.fma(weights, value, b.load(total, typ=vector)), total)

        code.chain(code.at(lines[0], code.i(code.panel), F32), add)
        for number, total in enumerate(sums):
            b.store(b.load(total, typ=vector), code.at(room, code.i(number), vector))
        _move_columns(code, (code.out, code.out_stride, row_bytes), block, (panels, rows), room, load=False)

    blocks = b.sdiv(b.add(code.outputs, code.i(code.panel - 1)), code.i(code.panel))
    place = code.room(I64)
    b.store(code.i(0), place)
    for panels in sorted({most, *([most // 2] if rows < 3 else []), 1}, reverse=True):
        begin = b.load(place, typ=I64)
        end = b.add(begin, b.mul(b.sdiv(b.sub(blocks, begin), code.i(panels)), code.i(panels)))
        with code.loop(end, start=begin, step=panels) as block:
            tile(block, panels)
        b.store(end, place)
    b.ret_void()
    return code.function


def _move_columns(
    code: _Dense,
    rows_at: tuple[Value, Value, Value],
    block: Value,
    tile: tuple[int, int],
    room: Value,
    *,
    load: bool,
) -> None:
    """Load or store a tile, [panels, rows] vectors in `room`, leaving out columns that do not exist.

    `rows_at` is the address of the first row, the stride of its columns, and the bytes between rows.
    """
    (base, stride, row_bytes), (panels, rows), b = rows_at, tile, code.b
    width, vector = code.panel, code.vector(F32)
    with code.loop(code.i(panels)) as g, code.loop(code.i(rows)) as r:
        column = b.mul(b.add(block, g), code.i(width))
        left = code.least(b.sub(code.outputs, column), code.i(width))
        row = code.at(base, b.mul(r, row_bytes))
        mine = code.at(room, b.add(b.mul(g, code.i(rows)), r), vector)
        is_whole = b.and_(b.icmp_signed("==", left, code.i(width)), b.icmp_signed("==", stride, code.i(1)))
        with b.if_else(is_whole) as (whole, part):
            with whole:
                place = code.at(row, column, F32)
                source, target = (place, mine) if load else (mine, place)
                code.put(code.get(source, vector, 4), target, 4)
            with part, code.loop(left) as k:
                place = code.at(row, b.mul(b.add(column, k), stride), F32)
                source, target = (place, code.at(mine, k, F32)) if load else (code.at(mine, k, F32), place)
                code.put(code.get(source, F32, 4), target, 4)


def _write_move(module: ir.Module, processor: Processor, way: str, size: str) -> None:
    """Write the move of rows at given addresses to [elements][lanes], or back."""
    code = Lanes(module, symbol(f"{way}_{size}", processor), MOVE, processor.lanes)
    b, kind, lanes, width = code.b, _MEMORY[size], processor.lanes, int(size)
    addresses, memory, count, rows = code.function.args
    into = way == "to_lanes"

    def row(number: Value) -> Value:
        return code.get(code.at(addresses, number, I64), POINTER, 8)

    def one_by_one(start: Value) -> None:
        with code.loop(rows) as r:
            mine = row(r)
            with code.loop(count, start=start) as k:
                here, there = code.at(mine, k, kind), code.at(memory, b.add(b.mul(k, code.i(lanes)), r), kind)
                if into:
                    code.put(code.get(here, kind, 1), there, width)
                else:
                    code.put(code.get(there, kind, width), here, 1)

    if size != "4" or lanes == 1:
        one_by_one(code.i(0))
        b.ret_void()
        return
    vector = code.vector(F32)
    with b.if_else(b.icmp_signed("==", rows, code.i(lanes))) as (whole, part):
        with whole:
            mine = [row(code.i(r)) for r in range(lanes)]
            blocks = b.mul(b.sdiv(count, code.i(lanes)), code.i(lanes))
            with code.loop(blocks, step=lanes) as k:
                ours = [code.at(each, k, F32) for each in mine]
                theirs = [code.at(memory, b.add(k, code.i(j)), vector) for j in range(lanes)]
                source, target = (ours, theirs) if into else (theirs, ours)
                vectors = [code.get(each, vector, 1) for each in source]
                for value, place in zip(_transposed(code, vectors), target, strict=True):
                    code.put(value, place, 1)
            one_by_one(blocks)
        with part:
            one_by_one(code.i(0))
    b.ret_void()


def _transposed(code: Lanes, vectors: list[Value]) -> list[Value]:
    """Transpose vectors [i][j] to [j][i] by swapping halves at every power of two."""
    count, step = len(vectors), 1
    while step < count:
        after = list(vectors)
        for i in range(count):
            if not i & step:
                one, other = vectors[i], vectors[i | step]
                low = [c if not c & step else count + (c ^ step) for c in range(count)]
                high = [c | step if not c & step else count + c for c in range(count)]
                for at, order in ((i, low), (i | step, high)):
                    mask = ir.Constant(ir.VectorType(I32, count), order)
                    after[at] = code.b.shuffle_vector(one, other, mask)
        vectors, step = after, 2 * step
    return vectors
