"""`instep model import net.onnx`: what is found in a graph, and what each graph that cannot be served is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import TensorProto, helper
from typer.testing import CliRunner

from instep.core.typing import F32
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.registry import build
from instep.program import app
from tests.support.onnx_graphs import (
    FLOAT,
    INT64,
    ROWS4,
    branch,
    counting_step,
    described,
    graph,
    imported,
    ints,
    leaky,
    node,
)
from tests.support.running import CPU


def stepped(folder: Path, x: F32, state: Mapping[str, Any]) -> tuple[F32, Any]:
    """Outputs, and the one leaf after them."""
    network = build(load_model(folder), CPU)
    y, rows = network.step(x, network.state.pack(state))
    (after,) = network.state.unpack(rows).values()
    return y, after


def with_names(inputs: str, outputs: str) -> onnx.ModelProto:
    """A graph of these inputs and outputs, all of one shape."""
    nodes = [node("Identity", [inputs.split()[0]], [name]) for name in outputs.split()]
    return graph(nodes, dict.fromkeys(inputs.split(), ROWS4), dict.fromkeys(outputs.split(), ROWS4))


@pytest.mark.parametrize(
    ("inputs", "outputs", "expected"),
    [
        ("x h0 c0", "y hn cn", "h0=hn c0=cn"),
        ("x h0_in h1_in", "y h0_out h1_out", "h0_in=h0_out h1_in=h1_out"),
        ("x past_k past_v", "present_k y present_v", "past_k=present_k past_v=present_v"),
        ("x h", "y z", None),
        ("x h", "hn h_out", None),
    ],
)
def test_state_is_matched_by_name(inputs: str, outputs: str, expected: str | None) -> None:
    model = with_names(inputs, outputs)
    if expected is None:
        with pytest.raises(ModelError, match="--state INPUT=OUTPUT"):
            described(model)
        return
    found = described(model)
    assert " ".join(f"{leaf.name}={after}" for leaf, after in found.state.items()) == expected
    assert (found.frame.name, found.answer) == (inputs.split()[0], ({*outputs.split()} - {*found.state.values()}).pop())


def test_what_is_found_is_written_down(tmp_path: Path) -> None:
    model = imported(tmp_path, counting_step())
    assert yaml.safe_load((tmp_path / "net" / "model.yaml").read_text()) == {
        "name": "net",
        "kind": "module",
        "features": 3,
        "state": [
            {"name": "sum", "shape": [3], "dtype": "float64"},
            {"name": "count", "shape": [], "dtype": "int64"},
            {"name": "peak", "shape": [1], "dtype": "bool"},
            {"name": "last", "shape": [1, 3]},
        ],
        "form": "normal.json",
    }
    files = {path.name for path in (tmp_path / "net").iterdir()}
    assert files == {"model.yaml", "normal.json", "weights.safetensors"}
    again = load_model(tmp_path / "net")
    assert (again.description, again.fingerprint) == (model.description, model.fingerprint)


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
    assert result.stdout == f"{folder}: 4 features → step of 5 operators, state h [4] → 4 outputs\n"
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    y, h = stepped(folder, x, {"h": np.full((3, 4), 0.25, np.float32)})
    np.testing.assert_allclose(h, 0.125 - 1.5 * x, rtol=1e-6)
    np.testing.assert_allclose(y, np.tanh(0.125 - 1.5 * x), rtol=1e-6)


def external() -> onnx.ModelProto:
    """A tensor in another file, within a branch."""
    model = leaky([branch("flag")], more_inputs={"flag": ([], TensorProto.BOOL)})
    tensor = TensorProto(name="secret", data_type=FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="/etc/passwd")
    [then] = [each.g for each in model.graph.node[0].attribute if each.name == "then_branch"]
    then.node[0].CopyFrom(node("Constant", [], ["v1"], value=tensor))
    return model


def foreign() -> onnx.ModelProto:
    """An operator that onnxruntime has and ONNX has not."""
    model = leaky([node("QuickGelu", ["x"], ["v"], domain="com.microsoft")])
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def with_a_function() -> onnx.ModelProto:
    model = leaky([helper.make_node("f", ["x"], ["v"], domain="d")])
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("d", 1)]
    body = [helper.make_node("f", ["a"], ["b"], domain="d")]  # it calls itself
    model.functions.append(helper.make_function("d", "f", ["a"], ["b"], body, imports))
    model.opset_import.append(imports[1])
    return model


def over_whole_sequences() -> onnx.ModelProto:
    shapes = {"w": [1, 12, 4], "r": [1, 12, 4]}
    weights = [helper.make_tensor(name, FLOAT, shape, [0.5] * 48) for name, shape in shapes.items()]
    frames, y = (helper.make_tensor_value_info(*each) for each in (("x", FLOAT, [20, 1, 4]), ("y", FLOAT, None)))
    graph = helper.make_graph([node("GRU", ["x", "w", "r"], ["y"], hidden_size=4)], "g", [frames], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


REFUSED: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "text": (lambda: b"import torch", "is not an ONNX graph"),
    "external data": (external, "'secret'"),
    "whole sequences": (over_whole_sequences, "whole sequences .*GRU"),
    "foreign operator": (foreign, "QuickGelu"),
    "a function": (with_a_function, "functions"),
    "fixed batch inside": (
        lambda: leaky([node("Reshape", ["x", "to"], ["v"])], weights={"to": ints(1, 4)}),
        "row",
    ),
    "open features": (lambda: leaky(x=["rows", "F"]), "--shape x=rows,40"),
    "a rate": (
        lambda: leaky([node("Mul", ["x", "rate"], ["v"])], more_inputs={"rate": []}),
        "--constant",
    ),
    "several outputs": (lambda: leaky(more_outputs={"kept": ROWS4}), "--answer"),
    "mean over rows": (
        lambda: leaky([node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["v"])]),
        r"output '\w+' .* the rows beside it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_graph_that_cannot_be_served_is_told_why(tmp_path: Path, case: str) -> None:
    make, named = REFUSED[case]
    with pytest.raises(ModelError, match=named) as raised:
        imported(tmp_path, make())
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "net").exists()


def test_a_state_that_changes_its_shape(tmp_path: Path) -> None:
    nodes = [node("Concat", ["h", "x"], ["hn"], axis=1), node("ReduceMax", ["hn"], ["y"], axes=[1])]
    growing = graph(nodes, {"x": ROWS4, "h": ["rows", 6]}, {"y": ["rows", 1], "hn": ["rows", 10]})
    with pytest.raises(ModelError, match=r"'h' is \[1, 6\], and 'hn', .* \[1, 10\]"):
        imported(tmp_path, growing, state={"h": "hn"})
