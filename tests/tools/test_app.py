from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import instep_tools
from instep_client.protocol.wire import DEFAULT_ENDPOINT, SENTENCES, Code, Kind
from instep_tools.app import app
from tests.support.fake_server import INFO, FakeServer, error, goodbye, reference

MAIN = "from instep_tools import main; main()"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as server:
        yield server


def run(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env=environment)


def test_ping(server: FakeServer) -> None:
    result = run("ping", "--endpoint", server.endpoint)
    assert (result.exit_code, result.stderr) == (0, "")
    start = f"{server.endpoint}: ready, model halving (3 to 2, 00) on none, exact (portable-1), round trip "
    assert re.fullmatch(re.escape(start) + r"\d+\.\d{3} ms\n", result.stdout)
    assert len(result.stdout.splitlines()) == 1
    result = run("ping", "--json", INSTEP_ENDPOINT=server.endpoint)
    values = json.loads(result.stdout)
    assert values["server"]["arithmetic"] == "portable-1"
    assert values["round_trip_ms"] > 0
    assert (values["ready"], values["why"]) == (True, None)


def test_no_warning_of_the_library_follows_a_verdict(server: FakeServer) -> None:
    held_up = """
import asyncio, time
from instep_client.aio import AsyncClient
ping = AsyncClient.ping
async def slow(client):
    asked = asyncio.ensure_future(ping(client))
    await asyncio.sleep(0)
    time.sleep(0.6)
    return await asked
AsyncClient.ping = slow
"""
    typed = [sys.executable, "-c", held_up + MAIN, "ping", "-e", server.endpoint]
    done = subprocess.run(typed, capture_output=True, text=True, check=False, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")


def test_ping_of_a_server_that_takes_nothing_new(server: FakeServer) -> None:
    server.rules.ready = 0.0
    result = run("ping", "--endpoint", server.endpoint)
    assert (result.exit_code, result.stderr) == (1, "")
    assert result.stdout == (
        f"{server.endpoint}: not ready: the server takes nothing new: "
        "it is shutting down, or its recording has failed\n"
    )
    values = json.loads(run("ping", "--json", "-e", server.endpoint).stdout)
    assert (values["ready"], values["server"]["model"]) == (False, "halving")


@pytest.mark.parametrize(("code", "status"), [(Code.SHUTTING_DOWN, 1), (Code.BUSY, 1), (Code.WRONG_VERSION, 2)])
def test_ping_of_a_server_that_takes_no_connection(server: FakeServer, code: Code, status: int) -> None:
    server.rules.fault = lambda header, frames: [error(header[1], code)] if header[0] == Kind.HELLO else None
    result = run("ping", "--endpoint", server.endpoint)
    assert result.exit_code == status
    if status == 1:
        assert (result.stdout, result.stderr) == (f"{server.endpoint}: not ready: {SENTENCES[code]}\n", "")
        values = json.loads(run("ping", "--json", "-e", server.endpoint).stdout)
        assert values == {
            "endpoint": server.endpoint,
            "ready": False,
            "why": SENTENCES[code],
            "round_trip_ms": None,
            "server": None,
        }
    else:
        assert (result.stdout, result.stderr) == ("", f"error: {code.name}: {SENTENCES[code]}\n")
        result = run("ping", "--json", "-e", server.endpoint)
        assert json.loads(result.stdout) == {"error": f"{code.name}: {SENTENCES[code]}"}
        assert (result.exit_code, result.stderr) == (2, f"error: {code.name}: {SENTENCES[code]}\n")


@pytest.mark.parametrize("kind", [Kind.PING, Kind.STATS])
def test_ping_of_a_server_that_ends_meanwhile_does_not_wait_for_another(server: FakeServer, kind: Kind) -> None:
    server.rules.fault = lambda header, frames: [goodbye()] if header[0] == kind else None
    result = run("ping", "--endpoint", server.endpoint)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: the server is shutting down: it was asked to\n"


def test_produce(server: FakeServer, tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.savetxt(tmp_path / "x.csv", x, delimiter=",")
    result = run("produce", tmp_path / "x.csv", "--name", "mic", "-e", server.endpoint)
    assert result.exit_code == 0
    expected = "stream,seq,y0,y1\n" + "".join(f"mic,{seq},{a},{b}\n" for seq, (a, b) in enumerate(reference(x)[0]))
    assert result.stdout == expected
    assert result.stderr.startswith("4 frames of 1 stream sent and answered")


def test_outputs_have_the_names_that_the_model_gives_them(tmp_path: Path) -> None:
    np.savetxt(tmp_path / "x.csv", np.zeros((2, 3)), delimiter=",")
    with FakeServer(replace(INFO, output_names=("speech", "loud, or not"))) as server:
        produced = run("produce", tmp_path / "x.csv", "-e", server.endpoint)
        saved = tmp_path / "y.csv"
        replayed = run("replay", tmp_path / "x.csv", "--save", saved, "-e", server.endpoint)
    assert produced.stdout.splitlines()[0] == 'stream,seq,speech,"loud, or not"'
    assert replayed.exit_code == 0, replayed.stderr
    assert saved.read_text().splitlines()[0].endswith('"x2","speech","loud, or not"')


@pytest.mark.parametrize("file", [[], ["-"]])
def test_produce_reads_standard_input_and_names_bad_lines(file: list[str], server: FakeServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, "produce", *file, "--named", "--endpoint", server.endpoint],
        input="a 1 2 3\nb 1 2\na 4 5 6\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.stdout.splitlines() == ["stream,seq,y0,y1", "a,0,6.0,7.0", "a,1,18.0,19.0"]
    assert done.stderr.startswith("error: line 2: ")
    assert done.returncode == 1


def test_replay(server: FakeServer, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.ones((5, 3), np.float32))
    result = run("replay", tmp_path / "x.npy", "--save", tmp_path / "y.npz", "-e", server.endpoint)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("5 frames of 1 stream in ")
    result = run("replay", tmp_path / "y.npz", "--check", "--speed", "max", "-e", server.endpoint)
    assert result.exit_code == 0
    assert "all 5 equal those in the file, bit for bit" in result.stdout
    result = run("replay", tmp_path / "x.npy", "--check", "-e", server.endpoint)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")


@pytest.mark.parametrize("speed", ["1", "x20", "20x", "×1.5", "max"])
def test_speeds(server: FakeServer, tmp_path: Path, speed: str) -> None:
    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    result = run("replay", tmp_path / "x.npy", "--speed", speed, "--rate", "1000", "-e", server.endpoint)
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prodce"], "Did you mean 'produce'?"),
        (["loadtst"], "Did you mean 'loadtest'?"),
        (["replay"], "Missing argument 'FILE'"),
        (["produce", "--rate", "0"], "it must be more than 0"),
        (["produce", "--rate", "abc"], "'abc'"),
        (["streams", "list", "--place", "prked"], "Did you mean 'parked'?"),
        (["ping", "-e", "127.0.0.1:5757"], "'127.0.0.1:5757' is not an endpoint: write tcp://127.0.0.1:5757"),
        (["ping", "-e", "tcp://there"], "'tcp://there' is not an endpoint: write tcp://127.0.0.1:5757 or ipc:///path"),
        (["produce", "--rate", "inf"], "it must be more than 0"),
        (["produce", "--frames", "0"], "Invalid value for '--frames'"),
        (["replay", "x", "--speed", "fast"], "it must be 1 (real time), xN"),
        (["replay", "x", "--speed", "-1"], "it must be 1 (real time), xN"),
    ],
)
def test_what_cannot_be_typed(arguments: list[str], said: str) -> None:
    result = run(*arguments, COLUMNS="300")
    assert result.exit_code == 2
    assert "Input should" not in result.stderr
    assert "Value error" not in result.stderr
    assert " ".join(result.stderr.replace("│", " ").split()).count(said) == 1


def test_version() -> None:
    for typed in ("--version", "-V"):
        assert run(typed).stdout == f"instep-client {version('instep')}\n"


def test_nobody_answers() -> None:
    for arguments in (["ping"], ["stats"], ["loadtest"]):
        result = run(*arguments, "--endpoint", "tcp://127.0.0.1:1")
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.splitlines() == [
            "error: nothing listens at tcp://127.0.0.1:1: start a server there, or correct the endpoint"
        ]


def test_help_names_every_command_and_the_endpoint() -> None:
    assert all(name in run("--help").stdout for name in ("ping", "produce", "replay", "loadtest"))
    for name in ("ping", "produce", "replay", "loadtest"):
        text = run(name, "-h", COLUMNS="200").stdout
        assert DEFAULT_ENDPOINT in text
        assert "INSTEP_ENDPOINT" in text
        assert "INSTEP_MODEL" in text


@pytest.fixture
def handler_kept() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("handler_kept")
def test_an_interrupt_that_nothing_else_handles_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("instep_tools.app.app", interrupted)
    with pytest.raises(SystemExit) as end:
        instep_tools.main()
    assert end.value.code == 130
    signal.raise_signal(signal.SIGINT)  # changes nothing any more


def test_until_it_handles_them_interrupts_end_it_and_a_terminals_line() -> None:
    script = "import os, signal\nimport instep_tools\nsignal.signal(2, instep_tools.end_quietly)\n"
    terminal, program = pty.openpty()
    with os.fdopen(terminal, "rb", buffering=0) as screen, os.fdopen(program, "wb") as stderr:
        command = [sys.executable, "-c", script + "os.kill(os.getpid(), 2)"]
        assert subprocess.run(command, stderr=stderr, check=False).returncode == 130
        assert screen.read(10) == b"\r\n"


@pytest.mark.usefixtures("handler_kept")
@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("instep_tools.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as end:
        instep_tools.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"instep-client needs the package '{package}', which is not installed: pip install \"instep[cli]\", "
        'or pip install -e ".[cli]" in a checkout\n'
    )


@pytest.mark.usefixtures("handler_kept")
def test_other_missing_modules_are_bugs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "instep_tools.app", None)
    with pytest.raises(ModuleNotFoundError, match=r"instep_tools.app"):
        instep_tools.main()


@pytest.mark.usefixtures("handler_kept")
def test_main_runs_the_app(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["instep-client", "--help"])
    with pytest.raises(SystemExit) as end:
        instep_tools.main()
    assert end.value.code == 0
    assert "instep-client" in capsys.readouterr().out
