"""Step graphs as normal forms, computed by the definition: truth is onnxruntime, torch, or arithmetic in numpy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from instep.models.errors import ModelError
from instep.models.onnx.importer import open_session, read_onnx
from instep.models.portable.definition import Definition
from tests.support.onnx_graphs import (
    BOOL,
    DOUBLE,
    FLOAT,
    INT64,
    ROWS4,
    Arrays,
    branch,
    described,
    graph,
    ints,
    leaky,
    node,
)

torch.manual_seed(6)
GRU, HEAD = nn.GRU(5, 24), nn.Linear(24, 3)
RANDOM = np.random.default_rng(0)


def read(model: onnx.ModelProto) -> Definition:
    traced = read_onnx(model, described(model))
    return Definition(traced.form, {name: values.numpy() for name, values in traced.constants.items()})


PREPARED = {
    "p": [node("Abs", ["x"], ["abs"]), node("Add", ["abs", "half"], ["p"])],
    "i": [node("Abs", ["x"], ["a"]), node("Clip", ["a", "", "three"], ["to3"]), node("Cast", ["to3"], ["i"], to=INT64)],
    "b": [node("Greater", ["x", "half"], ["b"])],
    "c": [node("Less", ["x", "one"], ["c"])],
}
NUMBERS = {name: np.array(value, np.float32) for name, value in (("half", 0.5), ("one", 1), ("three", 3))}


def weights(*shape: int) -> npt.NDArray[np.float32]:
    return RANDOM.standard_normal(shape).astype(np.float32)


def one_row(
    nodes: Sequence[NodeProto], constants: Arrays, *, shape: Sequence[int] = (1, 4, 6), opset: int = 17
) -> onnx.ModelProto:
    """A graph of one row, in which `nodes` make w of x, or of what is prepared: p > 0, i from 0 to 3, bools b and c."""
    before = [each for name in PREPARED if any(name in one.input for one in nodes) for each in PREPARED[name]]
    after = [node("Cast", ["w"], ["y"], to=FLOAT), node("Mul", ["h", "half"], ["hn"])]
    used = {name for each in (*before, *nodes, *after) for name in each.input}
    return graph(
        [*before, *nodes, *after],
        {"x": list(shape), "h": [1, 2]},
        {"y": None, "hn": [1, 2]},  # type: ignore[dict-item]
        {name: values for name, values in {**NUMBERS, **constants}.items() if name in used},
        opset=opset,
    )


def check(model: onnx.ModelProto) -> None:
    """Compare answers to a few frames with those of onnxruntime."""
    frame = described(model).frame
    step, session = read(model).step, open_session(model.SerializeToString(), "net")
    h = np.zeros((1, 2), np.float32)
    for x in np.random.default_rng(1).standard_normal((3, 1, frame.elements)).astype(np.float32) * 2:
        (y,) = session.run(["y"], {"x": x.reshape(frame.sized(1)), "h": h})
        assert np.isfinite(y).all()
        np.testing.assert_allclose(step([x, h])[0].reshape(y.shape), y, rtol=2e-6, atol=2e-6 * max(np.abs(y).max(), 1))


def w(op: str, *inputs: str, **attributes: Any) -> list[NodeProto]:
    return [node(op, list(inputs), ["w"], **attributes)]


UNARY = (
    "Abs Ceil Cos Dropout Elu Erf Exp Floor GlobalAveragePool GlobalMaxPool HardSigmoid HardSwish Identity LeakyRelu "
    "LogSoftmax Neg Relu Round Sigmoid Sign Sin Softmax Softplus Softsign Tanh"
)
BINARY = "Add Sub Mul Div Max Min Sum Equal Greater GreaterOrEqual Less LessOrEqual PRelu"  # of x and v
REDUCTIONS = "L2 Max Mean Min SumSquare"
PLAIN: dict[str, list[NodeProto]] = {
    **{op: w(op, "x") for op in UNARY.split()},
    **{op: w(op, "x", "v") for op in BINARY.split()},
    **{op: w(op, "p") for op in ("Log", "Reciprocal", "Sqrt")},
    **{op: w(op, "b", "c") for op in ("And", "Or", "Xor")},
    **{f"Reduce{name}": w(f"Reduce{name}", "p", axes=[1], keepdims=0) for name in REDUCTIONS.split()},
    "ReduceMean of all": w("ReduceMean", "x"),
    "ReduceSum": w("ReduceSum", "x", "axes"),
    "ReduceSum of int64": w("ReduceSum", "i", "axes", keepdims=0),
    "LeakyRelu 0.3": w("LeakyRelu", "x", alpha=0.3),
    "PRelu of channels": w("PRelu", "x", "column"),
    "Clip": w("Clip", "x", "", "half"),
    "Clip on both sides": w("Clip", "x", "minus", "half"),
    "Not": w("Not", "b"),
    "Where": w("Where", "b", "x", "v"),
    "Div of int64": [node("Sub", ["i", "two"], ["n"]), *w("Div", "n", "two")],
    "Mod": w("Mod", "x", "v", fmod=1),
    "Pow 2": w("Pow", "x", "two"),
    "Pow of a tensor": w("Pow", "p", "column"),
    "Pow to another rank": w("Pow", "x", "twos"),
    "Cast to int64": [node("Cast", ["x"], ["n"], to=INT64), *w("Cast", "n", to=TensorProto.INT32)],
    "Cast to bool": w("Cast", "x", to=BOOL),
    "Flatten": w("Flatten", "x", axis=2),
    "Transpose": w("Transpose", "x", perm=[2, 0, 1]),
    "Concat": w("Concat", "x", "whole", "p", axis=1),
    "Split": [node("Split", ["x"], ["w", "rest"], axis=2)],
    "Squeeze": w("Squeeze", "x", "zero"),
    "Unsqueeze": w("Unsqueeze", "x", "ends"),
    "Reshape": w("Reshape", "x", "to"),
    "Expand": w("Expand", "x", "larger"),
    "Tile": w("Tile", "x", "times"),
    "Slice": w("Slice", "x", "ones", "ends1", "last"),
    "Slice backwards": w("Slice", "x", "ends1", "far", "last", "back2"),
    "Size": [node("Size", ["x"], ["n"]), node("Cast", ["n"], ["f"], to=FLOAT), *w("Add", "x", "f")],
    "Shape": [node("Shape", ["x"], ["n"], start=1), *w("Reshape", "x", "n")],
    "shapes that are computed": [
        node("Shape", ["x"], ["n"]),
        node("Gather", ["n", "zero"], ["first"]),
        node("Concat", ["first", "rest"], ["shape"], axis=0),
        node("ConstantOfShape", ["shape"], ["zeros"]),
        *w("Add", "x", "zeros"),
    ],
    "ArgMax": w("ArgMax", "x", axis=2),
    "ArgMin": w("ArgMin", "x", axis=1, keepdims=0),
    "CumSum": w("CumSum", "x", "two0"),
    "MaxPool": w("MaxPool", "x", kernel_shape=[3], strides=[2], pads=[1, 0]),
    "MaxPool, rounded up": w("MaxPool", "x", kernel_shape=[2], strides=[4], ceil_mode=1),
    "Pad": w("Pad", "x", "pads", "half"),
    "Pad by reflection": w("Pad", "x", "pads", mode="reflect"),
    "Gather some": w("Gather", "x", "picked", axis=2),
    "Gather by values": [node("Gather", ["i", "zero0"], ["n"]), *w("Gather", "v", "n")],
    "GatherElements": w("GatherElements", "x", "i", axis=1),
    "GatherND": w("GatherND", "x", "places"),
    "GatherND by values": [node("Slice", ["i", "zero", "ones", "last"], ["n"]), *w("GatherND", "u4", "n")],
    "AveragePool": w("AveragePool", "x", kernel_shape=[3], strides=[2]),
    "ScatterElements": w("ScatterElements", "v4", "i", "x", axis=1),
    "ScatterND": w("ScatterND", "x", "places", "two_values"),
    "ScatterND by values": [
        node("Slice", ["i", "zero", "ones", "last"], ["n"]),
        *w("ScatterND", "u4", "n", "x"),
    ],
    "MatMul": w("MatMul", "x", "m"),
    "MatMul of values": [node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), *w("MatMul", "x", "t")],
    "Gemm": [node("Squeeze", ["x", "zero"], ["r"]), *w("Gemm", "r", "m", "off_on3", alpha=0.5, beta=2.0)],
    "Gemm, transposed": [node("Squeeze", ["x", "zero"], ["r"]), *w("Gemm", "r", "m4", "off_on3", transA=1, transB=1)],
    "Gemm without a bias": [node("Squeeze", ["x", "zero"], ["r"]), *w("Gemm", "r", "m")],
    "Einsum": w("Einsum", "x", "x", "m", equation="bci,bcj,jk->bik"),
    "Conv": w("Conv", "x", "k", "bias", pads=[2, 0]),
    "Conv with strides and dilations": w("Conv", "x", "k", strides=[2], dilations=[2], pads=[1, 1]),
    "Conv of groups": w("Conv", "x", "k1", "bias4", group=4),
    "ConvTranspose": w("ConvTranspose", "x", "kt", "bias", strides=[2]),
    "ConvTranspose of groups": w("ConvTranspose", "x", "kt", strides=[3], pads=[2, 1], group=2, output_padding=[2]),
    "BatchNormalization": w("BatchNormalization", "x", "bias4", "bias4", "bias4", "positive4"),
    "InstanceNormalization": w("InstanceNormalization", "x", "bias4", "positive4"),
    "LayerNormalization": w("LayerNormalization", "x", "off_on6", epsilon=0.01),
}
OF_FLOATS = (
    "v 4 6, column 4 1, whole 1 2 6, m 6 3, m4 3 4, v4 1 4 6, u4 4 6, k 5 4 3, k1 4 1 2, kt 4 5 3, bias 5, bias4 4, "
    "positive4 4, off_on 2, off_on3 3, off_on6 6, two_values 2 6"  # shapes
)
OF_INTS = (
    "axes 1 2, zero 0, two 2, fours 4, sizes 1 3, ends -1 0, to 0 -1 3, larger 3 1 4 6, times 1 2 3, ones 1, last -1, "
    "ends1 -1, far -100, back2 -2, rest 4 6, pads 0 0 3 0 1 2, ends2 1 2"  # values
)
CONSTANTS: dict[str, npt.NDArray[Any]] = {
    **{name: weights(*map(int, shape)) for name, *shape in map(str.split, OF_FLOATS.split(","))},
    **{name: ints(*map(int, values)) for name, *values in map(str.split, OF_INTS.split(","))},
    "picked": np.array([[0, -1], [2, 3]]),
    "places": np.array([[0, -1], [0, 1]]),
    "two0": np.array(2),
    "zero0": np.array(0),
    "minus": np.array(-0.25, np.float32),
    "twos": np.full((1, 1, 1, 1), 2, np.float32),
}
CONSTANTS["positive4"] = np.abs(CONSTANTS["positive4"]) + np.float32(0.5)
OTHER_OPSETS: dict[str, tuple[int, list[NodeProto]]] = {
    "Gelu": (20, w("Gelu", "x")),
    "Gelu by tanh": (20, w("Gelu", "x", approximate="tanh")),
    "Mish": (18, w("Mish", "x")),
    "GroupNormalization": (21, w("GroupNormalization", "x", "bias4", "positive4", num_groups=2)),
    "ReduceMax": (18, w("ReduceMax", "x", "axes", keepdims=0)),
    "Pad of an axis": (18, w("Pad", "x", "ends2", "", "last", mode="reflect")),
    "Split into parts": (18, [node("Split", ["x"], ["one", "two", "w"], axis=2, num_outputs=3)]),
    "Softmax of what is flat": (12, w("Softmax", "x", axis=1)),
    "Squeeze": (12, w("Squeeze", "x", axes=[0])),
    "Unsqueeze": (12, w("Unsqueeze", "x", axes=[0, -1])),
    "ReduceSum": (12, w("ReduceSum", "x", axes=[1])),
    "Split": (12, [node("Split", ["x"], ["rest", "w"], axis=1, split=[1, 3])]),
    "a constant of another version": (11, [node("Unsqueeze", ["v"], ["v1"], axes=[0]), *w("Add", "x", "v1")]),
    "Clip": (10, w("Clip", "x", min=-0.5)),
    "Pad": (10, w("Pad", "x", pads=[0, 0, 3, 0, 1, 2], value=0.5)),
    "Slice": (9, w("Slice", "x", starts=[1, 2], ends=[-1, 100], axes=[1, 2])),
}


@pytest.mark.parametrize("case", PLAIN)
def test_an_operator_gives_what_onnxruntime_gives(case: str) -> None:
    check(one_row(PLAIN[case], CONSTANTS))


@pytest.mark.parametrize("case", OTHER_OPSETS)
def test_other_versions_of_operators(case: str) -> None:
    opset, nodes = OTHER_OPSETS[case]
    check(one_row(nodes, CONSTANTS, opset=opset))


IMAGE = {"k": weights(3, 4, 2, 3), "kt": weights(4, 3, 2, 2)}


@pytest.mark.parametrize(
    "nodes",
    [
        w("Conv", "x", "k", pads=[1, 0, 0, 2], strides=[1, 2]),
        w("ConvTranspose", "x", "kt", pads=[0, 1, 1, 0], strides=[2, 1]),
        w("MaxPool", "x", kernel_shape=[2, 3], pads=[0, 1, 1, 1]),
        w("AveragePool", "x", kernel_shape=[2, 2]),
        w("GlobalAveragePool", "x"),
        w("InstanceNormalization", "x", "bias4", "positive4"),
    ],
    ids=lambda nodes: nodes[0].op_type,
)
def test_operators_of_two_dimensions(nodes: list[NodeProto]) -> None:
    check(one_row(nodes, CONSTANTS | IMAGE, shape=(1, 4, 3, 5)))


@pytest.mark.parametrize(
    ("direction", "given"), [("forward", "weights"), ("reverse", "everything"), ("bidirectional", "everything")]
)
@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("GRU", {"linear_before_reset": 1}),
        ("LSTM", {}),
        ("RNN", {}),
        ("RNN", {"activations": ["Relu"]}),
    ],
    ids=["GRU", "LSTM", "RNN", "RNN relu"],
)
def test_layers_over_the_timesteps_of_a_frame(op: str, attributes: dict[str, Any], direction: str, given: str) -> None:
    count, hidden, gates = 1 + (direction == "bidirectional"), 3, {"GRU": 3, "LSTM": 4, "RNN": 1}[op]
    constants = {"W": weights(count, gates * hidden, 6), "R": weights(count, gates * hidden, hidden)}
    names = ["t", "W", "R"]
    if given == "everything":
        constants |= {"B": weights(count, 2 * gates * hidden), "h0": weights(count, 1, hidden)}
        constants |= {"T": np.array([4], np.int32), "c0": weights(count, 1, hidden)}
        names += ["B", "T", "h0", *(["c0"] if op == "LSTM" else [])]
    attributes = (
        attributes | {"activations": attributes["activations"] * count} if attributes.get("activations") else attributes
    )
    outputs = ["Y", "Y_h", "Y_c"][: 3 if op == "LSTM" else 2]
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node(op, names, outputs, hidden_size=hidden, direction=direction, **attributes),
        *(node("Reshape", [each, "last"], [f"flat_{each}"]) for each in outputs),
        node("Concat", [f"flat_{each}" for each in outputs], ["w"], axis=0),
    ]
    check(one_row(nodes, CONSTANTS | constants))


def test_constants_are_computed_once() -> None:
    """Only weights that are used are kept: neither what they were made of, nor shapes and conditions."""
    middle = [
        node("Transpose", ["A"], ["turned"]),
        node("Gemm", ["x", "turned", "b"], ["g"]),
        node("Shape", ["x"], ["shape"]),
        node("Gather", ["shape", "zero"], ["rows"]),
        node("Concat", ["rows", "minus"], ["to"], axis=0),
        node("Reshape", ["g", "to"], ["v"]),
    ]
    held: dict[str, npt.NDArray[Any]] = {
        "A": weights(4, 4),
        "b": weights(4),
        "zero": ints(0),
        "minus": ints(-1),
        "unused": weights(9),
    }
    model = leaky(middle, weights=held)
    traced = read_onnx(model, described(model))
    assert set(traced.constants) <= {"turned", "b", "half"}
    torch.testing.assert_close(traced.constants["turned"], torch.from_numpy(held["A"].T), rtol=0, atol=0)


def test_branches_may_use_one_name_for_two_constants() -> None:
    def only(value: float, name: str) -> onnx.GraphProto:
        nodes = [node("Constant", [], ["k"], value_float=float(value)), node("Mul", ["x", "k"], [name])]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, FLOAT, ROWS4)])

    nodes = [
        node("If", ["flag"], ["a"], then_branch=only(2, "a1"), else_branch=only(3, "a2")),
        node("If", ["flag"], ["b"], then_branch=only(5, "b1"), else_branch=only(7, "b2")),
        node("Add", ["a", "b"], ["v"]),
    ]
    step = read(leaky(nodes, weights={"flag": np.array(True)})).step
    assert step([np.ones((1, 4), np.float32), np.zeros((1, 4), np.float32)])[1].tolist() == [[7.0] * 4]


def lstm(*names: str, **attributes: Any) -> list[NodeProto]:
    return [
        node("Unsqueeze", ["x", "zero"], ["t"]),
        node("LSTM", ["t", "W", "R", *names], ["", "last"], hidden_size=4, **attributes),
        node("Squeeze", ["last", "zero"], ["v"]),
    ]


LSTM: dict[str, npt.NDArray[Any]] = {"zero": ints(0), "W": weights(1, 16, 4), "R": weights(1, 16, 4)}
REFUSED: dict[str, tuple[list[NodeProto], str]] = {
    "an operator that is not served": ([node("TopK", ["x", "four"], ["v", "n"])], r"TopK ('v, n')"),
    "training mode": (
        [
            node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True))),
            node("Dropout", ["x", "", "yes"], ["v"]),
        ],
        "Dropout ('v')",
    ),
    "a clip": (lstm(clip=3.0), "clip is 3.0"),
    "functions of float64": (
        [node("Cast", ["x"], ["d"], to=DOUBLE), node("Exp", ["d"], ["e"]), node("Cast", ["e"], ["v"], to=FLOAT)],
        "Exp ('e') calls exp",
    ),
    "a branch on values": (
        [node("ReduceMax", ["x"], ["m"], keepdims=0), node("Greater", ["m", "half"], ["flag"]), branch("flag")],
        "If ('v')",
    ),
    "values that are random": (
        [node("RandomNormal", [], ["r"], shape=[1, 4]), node("Add", ["x", "r"], ["v"])],
        "Random",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named(case: str) -> None:
    nodes, named = REFUSED[case]
    held = {**LSTM, "P": weights(1, 12), "four": ints(4), "one": ints(1)}
    used = {name: values for name, values in held.items() if any(name in one.input for one in nodes)}
    with pytest.raises(ModelError, match=re.escape(named)) as raised:
        read(leaky(nodes, x=[1, 4], h=[1, 4], y=[1, 4], weights=used, opset=17))
    assert "\n" not in str(raised.value)
