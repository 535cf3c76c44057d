from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from instep_tools.app import app
from instep_tools.command_line import CommandLine, in_plain_words


class Checked(ValueError):
    """As pydantic's ValidationError, with which newer versions of typer check."""

    def __init__(self, kind: str, value: Any, **limits: Any) -> None:
        super().__init__()
        self.found = {"type": kind, "input": value, "ctx": limits, "msg": "Input should be something else"}

    def errors(self) -> list[dict[str, Any]]:
        return [self.found]


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Checked("int_parsing", "x"), "'x' is not a whole number"),
        (Checked("greater_than_equal", 0, ge=1), "it must be at least 1, not 0"),
        (Checked("another", 9), "'x' is not one of 'a'."),
        (None, "'x' is not one of 'a'."),
    ],
)
def test_plain_words(cause: Exception | None, words: str) -> None:
    error = typer.BadParameter("Value error, 'x' is not one of 'a'.")
    error.__cause__ = cause
    assert in_plain_words(error) == words


def test_help_shows_examples_as_typed_and_flags_without_a_value() -> None:
    app = CommandLine(help="What it is for.")

    @app.command("send", examples=["send frames.csv --fast  # all at once", "send frames.csv"])
    def send(file: str, fast: Annotated[bool, typer.Option("--fast")] = False) -> None:
        """Send frames."""

    @app.command("look")
    def look() -> None:
        """Look."""

    shown = CliRunner().invoke(app, ["send", "--help"]).output
    assert "bool" not in shown
    assert shown.endswith("\n Examples:\n\n   send frames.csv --fast  # all at once\n   send frames.csv\n\n")
    root = CliRunner().invoke(app, ["--help"]).output
    assert "bool" not in root
    assert "Examples" not in CliRunner().invoke(app, ["look", "--help"]).output


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        ("--colour", "No such option: --colour"),
        ("servee", "No such command 'servee'."),
        ("top --colour", "No such option: --colour"),
        ("top --every", "Option '--every' requires an argument."),
        ("top --every 0", "Invalid value for '--every': it must be at least 0.1"),
        ("top --every soon", "Invalid value for '--every': 'soon' is not a number"),
        ("top one two", "Got unexpected extra argument"),
    ],
)
def test_with_json_what_cannot_be_run_is_the_result_too(typed: str, sentence: str) -> None:
    in_words = CliRunner().invoke(app, typed.split())
    assert (in_words.exit_code, in_words.stdout) == (2, "")
    in_json = CliRunner().invoke(app, ["top", "--json", *typed.split()[1:]] if " " in typed else [typed, "--json"])
    assert in_json.exit_code == 2
    assert json.loads(in_json.stdout)["error"].startswith(sentence)
    assert in_json.stderr == in_words.stderr


def test_a_program_looks_for_json_in_its_own_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for flag in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", ["program", "top", "--colour", *flag])
        with pytest.raises(SystemExit) as end:
            app()
        assert end.value.code == 2
        said.append(capsys.readouterr().out)
    assert said == ["", '{"error": "No such option: --colour"}\n']


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


ASKED = "import asyncio; from instep_tools.running import *; from instep_tools.command_line import CommandLine\n"
RESULT = "async def run(terminal, stop): terminal.result({'a': 1}); return 0\n"
COMMAND = "app = CommandLine(help='x')\n@app.command()\ndef a(): run_command(run, Terminal(True))\n"


@pytest.mark.parametrize(
    "command",
    [
        ("-m", "instep", "--help"),
        ("-m", "instep", "config"),
        ("-m", "instep_tools", "produce", "--help"),
        ("-c", f"{ASKED}{RESULT}{COMMAND}@app.command()\ndef b(): pass\napp(['a'])"),
    ],
)
def test_output_that_nobody_reads_ends_a_command_quietly(command: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, *command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
