"""The help of every command, as a newcomer sees it: examples that can be typed, in 80 columns."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from instep.program import app


def commands_of(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(what is typed, the command) for each command at and below one."""
    if not hasattr(command, "commands"):
        yield words, command
        return
    for name, each in command.commands.items():
        yield from commands_of((*words, name), each)


COMMANDS = list(commands_of(("instep",), typer.main.get_command(app)))


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_help(words: tuple[str, ...], command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = CliRunner().invoke(app, [*words[1:], "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    examples = [line.strip() for line in shown.output.partition(" Examples:")[2].splitlines() if line.strip()]
    assert examples or words[-1] == "version"
    monkeypatch.chdir(tmp_path)
    for example in examples:
        typed = shlex.split(example.rpartition("| ")[2], comments=True)
        assert typed[: len(words)] == list(words)
        for each in typed[len(words) :]:
            if Path(each).suffix in (".csv", ".parquet", ".instep", ".mcap", ".json", ".safetensors", ".yaml"):
                (tmp_path / each).touch()  # options that demand a file find one
        command.make_context(words[-1], typed[len(words) :])  # parses it and runs nothing
