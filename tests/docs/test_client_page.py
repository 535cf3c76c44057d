"""What the page on the Python client shows is run here, against one server."""

from __future__ import annotations

import ast
import builtins
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import instep_client
from instep.models.folder import make_model, write_model
from instep.models.recurrent.description import GruDescription, GruLayers
from instep_client import AsyncClient, AsyncGroup, AsyncStream, Client
from tests.docs.support.page import Page
from tests.support.served import WarmServer
from tests.support.warm import run_program

pytestmark = pytest.mark.heavy

PAGE = Page("client.md")
PRINTED = [
    "mic-7 51 True 50\n",
    "64 64 (10, 64) [11 12]\n",
    "1000\n",
    "NOT_FINITE [(1, 1)]\n1 1\n",
    "5 True\n",
    f"{[100] * 8}\n",
]
"""By the code blocks in order."""

WARNINGS_ARE_ERRORS = "import warnings\nwarnings.simplefilter('error')\n"


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("model") / "small"
    write_model(folder, make_model(GruDescription(features=3, gru=GruLayers(hidden_size=4)), "random", name="small"))
    with WarmServer(folder) as server:
        yield server.endpoint


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_its_code_runs_and_prints_what_it_should(endpoint: str, tmp_path: Path, number: int) -> None:
    blocks = PAGE.blocks("python")
    assert len(blocks) == len(PRINTED)
    code = blocks[number][1]
    assert "tcp://127.0.0.1:5757" in code
    script = tmp_path / "script.py"
    script.write_text(WARNINGS_ARE_ERRORS + code.replace("tcp://127.0.0.1:5757", endpoint))
    result = run_program(str(script), tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, PRINTED[number], "")


def test_its_commands_run_as_written(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((_, text),) = PAGE.blocks("bash")
    commands = [shlex.split(line, comments=True) for line in text.splitlines()]
    assert [command[:3] for command in commands] == [
        ["instep-client", "state", verb] for verb in ("read", "snapshot", "restore", "fork", "reset")
    ]
    monkeypatch.setenv("INSTEP_ENDPOINT", endpoint)
    with Client(endpoint) as client:
        client.open("mic-7").step(np.ones((5, 3)))
        for command in commands:
            result = run_program("instep_tools", tmp_path, *command[1:])
            assert (result.returncode, result.stderr) == (0, "")
        for name in ("mic-7", "mic-7-again", "mic-7-copy"):  # the streams that were made or taken are there
            stream = client.resume(name, take_over=True)
            assert stream.next_seq == 5
            stream.close()


def test_it_names_every_error_and_nothing_that_is_not_there() -> None:
    errors = {name for name in instep_client.__all__ if isinstance(getattr(instep_client, name), type)}
    errors = {name for name in errors if issubclass(getattr(instep_client, name), instep_client.InstepError)}
    named = set(re.findall(r"`([A-Z]\w+)`", PAGE.prose))
    assert named >= errors
    assert all(hasattr(instep_client, name) or hasattr(builtins, name) for name in named)


def test_the_methods_it_calls_are_in_both_clients() -> None:
    calls = [node for _, code in PAGE.blocks("python") for node in ast.walk(ast.parse(code))]
    used = {node.attr for node in calls if isinstance(node, ast.Attribute)}
    for name in ("open", "open_group", "restore"):
        assert name in used
        assert hasattr(AsyncClient, name)
        assert hasattr(Client, name)
    for name in ("step", "close", "send", "finish", "read_state", "reset", "fork", "snapshot"):
        assert f"`{name}" in PAGE.text or name in used
        assert hasattr(AsyncStream, name)
        assert hasattr(AsyncGroup, name) or name in ("send", "finish", "snapshot")
