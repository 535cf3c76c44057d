"""Step graphs as models: truth is torch, or arithmetic in numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from instep.core.typing import F32
from instep.models.base import RecurrentModel
from instep.models.certify import candidate_buckets, certify
from instep.models.errors import ModelError
from instep.models.folder import load_model, write_model
from instep.models.handover.check import check
from instep.models.handover.save import save_model
from instep.models.model import Model
from instep.models.numerics import numerics
from instep.models.onnx.description import Extents
from instep.models.onnx.importer import import_onnx
from instep.models.onnx.matching import Hints
from instep.models.registry import build, parse_description
from instep.models.stepping import step_rows
from instep.recording.reader import RecordingReader
from instep.verify import verifier
from instep_client import AsyncClient
from tests.support.onnx_graphs import counting_by_hand, counting_step, graph, gru_step, node
from tests.support.running import CPU, running
from tests.support.verifying import ignore_progress
from tests.support.warm import run_program

torch.manual_seed(3)
GRU, HEAD = nn.GRU(5, 24), nn.Linear(24, 3)


def imported(path: Path, step: onnx.ModelProto) -> Model:
    (path / "net.onnx").write_bytes(step.SerializeToString())
    import_onnx(path / "net.onnx", path / "net")
    return load_model(path / "net")


def stepped(network: RecurrentModel, bucket: int, x: F32) -> F32:
    """Outputs [T, R, outputs] of frames [T, R, features]; R fills the bucket."""
    step, state, outputs = network.bind(bucket), network.state.initial(bucket), []
    for frame in x:
        y, state = step_rows(step, network.state, frame, state, network.description.outputs)
        outputs.append(y)
    return np.stack(outputs)


@torch.inference_mode()
def in_torch(x: F32) -> F32:
    y, _ = GRU(torch.from_numpy(x))
    found: F32 = HEAD(y).numpy()
    return found


def test_a_folder_of_a_graph(tmp_path: Path) -> None:
    model = imported(tmp_path, gru_step(GRU, HEAD))
    words = "5 features → ONNX graph, state h [1, 24] → 3 outputs"
    assert repr(model).startswith(f"<Model 'net': {words}; {len(model.graph):,} bytes, fingerprint ")
    with pytest.raises(ModelError, match="holds a model already"):
        write_model(tmp_path / "net", model)
    other = gru_step(GRU, nn.Linear(24, 3))
    assert imported_again(tmp_path, other).fingerprint != model.fingerprint
    kept = tmp_path / "net" / "notes.txt"
    kept.touch()
    save_model(tmp_path / "net", GRU, overwrite=True)
    assert {path.name for path in kept.parent.iterdir()} == {"model.yaml", "weights.safetensors", "notes.txt"}
    imported_again(tmp_path, other)
    assert {path.name for path in kept.parent.iterdir()} == {"model.yaml", "graph.onnx", "notes.txt"}
    (tmp_path / "net" / "graph.onnx").unlink()
    with pytest.raises(ModelError, match=r"cannot read the graph .*graph\.onnx: No such file"):
        load_model(tmp_path / "net")


def imported_again(path: Path, step: onnx.ModelProto) -> Model:
    (path / "again.onnx").write_bytes(step.SerializeToString())
    return import_onnx(path / "again.onnx", path / "net", name="net", overwrite=True)


def test_a_gru_gives_what_torch_gives(tmp_path: Path, rng: np.random.Generator) -> None:
    network = build(imported(tmp_path, gru_step(GRU, HEAD)), CPU)
    x = rng.standard_normal((30, 8, 5)).astype(np.float32)
    np.testing.assert_allclose(stepped(network, 8, x), in_torch(x), rtol=0, atol=2e-6)
    assert network.sequence(x, network.state.initial(8)) is None
    assert numerics(network.device, network.kernel)["onnxruntime"]
    assert "onnxruntime" not in numerics(CPU)


NET = """
from torch import nn
from tests.models.onnx.test_network import GRU, HEAD

class Net(nn.Module):
    def forward(self, x):
        return HEAD(GRU(x.transpose(0, 1))[0]).transpose(0, 1)
"""


def test_a_check_shows_no_whole_sequences_of_a_graph(tmp_path: Path) -> None:
    imported(tmp_path, gru_step(GRU, HEAD))
    (tmp_path / "net.py").write_text(NET)
    found = check(tmp_path / "net", f"{tmp_path / 'net.py'}:Net")
    assert found.agrees
    assert found.whole is None
    assert "frame by frame" in "".join(found.lines())


def test_leaves_of_every_dtype_with_rows_on_any_axis(tmp_path: Path, rng: np.random.Generator) -> None:
    network = build(imported(tmp_path, counting_step()), CPU)
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
    np.testing.assert_array_equal(stepped(network, 6, x), truth)
    found = certify(network, candidate_buckets(network, 16))
    assert (found.exactness, found.buckets, found.whole_sequence) == ("exact", (4, 8, 16), False)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_the_reference_computes_the_graph_in_either_precision(
    tmp_path: Path, rng: np.random.Generator, dtype: type[np.float64 | np.float32]
) -> None:
    network = build(imported(tmp_path, gru_step(GRU, HEAD)), CPU)
    reference = network.reference(dtype)
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
    active = np.array([2] * 12 + [1] * 8)
    y, state = reference.run(x.astype(dtype), given, active)
    tolerance = 1e-13 if dtype is np.float64 else 1e-5
    np.testing.assert_allclose(y[:12, 1], truth[:12, 1], rtol=0, atol=tolerance)
    np.testing.assert_allclose(y[:, 0], truth[:, 0], rtol=0, atol=tolerance)
    expected = [states[19, 0].numpy(), states[11, 1].numpy()]
    np.testing.assert_allclose(state["h"][:, 0], expected, rtol=0, atol=tolerance)
    assert not given["h"].any()


def test_the_reference_of_a_layer_norm_is_in_float64(tmp_path: Path, rng: np.random.Generator) -> None:
    """Its `stash_type` names the precision that a graph of float32 computes in, and is no tensor's type."""
    nodes = [node("Add", ["x", "h"], ["hn"]), node("LayerNormalization", ["hn", "scale"], ["y"], stash_type=1)]
    scale = rng.standard_normal(6).astype(np.float32)
    step = graph(nodes, {"x": ["rows", 6], "h": ["rows", 6]}, {"y": ["rows", 6], "hn": ["rows", 6]}, {"scale": scale})
    reference = build(imported(tmp_path, step), CPU).reference(np.float64)
    assert reference is not None
    x = rng.standard_normal((5, 2, 6)).astype(np.float32)
    y, _ = reference.run(x, {"h": np.zeros((2, 6))}, np.array([2] * 5))
    summed = torch.from_numpy(x.cumsum(axis=0, dtype=np.float64))
    epsilon = float(np.float32(1e-5))  # which a graph holds
    truth = nn.functional.layer_norm(summed, (6,), torch.from_numpy(scale.astype(np.float64)), eps=epsilon)
    np.testing.assert_allclose(y, truth.numpy(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("step", [gru_step(GRU, HEAD), counting_step()], ids=["gru", "counting"])
async def test_it_is_served_recorded_and_verified(
    tmp_path: Path, rng: np.random.Generator, step: onnx.ModelProto
) -> None:
    model = imported(tmp_path, step)
    features = model.description.features
    x = rng.standard_normal((40, features)).astype(np.float32)
    path = tmp_path / "r.instep"
    async with running(model, recording={"file": path}) as server, AsyncClient(server.endpoint) as client:
        one, other = [await client.open(name) for name in ("one", "other")]
        whole = await one.step(x)
        first = await other.step(x[:7])
        assert client.info.state == model.description.state
        await client.close(park=True)
    async with running(model, recording={"file": path}) as server, AsyncClient(server.endpoint) as client:
        other = await client.resume("other", 7, take_over=True)
        rest = await other.step(x[7:])
    truth = in_torch(x[:, None])[:, 0] if features == 5 else counting_by_hand(x)
    np.testing.assert_allclose(whole, truth, rtol=0, atol=2e-6)
    with RecordingReader(path) as reader:
        exact = reader.header.exactness == "exact"
        report = verifier.verify(reader, model, [], ignore_progress)
    if exact:
        np.testing.assert_array_equal(np.concatenate([first, rest]), whole)
        assert report.verdict == "exact"
    assert report.verified, report.as_json()
    assert report.checkers().endswith(" from the same graph in float64")
    assert report.checkers().startswith("replayed in steps; at most ")
    assert report.elements["whole sequence"] == 0


def test_a_pipeline_around_a_graph(tmp_path: Path, rng: np.random.Generator) -> None:
    """Frames of 2 values with the 3 values before them are the graph's frames of 5."""
    network = imported(tmp_path, gru_step(GRU, HEAD)).description.as_json()
    fields = {"kind": "pipeline", "features": 2, "before": [{"context": {"values": 3}}], "network": network}
    description = parse_description(fields)
    write_model(
        tmp_path / "pipeline", Model("pipeline", description, {}, graph=gru_step(GRU, HEAD).SerializeToString())
    )
    model = build(load_model(tmp_path / "pipeline"), CPU)
    x = rng.standard_normal((20, 4, 2)).astype(np.float32)
    history = np.concatenate([np.zeros((4, 3), np.float32), x.transpose(1, 0, 2).reshape(4, -1)], axis=1)
    frames = np.stack([history[:, at : at + 5] for at in range(0, 40, 2)])
    np.testing.assert_allclose(stepped(model, 4, x), in_torch(frames), rtol=0, atol=2e-6)
    reference = model.reference(np.float64)
    assert reference is not None
    assert not reference.independent


def test_a_description_that_does_not_fit_its_graph_is_refused(tmp_path: Path) -> None:
    imported(tmp_path, gru_step(GRU, HEAD))
    path = tmp_path / "net" / "model.yaml"
    good = path.read_text()
    for old, new, sentence in (
        ("tensor: x", "tensor: z", "the graph of net has no input 'z'; it has x, h"),
        ("output: hn", "output: next", "the graph of net has no output 'next'; it has y, hn"),
        (
            "- 24",
            "- 23",
            r"input 'h' of the graph of net has the shape \[1, rows, 24\], but in the desc.* \[1, rows, 23\]",
        ),
        (
            "  output: hn",
            "  output: hn\n  dtype: float64",
            "input 'h' of the graph of net is float32, but float64 in the",
        ),
        ("leaves:", "constants:\n- input: sr\n  value: 1\nleaves:", "the graph of net has no input 'sr'"),
    ):
        assert old in good
        path.write_text(good.replace(old, new))
        with pytest.raises(ModelError, match=sentence):
            build(load_model(tmp_path / "net"), CPU)
    for old, new, sentence in (
        ("  - rows\n  - 5", "  - 5", r"frame\.shape: one extent must be `rows`"),
        ("  - rows\n  - 5", "  - 5\n  - rows", r"frame\.shape: only axes of extent 1 may come before `rows`"),
        ("tensor: x", "tensor: h", "h is mapped twice"),
        ("name: h", "name: 4", "4"),
    ):
        path.write_text(good.replace(old, new))
        with pytest.raises(ModelError, match=sentence):
            load_model(tmp_path / "net")


def test_shapes_that_the_graph_leaves_open_are_tried(tmp_path: Path) -> None:
    sum_ = graph(
        [node("Add", ["x", "h"], ["hn"]), node("Identity", ["hn"], ["y"])],
        {"x": [None, None], "h": [None, None]},
        {"y": [None, None], "hn": [None, None]},
    )
    (tmp_path / "net.onnx").write_bytes(sum_.SerializeToString())
    shapes: dict[str, Extents] = {"x": ("rows", 4), "h": ("rows", 4)}
    import_onnx(tmp_path / "net.onnx", tmp_path / "net", Hints(shapes=shapes))
    path = tmp_path / "net" / "model.yaml"
    path.write_text(path.read_text().replace("- 4", "- 3", 2).replace("- 3", "- 4", 1))  # of the answer
    with pytest.raises(ModelError, match="onnxruntime cannot run the graph of net with the shapes of its description"):
        build(load_model(tmp_path / "net"), CPU)


def test_without_the_extra_the_error_says_what_to_install(tmp_path: Path) -> None:
    imported(tmp_path, gru_step(GRU, HEAD))
    program = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "import torch; from instep.models.folder import load_model; from instep.models.registry import build\n"
        f"model = load_model({str(tmp_path / 'net')!r}); assert 'onnx' not in sys.modules\n"
        "build(model, torch.device('cpu'))"
    )
    (tmp_path / "program.py").write_text(program)
    found = run_program(str(tmp_path / "program.py"), tmp_path)
    assert found.stderr.splitlines()[-1].endswith(
        'the graph of net needs onnxruntime, which is not installed: pip install "instep[onnx]"'
    )
