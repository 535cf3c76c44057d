"""The files of `deploy/` agree with the program and with one another: the systemd unit, the image, the composition."""

from __future__ import annotations

import configparser
import itertools
import json
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from instep.cluster.ray import RESOURCE
from instep.config import Config, ConfigError, load_config
from tests.docs.support.shell import assert_exists

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


def service(unit: str) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / f"{unit}.service")
    return parser["Service"]


SERVER_UNIT, AGENT_UNIT, DIRECTORY_UNIT = (service(unit) for unit in ("instep", "instep-agent", "instep-directory"))
DOCKERFILE = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.M))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVER = COMPOSE["services"]["server"]
RAY = (ROOT / "configs" / "cluster.yaml").read_text()
KUBERNETES: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "cluster.yaml").read_text()))


def instructions(keyword: str) -> list[str]:
    return re.findall(rf"^{keyword} (.+)$", DOCKERFILE, re.M)


def pod(kind: str) -> dict[str, Any]:
    """What the pods of the only object of this kind are."""
    (found,) = [each for each in KUBERNETES if each["kind"] == kind]
    spec: dict[str, Any] = found["spec"]["template"]["spec"]
    return spec


def container(kind: str) -> dict[str, Any]:
    """The only container of the pods."""
    (found,) = pod(kind)["containers"]
    return dict(found)


ENTRYPOINT, COMMAND = (json.loads(instructions(keyword)[0]) for keyword in ("ENTRYPOINT", "CMD"))


@pytest.mark.parametrize(
    "words",
    [
        *(shlex.split(unit["ExecStart"]) for unit in (SERVER_UNIT, AGENT_UNIT, DIRECTORY_UNIT)),
        ENTRYPOINT + COMMAND,
        ENTRYPOINT + SERVER["command"],
        *(ENTRYPOINT + container(kind)["args"] for kind in ("StatefulSet", "Deployment")),
        *(shlex.split(command) for command in re.findall(r"exec .* '(.+)'", RAY)),
    ],
    ids=" ".join,
)
def test_the_commands_and_options_that_it_runs_exist(words: list[str]) -> None:
    assert_exists(words)


def test_a_drain_is_given_the_time_it_may_take() -> None:
    drain_s = Config().shutdown.drain_timeout_s
    for unit in (SERVER_UNIT, AGENT_UNIT):
        assert unit["KillSignal"] == signal.SIGTERM.name
        assert int(unit["TimeoutStopSec"]) > drain_s + 10
    assert int(SERVER["stop_grace_period"].removesuffix("s")) > drain_s + 10
    assert pod("StatefulSet")["terminationGracePeriodSeconds"] > drain_s + 10
    for files in (SERVER_UNIT["LimitNOFILE"], AGENT_UNIT["LimitNOFILE"], SERVER["ulimits"]["nofile"]):
        assert int(files) > Config().limits.max_connections


def test_the_image_is_built_of_files_that_exist_and_serves_at_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = [path for line in instructions("COPY") if "--from" not in line for path in line.split()[:-1]]
    assert {"pyproject.toml", "clients", "engine"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    environ = dict(pair.partition("=")[::2] for line in instructions("ENV") for pair in line.split())
    for name, value in environ.items():
        if name.startswith("INSTEP_"):
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="allow_plaintext"):
        load_config(None, {"model.folder": "/model"})
    for name, value in SERVER["environment"].items():
        monkeypatch.setenv(name, value)
    config = load_config(None, {"model.folder": "/model"})
    port = Config().transport.endpoint.rpartition(":")[2]
    assert config.transport.endpoint == f"tcp://0.0.0.0:{port}"
    assert port in " ".join(instructions("EXPOSE"))


def test_the_composition_publishes_on_the_loopback_address_alone() -> None:
    published = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("kind", ["StatefulSet", "Deployment"])
def test_what_a_pod_mounts_and_is_reached_by_is_there(kind: str) -> None:
    (found,) = [each for each in KUBERNETES if each["kind"] == kind]
    volumes = {each["name"] for each in pod(kind)["volumes"]}
    volumes |= {each["metadata"]["name"] for each in found["spec"].get("volumeClaimTemplates", [])}
    mounts = {each["name"]: each["mountPath"] for each in container(kind)["volumeMounts"]}
    assert mounts.keys() == volumes
    arguments = container(kind)["args"]
    options = dict(itertools.pairwise(arguments))
    assert (options.get("--record") or options["--store"]) in mounts.values()
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert found["spec"]["selector"]["matchLabels"] == labels
    (name,) = [each["metadata"]["name"] for each in KUBERNETES if each["spec"].get("selector") == labels]
    assert name == (found["spec"]["serviceName"] if kind == "StatefulSet" else "instep-directory")
    environ = {each["name"]: each.get("value", "") for each in container(kind)["env"]}
    for setting in (name.removeprefix("INSTEP_") for name in environ if name.startswith("INSTEP_")):
        section, key = setting.lower().split("__")
        assert hasattr(getattr(Config(), section), key)


def test_no_machine_has_two_pods_and_each_is_bounded() -> None:
    agents = {"matchLabels": {"app": "instep", "part": "agent"}}
    for kind in ("StatefulSet", "Deployment"):
        (rule,) = pod(kind)["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule == {"topologyKey": "kubernetes.io/hostname", "labelSelector": agents}
        assert {each["tolerationSeconds"] for each in pod(kind)["tolerations"]} == {10}
        assert pod(kind)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(kind)["resources"].keys() == {"requests", "limits"}
        assert "livenessProbe" in container(kind)
    (budget,) = [each["spec"] for each in KUBERNETES if each["kind"] == "PodDisruptionBudget"]
    assert budget == {"maxUnavailable": 1, "selector": agents}


def test_agents_find_the_directory_that_there_is_one_of() -> None:
    (directory,) = [each for each in KUBERNETES if each["kind"] == "Deployment"]
    assert (directory["spec"]["replicas"], directory["spec"]["strategy"]) == (1, {"type": "Recreate"})
    agent, listens = container("StatefulSet")["args"], container("Deployment")["args"]
    host, _, port = agent[agent.index("--directory") + 1].partition(":")
    (service,) = [each for each in KUBERNETES if each["kind"] == "Service" and each["metadata"]["name"] == host]
    assert [str(each["port"]) for each in service["spec"]["ports"]] == [port]
    assert listens[listens.index("--endpoint") + 1] == f"tcp://0.0.0.0:{port}"


def test_machines_of_ray_that_serve_have_the_resource() -> None:
    (command,) = [line for line in yaml.safe_load(RAY)["worker_start_ray_commands"] if "start" in line]
    assert json.loads(re.findall(r"--resources='(.*)'", command)[0]) == {RESOURCE: 1}
