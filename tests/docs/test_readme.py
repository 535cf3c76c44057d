"""The README's commands and code, run against a server that its commands start."""

from __future__ import annotations

import re
import signal
import tomllib
from pathlib import Path

import pytest

from tests.docs.support.shell import TypedServer, commands, run

ROOT = Path(__file__).parents[2]
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
TYPED = [words for language, body in BLOCKS if language == "bash" for words in commands(body)]


def test_the_make_targets_and_the_extra_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [words[1] for words in TYPED if words[0] == "make"]
    assert targets == ["demo", "test"]
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)
    assert [words for words in TYPED if words[0] == "pip"] == [["pip", "install", "-e", ".[engine]"]]
    assert "engine" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


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
    (tmp_path / "net.py").write_text(own_network)
    saved = run(["python", "net.py"], tmp_path)
    assert saved.returncode == 0, saved.stderr
    same = run(["instep", "model", "check", "my-network", "--against", "net.py:net"], tmp_path)
    assert same.returncode == 0, same.stdout + same.stderr
    serve_own[serve_own.index("--record") + 1] = str(tmp_path)
    checked = run([*serve_own, "--endpoint", f"ipc://{tmp_path}/s", "--check"], tmp_path)
    assert checked.returncode == 0, checked.stderr
