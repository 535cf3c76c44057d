"""The page on exactness: its commands are run, and the words that it explains are those that networks can show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from instep.models.module.network import ModuleNetwork
from instep.models.onnx.network import OnnxNetwork
from instep.models.recurrent.cell import Kernel
from tests.docs.support.page import Page
from tests.docs.support.shell import assert_exists, commands, run

PAGE = Page("exactness.md")


@pytest.mark.heavy
def test_its_commands_run_and_print_what_is_shown(tmp_path: Path) -> None:
    make, info = (words for _, block in PAGE.blocks("bash") for words in commands(block))
    assert run(make, tmp_path).returncode == 0
    printed = run(info, tmp_path).stdout
    ((_, shown),) = PAGE.blocks("text")
    of_this_machine = re.compile(r"(?<=: )(?:fused|addmm|torch), (?:exact|tolerance) in batches of \d+ to \d+$", re.M)
    assert of_this_machine.search(shown)
    assert of_this_machine.sub("", printed) == of_this_machine.sub("", shown)


def test_it_explains_every_word_for_a_step() -> None:
    words = [word for row in PAGE.table("See it on your machine", "step").rows for word in row[0].split("`, `")]
    assert sorted(words) == sorted([*get_args(Kernel), ModuleNetwork.kernel, OnnxNetwork.kernel])


def test_the_options_that_it_names_exist() -> None:
    named = set(re.findall(r"`(?:instep serve )?(--[a-z-]+)", PAGE.prose))
    assert named == {"--json", "--exactness", "--accept-numerics-change", "--verify-live"}
    assert_exists(["instep", "model", "info", "--json"])
    assert_exists(["instep", "serve", "--exactness", "--accept-numerics-change", "--verify-live"])
