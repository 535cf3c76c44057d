from __future__ import annotations

import copy
import json
import math
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instep.models.errors import ModelError
from instep.models.portable.definition import Definition
from instep.models.portable.form import (
    MAX_ITERATIONS,
    Buffer,
    Builder,
    Form,
    Node,
    View,
    broadcast,
    check,
    form_of_values,
    iterations,
    narrow,
    permute,
    reshape,
)

TENSORS: dict[str, npt.NDArray[Any]] = {"weight": np.ones((3, 4), np.float32), "order": np.array([1, 0], np.int64)}
KNOWN = {name: (tensor.dtype.name, tensor.size) for name, tensor in TENSORS.items()}


def example() -> Form:
    """A form with primitives of every kind."""
    builder = Builder()
    x, ring, count = builder.input("float32", (4,)), builder.input("float32", (2, 3)), builder.input("int64", (1,))
    weight, order = builder.tensor("weight", "float32", (3, 4)), builder.tensor("order", "int64", (2,))
    dense = builder.dense(x, weight, math.inf)
    total = builder.reduce("sum", builder.map("tanh", dense), [0], keep=True)
    scan = builder.emit("cumsum", builder.fresh("float32", (3,)), builder.map("sub", dense, total))
    new_ring = builder.map("copy", ring, out=builder.fresh("float32", (2, 3)))
    place = builder.map("remainder", count, 2)
    rows = broadcast(reshape(new_ring, (1, 2, 3)), (1, 2, 3))
    slots = permute(rows, (0, 2, 1))
    builder.emit("put", slots, broadcast(reshape(place, (1, 1)), (1, 3)), reshape(scan, (1, 3)))
    best = builder.reduce("argmax", new_ring, [1])
    taken = builder.emit("take", builder.fresh("float32", (2,)), new_ring, best)
    mixed = builder.fresh("float32", (4,))
    builder.map("where", builder.map("lt", taken, 0.5), taken, -1.0, out=narrow(mixed, 0, 0, 2))
    builder.emit("take", narrow(mixed, 0, 2, 2), broadcast(reshape(taken, (1, 2)), (2, 2)), order)
    next_count = builder.map("add", count, builder.cast(builder.map("ge", total, 0.0), "int64"))
    return builder.form([mixed, new_ring, next_count])


def verify(form: Form) -> None:
    check(form, KNOWN, "the form")


def test_a_form_is_the_same_after_json() -> None:
    form = example()
    verify(form)
    assert form_of_values(json.loads(form.to_json()), "the form") == form
    assert '"inf"' in form.to_json()


@pytest.mark.parametrize("values", [[], 5, {"arithmetic": "portable-2"}])
def test_what_is_no_form_is_refused(values: Any) -> None:
    with pytest.raises(ModelError, match=r"model\.json"):
        form_of_values(values, "model.json")


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("buffers", [["float32", 2.5]]),
        ("nodes", [["add", [0, 0, [], []]]]),
        ("nodes", [["add", [0, 0, [], []], "one"]]),
        ("more", []),
    ],
)
def test_parts_of_another_type_are_refused(part: str, value: Any) -> None:
    values = {**json.loads(example().to_json()), part: value}
    with pytest.raises(ModelError):
        form_of_values(values, "the form")


def scalar(buffer: int, offset: int = 0) -> View:
    return View(buffer, offset, (), ())


def line(buffer: int, n: int, stride: int = 1, offset: int = 0) -> View:
    return View(buffer, offset, (n,), (stride,))


X, STATE, OUT, INTS, BOOLS, DOUBLES, WEIGHT = range(7)
BUFFERS = (
    Buffer("float32", 4),
    Buffer("float32", 2),
    Buffer("float32", 6),
    Buffer("int64", 4),
    Buffer("bool", 4),
    Buffer("float64", 4),
    Buffer("float32", 12, "weight"),
)
FILL = Node("copy", line(OUT, 6), (0.0,))
INDEX = Node("copy", line(INTS, 4), (3,))
TRUE = Node("copy", line(BOOLS, 4), (True,))


def form_of(*nodes: Node, **other: Any) -> Form:
    parts = {"buffers": BUFFERS, "inputs": (X, STATE), "outputs": (line(X, 4), line(STATE, 2)), **other}
    return Form(nodes=nodes, **parts)


def node(op: str, out: View, *args: View | float) -> Node:
    return Node(op, out, args)


VALID = {
    "nothing": form_of(),
    "window": form_of(node("sum", line(OUT, 3), View(X, 0, (3, 2), (1, 1)))),
    "backwards": form_of(node("copy", line(OUT, 4, -1, 3), line(X, 4, -1, 3))),
    "repeated": form_of(node("add", line(OUT, 6), line(X, 6, 0), line(WEIGHT, 6, 2, 1))),
    "in parts": form_of(
        node("copy", line(OUT, 3, 2), 1.0),
        node("copy", line(OUT, 3, 2, 1), line(X, 3)),
        node("cast", line(DOUBLES, 4), line(OUT, 4, 1, 1)),
    ),
    "empty": form_of(node("add", View(OUT, 0, (5, 0), (0, 1)), View(X, 0, (5, 0), (0, 1)), 1.0)),
    "empty sum": form_of(node("sum", scalar(OUT), line(X, 0))),
    "put to one place": form_of(FILL, INDEX, node("put_add", View(OUT, 0, (4, 6), (0, 1)), line(INTS, 4), line(X, 4))),
    "where": form_of(TRUE, node("where", line(OUT, 4), line(BOOLS, 4), line(X, 4), 0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", VALID)
def test_a_valid_form_can_be_computed(name: str) -> None:
    verify(VALID[name])
    x, state = np.arange(8, dtype=np.float32).reshape(2, 4), np.zeros((2, 2), np.float32)
    assert np.array_equal(Definition(VALID[name], TENSORS).step([x, state])[0], x)


HUGE = 2**70
REFUSED: dict[str, Form] = {
    "after the end": form_of(node("copy", line(OUT, 4), line(X, 4, 1, 1))),
    "an output without end": form_of(outputs=(View(X, 0, (2**18, 2**18), (0, 0)), line(STATE, 2))),
    "loops around nothing": form_of(node("copy", View(OUT, 0, (2**19, 2**19, 0), (0, 0, 1)), 0.0)),
    "no buffer": form_of(node("copy", line(7, 1), 1.0)),
    "huge stride": form_of(node("copy", line(OUT, 1, HUGE), 1.0)),
    "partly written": form_of(node("copy", line(OUT, 3, 2), 1.0), node("neg", line(OUT, 3), line(OUT, 3))),
    "put into unwritten": form_of(INDEX, node("put", line(OUT, 6), scalar(INTS), 1.0)),
    "overlapping": form_of(node("copy", View(OUT, 0, (2, 3), (2, 1)), 1.0)),
    "after a read": form_of(FILL, node("neg", line(OUT, 2), line(OUT, 2))),
    "too few arguments": form_of(node("add", line(OUT, 4), line(X, 4))),
    "float index": form_of(node("take", scalar(OUT), line(X, 4), scalar(STATE))),
    "shapes of a chain": form_of(node("fma_chain", scalar(OUT), 0.0, line(X, 4), line(STATE, 2))),
    "tensor of another size": form_of(buffers=(*BUFFERS, Buffer("float32", 11, "weight"))),
    "inputs twice": form_of(inputs=(X, X)),
    "a leaf of another size": form_of(outputs=(line(X, 4), line(X, 4))),
    "too many steps": form_of(node("sum", scalar(OUT), View(X, 0, (2, MAX_ITERATIONS // 2 + 1), (0, 0)))),
    "numbers of 4,000 digits": form_of(outputs=(View(X, 0, (10**4000,) * 5000, (0,) * 5000), line(STATE, 2))),
    "a million dimensions": form_of(node("copy", View(OUT, 0, (3,) * 10**6, (0,) * 10**6), 1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_form_that_cannot_be_computed_is_refused(name: str) -> None:
    with pytest.raises(ModelError):
        verify(REFUSED[name])


def test_sizes_below_zero_make_no_room_for_buffers() -> None:
    wide = form_of(buffers=(*BUFFERS, Buffer("bool", 2**29)), outputs=(line(X, 4), line(STATE, 2 - 2**29)))
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            verify(wide)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each value in JSON, outermost first."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inside for place in places(each, (*path, key)))]


SOUND = json.loads(example().to_json())
REPLACEMENTS: st.SearchStrategy[Any] = st.one_of(
    st.integers(-4, 9),
    st.sampled_from([2**24, 2**31, 2**63, -(2**63), 2**70, 0.5, 1e300, True, None, "inf", "", [], {}]),
    st.sampled_from(
        ["int32", "int64", "float64", "bool", "sum", "argmax", "put", "take", "copy", "exp", "cumsum", "neg"]
    ),
    st.sampled_from(places(SOUND)[1:]).map(lambda place: _at(SOUND, place)),
)


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value


def assert_inside(form: Form) -> None:
    for view in (*form.outputs, *(each for n in form.nodes for each in (n.out, *n.views))):
        if view.elements:
            ends = [(n - 1) * stride for n, stride in zip(view.shape, view.strides, strict=True)]
            assert view.offset + sum(min(end, 0) for end in ends) >= 0
            assert view.offset + sum(max(end, 0) for end in ends) < form.buffers[view.buffer].size


@settings(max_examples=600)
@given(st.lists(st.tuples(st.sampled_from(places(SOUND)[1:]), REPLACEMENTS), min_size=1, max_size=3))
def test_a_damaged_form_is_refused_or_computed(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    values = copy.deepcopy(SOUND)
    for place, replacement in changes:
        try:
            _at(values, place[:-1])[place[-1]] = copy.deepcopy(replacement)
        except (LookupError, TypeError):  # the place is gone by an earlier change
            continue
    try:
        form = form_of_values(values, "the form")
        verify(form)
    except ModelError:
        return
    assert_inside(form)
    if sum(map(iterations, form.nodes)) < 10_000:
        arrays = [np.ones((2, form.buffers[n].size), form.buffers[n].dtype) for n in form.inputs]
        results = Definition(form, TENSORS).step(arrays)
        assert [each.shape for each in results] == [(2, view.elements) for view in form.outputs]
