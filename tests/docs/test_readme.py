"""What the README says is run here: its commands and its code, against a server that its commands start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.docs.support.shell import TypedServer, commands, run

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
TYPED = [words for language, body in BLOCKS if language == "bash" for words in commands(body)]


def test_the_make_targets_it_names_exist() -> None:
    targets = [words[1] for words in TYPED if words[0] == "make"]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def would_run(*arguments: str) -> str:
    """What make would run."""
    return subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"]},  # without what a make around the tests says
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_lines_are_counted_where_coverage_is_neither_empty_nor_0() -> None:
    for value, is_counted in (("", False), ("0", False), ("1", True)):
        printed = would_run("all-tests", f"COVERAGE={value}", "-o", ".venv/.ready")
        assert ("coverage run -m pytest" in printed) == is_counted, (value, printed)


def test_the_demo_installs_only_what_it_needs_and_the_tests_everything_also_after_it(tmp_path: Path) -> None:
    def installed(target: str) -> list[str]:
        return re.findall(r'pip install .*-e "(\S+)"', would_run(target, f"VENV={tmp_path}"))

    assert installed("demo") == [".[engine]"]
    assert installed("all-tests") == [".[engine]", ".[dev]"]
    (tmp_path / ".ready-demo").touch()
    assert (installed("demo"), installed("all-tests"), installed("check")) == ([], [".[dev]"], [".[dev]"])
    (tmp_path / ".ready").touch()
    assert (installed("demo"), installed("all-tests")) == ([], [])
    assert f"rm -rf {tmp_path} " in would_run("clean", f"VENV={tmp_path}")


def test_what_it_installs_serves() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (installed,) = [words for words in TYPED if words[0] == "pip"]
    assert installed == ["pip", "install", "-e", ".[engine]"]
    assert "engine" in extras


@pytest.mark.heavy
def test_its_commands_and_its_code_run_as_written(tmp_path: Path) -> None:
    serve, verify, serve_own = (words for words in TYPED if words[0] == "instep")
    code, own_network = (body for language, body in BLOCKS if language == "python")
    with TypedServer(serve, tmp_path) as server:
        produced = run(server.script(code, "producer.py"), tmp_path)
        assert (produced.stdout, produced.stderr) == ("(9,) after 100 frames\n", "")
        assert server.stop(signal.SIGINT) == 0
    verified = run(verify, tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "1 stream, 100 frames, exact, 0 mismatches" in verified.stdout, verified.stdout
    (tmp_path / "network.py").write_text(own_network)
    saved = run(["python", "network.py"], tmp_path)
    assert saved.returncode == 0, saved.stderr
    same = run(["instep", "model", "check", "my-network", "--against", "network.py:net"], tmp_path)
    assert same.returncode == 0, same.stdout + same.stderr
    serve_own[serve_own.index("--record") + 1] = str(tmp_path)
    checked = run([*serve_own, "--endpoint", f"ipc://{tmp_path}/s", "--check"], tmp_path)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md"]
    + [f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")],
)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:tests|docs|configs|engine|clients|deploy|examples)/[\w/.-]+)`", text)
    for target in [*((ROOT / page).parent / link for link in links), *(ROOT / name for name in named)]:
        assert target.exists(), f"{page} names {target}, which is not there"


def test_the_changelog_knows_this_version() -> None:
    assert f"## {version('instep')}" in (ROOT / "CHANGELOG.md").read_text()
