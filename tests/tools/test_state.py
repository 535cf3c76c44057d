"""The commands on states through the command line, against a small server."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner, Result

from instep.program import app
from instep_client import Client, StreamSnapshot
from instep_client.protocol.wire import Kind
from tests.support.fake_server import RING_INFO, FakeRules, FakeServer, Message, reference
from tests.support.session_link import X

STATE = reference(X[:5])[1]


class Place:
    """A server, and what the command line says of it."""

    def __init__(self, ring: FakeRules, endpoint: str) -> None:
        self.ring = ring
        self.endpoint = endpoint

    def run(self, *arguments: str | Path) -> Result:
        return CliRunner().invoke(app, ["state", *map(str, arguments), "-e", self.endpoint])

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.stderr
        values: dict[str, Any] = json.loads(result.stdout)
        return values

    def refused(self, *arguments: str | Path) -> str:
        """The sentence of a command that changes nothing."""
        before = {name: (stream.epoch, stream.next_seq) for name, stream in self.ring.streams.items()}
        result = self.run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert {name: (stream.epoch, stream.next_seq) for name, stream in self.ring.streams.items()} == before
        (line,) = result.stderr.splitlines()
        return line.removeprefix("error: ")


@pytest.fixture
def place() -> Iterator[Place]:
    ring = FakeRules(RING_INFO)
    with FakeServer(RING_INFO, ring.handle) as server:
        yield Place(ring, server.endpoint)


@pytest.fixture
def owner(place: Place) -> Iterator[Client]:
    """A client that has the stream `mic`, five frames of which were applied."""
    with Client(place.endpoint) as client:
        client.open("mic").step(X[:5])
        yield client


def test_read(place: Place, owner: Client) -> None:
    about = {"stream": "mic", "seq": 5, "model": "halving", "fingerprint": "00"}
    assert place.json("read", "mic") == {**about, "state": {"h": STATE.tolist()}}
    assert place.ring.streams["mic"].epoch == 1
    odd = np.array([[np.nan, np.inf], [-np.inf, 0.1]], np.float32)
    place.ring.streams["mic"].state = odd.ravel()
    text = place.run("read", "mic", "--json").stdout
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["state"]["h"] == [["nan", "inf"], ["-inf", float(np.float32(0.1))]]
    rows = [line.split() for line in place.run("read", "mic").stdout.splitlines()[2:]]
    assert [row[:1] + row[-2:] for row in rows] == [["h[0]", "nan", "inf"], ["h[1]", "-inf", "0.1"]]


@pytest.mark.usefixtures("owner")
def test_a_snapshot_is_a_new_safetensors_file(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "mic.safetensors"
    assert place.json("save", "mic", "--output", path)["file"] == str(path)
    for refused in (path, tmp_path / "none" / "c"):
        assert str(refused) in place.refused("save", "mic", "--output", refused)
    assert place.refused("save", "none", "--output", tmp_path / "a").startswith("UNKNOWN_STREAM: ")
    assert [each.name for each in tmp_path.iterdir()] == ["mic.safetensors"]
    assert load_file(path)["state.h"].tobytes() == STATE.tobytes()


def test_ctrl_c_ends_a_command_whose_server_has_fallen_silent() -> None:
    ring, main = FakeRules(RING_INFO), threading.main_thread().ident
    assert main is not None

    def handle(peer: bytes, frames: list[bytes]) -> list[tuple[bytes, Message]]:
        answers = ring.handle(peer, frames)
        if not interrupts or ring.kinds[-1] is not Kind.READ_STATE:
            return answers
        signal.pthread_kill(main, signal.SIGINT)
        return []

    interrupts = False
    with FakeServer(RING_INFO, handle) as server, Client(server.endpoint) as owner:
        owner.open("mic").step(X[:5])
        interrupts = True
        result = Place(ring, server.endpoint).run("read", "mic")
        interrupts = False
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "")


@pytest.mark.usefixtures("owner")
@pytest.mark.parametrize("name", ["kept", "again"])
def test_a_restored_stream_outlives_the_command(place: Place, tmp_path: Path, name: str) -> None:
    StreamSnapshot("kept", 5, {"h": STATE}, "00", "halving").save(tmp_path / "a")
    arguments: list[str | Path] = ["restore", tmp_path / "a", *([] if name == "kept" else ["--as", name])]
    values = place.json(*arguments)
    about = {"stream": name, "seq": 5, "epoch": place.ring.streams[name].epoch, "park_s": 300.0}
    assert values == {**about, "model": "halving", "fingerprint": "00", "file": str(tmp_path / "a")}
    assert "--as" in place.refused(*arguments)
    with Client(place.endpoint) as client:
        stream = client.resume(name, epoch=values["epoch"])
        assert stream.step(X[5]).tolist() == reference(X[:6])[0][5].tolist()


def test_what_is_no_snapshot_for_this_server_is_not_restored(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert str(path) in place.refused("restore", path)
    path.write_text("something else")
    assert str(path) in place.refused("restore", path)
    not_finite = np.array([[0, np.nan], [0, 0]], np.float32)
    for state, fingerprint in ((STATE, "01" * 32), (not_finite, "00"), (np.zeros((1, 4), np.float32), "00")):
        StreamSnapshot("kept", 5, {"h": state}, fingerprint, "doubling").save(path)
        place.refused("restore", path)
    assert place.ring.streams == {}
