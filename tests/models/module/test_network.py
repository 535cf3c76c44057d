"""Exported steps: the module's values, the same bits in every batch, the module's float64, and the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from instep.core.typing import F32, U8
from instep.models import export_step
from instep.models.base import step_frames
from instep.models.folder import load_model
from instep.models.network import PortableNetwork
from instep.models.portable.form import form_of_values
from tests.support.steps import FEATURES, STEPS, eager, example, exported, exported_folder, leaves, step_of
from tests.support.torch_network import check_bits


def frames(rng: np.random.Generator, count: int = 12) -> F32:
    return rng.standard_normal((count, FEATURES)).astype(np.float32)


@cache
def network_of(name: str) -> PortableNetwork:
    return PortableNetwork(exported(name))


def assert_leaves_close(network: PortableNetwork, rows: U8, truth: Sequence[torch.Tensor]) -> None:
    for leaf, found in zip(truth, network.state.unpack(rows).values(), strict=True):
        np.testing.assert_allclose(found[0], leaf.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_a_frame_gives_what_the_module_does(name: str, rng: np.random.Generator) -> None:
    network, x = network_of(name), frames(rng)
    truth, final = eager(name, x, 1)
    rows = network.state.initial(1)
    whole = network.sequence(x[:, None], rows)
    assert whole is not None
    for y, after in (step_frames(network, x[:, None], rows), whole):
        np.testing.assert_allclose(y[:, 0], truth, rtol=1e-4, atol=1e-5)
        assert_leaves_close(network, after, final)


@pytest.mark.parametrize("name", STEPS)
def test_bits_are_those_of_the_definition_in_every_batch(name: str, rng: np.random.Generator) -> None:
    network = network_of(name)
    x = rng.standard_normal((6, 50, FEATURES)).astype(np.float32)
    check_bits(network, x * rng.choice([0.1, 1, 3], (50, 1)).astype(np.float32), network.state.initial(50))


@pytest.mark.parametrize("name", STEPS)
def test_the_reference_is_the_module_in_float64(name: str, rng: np.random.Generator) -> None:
    network, x = network_of(name), frames(rng)
    reference = network.reference(np.float64)
    assert reference is not None
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
            np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-7)  # numbers in the form are float32
    for leaf, value in zip(leaves(state), states.values(), strict=True):
        np.testing.assert_allclose(value, leaf.numpy(), rtol=1e-6, atol=1e-7)


def doubled(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.double() if state.is_floating_point() else state
    if isinstance(state, dict):
        return {name: doubled(leaf) for name, leaf in state.items()}
    return type(state)(doubled(leaf) for leaf in state)


def test_its_folder_is_plain_text_and_tensors_and_is_read_back() -> None:
    folder, model = exported_folder("counting"), exported("counting")
    assert sorted(path.name for path in folder.iterdir()) == [
        "graph.json",
        "model.yaml",
        "normal.json",
        "weights.safetensors",
    ]
    fields = yaml.safe_load((folder / "model.yaml").read_text())
    assert fields["kind"] == "module"
    assert [leaf.get("initial", 0) for leaf in fields["state"]] == [7, -1, 0, 0]
    assert [leaf.get("dtype", "float32") for leaf in fields["state"]] == ["int64", "float32", "bool", "float64"]
    graph = json.loads((folder / "graph.json").read_text())
    assert {node["op"].split(".")[0] for node in graph["nodes"]} <= {"aten", "int", "getitem"}
    (scale,) = load_file(folder / "weights.safetensors").values()
    torch.testing.assert_close(scale, step_of("counting").get_buffer("scale"), rtol=0, atol=0)
    form = form_of_values(json.loads((folder / "normal.json").read_text()), "normal.json")
    (x, *leaves) = [(form.buffers[at].dtype, form.buffers[at].size) for at in form.inputs]
    assert x == ("float32", FEATURES)
    assert leaves == [("int64", 1), ("float32", 3), ("bool", 1), ("float64", 1)]
    assert [view.elements for view in form.outputs] == [4, 1, 3, 1, 1]
    assert {buffer.tensor for buffer in form.buffers} >= {"", "scale"}
    assert re.fullmatch(
        r"5 features → step of \d+ operators, "
        r"state count \[\] int64, ring \[3\], loud \[\] bool, total \[\] float64 → 4 outputs",
        model.description.in_words(),
    )


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
        size = torch.fft.rfft(cell.abs().cumsum(dim=1)).abs()[:, 0]  # indices that nothing needs
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
    network = PortableNetwork(load_model(tmp_path / "m"))
    rows, state = network.state.initial(32), begin(32)
    with torch.inference_mode():
        for x in rng.standard_normal((7, 32, 4)).astype(np.float32):
            y, rows = network.step(x, rows)
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
