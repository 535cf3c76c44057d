"""What the README says is run here: its commands and its code, against a server that its commands start."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from instep.models.folder import load_model
from tests.support.running import prepared

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
SCRIPTS = Path(sys.executable).parent


def commands() -> list[list[str]]:
    lines = "".join(body for language, body in BLOCKS if language == "bash").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def run(command: list[str], cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [str(SCRIPTS / command[0]), *command[1:]]
    return subprocess.run(
        command, cwd=cwd, text=True, capture_output=True, timeout=100, check=False, env={**os.environ, **environ}
    )


def test_the_make_targets_it_opens_with_exist() -> None:
    targets = [command[1] for command in commands() if command[0] == "make"]
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_what_is_installed_is_what_it_says() -> None:
    installed = next(command for command in commands() if command[0] == "pip")
    assert installed == ["pip", "install", "-e", ".[engine]"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r'"\.\[([\w,]+)\]"', README)
    assert {extra for names in named for extra in names.split(",")} == {"engine", "cli", "export"} <= extras.keys()


def test_its_commands_and_its_code_run_as_written(tmp_path: Path) -> None:
    make_model, serve, verify = (command for command in commands() if command[0] == "instep")
    code, own_network = (body for language, body in BLOCKS if language == "python")
    made = run(make_model, tmp_path)
    assert made.returncode == 0, made.stderr
    server = subprocess.Popen(
        [str(SCRIPTS / serve[0]), *serve[1:]],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "INSTEP_TRANSPORT__ENDPOINT": "tcp://127.0.0.1:*"},
    )
    try:
        assert server.stderr is not None
        said = ""
        while "serving" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        assert "exactness=" in said
        (endpoint,) = re.findall(r"tcp://[\d.]+:\d+", said)
        assert "tcp://127.0.0.1:5757" in code
        (tmp_path / "producer.py").write_text(code.replace("tcp://127.0.0.1:5757", endpoint))
        produced = run(["python", "producer.py"], tmp_path)
        assert produced.returncode == 0, produced.stderr
        assert produced.stdout == "(128,) after 100 frames\n"
        server.send_signal(signal.SIGINT)
        server.communicate(timeout=60)
        assert server.returncode == 0
    finally:
        if server.poll() is None:
            server.kill()
            server.communicate()
    (tmp_path / "network.py").write_text(own_network)
    saved = run(["python", "network.py"], tmp_path)
    assert saved.returncode == 0, saved.stderr
    assert "GRU 128 → dense 10" in run(["instep", "model", "info", "my-network"], tmp_path).stdout
    verified = run(verify, tmp_path)
    assert verified.returncode == 0, verified.stdout + verified.stderr
    certification = prepared(load_model(tmp_path / "my-model"), 512).certification
    exact = "exact" if certification.whole_sequence else "within tolerance"
    assert f"1 stream, 100 frames, {exact}, 0 mismatches" in verified.stdout, verified.stdout


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
    + [f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")],
)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    named = re.findall(r"`((?:tests|docs|configs|engine|clients)/[\w/.-]+)`", text)
    for target in [*((ROOT / page).parent / link for link in links), *(ROOT / name for name in named)]:
        assert target.exists(), f"{page} names {target}, which is not there"


def test_the_changelog_knows_this_version() -> None:
    assert f"## {version('instep')}" in (ROOT / "CHANGELOG.md").read_text()
