"""Step graphs as models: values as onnxruntime and torch have them, bits as the definition has them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from instep.core.typing import F32
from instep.models.base import RecurrentModel, step_frames
from instep.models.folder import load_model
from instep.models.onnx.importer import open_session
from instep.models.registry import build
from tests.support.onnx_graphs import counting_by_hand, counting_step, graph, gru_step, imported, ints, leaky, node
from tests.support.running import CPU
from tests.support.torch_network import check_bits
from tests.support.warm import run_program

torch.manual_seed(3)
GRU, HEAD = nn.GRU(5, 24), nn.Linear(24, 3)


def one_row() -> onnx.ModelProto:
    """A graph with a batch of 1, a state of two axes and a mean over time, as DTLN and GTCRN are published."""
    nodes = [
        node("Transpose", ["x"], ["column"], perm=[0, 2, 1]),
        node("Slice", ["h", "one", "three", "two"], ["later"]),
        node("Concat", ["later", "column"], ["hn"], axis=2),
        node("ReduceMean", ["hn"], ["mean"], axes=[2], keepdims=0),
        node("Tanh", ["mean"], ["y"]),
    ]
    shapes: dict[str, Any] = {"x": [1, 1, 5], "h": [1, 5, 3]}
    return graph(nodes, shapes, {"y": [1, 5], "hn": [1, 5, 3]}, {"one": ints(1), "two": ints(2), "three": ints(3)})


GRAPHS = {"gru": gru_step(GRU, HEAD), "counting": counting_step(5), "leaky": leaky(), "one row": one_row()}


def network_of(path: Path, step: onnx.ModelProto) -> RecurrentModel:
    return build(load_model(path / imported(path, step).name), CPU)


def served(network: RecurrentModel, x: F32) -> F32:
    """Outputs [T, R, outputs] of frames [T, R, features]."""
    return step_frames(network, x, network.state.initial(x.shape[1]))[0]


@torch.inference_mode()
def in_torch(x: F32) -> F32:
    y, _ = GRU(torch.from_numpy(x))
    found: F32 = HEAD(y).numpy()
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_a_frame_has_the_bits_of_the_definition_in_every_batch(
    tmp_path: Path, rng: np.random.Generator, name: str
) -> None:
    network = network_of(tmp_path, GRAPHS[name])
    x = rng.standard_normal((6, 40, network.description.features)).astype(np.float32)
    check_bits(network, x, network.state.initial(40))
    assert network.sequence(x, network.state.initial(40)) is None


def test_a_gru_gives_what_torch_gives(tmp_path: Path, rng: np.random.Generator) -> None:
    network = network_of(tmp_path, GRAPHS["gru"])
    x = rng.standard_normal((30, 8, 5)).astype(np.float32)
    np.testing.assert_allclose(served(network, x), in_torch(x), rtol=0, atol=2e-6)


def test_leaves_of_every_dtype_with_rows_on_any_axis(tmp_path: Path, rng: np.random.Generator) -> None:
    network = network_of(tmp_path, counting_step())
    leaves = {leaf.name: (leaf.shape, leaf.dtype.name) for leaf in network.state.leaves}
    assert leaves == {
        "sum": ((3,), "float64"),
        "count": ((), "int64"),
        "peak": ((1,), "bool"),
        "last": ((1, 3), "float32"),
    }
    x = rng.standard_normal((25, 6, 3)).astype(np.float32)
    truth = np.stack([counting_by_hand(x[:, row]) for row in range(6)], axis=1)
    assert (truth[1:] < 0).any()
    np.testing.assert_array_equal(served(network, x), truth)


def test_a_graph_with_a_batch_of_one_is_served_in_any_batch(tmp_path: Path, rng: np.random.Generator) -> None:
    network, session = network_of(tmp_path, one_row()), open_session(one_row().SerializeToString(), "net")
    assert [leaf.shape for leaf in network.state.leaves] == [(5, 3)]
    x = rng.standard_normal((9, 7, 5)).astype(np.float32)
    y = served(network, x)
    for row in range(7):
        h = np.zeros((1, 5, 3), np.float32)
        for frame, found in zip(x[:, row], y[:, row], strict=True):
            wanted, h = session.run(["y", "hn"], {"x": frame.reshape(1, 1, 5), "h": h})
            np.testing.assert_allclose(found, wanted[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_streams_begin_with_what_the_folder_says(tmp_path: Path, learned: bool) -> None:
    imported(tmp_path, leaky())
    path, weights = tmp_path / "net" / "model.yaml", tmp_path / "net" / "weights.safetensors"
    fields = yaml.safe_load(path.read_text())
    fields["state"][0]["initial"] = "learned" if learned else 3.0
    path.write_text(yaml.safe_dump(fields))
    if learned:
        save_file(load_file(weights) | {"initial_state.h": torch.full((4,), 3.0)}, weights)
    y = served(build(load_model(tmp_path / "net"), CPU), np.zeros((1, 2, 4), np.float32))
    np.testing.assert_allclose(y, np.tanh(1.5), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_reference_computes_the_normal_form_in_either_precision(
    tmp_path: Path, rng: np.random.Generator, dtype: type[np.float64 | np.float32]
) -> None:
    reference = network_of(tmp_path, GRAPHS["gru"]).reference(dtype)
    assert reference is not None
    assert not reference.independent
    x = rng.standard_normal((20, 2, 5)).astype(np.float32)
    wide, head = nn.GRU(5, 24).to(torch.float64), nn.Linear(24, 3).to(torch.float64)
    wide.load_state_dict(GRU.state_dict())
    head.load_state_dict(HEAD.state_dict())
    with torch.inference_mode():
        states, _ = wide(torch.from_numpy(x.astype(np.float64)))
        truth = head(states).numpy()
    given = {"h": np.zeros((2, 1, 24), dtype)}
    y, state = reference.run(x.astype(dtype), given, np.array([2] * 12 + [1] * 8))
    tolerance = 1e-13 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(y[:12, 1], truth[:12, 1], rtol=0, atol=tolerance)
    np.testing.assert_allclose(y[:, 0], truth[:, 0], rtol=0, atol=tolerance)
    expected = [states[19, 0].numpy(), states[11, 1].numpy()]
    np.testing.assert_allclose(state["h"][:, 0], expected, rtol=0, atol=tolerance)
    assert not given["h"].any()


def test_serving_needs_neither_onnx_nor_onnxruntime(tmp_path: Path) -> None:
    imported(tmp_path, GRAPHS["leaky"])
    program = (
        "import sys; sys.modules['onnx'] = sys.modules['onnxruntime'] = None\n"
        "import numpy as np, torch\n"
        "from instep.models.folder import load_model; from instep.models.registry import build\n"
        f"network = build(load_model({str(tmp_path / 'net')!r}), torch.device('cpu'))\n"
        "print(network.step(np.zeros((1, 4), np.float32), network.state.initial(1))[0].tolist())\n"
        "from instep.models.onnx.importer import import_onnx\n"
        f"import_onnx({str(tmp_path / 'net.onnx')!r}, 'again')\n"
    )
    (tmp_path / "program.py").write_text(program)
    found = run_program(str(tmp_path / "program.py"), tmp_path)
    assert found.stdout == "[[0.0, 0.0, 0.0, 0.0]]\n"
    assert found.stderr.splitlines()[-1].endswith(
        'net.onnx needs onnx, which is not installed: pip install "instep[onnx]"'
    )
