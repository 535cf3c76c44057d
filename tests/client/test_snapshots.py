"""A snapshot's file, byte by byte, and files that are none."""

from __future__ import annotations

import errno
import json
import os
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from instep_client import StreamSnapshot
from instep_client.protocol.errors import InvalidInput
from tests.support.fake_server import INFO

STATE = np.array([[1.5, -2.0], [0.0, 3.0e-41]], np.float32)
SNAPSHOT = StreamSnapshot("mic é", 2**40, {"h": STATE}, "00", "halving")
ABOUT = {"format": "instep stream snapshot 2", "name": "mic", "seq": "7", "fingerprint": "00", "model": "halving"}


def test_the_file_is_a_length_a_header_and_the_data(tmp_path: Path) -> None:
    SNAPSHOT.save(tmp_path / "a.safetensors")
    content = (tmp_path / "a.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    assert header["state.h"] == {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    assert header["__metadata__"] == {
        "format": "instep stream snapshot 2",
        "name": "mic é",
        "seq": str(2**40),
        "fingerprint": "00",
        "model": "halving",
    }
    assert content[8 + length :] == STATE.astype("<f4").tobytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_the_safetensors_library_writes_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"state.h": STATE}, path, {**ABOUT, "note": "made elsewhere"})
    loaded = StreamSnapshot.load(path)
    assert (loaded.name, loaded.seq, loaded.fingerprint, loaded.model) == ("mic", 7, "00", "halving")
    assert loaded.state["h"].tobytes() == STATE.tobytes()


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        ({"state.h": STATE.view(np.int32)}, ABOUT),
        ({"state": STATE}, ABOUT),
        ({"state.h": STATE}, {key: ABOUT[key] for key in ABOUT if key != "seq"}),
    ],
    ids=range(3),
)
def test_good_safetensors_files_that_no_snapshot_can_be_are_refused(
    tmp_path: Path, tensors: dict[str, Any], about: dict[str, str] | None
) -> None:
    save_file(tensors, tmp_path / "a", about)
    with pytest.raises(InvalidInput):
        StreamSnapshot.load(tmp_path / "a")


def test_without_the_library_a_sentence_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    SNAPSHOT.save(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.delitem(sys.modules, "safetensors.numpy", raising=False)
    for use in (lambda: SNAPSHOT.save(tmp_path / "b"), lambda: StreamSnapshot.load(tmp_path / "a")):
        with pytest.raises(ModuleNotFoundError) as raised:
            use()
        assert raised.value.name == "safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    SNAPSHOT.check(INFO)  # what touches no file works without it


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("there", ["a file", "a link to nowhere", "nothing"])
def test_a_file_that_is_there_may_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str, links: bool
) -> None:
    def none(self: Path, target: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", none)
    path = tmp_path / "a"
    if there == "a file":
        path.write_text("something else")
    elif there == "a link to nowhere":
        path.symlink_to(tmp_path / "b")
    if there == "nothing":
        SNAPSHOT.save(path, overwrite=False)
        assert StreamSnapshot.load(path).seq == SNAPSHOT.seq
    else:
        with pytest.raises(FileExistsError):
            SNAPSHOT.save(path, overwrite=False)
        assert path.is_symlink() or path.read_text() == "something else"
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_file_that_cannot_be_written_whole_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "full, injected")

    (tmp_path / "a").write_text("something else")
    monkeypatch.setattr(os, "fsync", full)
    for name in ("a", "b"):
        with pytest.raises(OSError):
            SNAPSHOT.save(tmp_path / name)
    assert [each.read_text() for each in tmp_path.iterdir()] == ["something else"]


def test_a_state_of_several_leaves_is_saved_and_read(tmp_path: Path) -> None:
    state = {"level": np.array([0.5, -1], np.float32), "count": np.array(2**60), "open": np.array([True])}
    replace(SNAPSHOT, state=state).save(tmp_path / "a")
    found = StreamSnapshot.load(tmp_path / "a").state
    assert set(found) == set(state)
    for name, leaf in state.items():
        assert found[name].dtype == leaf.dtype
        assert found[name].tolist() == leaf.tolist()


@pytest.mark.parametrize("state", [[[np.nan, 0], [0, 0]], [[0, 0], [-np.inf, 0]], [[0, 0, 0, 0]]])
def test_a_state_that_no_server_takes_is_refused(state: list[list[float]]) -> None:
    with pytest.raises(InvalidInput):
        replace(SNAPSHOT, state={"h": np.array(state, np.float32)}).check(INFO)


def edited(content: bytes, old: bytes, new: bytes) -> bytes:
    """A file with something of the header replaced by something as long."""
    assert len(old) == len(new)
    assert old in content
    return content.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"F32"', b'"F16"'),
        (b"snapshot 2", b"snapshot 9"),
        (b'"1099511627776"', b'"1x99511627776"'),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "a"
    SNAPSHOT.save(path)
    path.write_bytes(edited(path.read_bytes(), old, new))
    with pytest.raises(InvalidInput):
        StreamSnapshot.load(path)


def header_with(shape: str, seq: str = "0") -> bytes:
    """A file that is all header."""
    about = {"format": "instep stream snapshot 2", "name": "a", "seq": seq, "fingerprint": "00", "model": "m"}
    tensor = f'{{"dtype": "F32", "shape": {shape}, "data_offsets": [0, 0]}}'
    return f'{{"__metadata__": {json.dumps(about)}, "state.h": {tensor}}}'.encode()


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 60_000,
        header_with("[Infinity, 1]"),
        header_with("[-1, 0]"),
        header_with("[1000000000000, 1000000000000]"),
        header_with("[0, 0]", seq="9" * 5000),
        header_with("[1, 1]"),
    ],
    ids=range(6),
)
def test_headers_that_are_hostile_are_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InvalidInput):
        StreamSnapshot.load(tmp_path / "a")


def test_no_more_is_read_than_a_snapshot_can_have(tmp_path: Path) -> None:
    for content in (b"\xff" * 8, (1).to_bytes(8, "little"), None):
        path = tmp_path / "a"
        if content is None:
            SNAPSHOT.save(path)
        else:
            path.write_bytes(content)
        with path.open("r+b") as file:
            file.truncate(2**27)
        tracemalloc.start()
        try:
            with pytest.raises(InvalidInput):
                StreamSnapshot.load(path)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()
        path.unlink()
