"""Every page: its links lead somewhere, and the files, commands, options and functions that it names exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from instep.config import Config
from tests.docs.support.page import Page
from tests.docs.support.shell import assert_exists, commands

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/*.md")]
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.M | re.S)
TYPED = {
    shlex.join(words)
    for text in TEXTS.values()
    for language, block in BLOCK.findall(text)
    if language in ("bash", "sh")
    for words in commands(block)
    if words[0] == "instep"
}


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere_and_named_files_exist(page: str) -> None:
    text = TEXTS[page]
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", text):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), f"{target}#{anchor}"
    for named in re.findall(r"`((?:tests|docs|configs|engine|clients|deploy|examples)/[\w/.-]+)`", text):
        assert (ROOT / named).exists(), named


@pytest.mark.parametrize("command", sorted(TYPED))
def test_the_commands_and_options_to_type_exist(command: str) -> None:
    assert_exists(shlex.split(command))


@pytest.mark.parametrize("page", TEXTS)
def test_programs_are_python(page: str) -> None:
    for language, block in BLOCK.findall(TEXTS[page]):
        if language == "python":
            ast.parse(block)


def test_the_functions_on_the_road_of_a_frame_and_the_seams_are_in_their_files() -> None:
    page = Page("architecture.md")
    hops, seams = page.table("A frame's life", "hop"), page.table("Seams", "seam")
    named = [*zip(hops.column("function"), hops.column("file"), strict=True)]
    named += zip(seams.column("seam"), seams.column("file"), strict=True)
    for name, file in named:
        text = (ROOT / "engine" / "instep" / file).read_text()
        assert re.search(rf"(def|class) {name.rpartition('.')[2]}\b| as {name}\b", text), (name, file)


@pytest.mark.parametrize("page", TEXTS)
def test_the_settings_that_it_names_exist(page: str) -> None:
    keys = Config().model_dump()
    for section, key in re.findall(r"`(\w+)\.(\w+)[`:]", TEXTS[page]):
        assert section not in keys or key in keys[section] or key in ("py", "yaml"), f"{section}.{key}"


def test_the_log_s_events_are_listed() -> None:
    listed = {event for row in Page("operations.md").table("The log", "event").rows for event in row[0].split(", ")}
    sources = "\n".join(path.read_text() for path in (ROOT / "engine" / "instep").rglob("*.py"))
    call = r"log(?:\([^()]*(?:\([^()]*\))?[^()]*\))?\.(?:debug|info|warning|error)\(\s*\"([^\"]+)\""
    assert listed == set(re.findall(call, sources))
