"""`instep model import net.onnx`: what is found in a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from typer.testing import CliRunner

from instep.cli import app
from instep.models.folder import load_model
from instep.models.onnx.matching import Hints, pairs
from instep.models.registry import build
from tests.support.onnx_graphs import FLOAT, INT64, ROWS4, branch, counting_step, graph, imported, ints, leaky, node
from tests.support.running import CPU


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


def test_a_branch_on_what_is_always_the_same_is_served(tmp_path: Path) -> None:
    given = leaky([branch("flag")], more_inputs={"flag": ([], TensorProto.BOOL)})
    assert imported(tmp_path, given, constants={"flag": 1}).constants[0].value == 1
    step = build(load_model(tmp_path / "net"), CPU).bind(1)
    step.x.fill_(2)
    step.run()
    assert step.new_state["h"].tolist() == [[-2.0] * 4]
