"""Model folders, graphs and files of weights that cannot be served, handed to the commands that users type."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

from instep.models.folder import write_model
from instep.program import app
from instep_client import Client
from tests.support.models import SMALL, whole
from tests.support.networks import NETWORKS
from tests.support.threaded import ThreadedServer
from tests.support.traffic import assert_same_bits

FREE_PORTS = ("--endpoint", "tcp://127.0.0.1:*", "--http", "off")
RUNNER = CliRunner(env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
KINDS = {"gru": "gru", "lstm": "lstm", "module": "min_gru", "pipeline": "pipeline"}
Spoil: TypeAlias = Callable[[Path], Any]


def described(**changes: Any) -> Spoil:
    """Other keys in `model.yaml`; `a__b` is the key b within a, and None leaves a key out."""

    def spoil(folder: Path) -> None:
        fields = yaml.safe_load((folder / "model.yaml").read_text())
        for path, value in changes.items():
            *places, key = path.split("__")
            part = fields
            for place in places:
                part = part[place]
            part.pop(key, None)
            if value is not None:
                part[key] = value
        (folder / "model.yaml").write_text(yaml.safe_dump(fields))

    return spoil


def cut(file: str, keep: float) -> Spoil:
    def spoil(folder: Path) -> None:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[: int(keep * len(content))])

    return spoil


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Spoil:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "weights.safetensors")

    return spoil


def graph(change: Callable[[dict[str, Any]], Any], file: str = "graph.json") -> Spoil:
    def spoil(folder: Path) -> None:
        fields = json.loads((folder / file).read_text())
        change(fields)
        (folder / file).write_text(json.dumps(fields))

    return spoil


def form(change: Callable[[dict[str, Any]], Any]) -> Spoil:
    return graph(change, "normal.json")


def no_file(file: str) -> Spoil:
    return lambda folder: (folder / file).unlink()


def leaf(**changes: Any) -> dict[str, Any]:
    return {"name": "state", "shape": [33], "dtype": "float32", **changes}


def saved(content: object) -> Callable[[Path], Any]:
    return lambda path: torch.save(content, path)


FOLDERS: dict[str, tuple[str, Spoil, str]] = {
    "no weights": ("lstm", no_file("weights.safetensors"), "weights.safetensors"),
    "weights of another network": ("lstm", weights(lambda t: t.pop("lstm.bias_ih_l0")), "lstm.bias_ih_l0"),
    "half of the weights": ("module", cut("weights.safetensors", 0.5), "weights.safetensors"),
    "NaN in a step": ("module", weights(lambda t: t["head.bias"].fill_(np.nan)), "head.bias"),
    "an unknown kind": ("gru", described(kind="gruu"), "'gruu'"),
    "a vast layer": ("gru", described(gru__hidden_size=10**12), "[3000000000000, 5]"),
    "a view beyond its buffer": ("module", form(lambda f: f["outputs"][0].__setitem__(1, 10**6)), "of a buffer of"),
    "a leaf of another size": ("module", described(state=[leaf(shape=[10**12])]), "leaf state"),
    "no normal form inside": ("pipeline", described(network__kind="module"), "normal form"),
}
"""By what is wrong: the kind of folder, how it is spoilt, and what the sentence names."""

GRU: dict[str, torch.Tensor] = {f"gru.{name}": tensor for name, tensor in nn.GRU(3, 4).state_dict().items()}
FILES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nan.pt": (saved({name: each * np.nan for name, each in GRU.items()}), "NaN"),
    "sparse.pt": (saved(GRU | {"gru.weight_ih_l0": torch.eye(12, 3).to_sparse()}), "gru.weight_ih_l0"),
    "pickled.pt": (lambda path: path.write_bytes(pickle.dumps({"a": Path()})), "pickled.pt"),
    "folder.onnx": (lambda path: path.mkdir(), "folder.onnx"),
    "zeros.onnx": (lambda path: path.write_bytes(bytes(1000)), "zeros.onnx"),
}
"""By name: how the file comes about, and what the sentence names."""

NET = """
from torch import nn

class Ends(nn.Module):
    def forward(self, x):
        return {"y": x}

ends = Ends()
"""
AGAINST: dict[str, tuple[str, str]] = {
    "gives a dict": ("gru net.py:ends", "net.py:ends returns a dict; return a tensor of outputs"),
    "ends the program": ("gru exit.py:net", "exit.py, line 1: SystemExit: 3; the file is run to find net"),
    "is no Python": ("gru wrong.py:net", "wrong.py: SyntaxError: '(' was never closed"),
    "looks like an emoji": ("gru no.py:x", "there is no file no.py"),
    "is a folder": ("gru here:x", "--against here:x: name a Python file"),
    "is not compared": ("spoilt net.py:ends", "cannot read the weights"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good folder of each kind."""
    path = tmp_path_factory.mktemp("folders")
    for kind, name in KINDS.items():
        write_model(path / kind, NETWORKS[name].model())
    return path


def test_each_is_refused_with_a_sentence_and_a_running_server_notices_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = rng.standard_normal((2 * len(FOLDERS), 5)).astype(np.float32), []
    write_model(tmp_path / "served", SMALL)
    with ThreadedServer(tmp_path / "served") as server, Client(server.endpoint) as client:
        stream = client.open("s")
        for at, (name, (kind, spoil, sentence)) in enumerate(FOLDERS.items()):
            folder = shutil.copytree(folders / kind, tmp_path / name.replace(" ", "-"))
            spoil(folder)
            check_refusal(name, sentence, "serve", "--check", str(folder), *FREE_PORTS, "--set", "log.level=error")
            y.append(stream.step(x[2 * at : 2 * at + 2]))
        for file, (make, sentence) in FILES.items():
            make(Path(file))
            check_refusal(file, sentence, "model", "import", file, "--output", "made")
            assert not Path("made").exists(), file
    assert_same_bits(np.concatenate(y), whole(SMALL, x)[0], "what was served meanwhile")
    assert not Path("ran").exists()


def test_what_a_folder_cannot_be_compared_with(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("exit.py").write_text("raise SystemExit(3)")
    Path("wrong.py").write_text("net = (")
    for kind in ("gru", "module"):
        shutil.copytree(folders / kind, kind)
    shutil.copytree(folders / "lstm", "spoilt")
    Path("spoilt/weights.safetensors").unlink()
    for name, (arguments, sentence) in AGAINST.items():
        folder, against = arguments.split()
        check_refusal(name, sentence, "model", "check", folder, "--against", against)


def check_refusal(name: str, sentence: str, *arguments: str) -> None:
    result = RUNNER.invoke(app, list(arguments))
    assert isinstance(result.exception, SystemExit), (name, result.exception)
    assert (result.exit_code, result.stdout) == (2, ""), (name, result.output)
    [told] = result.stderr.splitlines()
    assert sentence in told, (name, told)
    assert len(told) < 1000, name
