"""The normal form of a recurrent network: its cells and layers in primitives, as docs/exactness.md defines them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from instep.models.base import Shape
from instep.models.portable.form import Builder, Form, Operand, View, narrow, reshape, select
from instep.models.recurrent.description import FrameLayer, NormLayer, RecurrentDescription, RnnLayers


def mean_removed(b: Builder, x: View) -> tuple[View, View]:
    """The values [n] minus their mean, and the mean of the squares of these differences [1]."""
    count = float(x.elements)
    away = b.map("sub", x, b.map("div", b.reduce("sum", x, [0], keep=True), count))
    squares = b.reduce("sum", b.map("mul", away, away), [0], keep=True)
    return away, b.map("div", squares, count)


def layer_norm(b: Builder, x: View, weight: View | None, bias: View | None, eps: float) -> View:
    """A layer norm over all values [n]."""
    away, variance = mean_removed(b, x)
    y = b.map("mul", away, b.map("div", 1.0, b.map("sqrt", b.map("add", variance, eps))))
    if weight is not None and bias is not None:
        return b.map("fma", y, weight, bias)
    return y if weight is None else b.map("mul", y, weight)


def softmax(b: Builder, x: View) -> View:
    """The softmax over all values [n]."""
    e = b.map("exp", b.map("sub", x, b.reduce("amax", x, [0], keep=True)))
    return b.map("div", e, b.reduce("sum", e, [0], keep=True))


ACTIVATIONS: Final[Mapping[str, Callable[[Builder, View], View]]] = {
    "none": lambda b, x: x,
    "relu": lambda b, x: b.map("maximum", x, 0.0),
    "tanh": lambda b, x: b.map("tanh", x),
    "sigmoid": lambda b, x: b.map("sigmoid", x),
    "gelu": lambda b, x: b.map(
        "mul", b.map("mul", x, 0.5), b.map("add", b.map("erf", b.map("mul", x, math.sqrt(0.5))), 1.0)
    ),
    "silu": lambda b, x: b.map("mul", x, b.map("sigmoid", x)),
    "elu": lambda b, x: b.map("where", b.map("gt", x, 0.0), x, b.map("expm1", x)),
    "leaky_relu": lambda b, x: b.map("where", b.map("gt", x, 0.0), x, b.map("mul", x, 0.01)),
    "softplus": lambda b, x: b.map("where", b.map("gt", x, 20.0), x, b.map("log1p", b.map("exp", x))),
    "softmax": softmax,
}


Weights = tuple[View, View, View | None, View | None]
"""The weights of a cell in torch's layout: weight_ih, weight_hh, bias_ih, bias_hh."""


def gru_cell(b: Builder, x: View, h: View, weights: Weights) -> View:
    """The new state; gates are in torch's order: reset, update, new."""
    of_x, of_h, bias_x, bias_h = weights
    size = h.shape[0]
    both = narrow(of_x, 0, 0, 2 * size), narrow(of_h, 0, 0, 2 * size)
    starts = _bias_sum(b, bias_x, bias_h, 2 * size)
    new_x, new_h = (0.0 if each is None else narrow(each, 0, 2 * size, size) for each in (bias_x, bias_h))
    sums = b.dense(h, both[1], b.dense(x, both[0], starts))
    reset, update = (b.map("sigmoid", narrow(sums, 0, k * size, size)) for k in range(2))
    parts = (
        b.dense(given, narrow(weight, 0, 2 * size, size), start)
        for given, weight, start in ((x, of_x, new_x), (h, of_h, new_h))
    )
    of_input, of_state = parts
    new = b.map("tanh", b.map("fma", reset, of_state, of_input))
    return b.map("fma", update, b.map("sub", h, new), new)


def lstm_cell(b: Builder, x: View, h: View, c: View, weights: Weights) -> tuple[View, View]:
    """The new states h and c; gates are in torch's order: input, forget, cell, output."""
    of_x, of_h, bias_x, bias_h = weights
    size = h.shape[0]
    sums = b.dense(h, of_h, b.dense(x, of_x, _bias_sum(b, bias_x, bias_h, 4 * size)))
    i, f, g, o = (narrow(sums, 0, k * size, size) for k in range(4))
    fresh = b.map("mul", b.map("sigmoid", i), b.map("tanh", g))
    cell = b.map("fma", b.map("sigmoid", f), c, fresh)
    return b.map("mul", b.map("sigmoid", o), b.map("tanh", cell)), cell


def rnn_cell(b: Builder, x: View, h: View, weights: Weights, nonlinearity: str) -> View:
    """The new state."""
    of_x, of_h, bias_x, bias_h = weights
    sums = b.dense(h, of_h, b.dense(x, of_x, _bias_sum(b, bias_x, bias_h, h.shape[0])))
    return ACTIVATIONS[nonlinearity](b, sums)


def _bias_sum(b: Builder, one: View | None, other: View | None, size: int) -> Operand:
    if one is None or other is None:
        return 0.0
    return b.map("add", narrow(one, 0, 0, size), narrow(other, 0, 0, size))


def form_of(description: RecurrentDescription) -> Form:
    """The normal form: the frame, the layers before, the recurrent layers, and the layers after."""
    b, recurrent = Builder(), description.recurrent
    x = b.input("float32", (description.features,))
    leaves = {leaf.name: b.input("float32", leaf.shape) for leaf in description.state.leaves}
    shapes = description.tensor_shapes()
    x = _frame_layers(b, "before", description.before, x, shapes)
    after = {name: b.fresh("float32", leaf.shape) for name, leaf in leaves.items()}
    for index in range(recurrent.num_layers):
        states = {name: select(leaf, 0, index) for name, leaf in leaves.items()}
        weights = (
            _tensor(b, f"{description.kind}.weight_ih_l{index}", shapes),
            _tensor(b, f"{description.kind}.weight_hh_l{index}", shapes),
            _tensor(b, f"{description.kind}.bias_ih_l{index}", shapes) if recurrent.bias else None,
            _tensor(b, f"{description.kind}.bias_hh_l{index}", shapes) if recurrent.bias else None,
        )
        if "c" in leaves:
            x, cell = lstm_cell(b, x, states["h"], states["c"], weights)
            b.map("copy", cell, out=select(after["c"], 0, index))
        elif isinstance(recurrent, RnnLayers):
            x = rnn_cell(b, x, states["h"], weights, recurrent.nonlinearity)
        else:
            x = gru_cell(b, x, states["h"], weights)
        b.map("copy", x, out=select(after["h"], 0, index))
    y = _frame_layers(b, "after", description.after, x, shapes)
    return b.form([y, *after.values()])


def _tensor(b: Builder, name: str, shapes: Mapping[str, Shape]) -> View:
    return b.tensor(name, "float32", shapes[name])


def _frame_layers(
    b: Builder, place: str, frame_layers: Sequence[FrameLayer], x: View, shapes: Mapping[str, Shape]
) -> View:
    for index, layer in enumerate(frame_layers):
        weight, bias = (
            _tensor(b, name, shapes) if (name := f"{place}.{index}.{each}") in shapes else None
            for each in ("weight", "bias")
        )
        if isinstance(layer, NormLayer):
            x = layer_norm(b, x, weight, bias, layer.eps)
        else:
            assert weight is not None
            x = b.dense(x, weight, 0.0 if bias is None else bias)
        x = ACTIVATIONS[layer.activation](b, reshape(x, (x.elements,)))
    return x
