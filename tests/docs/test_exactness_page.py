"""The page on exactness: its commands are run, and print what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.support.page import Page
from tests.docs.support.shell import commands, run

PAGE = Page("exactness.md")


@pytest.mark.heavy
def test_its_commands_run_and_print_what_is_said(tmp_path: Path) -> None:
    make, info = (words for _, block in PAGE.blocks("bash") for words in commands(block))
    assert run(make, tmp_path).returncode == 0
    (said,) = re.findall(r"The third line says `(.+?)`", PAGE.text)
    assert run(info, tmp_path).stdout.splitlines()[2] == said
