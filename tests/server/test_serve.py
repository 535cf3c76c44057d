"""From a configuration to a running process and its exit status."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pytest
import torch
from typer.testing import CliRunner

from instep.config import Config
from instep.interrupts import Stopped
from instep.models.folder import write_model
from instep.models.network import IN_WORDS
from instep.models.portable.machine import host
from instep.models.portable.self_check import check_arithmetic
from instep.program import app
from instep.recording.writer import RecordingWriter
from instep.server import serve
from instep.server.preparation import CannotServe, prepare
from instep.server.services import effective_limits
from instep_client import Client
from tests.support.gate import GATE_VALUE, Gate
from tests.support.models import SMALL, whole
from tests.support.running import config as settings
from tests.support.running import log_into
from tests.support.served import WarmServer, serving

QUIET = log_into([])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    write_model(folder, SMALL)
    return folder


def configured(model: Path, **sections: dict[str, Any]) -> Config:
    return settings(model={"folder": model}, **sections)


def test_a_cuda_device_that_is_not_there_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CannotServe, match="CUDA"):
        prepare(configured(model, engine={"device": "cuda"}), QUIET)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotServe, match="cuda:3"):
        prepare(configured(model, engine={"device": "cuda:3"}), QUIET)


def test_a_processor_without_fma_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = replace(host(), triple="x86_64-unknown-linux-gnu", features="+avx2,-fma")
    monkeypatch.setattr("instep.server.preparation.host", lambda: without)
    with pytest.raises(CannotServe, match="FMA"):
        prepare(configured(model, engine={"device": "cpu"}), QUIET)


def test_arithmetic_that_gives_other_bits_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instep.models.portable.self_check.DIGEST", "of other bits")
    monkeypatch.setattr("instep.server.preparation.check_arithmetic", check_arithmetic.__wrapped__)
    with pytest.raises(CannotServe):
        prepare(configured(model), QUIET)


def test_limits_are_fitted_to_the_model() -> None:
    config = Config.model_validate({"transport": {"max_message_bytes": 65_536}})
    limits = effective_limits(config, features=100, outputs=10)
    assert limits.max_block_frames * (100 * 4 + 24) <= 65_536
    assert limits.credit_frames >= limits.max_block_frames
    with pytest.raises(CannotServe, match="raise it"):
        effective_limits(config, features=20_000, outputs=1)


def test_the_log_says_what_it_waits_for_and_what_is_served_and_an_interrupt_ends_it_cleanly(
    model: Path, tmp_path: Path
) -> None:
    recording = tmp_path / "r.instep"
    with serving(model, "--record", str(recording)) as served:
        endpoint = served.until("serving")["endpoint"]
        lines = {line["event"]: line for line in served.lines}
        assert [event for event in lines if event != "compiling"] == [
            *("loading", "compiled", "recording", "ready", "serving")
        ]
        assert all(list(line)[:3] == ["timestamp", "level", "event"] for line in lines.values())
        assert lines["loading"]["model"] == str(model)
        assert lines["compiled"]["arithmetic"] == IN_WORDS
        assert lines["ready"]["exactness"] == "exact"
        assert lines["recording"] == {**lines["recording"], "file": str(recording), "durability": "commit"}
        assert CliRunner().invoke(app, lines["serving"]["next"].split()[1:]).exit_code == 0
        ready = {"model": SMALL.name, "device": "cpu", "max_streams": 4096}
        assert lines["ready"] == {**lines["ready"], **ready}
        with Client(endpoint) as client:
            x = np.ones((3, 5), np.float32)
            np.testing.assert_array_equal(client.open("s").step(x), whole(SMALL, x)[0])
        served.process.send_signal(signal.SIGINT)
        stopping, stopped = served.end()
        assert served.process.returncode == 0
        assert (stopping["event"], stopped["event"]) == ("stopping", "stopped")
        assert (stopped["frames"], stopped["messages_unanswered"]) == (3, 0)
    with serving(model, "--record", str(recording)) as served:
        served.until("serving")
        (recovered,) = (line for line in served.lines if line["event"] == "recovered")
        assert (recovered["streams"], recovered["frames_replayed"]) == (0, 0)
        assert recovered["seconds"] > 0


def test_a_start_that_fails_is_one_json_object_a_line(model: Path, tmp_path: Path) -> None:
    for arguments, named in (
        (
            ["--set", "recording.durability=comit", "--set", "engine.max_streams=0"],
            ["engine.max_streams", "recording.durability"],
        ),
        ([str(tmp_path / "mdoel")], ["mdoel"]),
    ):
        with serving(model, *arguments) as served:
            *_, last = served.end()
            assert served.process.returncode == 2
        assert (last["event"], last["level"]) == ("cannot serve", "error")
        assert all(name in reason for name, reason in zip(named, last["reasons"], strict=True))


def test_a_second_interrupt_forces_the_end(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate()
    monkeypatch.setattr("instep.server.services.Stepper", gate.bare_stepper)

    def leave_a_frame_unanswered(endpoint: str) -> None:
        with Client(endpoint) as client:
            client.open("s").send(np.full(5, GATE_VALUE))
            client.ping()
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    def on_ready(endpoint: str) -> None:
        threading.Thread(target=leave_a_frame_unanswered, args=(endpoint,)).start()

    config = configured(model, log={"format": "json"})
    assert serve.run(config, on_ready=on_ready) == 130
    gate.open()
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["event"] for line in lines[-3:]] == ["serving", "stopping", "stopped"]
    assert lines[-1]["messages_unanswered"] == 1


def test_too_little_memory_is_said_and_leaves_no_recording_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory\nin C++")

    monkeypatch.setattr("instep.server.services.Stepper", exhausted)
    folder = tmp_path / "recordings"
    folder.mkdir()
    with pytest.raises(CannotServe, match=r"engine\.max_streams = 99"):
        serve.run(configured(model, engine={"max_streams": 99}, recording={"path": folder / "r.instep"}))
    assert list(folder.iterdir()) == []


def test_a_child_server_ends_when_a_signal_stops_the_wait_for_it(model: Path) -> None:
    class Stopping(dict[str, Any]):
        def __ior__(self, said: object) -> Self:  # type: ignore[override, misc]
            raise Stopped(signal.SIGTERM)

    child = WarmServer(model)
    child.started = Stopping()
    with pytest.raises(Stopped), child:
        pass
    with pytest.raises(ProcessLookupError):
        os.kill(child.pid, 0)


def test_a_recording_that_cannot_be_closed_is_a_failure(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: RecordingWriter) -> None:
        raise OSError("disk full, injected")

    monkeypatch.setattr(RecordingWriter, "close", full)
    config = configured(model, recording={"path": tmp_path / "r.instep"})
    assert serve.run(config, on_ready=lambda _: os.kill(os.getpid(), signal.SIGINT)) == 1


@contextmanager
def manager(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(address)
        listening.settimeout(60)
        yield listening


def told(listening: socket.socket, first: str) -> str:
    """The next message that begins with this line."""
    while True:
        message = listening.recv(4096).decode()
        if message.partition("\n")[0] == first:
            return message


def test_several_shards_are_ready_and_alive_together(model: Path, tmp_path: Path) -> None:
    with manager(str(tmp_path / "notify")) as listening:
        environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with serving(model, "--shards", "2", endpoint=f"ipc://{tmp_path}/s", env=environ) as served:
            assert listening.recv(4096).decode() == f"READY=1\nSTATUS=serving {SMALL.name} at 2 endpoints"
            first, _ = psutil.Process(served.process.pid).children()
            assert told(listening, "WATCHDOG=1")
            first.suspend()
            while select.select([listening], [], [], 0.5)[0]:  # what was on its way
                listening.recv(4096)
            first.resume()
            assert told(listening, "WATCHDOG=1")


def test_it_says_when_it_serves_that_it_lives_and_when_it_drains(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    with manager(str(tmp_path / "notify")) as listening:
        environ = {**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "200000"}
        with serving(tmp_path / "model", env=environ) as served:
            endpoint = served.until("serving")["endpoint"]
            ready = listening.recv(4096).decode()
            assert ready == f"READY=1\nSTATUS=serving {SMALL.name} at {endpoint}"
            for _ in range(3):
                assert listening.recv(4096) == b"WATCHDOG=1"
            served.process.send_signal(signal.SIGSTOP)  # as a loop that is stuck
            late = 0
            while select.select([listening], [], [], 0.5)[0]:  # what was on its way
                assert listening.recv(4096) == b"WATCHDOG=1"
                late += 1
            assert late < 3
            served.process.send_signal(signal.SIGCONT)
            served.process.terminate()
            assert told(listening, "STOPPING=1")
            assert served.end()[-1]["event"] == "stopped"
            assert served.process.returncode == 0
