"""`instep model import net.onnx`: what is found in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from onnx import TensorProto, helper
from typer.testing import CliRunner

from instep.cli import app
from instep.core.typing import F32
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.onnx.description import Extents
from instep.models.onnx.matching import Hints, pairs
from instep.models.registry import build
from tests.support.onnx_graphs import (
    FLOAT,
    INT64,
    ROWS4,
    Shape,
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
    found = described(gru)
    assert (found.frame.shape, found.answer.shape) == ((1, "rows", 4), (1, "rows", 6))
    assert found.leaves[0].shape == (1, "rows", 6)
    assert imported(tmp_path, gru).description.state.leaves[0].shape == (1, 6)


@pytest.mark.parametrize("shape", [[1, 4], ["batch", "F"]])
def test_a_graph_of_one_row_is_described(shape: Shape) -> None:
    """Its shapes are fixed in the graph, or by hints."""
    shapes: dict[str, Extents] = {} if shape == [1, 4] else {"x": (1, 4), "h": (1, 4)}
    found = described(leaky(x=shape, h=shape, y=shape), shapes=shapes)
    assert (found.frame.shape, found.answer.shape, found.leaves[0].shape) == ((1, 4), (1, 4), (1, 4))
    assert not found.is_batched
    with pytest.raises(ModelError, match=r"input 'x' of net has the fixed shape \[1, 4\]"):
        described(leaky(), shapes={"x": (1, 4)})


def test_float64_frames_and_outputs_are_converted(tmp_path: Path) -> None:
    double = TensorProto.DOUBLE
    wide = graph(
        [node("Add", ["x", "h"], ["hn"]), node("Identity", ["hn"], ["y"])],
        {"x": (ROWS4, double), "h": (ROWS4, double)},
        {"y": (ROWS4, double), "hn": (ROWS4, double)},
    )
    assert described(wide).frame.dtype == "float64"
    imported(tmp_path, wide)
    y, h = stepped(tmp_path / "net", np.full((2, 4), 0.1, np.float32), {"h": np.zeros((2, 4))})
    assert (y.dtype.name, h.dtype.name) == ("float32", "float64")
    assert y[0, 0] == h[0, 0] == np.float64(np.float32(0.1))


def test_a_branch_on_what_is_always_the_same_is_served(tmp_path: Path) -> None:
    given = leaky([branch("flag")], more_inputs={"flag": ([], TensorProto.BOOL)})
    imported(tmp_path, given, constants={"flag": 1})
    _, h = stepped(tmp_path / "net", np.full((1, 4), 2, np.float32), {"h": np.zeros((1, 4), np.float32)})
    assert h.tolist() == [[-2.0] * 4]
