"""The page for those who come from another server: our side of its examples is run, and its names are ours."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from instep.config import Config
from instep.models.folder import make_model, write_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep_client import Client
from instep_client.protocol.codes import Code
from tests.docs.support.page import Page
from tests.docs.support.shell import commands, run
from tests.support.served import WarmServer

PAGE = Page("migration.md")
PROGRAMS = dict(PAGE.blocks("python"))
SERVERS = ("Triton", "OpenVINO Model Server", "TorchServe")


@pytest.mark.heavy
def test_its_client_runs_as_written(tmp_path: Path) -> None:
    model = make_model(GruDescription(features=40, gru=GruLayers(hidden_size=4)), "random", name="ears")
    write_model(tmp_path / "ears", model)
    with WarmServer(tmp_path / "ears") as server:
        code = PROGRAMS["client.py"]
        assert "tcp://127.0.0.1:5757" in code
        (tmp_path / "client.py").write_text(code.replace("tcp://127.0.0.1:5757", server.endpoint))
        result = run(["python", "client.py"], tmp_path)
    assert (result.stdout, result.stderr) == (dict(PAGE.blocks("text"))["client.py"], "")
    ast.parse(PROGRAMS["triton.py"])


class _Sum(nn.Module):
    """As a graph for implicit state: it begins anew where START is set, and keeps a row that is not ready."""

    def forward(
        self, x: torch.Tensor, start: torch.Tensor, ready: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total = torch.where(start > 0, x, state + x)
        new_state = torch.where(ready > 0, total, state)
        return 2 * new_state, new_state


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_with_control_inputs_is_imported_as_written_and_sums_each_stream(tmp_path: Path) -> None:
    names = ["INPUT", "START", "READY", "INPUT_STATE", "OUTPUT", "OUTPUT_STATE"]
    torch.onnx.export(
        _Sum(),
        (torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 3)),
        str(tmp_path / "model.onnx"),
        input_names=names[:4],
        output_names=names[4:],
        dynamic_axes={name: {0: "rows"} for name in names},
        dynamo=False,
    )
    (importing,) = (words for _, block in PAGE.blocks("bash") for words in commands(block))
    imported = run(importing, tmp_path)
    assert imported.returncode == 0, imported.stderr
    with WarmServer(tmp_path / "model") as server, Client(server.endpoint) as client:
        one, other = client.open("one"), client.open("other")
        assert [one.step([k, 0, 1]).tolist() for k in (1, 2, 3)] == [[2, 0, 2], [6, 0, 4], [12, 0, 6]]
        assert other.step([1, 1, 1]).tolist() == [2, 2, 2]


def test_the_settings_and_codes_that_it_names_exist() -> None:
    settings = re.findall(r"`(engine|limits)\.(\w+)`", PAGE.text)
    assert len(settings) > 5
    for section, key in settings:
        assert hasattr(getattr(Config(), section), key)
    ours = [cell for server in SERVERS for row in PAGE.tables(server)[0].rows for cell in row[1:]]
    codes = [word for cell in ours for word in re.findall(r"\b[A-Z]+_[A-Z_]+\b", cell)]
    assert codes
    assert set(codes) <= {code.name for code in Code}


def test_the_defaults_that_it_gives_are_ours() -> None:
    limits, engine = Config().limits, Config().engine
    assert (limits.max_idle_s, engine.max_streams, limits.window_frames) == (3600, 4096, 32)
    for given in ("`limits.max_idle_s` (an hour)", "`engine.max_streams` (4,096)", "`limits.window_frames` (32)"):
        assert given in PAGE.text
