"""The page on models: its programs and commands are run, and its tables are held against the code."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from instep.models.folder import load_model
from instep.models.handover.traced_module import activation_of
from instep.models.recurrent.description import (
    ACTIVATIONS,
    DenseLayer,
    GruLayers,
    LstmLayers,
    NormLayer,
    RecurrentLayers,
    RnnLayers,
)
from instep.models.registry import KINDS, build
from tests.docs.support.page import Page
from tests.docs.support.shell import commands, run
from tests.support.served import WarmServer

pytestmark = pytest.mark.heavy

PAGE = Page("models.md")
PROGRAMS = dict(PAGE.blocks("python"))
SHOWN = dict(PAGE.blocks("text"))
COMMANDS = [words for _, block in PAGE.blocks("bash") for words in commands(block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first program has run."""
    path = tmp_path_factory.mktemp("page")
    for name, code in PROGRAMS.items():
        (path / name).write_text(code)
    saved = run(["python", "net.py"], path)
    assert saved.returncode == 0, saved.stderr
    assert saved.stdout.partition(", fingerprint ")[0] == SHOWN["net.py"].partition(", fingerprint ")[0]
    return path


def test_a_module_is_handed_over_as_shown(folder: Path) -> None:
    name = "ears/model.yaml"
    shown = dict(PAGE.blocks("yaml"))[name]
    assert yaml.safe_load((folder / name).read_text()) == yaml.safe_load(shown)
    assert run(["python", "layers.py"], folder).stderr == ""
    assert load_model(folder / "digits").description.in_words() == "40 features → GRU 128 → dense 32 gelu → dense 10"


def test_lstms_and_rnns_are_handed_over_as_shown_and_their_states_have_names(folder: Path) -> None:
    for program, words in (
        ("talk", "40 features → layer norm → LSTM 128 × 2 layers → dense 10"),
        ("steer", "6 features → RNN 32 relu → layer norm → dense 2 tanh"),
    ):
        shutil.rmtree(folder / program, ignore_errors=True)
        made = run(["python", f"{program}.py"], folder)
        assert (made.returncode, made.stderr) == (0, "")
        shown = yaml.safe_load(dict(PAGE.blocks("yaml"))[f"{program}/model.yaml"])
        assert yaml.safe_load((folder / program / "model.yaml").read_text()) == shown
        assert load_model(folder / program).description.in_words() == words
        assert len([line for line in PROGRAMS[f"{program}.py"].splitlines() if line]) < 20
    with WarmServer(folder / "talk") as server:
        code = PROGRAMS["state.py"].replace("tcp://127.0.0.1:5757", server.endpoint)
        (folder / "reads.py").write_text(code)
        assert run(["python", "reads.py"], folder).stdout == SHOWN["state.py"]


def test_the_keys_of_its_table_are_those_of_the_layers() -> None:
    ((_, of_dense), (_, of_norm), *recurrent) = (
        (row[0], row[0].partition("{")[2].rstrip("}") or row[0]) for row in PAGE.table("The folder", "key").rows
    )
    assert of_dense.replace("`", "").split(", ") == list(DenseLayer.model_fields)
    assert of_norm.replace("`", "").replace(": true", "").split(", ") == list(NormLayer.model_fields)
    described: tuple[type[RecurrentLayers], ...] = (GruLayers, LstmLayers, RnnLayers)
    for (text, keys), layers in zip(recurrent, described, strict=True):
        assert text.startswith(f"{layers.NAME.lower()}: {{")
        assert set(keys.split(", ")) == set(layers.model_fields)


def test_its_commands_run_as_written(folder: Path) -> None:
    importing, checking, *_ = COMMANDS
    if not (folder / "talk").exists():
        assert run(["python", "talk.py"], folder).returncode == 0
    imported = run(importing, folder)
    words = "copy: 40 features → layer norm → LSTM 128 × 2 layers → dense 10\n"
    assert (imported.returncode, imported.stdout) == (0, words), imported.stderr
    assert load_model(folder / "copy").fingerprint == load_model(folder / "talk").fingerprint
    said = run(["instep", "model", "import", "talk.pt", "--output", "unnamed"], folder)
    assert (said.returncode, said.stderr) == (2, SHOWN["import"])
    checked = run(checking, folder)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for line, shown in zip(checked.stdout.splitlines(), SHOWN["check"].splitlines(), strict=True):
        assert line[:40] == shown[:40]


def test_a_step_of_your_own_is_exported_and_checked_as_shown(folder: Path) -> None:
    assert len([line for line in PROGRAMS["step.py"].splitlines() if line]) < 20
    exported = run(["python", "step.py"], folder)
    assert exported.stdout.partition(", fingerprint ")[0] == SHOWN["step.py"].partition(", fingerprint ")[0], (
        exported.stderr
    )
    assert sorted(path.name for path in (folder / "own").iterdir()) == [
        "graph.json",
        "model.yaml",
        "normal.json",
        "weights.safetensors",
    ]


def test_its_graph_is_imported_as_written(folder: Path) -> None:
    exported = run(["python", "lstm.py"], folder)
    assert exported.returncode == 0, exported.stderr
    imported = run(COMMANDS[-1], folder)
    words = "lstm: 40 features → step of 26 operators, state h [64], c [64] → 3 outputs\n"
    assert (imported.returncode, imported.stdout) == (0, words), imported.stderr


def test_its_table_of_activations_is_whole() -> None:
    table = PAGE.table("Hand over layers one by one", "activation")
    named = {}
    for row in table.rows:
        for name, module in ((row[0], row[1]), (row[2], row[3])):
            kind = getattr(nn, module.partition(",")[0].strip("`").removeprefix("nn."))
            named[name] = activation_of(kind(dim=-1) if name == "softmax" else kind(), "it")
    assert named == {name: name for name in ACTIVATIONS}


def test_the_pipeline_is_made_as_shown(folder: Path) -> None:
    made = run(["python", "listens.py"], folder)
    assert (made.returncode, made.stderr) == (0, "")
    shown = yaml.safe_load(dict(PAGE.blocks("yaml"))["listens/model.yaml"])
    assert yaml.safe_load((folder / "listens" / "model.yaml").read_text()) == shown
    assert load_model(folder / "listens").description.in_words() == (
        "160 features → context of 352 values → GRU 64 → dense 1 sigmoid"
    )


def test_a_step_with_spectra_and_smoothing_is_exported_as_shown(folder: Path) -> None:
    made = run(["python", "hears.py"], folder)
    assert made.returncode == 0, made.stderr
    network = build(load_model(folder / "hears"), torch.device("cpu"))
    states = network.state.initial(1)
    y = []
    for frame in np.random.default_rng(0).standard_normal((30, 1, 160)).astype(np.float32):
        answers, states = network.step(frame, states)
        y.append(answers[0].tolist())
    assert all(0 < smoothed < 1 and is_on in (0, 1) for smoothed, is_on in y)


def test_its_overview_says_of_every_kind_how_it_is_verified(folder: Path) -> None:
    table = _overview()
    kinds = {kind for row in table for kind in row["kind"].replace("`", "").split(", ")}
    assert kinds == set(KINDS)
    for program, name, kind, network_word in (
        ("net", "ears", "gru", "nn.GRU"),
        ("talk", "talk", "lstm", "nn.LSTM"),
        ("steer", "steer", "rnn", "nn.RNN"),
        ("step", "own", "module", "torch"),
        ("lstm", "lstm", "module", "ONNX"),
        ("listens", "listens", "pipeline", "one of these"),
    ):
        if not (folder / name).exists():
            assert run(["python", f"{program}.py"], folder).returncode == 0
        if not (folder / name).exists():  # the program writes a graph only
            assert run(COMMANDS[-1], folder).returncode == 0
        model = load_model(folder / name)
        assert model.description.kind == kind
        (row,) = (row for row in table if kind in row["kind"] and network_word in row["your network"])
        network = build(model, torch.device("cpu"))
        x = np.zeros((4, 4, model.description.features), np.float32)
        reference = network.reference(np.float64)
        assert reference is not None
        compared = row["what `verify` compares it with"]
        if kind == "pipeline":  # here, around a GRU
            assert compared.startswith("as the network inside")
            continue
        in_torch = "over whole streams; " if kind != "module" else "its graph in torch; "
        assert (in_torch in compared) == (network.sequence(x, network.state.initial(4)) is not None)
        in_float64 = "an independent float64 computation" if reference.independent else "the same graph in float64"
        assert compared.endswith(in_float64)


def _overview() -> list[dict[str, str]]:
    """The first table of the page, which stands before any section."""
    lines = PAGE.text[: PAGE.text.index("\n## ")].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|"))
    return [dict(zip(head, row, strict=True)) for row in rows]
