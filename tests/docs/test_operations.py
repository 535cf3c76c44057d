"""The page on operations agrees with the program: log lines, commands and options, keys, statuses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from instep.config import Config
from instep_tools.top.view import KEYS
from tests.docs.support.page import Page
from tests.docs.support.shell import assert_exists, commands

ROOT = Path(__file__).parents[2]
PAGE = Page("operations.md")


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


@pytest.mark.parametrize(
    "words",
    [words for _, block in PAGE.blocks("bash") for words in commands(block) if "docker" not in words]
    + [shlex.split(line) for line in re.findall(r"`(instep(?:-client)? [^`]+)`", PAGE.text)],
    ids=" ".join,
)
def test_the_commands_and_options_that_it_names_exist(words: list[str]) -> None:
    assert_exists(words[1:] if words[0] == "setsid" else words)


def test_the_keys_of_top_are_those_that_it_has() -> None:
    assert PAGE.table("Watch it", "key").column("key") == [key for key, _ in KEYS]
    (shown,) = [block for _, block in PAGE.blocks("text") if block.startswith("instep top")]
    assert len(shown.splitlines()) == 24
    assert max(map(len, shown.splitlines())) <= 80


def test_the_statuses_are_those_of_the_promise() -> None:
    promised = Page("behavior.md").text.split("**Exit status of `instep serve`:**")[1].split("* **")[0]
    for status in PAGE.table("Exit statuses", "status").column("status")[:-1]:
        assert re.search(rf"\b{status}\b", promised), status


def test_every_key_that_it_names_exists() -> None:
    keys = Config().model_dump()
    for section, key in re.findall(r"`(\w+)\.(\w+)[`:]", PAGE.text):
        assert section not in keys or key in keys[section], key
