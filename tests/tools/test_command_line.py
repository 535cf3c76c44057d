from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from instep.program import app
from instep_tools.command_line import FORMER, in_plain_words


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


@pytest.mark.parametrize(
    "typed",
    [
        "--key-file {key} --server-key x ping",
        "ping --server-key=x --key-file {key}",
        "state read mic-7 --key-file={key} --json --server-key x",
    ],
)
def test_keys_are_given_before_or_after_a_command(typed: str, tmp_path: Path) -> None:
    result = run(typed.format(key=tmp_path / "missing.key_secret"))
    assert result.exit_code == 2
    assert "cannot be read" in result.stderr


def test_an_endpoint_may_be_given_before_a_command() -> None:
    before, after = (run(typed) for typed in ("-e tcp://127.0.0.1:1 ping", "ping -e tcp://127.0.0.1:1"))
    assert (before.exit_code, before.stderr) == (2, after.stderr)
    assert "tcp://127.0.0.1:1" in after.stderr


def run(typed: str) -> Result:
    """Run a command whose options set variables, which the runner takes back."""
    kept = dict.fromkeys(("INSTEP_ENDPOINT", "INSTEP_KEY_FILE", "INSTEP_SERVER_KEY"))
    return CliRunner(env=kept).invoke(app, typed.split())


@pytest.mark.parametrize("former", FORMER)
def test_a_former_name_is_answered_with_the_present_one(former: str) -> None:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, former.split())
    assert result.exit_code == 2
    assert f"instep {FORMER[former]}" in result.stderr


def test_a_program_looks_for_json_in_its_own_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["program", "top", "--colour", "--json"])
    with pytest.raises(SystemExit) as end:
        app()
    assert end.value.code == 2
    assert "--colour" in json.loads(capsys.readouterr().out)["error"]


def test_a_shell_completes_commands() -> None:
    asked = {"_INSTEP_COMPLETE": "complete_bash", "COMP_WORDS": "instep ser", "COMP_CWORD": "1"}
    script = Path(sys.executable).parent / "instep"
    result = subprocess.run([script], env={**os.environ, **asked}, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["serve"]


@pytest.mark.parametrize(
    "command",
    [
        "instep doctor --settings",
        "instep recordings info missing --json",
        "instep top --help",
    ],
)
def test_output_that_nobody_reads_ends_a_command_quietly(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        typed = [sys.executable, "-m", *command.split()]
        done = subprocess.run(typed, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
