"""Folders of step modules from strangers: nothing in them runs, and what is wrong with them is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.registry import build, torch_network
from instep.program import app
from tests.support.running import CPU
from tests.support.steps import FEATURES, exported, exported_folder

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(exported_folder("min_gru"), tmp_path / "m"))


def changed(folder: Path, change: Change) -> None:
    graph = json.loads((folder / "graph.json").read_text())
    change(graph)
    (folder / "graph.json").write_text(json.dumps(graph))


def call(op: str, *args: Any, **kwargs: Any) -> Change:
    """Puts a call in front of the others."""
    node = {"name": "new", "op": op, "args": list(args), "kwargs": kwargs}
    return lambda graph: graph["nodes"].insert(0, node)


CODE = "a=__import__('pathlib').Path('ran').touch(), b"
X: Any = {"x": True}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (call("os.system", "touch ran"), "'os.system'"),
        (call("builtins.eval", CODE), "'builtins.eval'"),
        (call("aten.add.__init__", X, X), "'aten.add.__init__'"),
        (call("aten.add.out", X, X, out=X), "'aten.add.out'"),
        (call("aten.add.Tensor", X, X, **{CODE: 1}), "arguments"),
        (call("int.add", 1, 2, **{CODE: 1}), "arguments"),
        (lambda graph: graph["nodes"].append(graph["nodes"][0]), "two nodes called 'linear'"),
        (call("aten.reshape.default", X, [32, 5]), "an operator of the step fails"),
        (lambda graph: graph.update(y=X), r"\(2, 5\).* where the description says .*\(2, 4\)"),
        (lambda graph: graph.pop("tensors"), "graph.tensors"),
        (lambda graph: graph["tensors"][0].update(dtype="int64"), "float32.*int64"),
    ],
)
def test_a_graph_that_is_refused(folder: Path, change: Change, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serving needs no graph; comparing what was served with it does."""
    monkeypatch.chdir(folder)
    changed(folder, change)
    with pytest.raises(ModelError, match=named) as refused:
        torch_network(load_model(folder), CPU)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 3000
    assert not (folder / "ran").exists()


def test_a_step_without_a_graph_is_served_and_has_no_module_of_torch(folder: Path, rng: np.random.Generator) -> None:
    original, x = build(load_model(folder), CPU), rng.standard_normal((3, FEATURES)).astype(np.float32)
    (folder / "graph.json").unlink()
    description = yaml.safe_load((folder / "model.yaml").read_text())
    assert (description["form"], description.pop("graph")) == ("normal.json", "graph.json")
    (folder / "model.yaml").write_text(yaml.safe_dump(description))
    flat = {name: each.flatten() for name, each in load_file(folder / "weights.safetensors").items()}
    save_file(flat, folder / "weights.safetensors")
    network, rows = build(load_model(folder), CPU), original.state.initial(3)
    y, after = network.step(x, rows)
    assert (y.tobytes(), after.tobytes()) == tuple(each.tobytes() for each in original.step(x, rows))
    assert network.sequence(x[None], rows) is None
    assert network.fingerprint != original.fingerprint
    reference = network.reference(np.float64)
    assert reference is not None
    assert not reference.independent
    state = {name: leaf.astype(np.float64) for name, leaf in network.state.unpack(rows).items()}
    np.testing.assert_allclose(reference.run(x[None].astype(np.float64), state, np.array([3]))[0][0], y, rtol=1e-5)


def written(folder: Path, change: Change) -> None:
    """Put a changed normal form into a folder."""
    form = json.loads((folder / "normal.json").read_text())
    change(form)
    (folder / "normal.json").write_text(json.dumps(form))


def sizes_of(form: dict[str, Any]) -> dict[str, int]:
    return {name: at for at, (_, _, *tensor) in enumerate(form["buffers"]) for name in tensor}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda form: form.update(arithmetic="portable-0"),
            "form: .*its arithmetic is 'portable-0' and not '",
        ),
        (lambda form: form.update(nodes=[{"op": "os.system"}]), "form: "),
        (
            lambda form: form.update(inputs=form["inputs"][:1]),
            "takes other frames or leaves",
        ),
        (
            lambda form: form.update(inputs=[10**6]),
            "takes other frames or leaves",
        ),
        (
            lambda form: form["buffers"][sizes_of(form)["head.bias"]].__setitem__(2, "other"),
            "lacks .* asks for: tensor other",
        ),
        (lambda form: form["nodes"].pop(0), "normal form"),
        (lambda form: form["outputs"].reverse(), "new state"),
    ],
)
def test_a_normal_form_that_is_refused(folder: Path, change: Change, sentence: str) -> None:
    written(folder, change)
    with pytest.raises(ModelError, match=sentence) as refused:
        build(load_model(folder), CPU)
    assert "\n" not in str(refused.value)


def test_names_in_a_graph_are_never_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.chdir(folder)
    renamed = (folder / "graph.json").read_text().replace('"linear"', json.dumps(f"x); {CODE} = 1 #"))
    (folder / "graph.json").write_text(renamed.replace('"gate.weight"', json.dumps(CODE)))
    form = (folder / "normal.json").read_text().replace('"gate.weight"', json.dumps(CODE))
    (folder / "normal.json").write_text(form)
    tensors = load_file("weights.safetensors")
    save_file(
        {CODE if name == "gate.weight" else name: tensor for name, tensor in tensors.items()}, "weights.safetensors"
    )
    network, original = (build(model, CPU) for model in (load_model(folder), exported("min_gru")))
    x, rows = rng.standard_normal((2, 4, FEATURES)).astype(np.float32), original.state.initial(4)
    for found, expected in (
        (network.step(x[0], rows), original.step(x[0], rows)),
        (network.sequence(x, rows), original.sequence(x, rows)),
    ):
        assert found is not None
        assert expected is not None
        assert [each.tobytes() for each in found] == [each.tobytes() for each in expected]
    assert not Path("ran").exists()


RESIDUAL = """
import torch
from torch import nn
from instep.models import export_step


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.GRU(5, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        y, _ = self.one(x)
        return y + self.two(y)[0]


class Step(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, state):
        y, one = self.net.one(x.unsqueeze(1), state["one"].unsqueeze(0))
        z, two = self.net.two(y, state["two"].unsqueeze(0))
        return (y + z).squeeze(1), {"one": one[0], "two": two[0]}


torch.manual_seed(1)
net = Residual()
state = {"one": torch.zeros(1, 8), "two": torch.zeros(1, 8)}
if __name__ == "__main__":
    export_step(Step(net), torch.zeros(1, 5), state, "right")
"""


def test_a_step_is_checked_against_the_network_over_sequences_that_it_was_written_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("residual.py").write_text(RESIDUAL)
    exec(RESIDUAL, {"__name__": "__main__"})
    weights = load_file(shutil.copytree("right", "wrong") / Path("weights.safetensors"))
    save_file({name: each * 0.999 for name, each in weights.items()}, "wrong/weights.safetensors")
    runner = CliRunner(env={"COLUMNS": "80"})

    def checked(folder: str, against: str) -> Any:
        return runner.invoke(app, ["model", "check", folder, "--against", f"residual.py:{against}", "--json"])

    right, wrong = checked("right", "net"), checked("wrong", "net")
    assert (right.exit_code, wrong.exit_code) == (0, 1), right.output
    assert json.loads(right.stdout)["error"] <= json.loads(right.stdout)["tolerance"] < 1e-4
    assert json.loads(wrong.stdout)["error"] > 1e-4
    refused = checked("right", "Residual")
    assert (refused.exit_code, "residual.py:Residual is <class" in refused.stderr) == (2, True)


def test_check_shows_the_leaves_and_tensors() -> None:
    found = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["model", "check", str(exported_folder("counting"))])
    lines = found.stdout.splitlines()
    assert re.match(r"counting: 5 features → step of \d+ operators, state count \[\] int64, ring \[3\]", lines[0])
    assert lines[1].startswith("3 weights; fingerprint "), "a buffer"
    assert lines[-1] == "  scale [3]"
    shown = CliRunner().invoke(app, ["model", "check", str(exported_folder("counting")), "--json"])
    assert json.loads(shown.stdout)["description"]["state"][0] == {
        "name": "count",
        "shape": [],
        "dtype": "int64",
        "initial": 7.0,
    }
