"""`instep doctor`: what it says of this machine, and what it warns of on others."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import socket
import sqlite3
import time
from dataclasses import replace
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from typer.testing import CliRunner

from instep.cli import app
from instep.config import Config
from instep.demo import MODEL_FOLDER
from instep.doctor.disk import examine_disk
from instep.doctor.findings import Findings
from instep.doctor.machine import examine_machine
from instep.doctor.serving import examine_endpoints, examine_models
from instep.doctor.software import examine_software
from instep.memory import size
from instep.models.folder import load_model, write_model
from instep.models.network import PortableNetwork
from instep_client import Client
from tests.support.models import SEED_SIZED, SMALL
from tests.support.threaded import ThreadedServer
from tests.support.warm import run_program

ANY_PORT = ["--endpoint", "tcp://127.0.0.1:*", "--http", "127.0.0.1:0"]


def test_everything_is_said_and_is_true(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "--json", "--record", str(tmp_path / "r.instep"), *ANY_PORT])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (set(found), found["problems"]) == ({"facts", "warnings", "problems"}, [])
    facts = found["facts"]
    assert facts["configuration"]["recording.file"] == str(tmp_path / "r.instep")
    assert facts["configuration"]["transport.endpoint"] == "tcp://127.0.0.1:*"
    assert "limits.park_s" not in facts["configuration"]
    software = facts["software"]
    assert (software["python"], software["torch"]) == (platform.python_version(), torch.__version__)
    assert (software["libzmq"], software["sqlite"]) == (zmq.zmq_version(), sqlite3.sqlite_version)
    assert (facts["arithmetic"]["arithmetic"], facts["arithmetic"]["fma"]) == ("portable-1", True)
    assert facts["gpu"]["devices"] == [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    machine = facts["machine"]
    assert (machine["cores"], machine["affinity"]) == (os.cpu_count(), sorted(os.sched_getaffinity(0)))
    assert machine["open_files"] == list(resource.getrlimit(resource.RLIMIT_NOFILE))
    assert machine["memory"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (facts["disk"]["folder"], facts["disk"]["sync_ms"] > 0) == (str(tmp_path), True)
    demo = load_model(MODEL_FOLDER)
    model = facts[f"model {demo.name}"]
    assert (model["fingerprint"], model["folder"]) == (demo.fingerprint, str(MODEL_FOLDER.resolve()))
    assert (model["exactness"], model["arithmetic"]) == ("exact", "portable-1")
    assert facts["limits"]["memory_when_full"] > 256 * 2**20
    assert model["would_record"] == {"file": str(tmp_path / "r.instep"), "durability": "commit"}
    assert facts["endpoints"] == {
        "transport.endpoint": "tcp://127.0.0.1:*",
        "http.endpoint": "127.0.0.1:0",
        "found": None,
    }
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource
from instep.__main__ import main
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
main()
"""


def test_a_low_limit_of_files_and_a_bad_configuration_are_named_and_the_rest_is_still_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.yaml").write_text("limits:\n  park_z: 3\nengine: {max_batch_size: none}\n")
    (tmp_path / "limited.py").write_text(LIMITED)
    monkeypatch.setenv("INSTEP_ENDPOINT", Config().transport.endpoint)
    monkeypatch.setenv("INSTEP_MODEL", "ears")
    done = run_program("limited.py", tmp_path, "doctor", "--config", "bad.yaml")
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    titles = [line for line in lines if line and not line.startswith(" ")]
    assert sorted(set(titles)) == sorted(titles)
    text = " ".join(done.stdout.split())
    assert "256 files may be open, and limits.max_connections of 16,384 needs 16,484" in text
    assert "LimitNOFILE=16484" in text
    assert "cannot start: limits.park_z (file" in text
    assert "did you mean limits.park_s?" in text
    assert "cannot start: engine.max_batch_size" in text
    assert f"python {platform.python_version()}" in text
    assert re.search(r" sync \d+\.\d\d ms \(median of 9\) free \d+\.\d GiB", text)
    assert "the working directory; that of a recording is known once the configuration is correct" in text
    assert "nothing is recorded" not in text
    assert "INSTEP_ENDPOINT" not in text
    assert "INSTEP_MODEL" not in text
    assert not {"endpoints", "limits"} & set(titles), "those of a configuration that nobody has written"
    assert not any(title.startswith("model ") for title in titles)


def system(root: Path, **changes: str) -> Path:
    """A machine as Linux shows it in files, with some of them changed."""
    files = {
        "proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nSwapTotal: 9 kB\nSwapFree: 9 kB\n",
        "proc/cpuinfo": "processor : 0\nflags\t\t: fpu avx2 avx512f amx_tile\n",
        "proc/self/cgroup": "0::/service\n",
        "sys/fs/cgroup/service/memory.max": "max\n",
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
        "sys/devices/system/clocksource/clocksource0/current_clocksource": "tsc\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "always [madvise] never\n",
        **{name.replace("__", "/"): text for name, text in changes.items()},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


FEW = Config.model_validate({"limits": {"max_connections": 10}})


def test_a_good_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.doctor.machine.usable_cores", lambda: 8)
    findings = Findings()
    assert examine_machine(findings, FEW, system(tmp_path)) == 16 * 2**30
    assert findings.warnings == []
    assert findings.sections[0].values["features"] == ["avx2", "avx512f", "amx_tile"]


@pytest.mark.parametrize(
    ("file", "text", "warning", "cure"),
    [
        ("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor", "powersave", "powersave", "cpupower"),
        ("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet", "clock source is hpet", "tsc"),
        ("sys/kernel/mm/transparent_hugepage/enabled", "[always] madvise never", "transparent huge", "madvise"),
        ("proc/meminfo", "MemTotal: 9 kB\nSwapTotal: 2097152 kB\nSwapFree: 0 kB\n", "2.0 GiB of memory are", "swapoff"),
    ],
)
def test_what_hurts_on_other_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, text: str, warning: str, cure: str
) -> None:
    monkeypatch.setattr("instep.doctor.machine.usable_cores", lambda: 2)
    findings = Findings()
    examine_machine(findings, FEW, system(tmp_path, **{file: text}))
    (advice,) = findings.warnings
    assert (warning in advice.what, cure in advice.cure) == (True, True), advice


def test_few_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.doctor.machine.usable_cores", lambda: 1)
    findings = Findings()
    examine_machine(findings, FEW, system(tmp_path))
    assert ["one core only" in advice.what for advice in findings.warnings[:1]] == [True]


@pytest.mark.parametrize(
    "groups",
    [
        {"sys/fs/cgroup/service/memory.max": "134217728\n"},
        {"sys/fs/cgroup/memory.max": "134217728\n"},
        {
            "proc/self/cgroup": "4:memory:/box\n0::/\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "134217728\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    ],
)
def test_a_containers_memory_that_the_limits_exceed(tmp_path: Path, groups: dict[str, str]) -> None:
    findings = Findings()
    memory = examine_machine(findings, FEW, system(tmp_path / "root", **groups))
    assert memory == 128 * 2**20
    write_model(tmp_path / "model", SMALL)
    findings.warnings.clear()
    config = Config.model_validate({"model": {"folder": tmp_path / "model"}, "engine": {"max_batch_size": 8}})
    examine_models(findings, config, MODEL_FOLDER, memory, is_served=False)
    assert any("the limits allow 263.1 MiB, and 128.0 MiB" in advice.what for advice in findings.warnings), (
        findings.warnings
    )


def test_old_versions_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["numpy>=99.1", "rich[jupyter]>=1; extra == 'cli'", "nobody-has-this>=1", "msgpack"]
    monkeypatch.setattr(metadata, "requires", lambda name: asked)
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    findings = Findings()
    examine_software(findings, Config())
    said = " ".join(advice.what for advice in findings.warnings)
    assert f"numpy {metadata.version('numpy')} is older than 99.1" in said
    assert "rich" not in said
    assert "nobody" not in said
    assert "NUMBA_DISABLE_JIT is set" in said


def test_a_recording_on_a_network_file_system_and_a_slow_and_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mounts").write_text(
        f"/dev/root / ext4 rw 0 0\nnas:/x {tmp_path} nfs4 rw 0 0\nproc /proc proc rw 0 0\n"
    )
    recording: dict[str, Any] = {"file": tmp_path / "r.instep", "warn_free_bytes": 2**60}
    findings, clock = Findings(), count(step=0.045)
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: next(clock))
        examine_disk(findings, Config.model_validate({"recording": recording}), tmp_path / "mounts")
    network, slow, full = [advice.what for advice in findings.warnings]
    assert "network file system (nfs4)" in network
    assert "takes 45 ms" in slow
    assert "are free for the recording" in full
    findings = Findings()
    examine_disk(findings, Config(), tmp_path / "none")
    assert (findings.warnings, findings.sections[0].values["file_system"]) == ([], "not known")
    assert findings.sections[0].values["folder"] == str(Path.cwd())
    assert "nothing is recorded; --record FILE would record here" in findings.sections[0].texts["folder"]


def test_a_model_that_cannot_be_served_and_one_that_is_not_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "none"), *ANY_PORT, "--json"])
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    (problem,) = found["problems"]
    assert problem["what"] == f"there is no model folder {tmp_path / 'none'}"
    assert problem["cure"].startswith("correct the path")
    assert "models" not in found["facts"]
    monkeypatch.setattr(PortableNetwork, "arithmetic", "torch")  # as on a GPU
    findings = Findings()
    examine_models(findings, Config(), MODEL_FOLDER, 2**40, is_served=False)
    (warning,) = findings.warnings
    assert warning.what.startswith("not exact: on a GPU torch's operators serve, within a tolerance")
    assert "docs/exactness.md" in warning.cure
    assert findings.problems == []


def test_each_of_several_models_has_facts_of_its_own(tmp_path: Path) -> None:
    for name in ("ears", "eyes"):
        write_model(tmp_path / name, replace(SMALL, name=name))
    (tmp_path / "recordings").mkdir()
    folders = [str(tmp_path / name) for name in ("ears", "eyes")]
    options = ["--record", str(tmp_path / "recordings"), *ANY_PORT, "--json"]
    done = CliRunner().invoke(app, ["doctor", *folders, *options])
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)["facts"]
    for name, folder in zip(("ears", "eyes"), folders, strict=True):
        model = facts[f"model {name}"]
        assert model["folder"] == folder
        assert model["would_record"]["file"] == str(tmp_path / "recordings" / f"{name}.instep")


def test_who_answers_at_the_endpoint(tmp_path: Path) -> None:
    def asked(endpoint: str, http: str = "off") -> tuple[str, int]:
        findings = Findings()
        config = {"transport": {"endpoint": endpoint, "allow_plaintext": True}, "http": {"endpoint": http}}
        examine_endpoints(findings, Config.model_validate(config))
        return findings.sections[0].texts["found"], len(findings.problems)

    write_model(tmp_path / "model", SMALL)
    with ThreadedServer(tmp_path / "model") as server:
        assert asked(server.endpoint) == (f"an instep server, ready, model {SMALL.name}", 0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert asked(f"tcp://127.0.0.1:{port}") == ("another program", 1)
        assert asked("tcp://127.0.0.1:*", f"127.0.0.1:{port}") == ("nobody listens there", 1)
    assert asked(f"tcp://127.0.0.1:{port}") == ("nobody listens there", 0)
    assert asked(f"tcp://lo:{port}") == ("nobody listens there", 0)  # the name of an interface
    assert asked(f"ipc://{tmp_path}/none/s")[1] == 1


def test_a_recording_that_a_server_writes_is_in_the_way_unless_that_server_answers(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    file = str(tmp_path / "r.instep")

    def examined(endpoint: str) -> tuple[int, Any]:
        options = ["--endpoint", endpoint, "--http", "off", "--record", file, "--json"]
        done = CliRunner().invoke(app, ["doctor", str(tmp_path / "model"), *options])
        return done.exit_code, json.loads(done.stdout)

    with ThreadedServer(tmp_path / "model", ["--record", file]) as server:
        status, found = examined(server.endpoint)
        assert (status, found["problems"]) == (0, [])
        assert found["facts"]["endpoints"]["found"] == f"an instep server, ready, model {SMALL.name}"
        status, found = examined("tcp://127.0.0.1:*")
        assert status == 1
        assert "is being written by another instep" in found["problems"][0]["what"]
    status, found = examined("tcp://127.0.0.1:*")
    assert (status, found["problems"]) == (0, [])
    assert found["facts"][f"model {SMALL.name}"]["would_continue"]["streams"] == 0


def test_streams_in_the_recording_of_another_version_come_with_the_command_that_serves_them(tmp_path: Path) -> None:
    for name, model in (("new", SMALL), ("old", SEED_SIZED)):
        write_model(tmp_path / name, replace(model, name="ears"))
    (tmp_path / "recordings").mkdir()
    file = tmp_path / "recordings" / "ears@2.instep"
    with ThreadedServer(tmp_path / "old", ["--record", str(file)]) as server, Client(server.endpoint) as client:
        client.open("s")
        client.close(park=True)
    options = ["--record", str(tmp_path / "recordings"), *ANY_PORT, "--json"]
    done = CliRunner().invoke(app, ["doctor", str(tmp_path / "new"), *options])
    (warning,) = [each for each in json.loads(done.stdout)["warnings"] if "streams not served" in each["what"]]
    assert warning["cure"].startswith(f"instep serve {tmp_path / 'old'} --record {file} --endpoint ")


def test_texts_have_80_columns() -> None:
    findings = Findings()
    section = findings.section("model")
    section.note("a_name", "word " * 60)
    section.note("recording.file", "/" + "x" * 100)
    findings.warn("something " * 20, "a cure " * 20)
    lines = [*section.lines(), *findings.verdict()]
    assert max(map(len, lines)) <= 80
    assert "  a name          word" in lines[1]
    assert any(line.startswith("  → a cure") for line in lines)
    assert list(Findings().verdict()) == ["nothing to warn of"]
    assert [size(n) for n in (0, 1536, 5 * 2**50)] == ["0 B", "1.5 KiB", "5120.0 TiB"]
