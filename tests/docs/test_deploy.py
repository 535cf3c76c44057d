"""The files of `deploy/` agree with the program and with one another: the systemd unit, the image, the composition."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import signal
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
SERVICE = UNIT["Service"]
DOCKERFILE = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVER = COMPOSE["services"]["server"]


def instructions(keyword: str) -> list[str]:
    return re.findall(rf"^{keyword} (.+)$", DOCKERFILE, re.M)


ENTRYPOINT, COMMAND = (json.loads(instructions(keyword)[0]) for keyword in ("ENTRYPOINT", "CMD"))


@pytest.mark.parametrize(
    "words",
    [shlex.split(SERVICE["ExecStart"]), ENTRYPOINT + COMMAND, ENTRYPOINT + SERVER["command"]],
    ids=" ".join,
)
def test_the_commands_and_options_that_it_runs_exist(words: list[str]) -> None:
    assert_exists(words)


def test_a_drain_is_given_the_time_it_may_take() -> None:
    drain_s = Config().shutdown.drain_timeout_s
    assert SERVICE["KillSignal"] == signal.SIGTERM.name
    assert int(SERVICE["TimeoutStopSec"]) > drain_s + 10
    assert int(SERVER["stop_grace_period"].removesuffix("s")) > drain_s + 10
    for files in (SERVICE["LimitNOFILE"], SERVER["ulimits"]["nofile"]):
        assert int(files) > Config().limits.max_connections


def test_the_image_is_built_of_files_that_exist_and_serves_at_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = [path for line in instructions("COPY") if "--from" not in line for path in line.split()[:-1]]
    assert {"pyproject.toml", "clients", "engine"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    environ = dict(pair.partition("=")[::2] for line in instructions("ENV") for pair in line.split())
    for name, value in environ.items():
        if name.startswith("INSTEP_"):
            monkeypatch.setenv(name, value)
    config = load_config(None, {"model.folder": "/model"})
    port = Config().transport.endpoint.rpartition(":")[2]
    assert config.transport.endpoint == f"tcp://0.0.0.0:{port}"
    assert config.transport.allow_plaintext
    assert port in " ".join(instructions("EXPOSE"))


def test_the_composition_publishes_on_the_loopback_address_alone() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)
