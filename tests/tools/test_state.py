"""The commands on states through the command line, against a small server."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from instep_client import Client, StreamSnapshot
from instep_client.protocol.wire import Kind
from instep_tools.app import app
from tests.support.fake_server import FakeServer, Message
from tests.support.ring_server import RING_INFO, RingServer
from tests.support.session_link import X
from tests.tools.state_place import STATE, Place, assert_waits
from tests.tools.state_place import owner as owner
from tests.tools.state_place import place as place

MAIN = "from instep_tools import main; main()"


@pytest.mark.usefixtures("owner")
def test_read(place: Place) -> None:
    result = place.run("read", "mic")
    assert (result.exit_code, result.stderr) == (0, "")
    first, head, *rows = result.stdout.splitlines()
    assert first == "'mic' is before frame 5; its state is h float32 [2, 2] of model halving"
    assert head.split() == ["row", "min", "mean", "max", "first", "values"]
    value = f"{STATE[0, 0]:.6g}"
    assert [row.split() for row in rows] == [[f"h[{row}]", *[value] * 5] for row in range(2)]
    assert place.json("read", "mic") == {
        "stream": "mic",
        "seq": 5,
        "model": "halving",
        "fingerprint": "00",
        "state": STATE.tolist(),
    }
    assert place.ring.streams["mic"].epoch == 1


def test_a_state_of_odd_values_is_shown_and_stays_json(place: Place, owner: Client) -> None:
    odd = np.array([[np.nan, np.inf], [-np.inf, 0.1]], np.float32)
    place.ring.streams["mic"].state = odd.ravel()
    assert place.run("read", "mic").stdout.splitlines()[2].split() == ["h[0]", "nan", "nan", "nan", "nan", "inf"]
    text = place.run("read", "mic", "--json").stdout

    def strict(word: str) -> None:
        raise ValueError(word)

    assert json.loads(text, parse_constant=strict)["state"] == [["nan", "inf"], ["-inf", float(np.float32(0.1))]]


def test_a_snapshot_is_a_new_safetensors_file(place: Place, owner: Client, tmp_path: Path) -> None:
    path = tmp_path / "mic.safetensors"
    result = place.run("snapshot", "mic", "--to", path)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"saved 'mic' as it is before frame 5 (model halving, 00) in {path}\n"
    assert load_file(path)["state"].tobytes() == STATE.tobytes()
    assert place.refused("snapshot", "mic", "--to", path).startswith(f"{path} exists already and is not written over")
    assert load_file(path)["state"].tobytes() == STATE.tobytes()
    assert place.json("snapshot", "mic", "--to", tmp_path / "b") == {
        "stream": "mic",
        "seq": 5,
        "model": "halving",
        "fingerprint": "00",
        "file": str(tmp_path / "b"),
    }
    nowhere = tmp_path / "none" / "c"
    assert place.refused("snapshot", "mic", "--to", nowhere).startswith(f"{nowhere} cannot be written: there is no")
    assert "File name too long" in place.refused("snapshot", "mic", "--to", tmp_path / ("x" * 300) / "c")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b", "mic.safetensors"]


@pytest.mark.parametrize("error", [FileExistsError, PermissionError(13, "Permission denied")])
def test_a_file_that_turns_out_not_to_be_writable(
    place: Place, owner: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def save(self: StreamSnapshot, path: Path, overwrite: bool = True) -> None:
        assert not overwrite
        raise error

    monkeypatch.setattr(StreamSnapshot, "save", save)
    said = place.refused("snapshot", "mic", "--to", tmp_path / "a")
    assert re.search("exists already|cannot be written: Permission denied", said)


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        (["read", "mic"], Kind.READ_STATE, ""),
        (["fork", "mic", "copy"], Kind.OPEN, ""),
        (["reset", "mic", "--take-over"], Kind.RESUME, "stream 'mic' may have been taken from its owner"),
        (["reset", "mic", "--take-over"], Kind.RESET, "stream 'mic' was taken from its owner before this"),
    ],
)
def test_ctrl_c_ends_a_command_whose_server_has_fallen_silent(arguments: list[str], kind: Kind, said: str) -> None:
    ring, main = RingServer(), threading.main_thread().ident
    assert main is not None

    def handle(peer: bytes, frames: list[bytes]) -> list[tuple[bytes, Message]]:
        answers = ring.handle(peer, frames)
        if not interrupts or ring.kinds[-1] is not kind:
            return answers
        signal.pthread_kill(main, signal.SIGINT)
        return []

    interrupts = False
    with FakeServer(RING_INFO, handle) as server, Client(server.endpoint) as owner:
        owner.open("mic").step(X[:5])
        interrupts = True
        result = Place(ring, server.endpoint).run(*arguments)
        interrupts = False
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.startswith(said)
    assert len(result.stderr.splitlines()) == bool(said)


def test_a_fork_outlives_the_command_and_its_source_does_not_notice(place: Place, owner: Client) -> None:
    result = place.run("fork", "mic", "copy")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("'copy' continues from 'mic' with frame 5; the server")
    assert_waits(place, result.stdout, "copy", 5)
    assert place.ring.streams["mic"].epoch == 1
    assert place.json("fork", "mic", "second")["from"] == "mic"
    assert place.refused("fork", "mic", "second").startswith("NAME_IN_USE: ")
    assert place.refused("fork", "mic", "a\tb").startswith(r"'a\tb' is not a valid stream name: it holds '\t'")


def test_streams_that_are_not_there(place: Place, owner: Client, tmp_path: Path) -> None:
    place.ring.expired.add("gone")
    for name, code in (("none", "UNKNOWN_STREAM"), ("gone", "EXPIRED")):
        for arguments in (
            ["read", name],
            ["snapshot", name, "--to", tmp_path / "a"],
            ["fork", name, "copy"],
            ["reset", name],
            ["reset", name, "--take-over"],
        ):
            said = place.refused(*arguments)
            assert said.startswith(f"{code}: ")
            assert said.endswith(f"(stream '{name}')")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_parks_nothing_is_given_no_stream_to_keep(tmp_path: Path) -> None:
    ring = RingServer(replace(RING_INFO, park_s=0.0))
    with FakeServer(ring.info, ring.handle) as server, Client(server.endpoint) as owner:
        place = Place(ring, server.endpoint)
        owner.open("mic")
        owner.snapshot("mic").save(tmp_path / "a")
        for verb, *rest in (
            ["restore", tmp_path / "a", "--as", "b"],
            ["fork", "mic", "copy"],
            ["reset", "mic", "--take-over"],
        ):
            assert "limits.park_s is 0" in place.refused(str(verb), *rest)
        assert place.json("read", "mic")["seq"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["snapshott", "mic"], "Did you mean 'snapshot'?"),
        (["raed", "mic"], "Did you mean 'read'?"),
        (["read"], "Missing argument 'NAME'"),
        (["snapshot", "mic"], "Missing option '--to'"),
        (["fork", "mic"], "Missing argument 'NEW'"),
        (["restore"], "Missing argument 'FILE'"),
        (["read", "mic", "-e", "127.0.0.1:5757"], "write tcp://127.0.0.1:5757"),
        (["read", "mic", "--jsn"], "--json"),
    ],
)
def test_what_cannot_be_typed(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["state", *arguments], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_help_names_every_verb_and_the_exit_status() -> None:
    text = CliRunner().invoke(app, ["state", "-h"], env={"COLUMNS": "200"}).stdout
    assert all(verb in text for verb in ("read", "snapshot", "restore", "fork", "reset", "exit status"))
    assert "state" in CliRunner().invoke(app, ["--help"]).stdout


def test_as_a_program(place: Place, owner: Client, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MAIN, "state", "fork", "mic", "copy", "-e", place.endpoint],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert_waits(place, done.stdout, "copy", 5)
