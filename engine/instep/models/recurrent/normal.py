"""The normal form of a recurrent network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from instep.models.base import Shape
from instep.models.portable import layers
from instep.models.portable.builder import Builder, reshape, select
from instep.models.portable.form import Form, View
from instep.models.recurrent.description import FrameLayer, NormLayer, RecurrentDescription, RnnLayers


def form_of(description: RecurrentDescription) -> Form:
    """The frame, the frame layers before, the recurrent layers in order, and those after."""
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
            x, cell = layers.lstm_cell(b, x, states["h"], states["c"], weights)
            b.map("copy", cell, out=select(after["c"], 0, index))
        elif isinstance(recurrent, RnnLayers):
            x = layers.rnn_cell(b, x, states["h"], weights, recurrent.nonlinearity)
        else:
            x = layers.gru_cell(b, x, states["h"], weights)
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
            x = layers.layer_norm(b, x, weight, bias, layer.eps)
        else:
            assert weight is not None
            x = b.dense(x, weight, 0.0 if bias is None else bias)
        x = layers.ACTIVATIONS[layer.activation](b, reshape(x, (x.elements,)))
    return x
