"""Exported steps: the module's own bits in a certified batch, its float64 in the reference, and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from instep.core.typing import F32
from instep.models import export_step
from instep.models.certify import candidate_buckets, certify
from instep.models.folder import load_model, write_model
from instep.models.model import Model
from instep.models.module.network import ModuleNetwork
from instep.models.registry import build, parse_description
from instep.models.stepping import step_rows
from tests.support.running import CPU, prepared
from tests.support.steps import FEATURES, STEPS, eager, example, exported, exported_folder, leaves, step_of


def frames(rng: np.random.Generator, count: int = 12) -> F32:
    return rng.standard_normal((count, FEATURES)).astype(np.float32)


def network_of(name: str) -> ModuleNetwork:
    network = prepared(exported(name), 128).network
    assert isinstance(network, ModuleNetwork)
    return network


@pytest.mark.parametrize("name", STEPS)
def test_a_frame_has_the_bits_of_the_module_in_every_certified_batch(name: str, rng: np.random.Generator) -> None:
    network, x = network_of(name), frames(rng)
    certification = prepared(exported(name), 128).certification
    assert not certification.whole_sequence
    for bucket in certification.buckets:
        step, rows = network.bind(bucket), network.state.initial(bucket)
        expected, final = eager(name, x, bucket)
        alone, _ = eager(name, x, 1)
        for frame, truth, close in zip(x, expected, alone, strict=True):
            batch = rng.standard_normal((bucket, FEATURES)).astype(np.float32)
            batch[bucket // 2] = frame  # beside other streams
            y, rows = step_rows(step, network.state, batch, rows, network.description.outputs)
            if certification.exactness == "exact":
                np.testing.assert_array_equal(y[bucket // 2], truth)
            np.testing.assert_allclose(y[bucket // 2], close, rtol=1e-4, atol=1e-5)
        for leaf, found in zip(final, network.state.unpack(rows).values(), strict=True):
            np.testing.assert_allclose(found[bucket // 2], leaf.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_what_was_certified_holds_for_other_rows_too(name: str) -> None:
    certification, network = prepared(exported(name), 128).certification, network_of(name)
    if certification.exactness != "exact":
        pytest.skip("not exact on this machine")
    rng, spec = np.random.default_rng(99), network.state
    largest = certification.buckets[-1]
    x = (rng.choice([0.1, 1, 3], (largest, 1)) * rng.standard_normal((largest, FEATURES))).astype(np.float32)
    states = spec.initial(largest)
    for _ in range(20):
        y, after = step_rows(network.bind(largest), spec, x, states, network.description.outputs)
        for bucket in certification.buckets[:-1]:
            rows = rng.permutation(largest)[:bucket]
            found = step_rows(network.bind(bucket), spec, x[rows], states[rows], network.description.outputs)
            np.testing.assert_array_equal(found[0], y[rows])
            np.testing.assert_array_equal(found[1], after[rows])
        x, states = rng.permutation(x), after


@pytest.mark.parametrize("name", STEPS)
def test_the_reference_is_the_module_in_float64(name: str, rng: np.random.Generator) -> None:
    network, x = network_of(name), frames(rng)
    reference = network.reference(np.float64)
    assert not reference.independent
    initial = {
        leaf: value.astype(np.float64) if value.dtype.kind == "f" else value
        for leaf, value in network.state.unpack(network.state.initial(32)).items()
    }
    batch = np.repeat(x[:, None].astype(np.float64), 32, axis=1)
    y, states = reference.run(batch, initial, np.full(len(x), 32))
    assert y.dtype == np.float64
    module, state = step_of(name).double(), doubled(example(name, 32))
    with torch.inference_mode():
        for frame, found in zip(batch, y, strict=True):
            outputs, state = module(torch.from_numpy(frame), state)
            parts = outputs.values() if isinstance(outputs, dict) else [outputs]
            truth = torch.cat([part.reshape(32, -1) for part in parts], 1).numpy()
            if name == "counting":  # it rounds to float32 itself, which the reference does not
                np.testing.assert_allclose(found, truth, rtol=1e-6)
            else:
                np.testing.assert_array_equal(found, truth)
    for leaf, value in zip(leaves(state), states.values(), strict=True):
        np.testing.assert_array_equal(value, leaf.numpy())


def doubled(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.double() if state.is_floating_point() else state
    if isinstance(state, dict):
        return {name: doubled(leaf) for name, leaf in state.items()}
    return type(state)(doubled(leaf) for leaf in state)


def test_references_run_sequences_of_different_lengths(rng: np.random.Generator) -> None:
    network = network_of("counting")
    x = rng.standard_normal((4, 3, FEATURES)).astype(np.float32)
    for dtype in (np.float32, np.float64):
        initial = {
            name: leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf
            for name, leaf in network.state.unpack(network.state.initial(3)).items()
        }
        y, states = network.reference(dtype).run(x.astype(dtype), initial, np.array([3, 2, 2, 1]))
        assert states["count"].tolist() == [11, 10, 8]
        for row, length in enumerate([4, 3, 1]):
            expected, final = eager("counting", x[:length, row], 1)
            np.testing.assert_allclose(y[:length, row], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(states["total"][row], final[3], rtol=1e-6)
        assert {name: (leaf == 7).all() for name, leaf in initial.items()}["count"], "what it is given stays"


def test_its_folder_is_plain_text_and_tensors_and_is_read_back() -> None:
    folder, model = exported_folder("counting"), exported("counting")
    assert sorted(path.name for path in folder.iterdir()) == ["graph.json", "model.yaml", "weights.safetensors"]
    fields = yaml.safe_load((folder / "model.yaml").read_text())
    assert fields["kind"] == "module"
    assert [leaf.get("initial", 0) for leaf in fields["state"]] == [7, -1, 0, 0]
    assert [leaf.get("dtype", "float32") for leaf in fields["state"]] == ["int64", "float32", "bool", "float64"]
    graph = json.loads((folder / "graph.json").read_text())
    assert {node["op"].split(".")[0] for node in graph["nodes"]} <= {"aten", "int", "getitem"}
    (scale,) = load_file(folder / "weights.safetensors").values()
    torch.testing.assert_close(scale, step_of("counting").get_buffer("scale"), rtol=0, atol=0)
    assert model.description.in_words() == (
        "5 features → step of 21 operators, state count [] int64, ring [3], loud [] bool, total [] float64 → 4 outputs"
    )


class TakingTurns(nn.Module):
    """Two leaves that take each other's place."""

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return x + state["a"], {"a": state["b"], "b": state["a"]}


def test_a_leaf_may_become_another_one(tmp_path: Path, rng: np.random.Generator) -> None:
    state = {"a": torch.full((1, 2), 1.0), "b": torch.full((1, 2), 5.0)}
    model = export_step(TakingTurns(), torch.zeros(1, 2), state, tmp_path / "m", initial_state="example")
    network, x = ModuleNetwork(model, CPU), rng.integers(9, size=(3, 32, 2)).astype(np.float32)
    truth, rows, spec = x + np.array([1, 5, 1])[:, None, None], network.state.initial(32), network.state
    before = {name: leaf.astype(np.float64) for name, leaf in spec.unpack(rows).items()}
    y, after = network.reference(np.float64).run(x.astype(np.float64), before, np.array([32, 32, 20]))
    np.testing.assert_array_equal(y[:, :20], truth[:, :20])
    assert [after["a"][row, 0] for row in (0, 19, 20, 31)] == [5, 5, 1, 1]
    assert [after["b"][row, 0] for row in (0, 19, 20, 31)] == [1, 1, 5, 5]
    step = network.bind(32)
    for frame, expected in zip(x, truth, strict=True):
        found, rows = step_rows(step, spec, frame, rows, 2)
        np.testing.assert_array_equal(found, expected)
    assert {name: leaf[0, 0] for name, leaf in spec.unpack(rows).items()} == {"a": 5, "b": 1}


def test_outputs_in_a_dict_are_joined_and_named() -> None:
    assert exported("causal_convolution").output_names == ("level", "class.0", "class.1")
    assert exported("causal_convolution").description.outputs == 3


class Recurrent(nn.Module):
    """What people have: layers of torch around an attention over a cache, in evaluation mode after training."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.cell = nn.LSTM(4, 8, num_layers=2, batch_first=True), nn.GRUCell(8, 8)
        self.norm, self.dropout, self.embedding = nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Embedding(3, 8)
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.last = nn.Linear(8, 2)
        self.last.weight.data = self.last.weight.data.t().contiguous().t()

    def forward(self, x: torch.Tensor, state: dict[str, torch.Tensor]) -> Any:
        h, c = (state[name].transpose(0, 1).contiguous() for name in ("h", "c"))
        y, (h, c) = self.lstm(x.masked_fill(self.mask, float("-inf")).clamp(min=-1).unsqueeze(1), (h, c))
        cell = self.cell(self.dropout(self.norm(y[:, 0])), state["cell"])
        keys = state["keys"].clone()
        keys[torch.arange(x.shape[0]), state["place"]] = cell
        query = (cell + self.embedding(state["place"])).unsqueeze(1)
        seen = nn.functional.scaled_dot_product_attention(query, keys, keys).squeeze(1)
        new = {"h": h.transpose(0, 1), "c": c.transpose(0, 1), "cell": cell, "keys": keys}
        size = torch.fft.rfft(cell.abs().topk(4, dim=1).values).abs()[:, 0]  # indices that nothing needs
        return (self.last(seen), size), new | {"place": (state["place"] + 1) % 3}


def test_layers_of_torch_in_a_step(tmp_path: Path, rng: np.random.Generator) -> None:
    torch.manual_seed(3)
    module = Recurrent()
    with torch.no_grad():
        module(torch.randn(64, 4), begin(64))  # so that its statistics are no longer those of a new layer
    model = export_step(
        module, torch.zeros(2, 4), begin(2), tmp_path / "m", name="all", outputs=["left", "right", "size"]
    )
    assert module.training
    assert (model.name, model.output_names) == ("all", ("left", "right", "size"))
    network = ModuleNetwork(load_model(tmp_path / "m"), CPU)
    certify(network, candidate_buckets(network, 64))
    step, rows, state = network.bind(32), network.state.initial(32), begin(32)
    with torch.inference_mode():
        for x in rng.standard_normal((7, 32, 4)).astype(np.float32):
            y, rows = step_rows(step, network.state, x, rows, 3)
            (left, size), state = module.eval()(torch.from_numpy(x), state)
            np.testing.assert_allclose(y, torch.cat([left, size[:, None]], 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(network.state.unpack(rows)["place"], state["place"])


def begin(rows: int) -> dict[str, torch.Tensor]:
    return {
        "h": torch.zeros(rows, 2, 8),
        "c": torch.zeros(rows, 2, 8),
        "cell": torch.zeros(rows, 8),
        "keys": torch.zeros(rows, 3, 8),
        "place": torch.zeros(rows, dtype=torch.int64),
    }


def test_a_pipeline_may_hold_a_step_module(tmp_path: Path, rng: np.random.Generator) -> None:
    inside = exported("layer_norm_gru")
    network, x = network_of("layer_norm_gru"), rng.standard_normal((6, 32, FEATURES)).astype(np.float32)
    description = {"kind": "pipeline", "features": FEATURES, "network": inside.description.as_json()}
    smoothed = Model("p", parse_description({**description, "after": [{"smooth": 0.5}]}), inside.weights)
    write_model(tmp_path / "p", smoothed)
    assert "graph" not in (tmp_path / "p" / "model.yaml").read_text()
    found = load_model(tmp_path / "p")
    assert (found.description, found.fingerprint) == (smoothed.description, smoothed.fingerprint)
    served, plain = build(found, CPU).bind(32), network.bind(32)
    rows, alone = found.description.state.initial(32), network.state.initial(32)
    kept: Any = None
    for frame in x:
        y, rows = step_rows(served, found.description.state, frame, rows, 3)
        inner, alone = step_rows(plain, network.state, frame, alone, 3)
        kept = inner if kept is None else (kept + inner) / 2
        np.testing.assert_allclose(y, kept, rtol=1e-5, atol=1e-6)
