"""The commands that restore and reset states, against a small server."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from instep_client import Client, StreamEvicted, StreamRefused, StreamSnapshot
from instep_client.protocol.codes import Code
from instep_client.protocol.wire import Kind
from tests.support.fake_server import reference
from tests.support.session_link import X
from tests.tools.state_place import STATE, Place, assert_waits
from tests.tools.state_place import owner as owner
from tests.tools.state_place import place as place


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
