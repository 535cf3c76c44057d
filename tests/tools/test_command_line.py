from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from instep_tools.app import app
from instep_tools.command_line import in_plain_words


class Checked(ValueError):
    """As pydantic's ValidationError, with which newer versions of typer check."""

    def __init__(self, kind: str, value: Any, **limits: Any) -> None:
        super().__init__()
        self.found = {"type": kind, "input": value, "ctx": limits, "msg": "Input should be something else"}

    def errors(self) -> list[dict[str, Any]]:
        return [self.found]


@pytest.mark.parametrize("cause", [Checked("greater_than_equal", 0, ge=1), Checked("another", 9), None])
def test_plain_words(cause: Exception | None) -> None:
    error = typer.BadParameter("Value error, 'x' is not one of 'a'.")
    error.__cause__ = cause
    said = in_plain_words(error)
    assert "Input should" not in said
    assert "Value error" not in said


@pytest.mark.parametrize("typed", ["servee", "top --colour", "top --every 0"])
def test_with_json_what_cannot_be_run_is_the_result_too(typed: str) -> None:
    in_words = CliRunner().invoke(app, typed.split())
    in_json = CliRunner().invoke(app, [*typed.split(), "--json"])
    assert (in_words.exit_code, in_words.stdout, in_json.exit_code) == (2, "", 2)
    assert json.loads(in_json.stdout)["error"]
    assert in_json.stderr == in_words.stderr


def test_a_command_does_not_take_what_goes_before_it() -> None:
    typed = CliRunner().invoke(app, ["state", "read", "mic-7", "--key-file=x", "--json"])
    assert (typed.exit_code, "--key-file" in json.loads(typed.stdout)["error"]) == (2, True)
    helped = CliRunner().invoke(app, ["ping", "--help"])
    assert "key" not in helped.stdout


def test_a_program_looks_for_json_in_its_own_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "top", "--colour", "--json"])
    with pytest.raises(SystemExit) as end:
        app()
    assert end.value.code == 2
    assert "--colour" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("program", "begun", "completed"), [("instep", "ser", "serve"), ("instep-client", "prod", "produce")]
)
def test_a_shell_completes_commands(program: str, begun: str, completed: str) -> None:
    asked = {
        f"_{program.upper().replace('-', '_')}_COMPLETE": "complete_bash",
        "COMP_WORDS": f"{program} {begun}",
        "COMP_CWORD": "1",
    }
    script = Path(sys.executable).parent / program
    result = subprocess.run([script], env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [completed]


@pytest.mark.parametrize(
    "command",
    [
        "instep config",
        "instep recordings info missing --json",
        "instep_tools produce --help",
    ],
)
def test_output_that_nobody_reads_ends_a_command_quietly(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        typed = [sys.executable, "-m", *command.split()]
        done = subprocess.run(typed, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
