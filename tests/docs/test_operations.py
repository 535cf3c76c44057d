"""The page on operations and the systemd unit agree with the program: log lines, options, keys, statuses."""

from __future__ import annotations

import configparser
import re
import shlex
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from instep.cli import app
from instep.config import Config
from instep_tools.app import app as client_app
from tests.docs.support.page import Page
from tests.docs.support.shell import commands

ROOT = Path(__file__).parents[2]
PAGE = Page("operations.md")
UNIT = configparser.RawConfigParser(strict=False)
UNIT.optionxform = str  # type: ignore[assignment,method-assign]
UNIT.read(ROOT / "deploy" / "instep.service")


def test_every_line_of_the_log_is_explained_with_its_level() -> None:
    table = PAGE.table("The log", "event")
    explained = {
        (event, level)
        for events, level in zip(table.column("event"), table.column("level"), strict=True)
        for event in events.split(", ")
    }
    logged = {
        (event, level)
        for path in (ROOT / "engine" / "instep").rglob("*.py")
        for level, event in re.findall(
            r"log(?:\([^()]*(?:\([^()]*\))?[^()]*\))?\.(debug|info|warning|error)\(\s*\"([^\"]+)\"", path.read_text()
        )
    }
    assert explained == logged


def test_the_unit_gives_a_drain_the_time_it_may_take() -> None:
    service = UNIT["Service"]
    assert service["KillSignal"] == signal.SIGTERM.name
    assert int(service["TimeoutStopSec"]) > Config().shutdown.drain_timeout_s + 10
    assert int(service["LimitNOFILE"]) > Config().limits.max_connections
    assert service["RestartPreventExitStatus"] == "2"


@pytest.mark.parametrize(
    "words",
    [shlex.split(UNIT["Service"]["ExecStart"])]
    + [words for _, block in PAGE.blocks("bash") for words in commands(block)]
    + [shlex.split(line) for line in re.findall(r"`(instep(?:-client)? [^`]+)`", PAGE.text)],
    ids=" ".join,
)
def test_the_commands_and_options_that_it_names_exist(words: list[str]) -> None:
    words = words[1:] if words[0] == "setsid" else words
    command_line = client_app if Path(words[0]).name == "instep-client" else app
    path = [word for word in words[1:3] if re.fullmatch("[a-z]+", word)]
    help_text = CliRunner(env={"COLUMNS": "200"}).invoke(command_line, [*path, "--help"])
    assert help_text.exit_code == 0, path
    for option in (word for word in words if word.startswith("--")):
        assert option in help_text.stdout


def test_the_statuses_are_those_of_the_promise() -> None:
    promised = Page("behavior.md").text.split("**Exit status of `instep serve`:**")[1].split("* **")[0]
    for status in PAGE.table("Exit statuses", "status").column("status")[:-1]:
        assert re.search(rf"\b{status}\b", promised), status


def test_every_key_that_it_names_exists() -> None:
    keys = Config().model_dump()
    for section, key in re.findall(r"`(\w+)\.(\w+)[`:]", PAGE.text):
        assert section not in keys or key in keys[section], key
