"""Folders of step modules from strangers: nothing in them runs, and what is wrong with them is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from instep.cli import app
from instep.models.base import Leaf, StateSpec, state_in_words
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.registry import build
from tests.support.running import CPU
from tests.support.steps import STEPS, exported, exported_folder

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


def calls(*nodes: tuple[str, list[Any], dict[str, Any]]) -> Change:
    """Puts calls named `new0`, `new1`, … in front of the others."""
    added = [{"name": f"new{at}", "op": op, "args": args, "kwargs": kw} for at, (op, args, kw) in enumerate(nodes)]
    return lambda graph: graph["nodes"].__setitem__(slice(0, 0), added)


CODE = "a=__import__('pathlib').Path('ran').touch(), b"
X: Any = {"x": True}
WEIGHT: Any = {"tensor": "head.bias"}
GROWS: tuple[str, list[Any], dict[str, Any]] = ("aten.add_.Scalar", [{"node": "new0"}, 1], {})


def nested(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (call("os.system", "touch ran"), "the graph calls 'os.system', which no step may"),
        (call("builtins.eval", CODE), "the graph calls 'builtins.eval'"),
        (call("aten.from_file.default", "ran", True, 4), "the graph calls 'aten.from_file.default'"),
        (call("aten.__class__.__init__", X), "the graph calls 'aten.__class__.__init__'"),
        (call("aten.add.__init__", X, X), "the graph calls 'aten.add.__init__'"),
        (call("aten.randn_like.default", X), "the graph calls 'aten.randn_like.default'"),
        (call("aten.nonzero.default", X), "the graph calls 'aten.nonzero.default'"),
        (call("aten.add.out", X, X, out=X), "the graph calls 'aten.add.out'"),
        (call("aten.masked_scatter.default", X, X, X), "the graph calls 'aten.masked_scatter.default'"),
        (call("aten.empty.memory_format", [4]), "the graph calls 'aten.empty.memory_format'"),
        (call("aten.batch_norm.default", X, None, None, None, None, True, 0.1, 1e-5, False), "as in training"),
        (call("aten.add.Tensor", X, X, **{CODE: 1}), "with arguments that it does not have"),
        (call("int.add", 1, 2, **{CODE: 1}), "with arguments that it does not have"),
        (call("aten.mul_.Tensor", {"state": "state"}, 2), "changes the leaf state of the state in place"),
        (call("aten.fill_.Scalar", {"tensor": "head.bias"}, 2), "changes the tensor head.bias in place"),
        (call("aten.abs.default", {"node": "linear"}), "the argument {'node': 'linear'}, which means nothing"),
        (call("aten.abs.default", {"dtype": "float8"}), "which means nothing"),
        (call("aten.abs.default", {"x": True, "state": "state"}), "which means nothing"),
        (lambda graph: graph["nodes"].append(graph["nodes"][0]), "two nodes called 'linear'"),
        (lambda graph: graph["nodes"].__delitem__(0), "the argument {'node': 'linear'}, which means nothing"),
        (call("aten.batch_norm.default", X, None, None, None, None, 1, 0.1, 1e-5, False), "as in training"),
        (
            calls(("aten.view.dtype", [], {"dtype": {"dtype": "float32"}, "self": WEIGHT}), GROWS),
            "changes its weights, its frames or its state in place",
        ),
        (
            calls(("aten.einsum.default", ["i->i", [WEIGHT]], {}), GROWS),
            "changes its weights, its frames or its state in place",
        ),
        (call("aten.reshape.default", X, [32, 5]), "does not run in a batch of 96 rows"),
        (call("int.mul", "text", 3), r"does not run .*arithmetic is for sizes only"),
        (
            calls(*[("int.mul", [{"node": f"new{at - 1}"} if at else {"rows": True}] * 2, {}) for at in range(40)]),
            r"does not run .*arithmetic is for sizes only",
        ),
        (lambda graph: graph.update(outputs=10**15), "does not run"),
        (call("aten.abs.default", nested(400)), "graph.nodes.0.args.0"),
        (lambda graph: graph.update(nodes=[{"name": ""}] * 1000), "and 2,988 more"),
        (call("aten.view.default", X, [3]), "does not run"),
        (lambda graph: graph.update(y=X), r"does not run .*\(it gives torch.float32 \[32, 5\] where the description"),
        (lambda graph: graph.update(outputs=0), "graph.outputs: 0 is wrong, it should be greater than"),
        (lambda graph: graph.update(version=2), "graph.version: there is no such key"),
        (lambda graph: graph.pop("tensors"), "graph.tensors: it is missing"),
        (lambda graph: graph.update(new_state={"h": X}), "the state has the leaves state, and the graph gives h"),
        (lambda graph: graph["tensors"][0].update(shape=[3]), r"has shape \[33, 5\], .* asks for \[3\]"),
        (lambda graph: graph["tensors"][0].update(dtype="int64"), "is float32; convert the weights to int64"),
    ],
)
def test_a_graph_that_is_refused(folder: Path, change: Change, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    changed(folder, change)
    with pytest.raises(ModelError, match=sentence) as refused:
        build(load_model(folder), CPU)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 3000
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "graph.json is not JSON"),
        ("[" * 100_000, "graph.json is not JSON"),
        ("[]", "graph: "),
        (" " * 2**23 + "[]", "graph.json has 8,388,610 bytes, and at most 8,388,608 can be served"),
        (None, "cannot read the graph"),
    ],
    ids=["open", "nested", "list", "large", "missing"],
)
def test_a_file_that_is_no_graph(folder: Path, text: str | None, sentence: str) -> None:
    (folder / "graph.json").unlink()
    if text is not None:
        (folder / "graph.json").write_text(text)
    with pytest.raises(ModelError, match=sentence):
        load_model(folder)


def test_names_in_a_graph_are_never_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    renamed = (folder / "graph.json").read_text().replace('"linear"', json.dumps(f"x); {CODE} = 1 #"))
    renamed = renamed.replace('"gate.weight"', json.dumps(CODE))
    (folder / "graph.json").write_text(renamed)
    tensors = load_file("weights.safetensors")
    save_file(
        {CODE if name == "gate.weight" else name: tensor for name, tensor in tensors.items()}, "weights.safetensors"
    )
    step = build(load_model(folder), CPU).bind(32)
    step.run()
    assert not Path("ran").exists()
    original = build(exported("min_gru"), CPU).bind(32)
    original.run()
    torch.testing.assert_close(step.y, original.y, rtol=0, atol=0)


STEP_FILE = """
import torch
from tests.support.steps import FEATURES, STEPS, step_of

globals().update({name: step_of(name) for name in STEPS})
other = STEPS["counting"][0]()
other.scale += 1
"""


@pytest.mark.parametrize("name", STEPS)
def test_a_folder_is_checked_against_the_step_that_it_was_exported_from(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("steps.py").write_text(STEP_FILE)
    runner, folder = CliRunner(env={"COLUMNS": "80"}), str(exported_folder(name))
    found = runner.invoke(app, ["model", "check", folder, "--against", f"steps.py:{name}"])
    assert found.exit_code == 0, found.output
    assert "served frame by frame" in found.stdout
    assert "whole sequences" not in found.stdout
    shown = json.loads(runner.invoke(app, ["model", "check", folder, "--against", f"steps.py:{name}", "--json"]).stdout)
    assert shown["whole"] is None
    assert shown["stepped"]["error"] <= shown["tolerance"] < 1e-3


def test_a_check_against_another_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("steps.py").write_text(STEP_FILE)
    runner, folder = CliRunner(env={"COLUMNS": "80"}), str(exported_folder("counting"))
    assert runner.invoke(app, ["model", "check", folder, "--against", "steps.py:other"]).exit_code == 1
    for name, sentence in (
        ("layer_norm_gru", "fails on frames [32, 5] and a state with the leaves count, ring, loud, total"),
        ("layer", "has no layer"),
    ):
        found = runner.invoke(app, ["model", "check", folder, "--against", f"steps.py:{name}"])
        assert found.exit_code == 2
        assert sentence in " ".join(found.stderr.split())


@pytest.mark.parametrize(
    ("names", "words"), [(["state"], "state [4]"), (["h"], "state h [4]"), (["state", "h"], "state state [4], h [4]")]
)
def test_a_state_of_one_leaf_called_state_is_named_once(names: list[str], words: str) -> None:
    assert state_in_words(StateSpec(tuple(Leaf(name, (4,), np.dtype(np.float32)) for name in names))) == words


def test_info_shows_the_leaves_and_tensors() -> None:
    found = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["model", "info", str(exported_folder("counting"))])
    lines = found.stdout.splitlines()
    assert lines[0].startswith("counting: 5 features → step of 21 operators, state count [] int64, ring [3]")
    assert lines[1].startswith("3 weights; fingerprint "), "a buffer"
    assert lines[-1] == "  scale [3]"
    shown = CliRunner().invoke(app, ["model", "info", str(exported_folder("counting")), "--json"])
    assert json.loads(shown.stdout)["description"]["state"][0] == {
        "name": "count",
        "shape": [],
        "dtype": "int64",
        "initial": 7.0,
    }


def test_a_graph_from_a_newer_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.models.module.operators.ALLOWED", frozenset(["of_the_future"]))
    changed(folder, call("aten.of_the_future.default", X))
    with pytest.raises(ModelError, match=r"calls aten.of_the_future.default, which torch .* lacks; install a newer"):
        build(load_model(folder), CPU)
