"""What `deploy/` holds agrees with the program and with one another: the systemd unit, the image, the composition."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import signal
import subprocess
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from instep.config import Config, load_config
from tests.docs.support.shell import assert_exists

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = configparser.RawConfigParser(strict=False)
UNIT.optionxform = str  # type: ignore[assignment,method-assign]
UNIT.read(DEPLOY / "instep.service")
DOCKERFILE = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVER = COMPOSE["services"]["server"]


def instructions(keyword: str) -> list[str]:
    return re.findall(rf"^{keyword} (.+)$", DOCKERFILE, re.M)


ENTRYPOINT, COMMAND = (json.loads(instructions(keyword)[0]) for keyword in ("ENTRYPOINT", "CMD"))
PROBE = json.loads(instructions("HEALTHCHECK")[0].partition("CMD ")[2])


@pytest.mark.parametrize(
    "words",
    [shlex.split(UNIT["Service"]["ExecStart"]), ENTRYPOINT + COMMAND, PROBE, ENTRYPOINT + SERVER["command"]],
    ids=" ".join,
)
def test_the_commands_and_options_that_it_runs_exist(words: list[str]) -> None:
    assert_exists(words)


def test_every_command_that_starts_the_composition_sets_what_it_requires() -> None:
    text = (DEPLOY / "compose.yaml").read_text()
    required = set(re.findall(r"\$\{(\w+):\?", text))
    started = re.findall(r"(.*)docker compose .*\bup\b", text + (ROOT / "docs" / "operations.md").read_text())
    assert len(started) == 2
    for before in started:
        assert required == set(re.findall(r"(\w+)=\S", before))
    assert not any(name.startswith("INSTEP_") for name in required), "clients read $INSTEP_MODEL, for one"


def test_a_drain_is_given_the_time_it_may_take() -> None:
    service, drain_s = UNIT["Service"], Config().shutdown.drain_timeout_s
    assert service["KillSignal"] == signal.SIGTERM.name
    assert int(service["TimeoutStopSec"]) > drain_s + 10
    assert int(SERVER["stop_grace_period"].removesuffix("s")) > drain_s + 10
    for files in (service["LimitNOFILE"], SERVER["ulimits"]["nofile"]):
        assert int(files) > Config().limits.max_connections
    assert service["RestartPreventExitStatus"] == "2"


def test_the_unit_hears_from_the_process_that_serves() -> None:
    service = UNIT["Service"]
    assert service["Type"] == "notify"
    assert "--restart" in service["ExecStart"]
    assert service["NotifyAccess"] == "all", "with --restart a child of the main process serves"
    assert int(service["WatchdogSec"]) > 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "instep.service").read_text()
    (tmp_path / "instep.service").write_text(text.replace("/opt/instep/bin/instep", "/bin/true"))
    words = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "instep.service")]
    found = subprocess.run(words, text=True, capture_output=True, timeout=60, check=False)
    assert (found.returncode, found.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_the_linter_finds_nothing_in_the_dockerfile() -> None:
    words = ["hadolint", "--no-color", str(DEPLOY / "Dockerfile")]
    found = subprocess.run(words, text=True, capture_output=True, timeout=60, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_image_is_built_of_files_that_exist_and_are_sent_to_the_builder() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("", "#")]
    copied = [path for line in instructions("COPY") if "--from" not in line for path in line.split()[:-1]]
    assert {"pyproject.toml", "clients", "engine"} <= set(copied)
    for path in copied:
        assert (ROOT / path).exists()
        ignored = [not pattern.startswith("!") for pattern in patterns if fnmatch(path, pattern.removeprefix("!"))]
        assert ignored[-1] is False, path
    project = (ROOT / "pyproject.toml").read_text()
    assert all(named in copied for named in re.findall(r'"((?:README|LICENSE)[^"]*)"', project))
    (extra,) = re.findall(r"install \"\.\[(\w+)\]\"", DOCKERFILE)
    assert re.search(rf"^{extra} = \[", project, re.M)
    (torch,) = re.findall(r"\"(torch[^\"]*)\"", DOCKERFILE)
    assert f'"{torch}"' in project


def test_the_image_serves_where_its_probe_and_its_ports_look(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = dict(pair.partition("=")[::2] for line in instructions("ENV") for pair in line.split())
    for name, value in environ.items():
        if name.startswith("INSTEP_"):
            monkeypatch.setenv(name, value)
    config = load_config(None, {"model.folder": "/model"})
    port = Config().transport.endpoint.rpartition(":")[2]
    assert config.transport.endpoint == f"tcp://0.0.0.0:{port}"
    assert config.transport.allow_plaintext
    assert instructions("EXPOSE") == [port]
    assert SERVER["ports"] == [f"127.0.0.1:{port}:{port}"]


def test_the_composition_builds_this_image_and_mounts_what_the_image_owns() -> None:
    build = SERVER["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DEPLOY / "Dockerfile"
    arguments = dict(line.partition("=")[::2] for line in instructions("ARG"))
    for name, value in build["args"].items():
        assert value == f"${{{name}:-{arguments[name]}}}", "the same default in both"
    mounts = dict(volume.rsplit(":", 1) for volume in SERVER["volumes"] if not volume.endswith(":ro"))
    assert mounts.keys() == COMPOSE["volumes"].keys() - {"metrics"}
    (owned,) = re.findall(r"install -d -o instep -g instep (.+)", DOCKERFILE)
    assert set(mounts.values()) == set(owned.split())
    assert SERVER["command"][SERVER["command"].index("--record") + 1] == mounts["recordings"]
    assert f"NUMBA_CACHE_DIR={mounts['cache']}" in DOCKERFILE
