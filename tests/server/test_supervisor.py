"""`instep serve --restart`: a server that a signal kills is there again, with its streams, before a client gives up."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from instep.models.folder import write_model
from instep.recording.reader import RecordingReader
from instep.server.supervisor import MOST_RESTARTS
from instep_client import Client
from tests.support.models import SMALL, plain, whole
from tests.support.ports import free_ports
from tests.support.served import Served, serving
from tests.support.streaming import random_frames

pytestmark = pytest.mark.heavy


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[tuple[Served, str]]:
    """A supervised server that records, with a configuration file, and its endpoint."""
    write_model(tmp_path / "model", SMALL)
    port = free_ports(2)
    endpoint, http = f"tcp://127.0.0.1:{port}", f"127.0.0.1:{port + 1}"
    (tmp_path / "c.yaml").write_text("limits: {park_s: 60}\n")
    files = ["--record", str(tmp_path / "r.instep"), "--config", str(tmp_path / "c.yaml")]
    arguments = ["--http", http, "--restart", *files]
    with serving(tmp_path / "model", *arguments, endpoint=endpoint, start_new_session=True) as served:
        served.until("serving")
        yield served, endpoint


def server_of(served: Served) -> psutil.Process:
    (child,) = psutil.Process(served.process.pid).children()
    return child


def test_a_crash_costs_a_stream_nothing_but_time(
    supervised: tuple[Served, str], tmp_path: Path, rng: np.random.Generator
) -> None:
    served, endpoint = supervised
    x, outputs = random_frames(rng, 60)[:, 0], []
    with Client(endpoint) as client:
        stream = client.open("s")
        for number, frame in enumerate(x):
            if number in (20, 40):
                first = server_of(served)
                (steps,) = first.children()
                assert (first.name(), steps.name()) == ("instep server", "instep step")
                (first if number == 20 else steps).send_signal(signal.SIGKILL)
                assert served.until("restarting")["level"] == "error"
                served.until("serving")
                assert server_of(served).pid != first.pid
                about = httpx.get(f"{served.lines[-1]['http']}/api/stats").json()
                assert about["pid"] == server_of(served).pid
            outputs.append(stream.step(frame))
        np.testing.assert_array_equal(np.array(outputs), whole(SMALL, x)[0])
        stream.close()
    served.process.send_signal(signal.SIGHUP)
    assert served.until("reloaded")["changed"] == []
    served.process.terminate()
    assert [line["event"] for line in served.end()] == ["stopping", "stopped"]
    assert served.process.returncode == 0
    with RecordingReader(tmp_path / "r.instep") as reader:
        assert reader.finished


def test_a_crash_after_a_reload_serves_the_models_that_were_reloaded_with_their_streams(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    for name, seed in (("old", 1), ("new", 2)):
        write_model(tmp_path / name, plain(5, 8, seed=seed))
    file, x = tmp_path / "c.yaml", rng.standard_normal((30, 5)).astype(np.float32)

    def configure(name: str) -> None:
        file.write_text(f"model: {{folder: {{ears: {tmp_path / name}}}, on_reload: move}}")

    configure("old")
    endpoint = f"tcp://127.0.0.1:{free_ports(1)}"
    arguments = ["--config", str(file), "--record", str(tmp_path / "recordings"), "--restart"]
    with serving(None, *arguments, endpoint=endpoint, start_new_session=True) as served:
        served.until("serving")
        with Client(endpoint) as client:
            stream = client.open("s")
            y = [stream.step(x[:10])]
            configure("new")
            served.process.send_signal(signal.SIGHUP)
            served.until("moved")
            while stream.moved_at is None:  # a client that is not told yet has to connect again
                time.sleep(0.01)
            server_of(served).kill()  # in the middle of the reload
            file.write_text("model: [")
            served.until("serving")
            y.append(stream.step(x[10:20]))
            server_of(served).send_signal(signal.SIGSEGV)
            served.until("serving")
            y.append(stream.step(x[20:]))
            before, state = whole(plain(5, 8, seed=1), x[:10])
            after, _ = whole(plain(5, 8, seed=2), x[10:], state)
            np.testing.assert_array_equal(np.concatenate(y), np.concatenate([before, after]))
            stream.close()
        shutil.rmtree(tmp_path / "new")
        server_of(served).send_signal(signal.SIGSEGV)
        assert served.until("models not reloaded")["reason"].startswith("models are as at the start: ")
        served.until("serving")
        with Client(endpoint) as client:
            assert client.info.fingerprint == plain(5, 8, seed=1).fingerprint


def test_a_crash_undoes_no_reload_and_loads_no_other_weights_whatever_the_files_hold_by_then(
    supervised: tuple[Served, str], tmp_path: Path, rng: np.random.Generator
) -> None:
    served, endpoint = supervised
    x, file = random_frames(rng, 30)[:, 0], tmp_path / "c.yaml"
    for value in (66, 77):
        file.write_text(f"limits: {{park_s: {value}}}\n")
        served.process.send_signal(signal.SIGHUP)
        served.until("reloaded")
    good = file.read_text()
    file.write_text("limits: [\n")
    with Client(endpoint) as client:
        stream = client.open("s")
        y = [stream.step(x[:10])]
        write_model(tmp_path / "model", plain(5, 8, seed=9), overwrite=True)
        for first, is_read in ((10, False), (20, True)):
            if is_read:
                served.process.send_signal(signal.SIGHUP)
                served.until("not reloaded")
            server_of(served).send_signal(signal.SIGSEGV)
            assert served.until("reload kept")["changed"] == ["limits.park_s: 60.0 → 77.0"]
            served.until("serving")
            y.append(stream.step(x[first : first + 10]))
        np.testing.assert_array_equal(np.concatenate(y), whole(SMALL, x)[0])
    file.write_text(good)
    served.process.send_signal(signal.SIGHUP)
    assert served.until("reloaded")["changed"] == [], "77 was in effect"


def test_an_interrupt_from_a_terminal_reaches_the_server_once(supervised: tuple[Served, str]) -> None:
    served, _ = supervised
    server = server_of(served)
    os.killpg(served.process.pid, signal.SIGINT)  # as Ctrl-C does, to everybody in the group
    assert [line["event"] for line in served.end()] == ["stopping", "stopped"]
    assert served.process.returncode == 0, "a second one would have forced the end"
    assert not server.is_running()


def test_a_server_that_dies_again_and_again_is_given_up(supervised: tuple[Served, str]) -> None:
    served, _ = supervised
    for _ in range(MOST_RESTARTS):
        server_of(served).send_signal(signal.SIGSEGV)
        served.until("serving")
    unnamed = 36  # a real-time signal
    server_of(served).send_signal(unnamed)
    assert served.until("failed")["reason"] == (
        f"the server was killed by signal 36, {MOST_RESTARTS} restarts within a minute have not helped"
    )
    served.end()
    assert served.process.returncode == 128 + unnamed


def test_a_server_ends_with_its_supervisor(supervised: tuple[Served, str]) -> None:
    served, _ = supervised
    server = server_of(served)
    served.process.kill()
    served.process.wait()
    psutil.wait_procs([server], timeout=30)
    assert not server.is_running()
    assert [line["event"] for line in served.end()][:2] == ["stopping", "stopped"]
