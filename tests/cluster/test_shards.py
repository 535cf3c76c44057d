"""`instep serve --shards N`: N servers under one command, in real processes."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from instep.cluster.shards import claim
from instep.config import Config
from instep.models.folder import write_model
from instep.recording.errors import RecordingError
from instep.recording.reader import RecordingReader
from instep.replay import command
from instep.server.checks import CannotServe, before_loading, rehearse
from instep.server.supervisor import MOST_RESTARTS
from instep_client import Client
from instep_client.protocol.wire import shard_of
from tests.support.models import SMALL, whole
from tests.support.ports import free_ports
from tests.support.running import log_into
from tests.support.served import Served, serving
from tests.support.streaming import random_frames

TOKEN = "a-token-of-a-test-and-of-nothing-else"


@dataclass
class Cluster:
    """Two shards that record, and their admin server."""

    served: Served
    port: int
    http: httpx.Client

    def endpoint(self, shard: int) -> str:
        return f"tcp://127.0.0.1:{self.port + shard}"

    def process(self, shard: int) -> psutil.Process:
        return psutil.Process(self.http.get("/api/stats").json()["shards"][shard]["pid"])


def take(port: int) -> socket.socket:
    """Take a port as soon as the process that has it is gone."""
    while True:
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", port))


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    write_model(tmp_path / "model", SMALL)
    return ["--shards", "2", "--record", str(tmp_path / "recordings")]


@pytest.fixture
def cluster(tmp_path: Path, arguments: list[str]) -> Iterator[Cluster]:
    (tmp_path / "tokens").write_text(f"one: {TOKEN}\n")
    port = free_ports(3)
    http = f"127.0.0.1:{port + 2}"
    arguments += ["--http", http, "--set", f"http.token_file={tmp_path / 'tokens'}"]
    with (
        serving(tmp_path / "model", *arguments, endpoint=f"tcp://127.0.0.1:{port}", start_new_session=True) as served,
        httpx.Client(base_url=f"http://{http}", headers={"authorization": f"Bearer {TOKEN}"}, timeout=30) as client,
    ):
        cluster = Cluster(served, port, client)
        lines = [served.until("serving", "admin server") for _ in range(3)]
        endpoints = {line["shard"]: line["endpoint"] for line in lines if line["event"] == "serving"}
        assert endpoints == {shard: cluster.endpoint(shard) for shard in (0, 1)}
        yield cluster


@pytest.mark.heavy
def test_a_killed_shard_comes_back_with_its_streams_and_signals_and_numbers_are_those_of_all(
    cluster: Cluster, tmp_path: Path, rng: np.random.Generator
) -> None:
    names = [next(name for name in map(str, range(99)) if shard_of(name, 2) == shard) for shard in (0, 1)]
    x = random_frames(rng, 40)[:, 0]
    with Client(cluster.endpoint(0)) as client:
        streams = list(map(client.open, names))
        y = [[stream.step(x[:20])] for stream in streams]
        pids = [cluster.process(shard).pid for shard in (0, 1)]
        cluster.process(1).kill()
        assert cluster.served.until("restarting", shard=1)["level"] == "error"
        cluster.served.until("serving", shard=1)
        for stream, outputs in zip(streams, y, strict=True):
            outputs.append(stream.step(x[20:]))
            np.testing.assert_array_equal(np.concatenate(outputs), whole(SMALL, x)[0])
        assert [cluster.process(shard).pid == pid for shard, pid in enumerate(pids)] == [True, False]
        check_admin(cluster)
        (tmp_path / "tokens").write_text(f"one: {TOKEN[::-1]}\n")
        cluster.served.process.send_signal(signal.SIGHUP)
        assert {cluster.served.until("reloaded")["shard"] for _ in range(2)} == {0, 1}
        assert cluster.http.get("/metrics").status_code == 401
        assert cluster.http.get("/metrics", headers={"authorization": f"Bearer {TOKEN[::-1]}"}).status_code == 200
        cluster.served.process.terminate()
        lines = [(line["event"], line.get("shard")) for line in cluster.served.end()]
    assert sorted(lines) == [("stopped", 0), ("stopped", 1), ("stopping", 0), ("stopping", 1)]
    assert cluster.served.process.returncode == 0
    for shard in (0, 1):
        with RecordingReader(tmp_path / "recordings" / f"shard-{shard}" / f"{SMALL.name}.instep") as reader:
            assert [info.name for info in reader.streams()] == [names[shard]]
    from rich.console import Console

    assert command.run([tmp_path / "recordings"], tmp_path / "model", [], Console(), json=True) == command.VERIFIED


def check_admin(cluster: Cluster) -> None:
    """The admin server shows what both shards do, and nothing without a token."""
    assert cluster.http.get("/healthz", headers={"authorization": ""}).status_code == 200
    for path in ("/api/stats", "/metrics", "/shards/1/"):
        assert cluster.http.get(path, headers={"authorization": ""}).status_code == 401
    assert cluster.http.get("/readyz").status_code == 200
    families = {each.name: each for each in text_string_to_metric_families(cluster.http.get("/metrics").text)}
    frames = {each.labels["shard"]: each.value for each in families["instep_frames"].samples}
    assert frames == {"0": 40.0, "1": 20.0}, "the process of shard 1 stepped the second half"
    assert {each.labels["shard"] for each in families["instep_latency_seconds"].samples} == {"0", "1"}
    assert [each.value for each in families["instep_shard_up"].samples] == [1.0, 1.0]
    assert cluster.http.get("/").headers["location"] == "shards/0/"
    assert "<title>instep</title>" in cluster.http.get("/shards/1/").text
    assert cluster.http.get("/shards/1/api/streams", params={"limit": 1}).json()["total"] == 1
    assert cluster.http.get("/shards/1/api/streams/no%3Fne%20").json()["error"]["code"] == "UNKNOWN_STREAM"
    assert cluster.http.get("/shards/2/").json()["error"]["code"] == "NOT_FOUND"
    with cluster.http.stream("GET", "/shards/1/api/events") as events:
        assert next(events.iter_lines()) == "event: stats"


@pytest.mark.heavy
def test_a_shard_that_dies_again_and_again_is_given_up_and_the_others_go_on(cluster: Cluster) -> None:
    for _ in range(MOST_RESTARTS):
        cluster.process(1).kill()
        cluster.served.until("serving", shard=1)
    cluster.process(1).kill()
    assert cluster.served.until("failed", shard=1)["level"] == "error"
    with Client(cluster.endpoint(0)) as client:
        client.ping()
    for path in ("/healthz", "/readyz"):
        answer = cluster.http.get(path)
        assert answer.status_code == 503
        assert "shard 1" in answer.json()["error"]["message"]
    assert cluster.http.get("/shards/1/api/stats").status_code == 503
    assert [each["ready"] for each in cluster.http.get("/api/stats").json()["shards"]] == [True, False]
    cluster.served.process.send_signal(signal.SIGINT)
    cluster.served.end()
    assert cluster.served.process.returncode == 1


@pytest.mark.heavy
def test_a_port_that_is_taken_at_a_restart_is_tried_again(cluster: Cluster) -> None:
    supervisor, server = psutil.Process(cluster.served.process.pid), cluster.process(1)
    supervisor.suspend()
    server.kill()
    with take(cluster.port + 1):
        supervisor.resume()
        assert "SIGKILL" in cluster.served.until("restarting", shard=1)["reason"]
        assert "SIGKILL" not in cluster.served.until("restarting", shard=1)["reason"]
    cluster.served.until("serving", shard=1)
    with Client(cluster.endpoint(1)) as client:
        client.ping()


@pytest.mark.heavy
def test_a_shard_that_cannot_begin_ends_all(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "s.1").mkdir()
    with serving(tmp_path / "model", *arguments, endpoint=f"ipc://{tmp_path}/s") as served:
        reasons = [line["reasons"] for line in served.end() if line["event"] == "cannot serve"]
    assert served.process.returncode == 2
    ((reason,),) = reasons
    assert reason.startswith("shard 1: ")
    assert f"{tmp_path}/s.1" in reason


def configured(endpoint: str, record: Path | None = None, http: str = "off", model: Path | None = None) -> Config:
    sections = {"model": {"folder": model}, "transport": {"endpoint": endpoint}, "http": {"endpoint": http}}
    return Config.model_validate({**sections, "recording": {"path": record}})


def problems(config: Config, shards: int, copies: int = 0) -> list[str]:
    return [str(each) for each in before_loading(config, shards=shards, copies=copies) if each.severity == "problem"]


def test_ports_that_are_taken_or_do_not_exist_are_refused_before_anything_starts() -> None:
    for endpoint in ("tcp://127.0.0.1:*", "tcp://127.0.0.1:65534"):
        (problem,) = problems(configured(endpoint), 3)
        assert endpoint in problem
    port = free_ports(3)
    endpoint = f"tcp://127.0.0.1:{port}"
    assert problems(configured(endpoint), 3) == []
    (problem,) = problems(configured(endpoint, http=f"127.0.0.1:{port + 2}"), 3)
    assert "http.endpoint" in problem
    with socket.create_server(("127.0.0.1", port + 2)):
        (problem,) = problems(configured(endpoint), 3)
    assert re.match(rf"shard 2: .*:{port + 2}\b", problem)


def test_recordings_of_another_number_of_shards_are_refused(arguments: list[str], tmp_path: Path) -> None:
    folder, told = tmp_path / "recordings", list[dict[str, Any]]()
    config = configured(f"ipc://{tmp_path}/s", folder, model=tmp_path / "model")
    rehearse(config, log_into(told), shards=4)
    endpoints = [line["endpoint"] for line in told if line["event"] == "can serve"]
    assert endpoints == [f"ipc://{tmp_path}/s.{shard}" for shard in range(4)]
    assert not folder.exists(), "nothing was written"
    for count in (6, 4):
        claim(folder, count)  # nothing was recorded, and 6 does not count
    (folder / "shard-2" / "small.instep").touch()
    assert problems(config, 4) == []
    for count in (6, 1):
        (problem,) = problems(config, count)
        assert f"of 4 shards, not {count}" in problem
    with pytest.raises(CannotServe, match="of 4 shards, not 2"):
        rehearse(config, log_into([]), shards=2)
    (folder / "shards").unlink()
    with pytest.raises(RecordingError, match=re.escape(str(folder / "shards"))):
        problems(config, 4)
    (tmp_path / "ears.instep").touch()
    for wrong, reason in ((tmp_path / "ears.instep", "is one file"), (tmp_path, "has the recording of a server")):
        (problem,) = problems(configured(f"ipc://{tmp_path}/s", wrong), 2)
        assert f"{wrong} {reason}" in problem
    assert problems(configured(f"ipc://{tmp_path}/s", tmp_path), 1) == []
    (problem,) = problems(configured(f"ipc://{tmp_path}/s", tmp_path), 1, copies=1)  # those of one shard are elsewhere
    assert str(tmp_path) in problem
