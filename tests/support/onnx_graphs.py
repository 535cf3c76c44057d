"""Graphs in ONNX, node by node, with weights of torch's modules in ONNX's layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from instep.models.model import Model
from instep.models.onnx.importer import StepGraph, describe, import_onnx, open_session

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
Shape: TypeAlias = Sequence[int | str | None]
FLOAT, DOUBLE, INT64, BOOL = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64, TensorProto.BOOL
OPSET = 17
ROWS4: Shape = ["rows", 4]

node = helper.make_node


def graph(
    nodes: Sequence[NodeProto],
    inputs: Mapping[str, Shape | tuple[Shape, int]],
    outputs: Mapping[str, Shape | tuple[Shape, int]],
    weights: Arrays | None = None,
    *,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """A graph; an input or output is a shape of float32, or a shape and a dtype."""
    made = helper.make_graph(
        nodes,
        "graph",
        [_info(name, given) for name, given in inputs.items()],
        [_info(name, given) for name, given in outputs.items()],
        [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in (weights or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _info(name: str, given: Any) -> onnx.ValueInfoProto:
    shape, dtype = given if isinstance(given, tuple) and isinstance(given[0], list) else (given, FLOAT)
    return helper.make_tensor_value_info(name, dtype, shape)


def floats(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, np.float32)


def ints(*values: int) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


ORDERS = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN": (0,)}
"""Where ONNX's gates (GRU: update, reset, new; LSTM: input, output, forget, cell) are in torch's order of them."""


def recurrent_weights(module: nn.RNNBase, layer: int = 0, prefix: str = "") -> dict[str, npt.NDArray[Any]]:
    """W, R and B of one layer of an `nn.GRU`, `nn.LSTM` or `nn.RNN`."""
    order = ORDERS[type(module).__name__]

    def gates(kind: str) -> npt.NDArray[Any]:
        values = getattr(module, f"{kind}_l{layer}").detach().numpy()
        return np.concatenate([np.split(values, len(order))[at] for at in order])

    found = {f"{prefix}W": gates("weight_ih")[None], f"{prefix}R": gates("weight_hh")[None]}
    if module.bias:
        found[f"{prefix}B"] = np.concatenate([gates("bias_ih"), gates("bias_hh")])[None]
    return found


def gru_step(gru: nn.GRU, head: nn.Linear, names: tuple[str, str, str, str] = ("x", "h", "y", "hn")) -> onnx.ModelProto:
    """A step of one layer: x [rows, F], h [1, rows, H] to y [rows, outputs], hn [1, rows, H]."""
    x, h, y, after = names
    nodes = [
        node("Unsqueeze", [x, "first"], ["sequence"]),
        node(
            "GRU", ["sequence", "W", "R", "B", "", h], ["", after], hidden_size=gru.hidden_size, linear_before_reset=1
        ),
        node("Squeeze", [after, "first"], ["rows"]),
        node("Gemm", ["rows", "A", "b"], [y], transB=1),
    ]
    weights = {"first": ints(0), "A": head.weight.detach().numpy(), "b": head.bias.detach().numpy()}
    sizes = (gru.input_size, gru.hidden_size, head.out_features)
    return graph(
        nodes,
        {x: ["rows", sizes[0]], h: [1, "rows", sizes[1]]},
        {y: ["rows", sizes[2]], after: [1, "rows", sizes[1]]},
        weights | recurrent_weights(gru),
    )


def counting_step(width: int = 3) -> onnx.ModelProto:
    """Leaves of every dtype, with the axis of rows in other places.

    sum (float64 [width, rows]) adds up frames, count (int64 [rows]) counts them, peak (bool [rows, 1]) tells whether a
    value above 2 was seen, and last (float32 [rows, 1, width]) is the frame before. y is the mean so far plus last,
    negative after a peak.
    """
    nodes = [
        node("Squeeze", ["x", "one"], ["frame"]),
        node("Cast", ["frame"], ["wide"], to=DOUBLE),
        node("Transpose", ["wide"], ["columns"], perm=[1, 0]),
        node("Add", ["sum", "columns"], ["sum_out"]),
        node("Add", ["count", "one"], ["count_out"]),
        node("ReduceMax", ["frame"], ["largest"], axes=[1], keepdims=1),
        node("Greater", ["largest", "two"], ["above"]),
        node("Or", ["peak", "above"], ["peak_out"]),
        node("Cast", ["count_out"], ["counted"], to=DOUBLE),
        node("Div", ["sum_out", "counted"], ["mean_columns"]),
        node("Transpose", ["mean_columns"], ["mean_wide"], perm=[1, 0]),
        node("Cast", ["mean_wide"], ["mean"], to=FLOAT),
        node("Squeeze", ["last", "one"], ["before"]),
        node("Add", ["mean", "before"], ["plus"]),
        node("Neg", ["plus"], ["minus"]),
        node("Where", ["peak_out", "minus", "plus"], ["y_rows"]),
        node("Unsqueeze", ["y_rows", "one"], ["y"]),
        node("Identity", ["x"], ["last_out"]),
    ]
    state: dict[str, tuple[Shape, int]] = {
        "sum": ([width, "rows"], DOUBLE),
        "count": (["rows"], INT64),
        "peak": (["rows", 1], BOOL),
        "last": (["rows", 1, width], FLOAT),
    }
    return graph(
        nodes,
        {"x": ["rows", 1, width], **state},
        {"y": ["rows", 1, width], **{f"{name}_out": given for name, given in state.items()}},
        {"one": ints(1), "two": floats(2)},
    )


def counting_by_hand(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """What `counting_step` answers to frames [T, width] of one stream."""
    y = np.zeros_like(x)
    sum_, last, peak = np.zeros(x.shape[1]), np.zeros(x.shape[1], np.float32), False
    for at, frame in enumerate(x):
        sum_, peak = sum_ + frame, peak or bool(frame.max() > 2)
        y[at] = (sum_ / (at + 1)).astype(np.float32) + last
        y[at] = -y[at] if peak else y[at]
        last = frame
    return y


def leaky(
    middle: list[onnx.NodeProto] | None = None,
    *,
    x: Any = ROWS4,
    h: Any = ROWS4,
    y: Any = ROWS4,
    more_inputs: dict[str, Any] | None = None,
    more_outputs: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    opset: int = OPSET,
) -> onnx.ModelProto:
    """hn = 0.5 · h + v, y = tanh(hn), where `middle` makes v of x."""
    nodes = [
        *(middle or [node("Identity", ["x"], ["v"])]),
        node("Mul", ["h", "half"], ["kept"]),
        node("Add", ["kept", "v"], ["hn"]),
        node("Tanh", ["hn"], ["y"]),
    ]
    return graph(
        nodes,
        {"x": x, "h": h, **(more_inputs or {})},
        {"y": y, "hn": h, **(more_outputs or {})},
        {"half": floats(0.5), **(weights or {})},
        opset=opset,
    )


def branch(condition: str) -> onnx.NodeProto:
    """v = -x where the condition holds, otherwise v = x."""

    def only(op: str, name: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, FLOAT, ROWS4)
        return helper.make_graph([node(op, ["x"], [name])], name, [], [value])

    return node("If", [condition], ["v"], then_branch=only("Neg", "v1"), else_branch=only("Identity", "v2"))


def described(model: onnx.ModelProto, **named: Any) -> StepGraph:
    session = open_session(model.SerializeToString(), "net")
    return describe(session, "net", **{"state": None, "answer": None, "constants": {}, "shapes": {}} | named)


def imported(path: Path, model: onnx.ModelProto | bytes, **named: Any) -> Model:
    """What is found in a graph; its model folder is `net` under the path."""
    content = model if isinstance(model, bytes) else model.SerializeToString()
    (path / "net.onnx").write_bytes(content)
    return import_onnx(path / "net.onnx", path / "net", **named)
