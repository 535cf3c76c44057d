from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from instep.program import app
from instep_client.protocol.wire import Code, Kind
from tests.support.fake_server import INFO, FakeServer, error, fake_shards, reference


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def test_ping(server: FakeServer) -> None:
    result = run("ping", "--endpoint", server.endpoint)
    assert (result.exit_code, result.stderr, len(result.stdout.splitlines())) == (0, "", 1)
    assert result.stdout.startswith(f"{server.endpoint}: ready, model halving ")
    values = json.loads(run("ping", "--json", INSTEP_ENDPOINT=server.endpoint).stdout)
    assert (values["ready"], values["why"], values["server"]["arithmetic"]) == (True, None, "portable-1")
    assert values["round_trip_ms"] > 0
    server.rules.ready = 0.0
    result = run("ping", "--json", "--endpoint", server.endpoint)
    values = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (1, "")
    assert (values["ready"], values["server"]["model"]) == (False, "halving")


@pytest.mark.parametrize(("code", "status"), [(Code.SHUTTING_DOWN, 1), (Code.BUSY, 1), (Code.WRONG_VERSION, 2)])
def test_ping_of_a_server_that_takes_no_connection(server: FakeServer, code: Code, status: int) -> None:
    server.rules.fault = lambda header, frames: [error(header[1], code)] if header[0] == Kind.HELLO else None
    result = run("ping", "--json", "--endpoint", server.endpoint)
    assert result.exit_code == status
    if status == 1:
        about = {"endpoint": server.endpoint, "ready": False, "round_trip_ms": None, "server": None, "models": []}
        assert json.loads(result.stdout) == {**about, "why": code.sentence}
    else:
        said = f"{code.name}: {code.sentence}"
        assert (json.loads(result.stdout), result.stderr) == ({"error": said}, f"error: {said}\n")


def test_a_cluster_is_shown_with_its_shards() -> None:
    with fake_shards((0, 0), (1, 0)) as (first, second):
        first.rules.occupy("mic-1")
        second.rules.occupy("mic-4")
        place = "--endpoint", f"tcp://127.0.0.1:1,{second.endpoint}"
        assert "2 shards" in run("ping", *place).stdout
        for command in (("streams", "list", *place), ("top", *place, "--every", "0.1")):
            words = [line.split() for line in run(*command).stdout.splitlines() if line]
            assert [line[-1] for line in words if line[0] in ("name", "mic-1", "mic-4", "▼name")][-2:] == ["0", "1"]
        second.rules.ready = 0.0
        assert run("ping", *place).exit_code == 1
        first.rules.fault = lambda header, frames: []
        result = run("ping", *place, "--json")
        values = json.loads(result.stdout)
        assert (result.exit_code, values["ready"], values["server"]["shards"]) == (1, False, 2)
        assert first.endpoint in values["why"]


def test_send(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",")
    with FakeServer(replace(INFO, output_names=("speech", "loud, or not"))) as server:
        result = run("send", tmp_path / "x.csv", "--name", "mic", "-e", server.endpoint)
        saved = run("send", tmp_path / "x.csv", "--output", tmp_path / "y.csv", "-e", server.endpoint)
    lines = (f"mic,{seq},{a},{b}\n" for seq, (a, b) in enumerate(reference(x)[0]))
    assert result.stdout == 'stream,seq,speech,"loud, or not"\n' + "".join(lines)
    assert (result.exit_code, saved.exit_code) == (0, 0)
    assert (tmp_path / "y.csv").read_text().splitlines()[0].endswith('"x2","speech","loud, or not"')


def test_send_reads_standard_input_and_names_bad_lines(server: FakeServer) -> None:
    command = [sys.executable, "-m", "instep", "send", "-", "--named", "--endpoint", server.endpoint]
    typed = "a 1 2 3\nb 1 2\na 4 5 6\n"
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=False, timeout=100)
    assert done.stdout.splitlines() == ["stream,seq,y0,y1", "a,0,6.0,7.0", "a,1,18.0,19.0"]
    assert done.stderr.startswith("error: line 2: ")
    assert done.returncode == 1


def test_speeds(server: FakeServer, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    for speed in ("1", "x20", "×1.5", "max"):
        result = run("send", tmp_path / "x.npy", "--speed", speed, "--rate", "1000", "-e", server.endpoint)
        assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sned"], "'send'"),
        (["send", "--rate", "0"], "'--rate'"),
        (["send", "--rate", "abc"], "'abc'"),
        (["ping", "-e", "127.0.0.1:5757"], "tcp://127.0.0.1:5757"),
        (["send", "x", "--speed", "fast"], "'--speed'"),
    ],
)
def test_what_cannot_be_typed(arguments: list[str], said: str) -> None:
    result = run(*arguments, COLUMNS="300")
    assert result.exit_code == 2
    assert not re.search("Input should|Value error", result.stderr)
    assert said in result.stderr


@pytest.mark.parametrize("command", ["ping", "streams", "loadtest"])
def test_nobody_answers(command: str) -> None:
    result = run(command, "--endpoint", "tcp://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: nothing listens at tcp://127.0.0.1:1: ")
    assert len(result.stderr.splitlines()) == 1
