"""The page on models: its programs and commands are run, and its table of activations is that of the network."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from instep.models.folder import load_model
from instep.models.handover.tracer import activation_of
from instep.models.pipeline.steps import STEPS
from instep.models.recurrent.description import ACTIVATIONS
from instep.models.registry import parse_description
from tests.docs.support.page import Page
from tests.docs.support.shell import commands, run

pytestmark = pytest.mark.heavy

PAGE = Page("models.md")
PROGRAMS = dict(PAGE.blocks("python"))
SHOWN = [text for _, text in PAGE.blocks("text")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first program has run."""
    path = tmp_path_factory.mktemp("page")
    for name, code in PROGRAMS.items():
        (path / name).write_text(code)
    saved = run(["python", "net.py"], path)
    assert saved.returncode == 0, saved.stderr
    assert saved.stdout.partition(", fingerprint ")[0] == SHOWN[0].partition(", fingerprint ")[0]
    return path


def test_a_module_is_handed_over_as_shown(folder: Path) -> None:
    name = "ears/model.yaml"
    shown = dict(PAGE.blocks("yaml"))[name]
    assert yaml.safe_load((folder / name).read_text()) == yaml.safe_load(shown)
    assert run(["python", "layers.py"], folder).stderr == ""
    assert load_model(folder / "digits").description.in_words() == "40 features → GRU 128 → dense 32 gelu → dense 10"


def test_its_commands_run_as_written(folder: Path) -> None:
    (importing,), (checking,) = (commands(block) for _, block in PAGE.blocks("bash"))
    save_file(nn.ModuleDict({"rnn": nn.GRU(4, 5), "fc": nn.Linear(5, 2)}).state_dict(), folder / "net.safetensors")
    imported = run(importing, folder)
    assert (imported.returncode, imported.stdout) == (0, "talk: 4 features → GRU 5 → dense 2 softmax\n"), (
        imported.stderr
    )
    checked = run(checking, folder)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for line, shown in zip(checked.stdout.splitlines(), SHOWN[2].splitlines(), strict=False):
        assert line[:40] == shown[:40]


def test_a_step_of_your_own_is_exported_and_checked_as_shown(folder: Path) -> None:
    assert len([line for line in PROGRAMS["step.py"].splitlines() if line]) < 20
    exported = run(["python", "step.py"], folder)
    assert exported.stdout.partition(", fingerprint ")[0] == SHOWN[3].partition(", fingerprint ")[0], exported.stderr
    assert sorted(path.name for path in (folder / "own").iterdir()) == [
        "graph.json",
        "model.yaml",
        "weights.safetensors",
    ]
    checked = run(["instep", "model", "check", "own", "--against", "step.py:step"], folder)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_an_import_without_options_says_what_is_shown(folder: Path) -> None:
    weights = torch.load(folder / "net.pt", weights_only=True)
    plain = {name: tensor for name, tensor in weights.items() if not name.startswith("encoder.1.")}
    (folder / "plain").mkdir()
    torch.save(plain, folder / "plain" / "net.pt")
    said = run(["instep", "model", "import", "net.pt"], folder / "plain")
    assert (said.returncode, said.stderr) == (2, SHOWN[1])
    shutil.rmtree(folder / "plain")


def test_its_table_of_activations_is_whole() -> None:
    table = PAGE.table("Hand over layers one by one", "activation")
    named = {}
    for row in table.rows:
        for name, module in ((row[0], row[1]), (row[2], row[3])):
            kind = getattr(nn, module.partition(",")[0].strip("`").removeprefix("nn."))
            named[name] = activation_of(kind(dim=-1) if name == "softmax" else kind(), "it")
    assert named == {name: name for name in ACTIVATIONS}


def test_the_pipeline_is_one_and_every_step_is_described() -> None:
    fields = yaml.safe_load(dict(PAGE.blocks("yaml"))["listens/model.yaml"])
    assert parse_description(fields).in_words() == (
        "160 features → context of 352 values → log power spectrum → GRU 64 → dense 1 sigmoid → smooth 0.9"
    )
    rows = [line for line in PAGE.text.splitlines() if line.startswith("| `")]
    assert [name for name in STEPS if any(line.startswith(f"| `{name}: ") for line in rows)] == list(STEPS)
