"""`instep model import net.onnx`: what is found in a graph, and what each graph that cannot be served is told."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from typer.testing import CliRunner

from instep.cli import app
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.onnx.importer import import_onnx
from instep.models.onnx.matching import Hints, pairs
from instep.models.registry import build
from tests.support.onnx_graphs import FLOAT, INT64, Shape, counting_step, floats, graph, gru_step, ints, node
from tests.support.running import CPU

torch.manual_seed(4)
GRU, HEAD = nn.GRU(4, 6), nn.Linear(6, 2)
ROWS4: Shape = ["rows", 4]
ROWS6: Shape = ["rows", 6]


def leaky(
    middle: list[onnx.NodeProto] | None = None,
    *,
    x: Any = ROWS4,
    h: Any = ROWS4,
    y: Any = ROWS4,
    more_inputs: dict[str, Any] | None = None,
    more_outputs: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    opset: int = 17,
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


def imported(path: Path, model: onnx.ModelProto | bytes, **hints: Any) -> Any:
    content = model if isinstance(model, bytes) else model.SerializeToString()
    (path / "net.onnx").write_bytes(content)
    return import_onnx(path / "net.onnx", path / "net", Hints(**hints)).description


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ("x h", "y hn", "h:hn"),
        ("x h0", "y hn", "h0:hn"),
        ("x h0 c0", "y hn cn", "h0:hn c0:cn"),
        ("x h_0 c_0", "y h_n c_n", "h_0:h_n c_0:c_n"),
        ("input state sr", "output stateN", "state:stateN"),
        ("x state_in", "y state_out", "state_in:state_out"),
        ("x in_state", "y out_state", "in_state:out_state"),
        ("x stateIn", "y stateOut", "stateIn:stateOut"),
        ("x h0_in h1_in", "y h0_out h1_out", "h0_in:h0_out h1_in:h1_out"),
        ("x cached_key_0 cached_key_1", "y new_cached_key_0 new_cached_key_1", "*"),
        ("x past_k past_v", "present_k y present_v", "past_k:present_k past_v:present_v"),
        ("mix conv_cache tra_cache", "enh conv_cache_out tra_cache_out", "*"),
        ("x prev_h", "y next_h", "prev_h:next_h"),
        ("x h", "y z", ""),
        ("main", "man", ""),
        ("x h", "hn h_out", ""),
    ],
)
def test_state_is_matched_by_name(inputs: str, outputs: str, expected: str) -> None:
    found = pairs(inputs.split(), outputs.split(), Hints())
    if expected == "*":
        expected = " ".join(map(":".join, zip(inputs.split()[1:], outputs.split()[1:], strict=True)))
    assert " ".join(map(":".join, found.items())) == expected


def test_what_is_found_is_written_down(tmp_path: Path) -> None:
    found = imported(tmp_path, counting_step())
    assert found.as_json(defaults=False) == {
        "kind": "onnx",
        "frame": {"tensor": "x", "shape": ["rows", 1, 3]},
        "answer": {"tensor": "y", "shape": ["rows", 1, 3]},
        "leaves": [
            {"name": "sum", "input": "sum", "output": "sum_out", "shape": [3, "rows"], "dtype": "float64"},
            {"name": "count", "input": "count", "output": "count_out", "shape": ["rows"], "dtype": "int64"},
            {"name": "peak", "input": "peak", "output": "peak_out", "shape": ["rows", 1], "dtype": "bool"},
            {"name": "last", "input": "last", "output": "last_out", "shape": ["rows", 1, 3]},
        ],
    }
    assert load_model(tmp_path / "net").description == found


def test_what_names_and_shapes_do_not_say_is_given(tmp_path: Path) -> None:
    middle = [
        node("Cast", ["rate"], ["gain"], to=FLOAT),
        node("Mul", ["x", "gain"], ["scaled"]),
        node("Mul", ["scaled", "weight"], ["v"]),
    ]
    more = {"rate": ([], INT64), "weight": ["rows", 1]}
    given = leaky(middle, x=[None, None], h=[None, None], y=[None, None], more_inputs=more)
    given.graph.output.append(helper.make_tensor_value_info("kept", FLOAT, ROWS4))
    path = tmp_path / "net.onnx"
    path.write_bytes(given.SerializeToString())
    options = ["--shape", "x=rows,4", "--shape", "h=rows,4", "--constant", "rate=-3", "--constant", "weight=0.5"]
    result = CliRunner().invoke(app, ["model", "import", str(path), "--answer", "y", "--state", "h=hn", *options])
    assert result.exit_code == 0, result.output
    folder = tmp_path / "net"
    assert result.stdout == f"{folder}: 4 features → ONNX graph, state h [4] → 4 outputs\n"
    network = build(load_model(folder), CPU)
    step = network.bind(3)
    x = torch.arange(12.0).view(3, 4)
    step.x.copy_(x)
    step.state["h"].fill_(0.25)
    step.run()
    torch.testing.assert_close(step.new_state["h"], 0.125 - 1.5 * x)
    torch.testing.assert_close(step.y, torch.tanh(0.125 - 1.5 * x))
    shown = CliRunner().invoke(app, ["model", "info", str(folder)]).stdout
    assert f"{path.stat().st_size:,} bytes; fingerprint " in shown


def test_timesteps_of_a_step_are_one(tmp_path: Path) -> None:
    """With the frames of a GRU as [T, rows, features], only one order of the axes runs."""
    gru = graph(
        [
            node("GRU", ["x", "W", "R", "", "", "h"], ["Y", "hn"], hidden_size=6, linear_before_reset=1),
            node("Squeeze", ["Y", "one"], ["y"]),
        ],
        {"x": [None, None, 4], "h": [1, None, 6]},
        {"y": [None, None, 6], "hn": [1, None, 6]},
        {"one": ints(1), "W": np.ones((1, 18, 4), np.float32), "R": np.ones((1, 18, 6), np.float32)},
    )
    found = imported(tmp_path, gru)
    assert (found.frame.shape, found.answer.shape) == ((1, "rows", 4), (1, "rows", 6))
    assert found.leaves[0].shape == (1, "rows", 6)


def test_float64_frames_and_outputs_are_converted(tmp_path: Path) -> None:
    double = TensorProto.DOUBLE
    wide = graph(
        [node("Add", ["x", "h"], ["hn"]), node("Identity", ["hn"], ["y"])],
        {"x": (ROWS4, double), "h": (ROWS4, double)},
        {"y": (ROWS4, double), "hn": (ROWS4, double)},
    )
    description = imported(tmp_path, wide)
    assert description.frame.dtype == description.leaves[0].dtype == "float64"
    step = build(load_model(tmp_path / "net"), CPU).bind(2)
    step.x.fill_(0.1)
    step.run()
    assert step.y.dtype == torch.float32
    assert step.y[0, 0].item() == step.new_state["h"][0, 0].item() == np.float64(np.float32(0.1))


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


def branch(condition: str) -> onnx.NodeProto:
    def only(op: str, name: str) -> onnx.GraphProto:
        value = helper.make_tensor_value_info(name, FLOAT, ROWS4)
        return helper.make_graph([node(op, ["x"], [name])], name, [], [value])

    return node("If", [condition], ["v"], then_branch=only("Neg", "v1"), else_branch=only("Identity", "v2"))


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
        lambda: leaky(x=[1, 4], h=[1, 4], y=[1, 4]),
        r"input 'x' of .* has the fixed shape \[1, 4\]: export",
    ),
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
        r"with NonZero \('n'\), values of one row decide what happens to the others",
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
        r"with Gather \('v'\), values of one row decide",
    ),
    "one row branches for all": (lambda: leaky(any_above()), r"with If \('v'\), values of one row decide"),
    "until all rows end": (lambda: leaky(endless()), r"Loop \('v'\) runs until values of rows end it"),
    "dynamic quantisation": (
        lambda: leaky(
            [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("DequantizeLinear", ["q", "s", "z"], ["v"])]
        ),
        r"with DynamicQuantizeLinear \('q, s, z'\), values of one row decide",
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


def test_a_branch_on_what_is_always_the_same_is_served(tmp_path: Path) -> None:
    given = leaky([branch("flag")], more_inputs={"flag": ([], TensorProto.BOOL)})
    assert imported(tmp_path, given, constants={"flag": 1}).constants[0].value == 1
    step = build(load_model(tmp_path / "net"), CPU).bind(1)
    step.x.fill_(2)
    step.run()
    assert step.new_state["h"].tolist() == [[-2.0] * 4]


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
