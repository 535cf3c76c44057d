"""The page on troubleshooting names every code, and the words and options it quotes are the program's."""

from __future__ import annotations

import re
from pathlib import Path

from instep_client.protocol.codes import Code
from tests.docs.support.page import Page

PAGE = Page("troubleshooting.md")
ROOT = Path(__file__).parents[2]
ENGINE, TOOLS = (
    "\n".join(path.read_text() for path in (ROOT / folder).rglob("*.py"))
    for folder in ("engine", "clients/instep_tools")
)


def test_every_code_has_its_cause_and_cure() -> None:
    table = PAGE.table("Codes", "code")
    assert table.column("code") == [code.name for code in Code]
    assert all(table.column("usual cause"))
    assert all(table.column("cure"))


def test_the_words_by_which_it_finds_a_failed_start_are_the_program_s() -> None:
    joined = re.sub(r"\"\s+f?\"", "", ENGINE)  # sentences whose source takes several lines
    for cell in PAGE.table("The server does not start", "the sentence contains").column("the sentence contains"):
        for words in cell.split("` … `"):
            assert words in joined, words


def test_the_options_and_keys_it_names_exist() -> None:
    manual = (ROOT / "configs" / "default.yaml").read_text()
    for key in re.findall(r"`(?:limits|engine|recording|transport)\.(\w+)`", PAGE.text):
        assert f"{key}:" in manual, key
    options = re.findall(r"(--[a-z][a-z-]+)", PAGE.text)
    assert len(options) > 8
    for option in options:
        assert option.strip("-").replace("-", "_") in ENGINE + TOOLS, option
