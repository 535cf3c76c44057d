"""`instep model import net.onnx`: what each graph that cannot be served is told, and each hint that does not fit."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from typer.testing import CliRunner

from instep.cli import app
from instep.models.errors import ModelError
from instep.models.onnx.importer import import_onnx
from tests.support.onnx_graphs import FLOAT, INT64, ROWS4, Shape, branch, graph, gru_step, imported, ints, leaky, node

torch.manual_seed(4)
GRU, HEAD = nn.GRU(4, 6), nn.Linear(6, 2)
ROWS6: Shape = ["rows", 6]


def external() -> onnx.ModelProto:
    model = leaky()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model


def external_in_a_branch() -> onnx.ModelProto:
    model = leaky([branch("flag")], more_inputs={"flag": ([], TensorProto.BOOL)})
    [then] = [each.g for each in model.graph.node[0].attribute if each.name == "then_branch"]
    then.node[0].CopyFrom(node("Constant", [], ["v1"], value=external().graph.initializer[0]))
    return model


def foreign() -> onnx.ModelProto:
    model = leaky([node("MyOp", ["x"], ["v"], domain="com.example")])
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    return model


def any_above() -> list[onnx.NodeProto]:
    return [node("ReduceMax", ["x"], ["m"], keepdims=0), node("Greater", ["m", "half"], ["flag"]), branch("flag")]


def picked() -> list[onnx.NodeProto]:
    return [
        node("Abs", ["x"], ["above"]),
        node("NonZero", ["above"], ["n"]),
        node("Transpose", ["n"], ["n_rows"]),
        node("GatherND", ["x", "n_rows"], ["picked"]),
        node("ScatterND", ["x", "n_rows", "picked"], ["v"]),
    ]


def with_functions(levels: int, calls: int) -> onnx.ModelProto:
    """Functions each of which calls the one before twice; the first one calls itself where `calls` is 1."""
    model = leaky([helper.make_node(f"f{levels - 1}", ["x"], ["v"], domain="d")])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    for level in range(levels):
        inner = ("Neg", "") if level == 0 and calls == 2 else (f"f{max(level - 1, 0)}", "d")
        names = ["a", "b", "c"][: calls + 1]
        nodes = [
            helper.make_node(inner[0], [one], [other], domain=inner[1]) for one, other in itertools.pairwise(names)
        ]
        model.functions.append(helper.make_function("d", f"f{level}", ["a"], [names[-1]], nodes, imports))
    model.opset_import.append(imports[1])
    return model


def endless() -> list[onnx.NodeProto]:
    body = helper.make_graph(
        [
            node("Sub", ["a", "half"], ["b"]),
            node("ReduceMax", ["b"], ["m"], keepdims=0),
            node("Greater", ["m", "half"], ["c"]),
        ],
        "body",
        [helper.make_tensor_value_info(n, t, s) for n, t, s in (("i", INT64, []), ("d", 9, []), ("a", FLOAT, ROWS4))],
        [helper.make_tensor_value_info("c", 9, []), helper.make_tensor_value_info("b", FLOAT, ROWS4)],
    )
    return [node("Loop", ["", "", "x"], ["v"], body=body)]


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "empty": (lambda: b"", "is not an ONNX graph, or is damaged"),
    "text": (lambda: b"import torch", "is not an ONNX graph, or is damaged"),
    "cut off": (lambda: leaky().SerializeToString()[:-40], "is not an ONNX graph, or is damaged"),
    "external data": (external, "keeps the tensor 'half' in another file: save it as one file"),
    "external data in a branch": (external_in_a_branch, "keeps the tensor 'half' in another file"),
    "foreign operator": (foreign, r"uses com\.example\.MyOp, which is not an operator of ONNX"),
    "unknown operator": (lambda: leaky([node("Tnah", ["x"], ["v"])]), "uses Tnah, which is not an operator of ONNX"),
    "opset of the future": (lambda: leaky(opset=99), r"has opset 99, and \d+ is the newest that is known here"),
    "wrong types": (lambda: leaky([node("Not", ["x"], ["v"])]), r"onnxruntime cannot load .*; export it again"),
    "random": (
        lambda: leaky([node("RandomNormalLike", ["x"], ["v"])]),
        r"RandomNormalLike \('v'\) gives random values or is in training mode",
    ),
    "dropout in training": (
        lambda: leaky([node("Dropout", ["x", "half", "yes"], ["v"])], weights={"yes": np.array(True)}),
        r"Dropout \('v'\) gives random values or is in training mode",
    ),
    "fixed batch": (
        lambda: leaky(x=[2, 4], h=[2, 4], y=[2, 4]),
        r"input 'x' of .* has the fixed shape \[2, 4\]: export",
    ),
    "fixed batch of the state": (lambda: leaky(h=[1, 4]), r"input 'h' of .* has the fixed shape \[1, 4\]: export it"),
    "fixed batch of frames": (lambda: leaky(x=[1, 4]), r"input 'x' of .* has the fixed shape \[1, 4\]: export it with"),
    "fixed batch inside": (
        lambda: leaky([node("Reshape", ["x", "to"], ["v"])], weights={"to": ints(2, 4)}),
        r"cannot run with 3 rows, so something in it has a fixed batch size",
    ),
    "open features": (
        lambda: leaky(x=["rows", "F"]),
        r"input 'x' of .* has the shape \[rows, F\], which leaves more open than .* --shape x=rows,40",
    ),
    "no state": (lambda: graph([node("Tanh", ["x"], ["y"])], {"x": ROWS4}, {"y": ROWS4}), "has no state: no input and"),
    "another input": (
        lambda: leaky([node("Add", ["x", "z"], ["v"])], more_inputs={"z": ROWS4}),
        "has inputs that are neither its frame nor match an output: 'x', 'z'; say which one is the frame",
    ),
    "a rate": (
        lambda: leaky([node("Mul", ["x", "rate"], ["v"])], more_inputs={"rate": []}),
        "input 'rate' of .* matches no output: say what it always is, as in --constant rate=16000",
    ),
    "no frame": (
        lambda: graph([node("Neg", ["h"], ["hn"])], {"h": ROWS4}, {"hn": ROWS4}),
        "every input of .* so none is the frame: say which one is with --frame NAME; the inputs are h",
    ),
    "no answer": (
        lambda: graph([node("Add", ["x", "h"], ["hn"])], {"x": ROWS4, "h": ROWS4}, {"hn": ROWS4}),
        "every output of .* takes the place of an input, so none is the answer",
    ),
    "several outputs": (
        lambda: leaky(more_outputs={"kept": ROWS4}),
        "has several outputs besides its state, 'y', 'kept': say which one is answered with --answer NAME",
    ),
    "growing state": (
        lambda: graph(
            [node("Concat", ["h", "x"], ["hn"], axis=1), node("ReduceMax", ["hn"], ["y"], axes=[1])],
            {"x": ROWS4, "h": ROWS6},
            {"y": ["rows", 1], "hn": ["rows", 10]},
        ),
        r"a state changes its shape in .*: 'h' is \[5, 6\], and 'hn', which takes its place, is \[5, 10\]",
    ),
    "a maximum over rows besides": (
        lambda: leaky(
            [node("Identity", ["x"], ["v"]), node("ReduceMax", ["x"], ["z"], axes=[0])], more_outputs={"z": [1, 4]}
        ),
        "has several outputs besides its state, 'y', 'z'",
    ),
    "half precision": (
        lambda: leaky([node("Cast", ["x"], ["v"], to=FLOAT)], x=(ROWS4, TensorProto.FLOAT16)),
        r"input 'x' of .* is tensor\(float16\): expected float32, float64, int64 or bool",
    ),
    "mean over rows": (
        lambda: leaky([node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["v"])]),
        "the results of a row depend on the rows beside it, as with a mean over the batch",
    ),
    "rows picked out": (
        lambda: leaky(picked()),
        r"NonZero \('n'\) cannot be served: write it with other operators",
    ),
    "functions that fill the memory": (
        lambda: with_functions(60, 2),
        "more than 100,000 operators once its functions are written out",
    ),
    "a function that calls itself": (lambda: with_functions(1, 1), "functions that call themselves"),
    "rows chosen by values": (
        lambda: leaky(
            [
                node("ReduceMax", ["x"], ["m"], axes=[1], keepdims=0),
                node("Floor", ["m"], ["f"]),
                node("Cast", ["f"], ["i"], to=INT64),
                node("Gather", ["x", "i"], ["v"]),
            ]
        ),
        "onnxruntime cannot run .* with 1 row: .* Gather node",
    ),
    "one row branches for all": (
        lambda: leaky(any_above()),
        r"If \('v'\) cannot be served: its input 'flag' depends on the frame or the state",
    ),
    "until all rows end": (lambda: leaky(endless()), r"Loop \('v'\) cannot be served: write it with other operators"),
    "dynamic quantisation": (
        lambda: leaky(
            [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("DequantizeLinear", ["q", "s", "z"], ["v"])]
        ),
        r"DynamicQuantizeLinear \('q, s, z'\) cannot be served: write it with other operators",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_that_cannot_be_served_is_told_why(tmp_path: Path, case: str) -> None:
    make, sentence = REFUSED[case]
    with pytest.raises(ModelError, match=sentence) as raised:
        imported(tmp_path, make())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "net").exists()


def test_a_file_that_is_missing_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    with pytest.raises(ModelError, match=r"cannot read the graph .*net\.onnx: No such file"):
        import_onnx(path, tmp_path / "net")
    with path.open("wb") as file:
        file.truncate(2**29 + 1)  # takes no room on the disk
    with pytest.raises(ModelError, match="has 536,870,913 bytes, and at most 536,870,912 can be served"):
        import_onnx(path, tmp_path / "net")


def test_wrong_hints_are_answered(tmp_path: Path) -> None:
    step = gru_step(GRU, HEAD)
    for hints, sentence in (
        ({"frame": "z"}, "has no input 'z'; it has x, h"),
        ({"answer": "z"}, "has no output 'z'; it has y, hn"),
        ({"state": {"h": "z"}}, "has no output 'z'; it has y, hn"),
        (
            {"shapes": {"x": (4,)}},
            r"input 'x' of .* has the shape \[rows, 4\], not \[4\]: give an extent for each axis",
        ),
        ({"shapes": {"x": (2, 4)}}, r"has the shape \[rows, 4\], not \[2, 4\]"),
    ):
        with pytest.raises(ModelError, match=sentence):
            imported(tmp_path, step, **hints)
    rowless = leaky(
        [node("Identity", ["x"], ["v"]), node("ReduceMax", ["x"], ["z"], axes=[0])], more_outputs={"z": [1, 4]}
    )
    with pytest.raises(
        ModelError, match=r"output 'z' of .* has the shape \[1, 4\] for 3 rows .* name another with --answ"
    ):
        imported(tmp_path, rowless, answer="z")
    path = str(tmp_path / "net.onnx")
    for options, words in (
        (["--state", "h"], "'h' should look like h=hn"),
        (["--constant", "sr=fast"], "'sr=fast' should look like sr=16000"),
        (["--shape", "x=a,b"], "'x=a,b' should look like x=rows,40"),
        (["--leave-out", "a"], "--recurrent, --nonlinearity, --before, --after and --leave-out go with"),
    ):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["model", "import", path, *options])
        assert result.exit_code == 2
        assert words in result.output
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["model", "import", "net.pt", "--frame", "x"])
    assert "go with an .onnx graph" in result.output
