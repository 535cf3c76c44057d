"""The programs of the pages on models and on the client run as written, and print what the pages show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from instep.models.folder import load_model
from tests.docs.support.page import Page
from tests.docs.support.shell import commands, run
from tests.support.served import WarmServer

pytestmark = pytest.mark.long

PAGE = Page("models.md")
FINGERPRINT = re.compile(r", fingerprint \w+")


def test_models_are_handed_over_as_shown(tmp_path: Path) -> None:
    shown = dict(PAGE.blocks("text"))
    for name, code in PAGE.blocks("python"):
        (tmp_path / name).write_text(code)
        if name != "state.py":
            ran = run(["python", name], tmp_path)
            assert (ran.returncode, ran.stderr if name != "lstm.py" else "") == (0, "")
            assert FINGERPRINT.sub("", ran.stdout) == FINGERPRINT.sub("", shown.get(name, ran.stdout))
    for words in (words for _, block in PAGE.blocks("bash") for words in commands(block)):
        ran = run(words, tmp_path)
        assert ran.returncode == 0, ran.stderr
    assert load_model(tmp_path / "copy").fingerprint == load_model(tmp_path / "talk").fingerprint
    with WarmServer(tmp_path / "talk") as server:
        code = (tmp_path / "state.py").read_text().replace("tcp://127.0.0.1:5757", server.endpoint)
        (tmp_path / "state.py").write_text(code)
        assert run(["python", "state.py"], tmp_path).stdout == shown["state.py"]


def test_clients_run_as_shown(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn; from instep.models import save_model; save_model('small', nn.GRU(3, 4))"
    )
    assert run(["python", "net.py"], tmp_path).returncode == 0
    programs = [*Page("client.md").blocks("python"), ("", dict(Page("migration.md").blocks("python"))["client.py"])]
    with WarmServer(tmp_path / "small") as server:
        for number, (_, code) in enumerate(programs):
            assert "tcp://127.0.0.1:5757" in code
            code = code.replace("tcp://127.0.0.1:5757", server.endpoint).replace("randn(100, 40)", "randn(100, 3)")
            (tmp_path / f"{number}.py").write_text(code)
            ran = run(["python", f"{number}.py"], tmp_path)
            assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
            assert ran.stdout
