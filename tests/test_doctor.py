"""`instep doctor`: what it says of this machine, of models and of a configuration, and what stands in the way."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from instep.memory import memory_limit, size
from instep.models.folder import write_model
from instep.models.network import PortableNetwork
from instep.program import app
from tests.support.models import SMALL
from tests.support.threaded import ThreadedServer

ANY_PORT = ["--set", "transport.endpoint=tcp://127.0.0.1:*", "--set", "http.endpoint=127.0.0.1:0"]


def examined(*arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["doctor", *arguments, "--json"])
    return done.exit_code, json.loads(done.stdout)


def test_everything_is_said_and_is_true(tmp_path: Path) -> None:
    status, found = examined("--record", str(tmp_path / "r.instep"), *ANY_PORT)
    assert (status, set(found), found["problems"]) == (0, {"facts", "warnings", "problems"}, [])
    facts = found["facts"]
    assert (facts["python"], facts["fma"], facts["sync_ms"] > 0) == (platform.python_version(), True, True)
    assert facts["would record"] == f"file {tmp_path / 'r.instep'}, durability commit"
    assert "exactness exact" in facts["can serve speakers"]
    assert list(tmp_path.iterdir()) == []


def test_a_bad_configuration_is_named_and_the_rest_is_still_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.yaml").write_text("limits:\n  park_z: 3\nengine: {max_batch_size: none}\n")
    monkeypatch.setenv("INSTEP_PARK_S", "3")
    done = CliRunner().invoke(app, ["doctor", "--config", str(tmp_path / "bad.yaml")])
    assert done.exit_code == 1
    text = " ".join(done.stdout.split())
    assert "cannot start: limits.park_z (file" in text
    assert "cannot start: engine.max_batch_size" in text
    assert "warning: INSTEP_PARK_S is not a setting" in text
    assert f"python: {platform.python_version()}" in text
    assert "can serve" not in text


def test_a_model_that_cannot_be_served_and_one_that_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status, found = examined(str(tmp_path / "none"), *ANY_PORT)
    assert status == 1
    (problem,) = found["problems"]
    assert problem["what"].startswith(f"there is no model folder {tmp_path / 'none'}: correct the path")
    monkeypatch.setattr(PortableNetwork, "arithmetic", "torch")  # as on a GPU
    status, found = examined(*ANY_PORT)
    assert status == 0
    assert any(each["what"].startswith("not exact: ") for each in found["warnings"])


def test_a_recording_that_a_server_writes_is_in_the_way(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    arguments = [str(tmp_path / "model"), "--record", str(tmp_path / "r.instep"), *ANY_PORT]
    with ThreadedServer(tmp_path / "model", ["--record", str(tmp_path / "r.instep")]):
        status, found = examined(*arguments)
        assert (status, "is being written by another instep" in found["problems"][0]["what"]) == (1, True)
    status, found = examined(*arguments)
    assert (status, found["problems"]) == (0, [])
    assert "streams 0" in found["facts"]["would continue"]


def test_the_memory_of_a_container_is_the_smallest_limit_around_it(tmp_path: Path) -> None:
    for name, text in (
        ("proc/self/cgroup", "0::/outer/inner\n"),
        ("sys/fs/cgroup/outer/inner/memory.max", "max\n"),
        ("sys/fs/cgroup/outer/memory.max", "5000\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory_limit(tmp_path) == 5000
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/old\n")
    (tmp_path / "sys/fs/cgroup/memory/old").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/memory/old/memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert memory_limit(tmp_path) is None
    (tmp_path / "sys/fs/cgroup/memory/old/memory.limit_in_bytes").write_text("7000\n")
    assert memory_limit(tmp_path) == 7000
    assert [size(n) for n in (0, 1536, 5 * 2**50)] == ["0 B", "1.5 KiB", "5120.0 TiB"]
