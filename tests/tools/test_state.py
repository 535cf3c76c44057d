"""The commands on states: through the command line against a small server, and against the engine itself."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from instep_client import AsyncClient, Client, StreamEvicted, StreamRefused, StreamSnapshot
from instep_client.protocol.codes import Code
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import Kind
from instep_tools import state
from instep_tools.app import app
from instep_tools.connect import Target
from instep_tools.pacing import Stop
from instep_tools.problems import CommandProblem, Exit
from tests.support.fake_server import FakeServer, Message, reference
from tests.support.models import SEED_SIZED, SMALL, whole
from tests.support.ring_server import RING_INFO, RingServer
from tests.support.running import running
from tests.support.session_link import X
from tests.support.steps import eager, exported
from tests.tools.helpers import RememberingTerminal

MAIN = "from instep_tools import main; main()"


class Place:
    """A server, and what the command line says of it."""

    def __init__(self, ring: RingServer, endpoint: str) -> None:
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
        """What is said of what is not done."""
        before = {name: (stream.epoch, stream.next_seq) for name, stream in self.ring.streams.items()}
        result = self.run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert {name: (stream.epoch, stream.next_seq) for name, stream in self.ring.streams.items()} == before
        (line,) = result.stderr.splitlines()
        return line.removeprefix("error: ")


@pytest.fixture
def place() -> Iterator[Place]:
    ring = RingServer()
    with FakeServer(RING_INFO, ring.handle) as server:
        yield Place(ring, server.endpoint)


@pytest.fixture
def owner(place: Place) -> Iterator[Client]:
    """A client that has the stream `mic`, five frames of which were applied."""
    with Client(place.endpoint) as client:
        client.open("mic").step(X[:5])
        yield client


STATE = reference(X[:5])[1]


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


def assert_waits(place: Place, said: str, name: str, seq: int) -> None:
    """The stream is there, and goes on for who does what was said."""
    (epoch,) = re.findall(rf"keeps it for 300 s for .* with client\.resume\('{name}', epoch=(\d+)\)", said)
    with Client(place.endpoint) as client:
        stream = client.resume(name, epoch=int(epoch))
        assert stream.next_seq == seq
        assert stream.step(X[5]).tolist() == reference(X[:6])[0][5].tolist()


@pytest.mark.parametrize("name", [None, "again"])
def test_a_restored_stream_outlives_the_command(place: Place, owner: Client, tmp_path: Path, name: str | None) -> None:
    path = tmp_path / "a"
    save_file(
        {"state": STATE},
        path,
        {"format": "instep stream snapshot 1", "name": "kept", "seq": "5", "fingerprint": "00", "model": "halving"},
    )
    arguments = ["restore", str(path), *([] if name is None else ["--as", name])]
    result = place.run(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    name = name or "kept"
    assert result.stdout.startswith(f"{name!r} continues from {path} with frame 5; the server")
    said = place.refused(*arguments)
    assert said.startswith("NAME_IN_USE: ")
    assert said.endswith("; restore it under another name with --as NAME")
    assert_waits(place, result.stdout, name, 5)
    values = place.json("restore", path, "--as", "third")
    assert values == {
        "stream": "third",
        "seq": 5,
        "epoch": place.ring.streams["third"].epoch,
        "park_s": 300.0,
        "model": "halving",
        "fingerprint": "00",
        "file": str(path),
    }


def test_what_is_no_snapshot_of_this_model_is_not_restored(place: Place, owner: Client, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for arguments in (["restore", str(path)], ["reset", "mic", "--take-over", "--state", str(path)]):
        path.unlink(missing_ok=True)
        assert place.refused(*arguments) == f"{path} cannot be read: No such file or directory"
        path.write_text("something else")
        assert place.refused(*arguments).startswith(f"{path} is not a snapshot of a stream: ")
        StreamSnapshot("kept", 5, STATE, "01" * 32, "doubling").save(path)
        said = place.refused(*arguments)
        assert said.startswith(f"{path}: the snapshot is of model 'doubling' (fingerprint 010101010101), the server ")


def test_a_stream_is_not_taken_for_a_state_that_no_server_takes(place: Place, owner: Client, tmp_path: Path) -> None:
    path = tmp_path / "a"
    for bad, said in (
        (np.array([[0, np.nan], [0, 0]], np.float32), "holds NaN or infinity"),
        (np.zeros((1, 4), np.float32), "has shape [1, 4]"),
    ):
        StreamSnapshot("kept", 5, bad, "00", "halving").save(path)
        assert said in place.refused("reset", "mic", "--take-over", "--state", path)
        assert said in place.refused("restore", path)
    assert place.ring.kinds.count(Kind.RESUME) == 0


def test_a_reset_that_fails_says_that_the_stream_was_taken(place: Place, owner: Client) -> None:
    place.ring.refuses[Kind.RESET] = Code.TOO_LARGE
    result = place.run("reset", "mic", "--take-over")
    assert (result.exit_code, result.stdout) == (2, "")
    note, problem = result.stderr.splitlines()
    assert note.startswith("stream 'mic' was taken from its owner")
    assert note.endswith(f"client.resume('mic', epoch={place.ring.streams['mic'].epoch})")
    assert problem.startswith("error: TOO_LARGE: ")


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
    assert place.refused("fork", "mic", "a\tb").startswith("there must be at least one name")


def test_a_reset_needs_to_be_told_to_take_the_stream(place: Place, owner: Client) -> None:
    said = place.refused("reset", "mic")
    assert said.startswith("stream 'mic' has an owner")
    assert "--take-over" in said


@pytest.mark.parametrize("to_zeros", [True, False])
def test_a_reset_takes_the_stream_and_leaves_it(place: Place, tmp_path: Path, to_zeros: bool) -> None:
    path = tmp_path / "a"
    given = np.full((2, 2), 3.0, np.float32)
    StreamSnapshot("kept", 99, given, "00", "halving").save(path)
    with Client(place.endpoint, reconnect_s=0.0) as owner:
        stream = owner.open("mic")
        stream.step(X[:5])
        result = place.run("reset", "mic", "--take-over", *([] if to_zeros else ["--state", str(path)]))
        assert (result.exit_code, result.stderr) == (0, "")
        state = "the initial state" if to_zeros else f"the state in {path}"
        assert result.stdout.startswith(f"'mic' continues from {state} with frame 5; the server keeps it for 300 s")
        with pytest.raises(StreamEvicted) as evicted:
            stream.step(X[5])
        assert evicted.value.code is Code.FENCED
        with pytest.raises(StreamRefused) as refused:
            owner.resume("mic", 5, stream.epoch)
        assert refused.value.code is Code.FENCED
        again = owner.resume("mic", take_over=True)
        truth = reference(X[5:6], np.zeros((2, 2), np.float32) if to_zeros else given)[0][0]
        assert (again.next_seq, again.step(X[5]).tolist()) == (5, truth.tolist())
    with Client(place.endpoint) as other:
        other.open("mic")
        values = place.json("reset", "mic", "--take-over")
        assert (values["seq"], values["file"], values["epoch"]) == (0, None, place.ring.streams["mic"].epoch)


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


async def test_a_state_of_single_values_is_json(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, exported("counting").description.features)).astype(np.float32)
    _, leaves = eager("counting", x, 1)
    async with running(exported("counting")) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("mic")
        await stream.step(x)
        terminal = RememberingTerminal(as_json=True)
        assert await state.read(Target(server.endpoint), terminal, Stop(), "mic") == Exit.OK
    found = terminal.json()["state"]
    assert found["count"] == leaves[0].item()
    for given, leaf in zip(found.values(), leaves, strict=True):
        np.testing.assert_allclose(given, leaf, rtol=1e-5, atol=1e-6)


async def test_a_state_moves_from_one_engine_to_another_and_goes_on_to_the_bit(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((9, SEED_SIZED.description.features)).astype(np.float32)
    y, final = whole(SEED_SIZED, x)
    path, stop = tmp_path / "mic.safetensors", Stop()
    transport = {"heartbeat_s": 0.1}
    async with running(SEED_SIZED, transport=transport) as server, AsyncClient(server.endpoint) as client:
        stream = await client.open("mic")
        await stream.step(x[:5])
        assert await state.snapshot(Target(server.endpoint), RememberingTerminal(), stop, "mic", path) == Exit.OK
        terminal = RememberingTerminal(as_json=True)
        assert await state.fork(Target(server.endpoint), terminal, stop, "mic", "copy") == Exit.OK
        while (await client.stats())["streams_parked"] != 1:
            await client.ping()
        copy = await client.resume("copy", 5, terminal.json()["epoch"])
        for each in (stream, copy):
            np.testing.assert_array_equal(await each.step(x[5:]), y[5:])
            np.testing.assert_array_equal(await each.close(), final)
    np.testing.assert_array_equal(load_file(path)["state"], whole(SEED_SIZED, x[:5])[1])
    async with running(SEED_SIZED, transport=transport) as server, AsyncClient(server.endpoint) as client:
        terminal = RememberingTerminal(as_json=True)
        assert await state.restore(Target(server.endpoint), terminal, stop, path) == Exit.OK
        restored = await client.resume("mic", epoch=terminal.json()["epoch"])
        np.testing.assert_array_equal(await restored.step(x[5:]), y[5:])
        terminal = RememberingTerminal(as_json=True)
        assert await state.reset(Target(server.endpoint), terminal, stop, "mic", path, True) == Exit.OK
        assert terminal.json()["seq"] == 9
        with pytest.raises(StreamEvicted, match="FENCED"):
            await restored.step(x[5:])
        again = await client.resume("mic", epoch=terminal.json()["epoch"])
        np.testing.assert_array_equal(await again.step(x[5:]), y[5:])
    async with running(SMALL) as server:
        with pytest.raises(CommandProblem, match="a state is valid only with the weights that made it") as refused:
            await state.restore(Target(server.endpoint), RememberingTerminal(), stop, path)
        assert not isinstance(refused.value, InvalidInput)
        assert server.default.engine.table.open_count == 0
