"""Key files: what `instep keys` makes, and which files are refused, without their content in any message."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import zmq
from typer.testing import CliRunner
from zmq.auth import load_certificate

from instep.config import TransportConfig
from instep.program import app
from instep.security.keys import ServerKeys, make_key_pair
from instep.security.principals import Principals, Role
from instep_client.key_files import MAX_FILE_BYTES, read_client_keys, read_key_pair, read_public_key
from instep_client.protocol.errors import InvalidInput
from tests.support.keys import KeyRing


def test_a_pair_is_written_as_zmq_auth_reads_it_and_only_its_owner_can_read_the_secret(tmp_path: Path) -> None:
    public, secret = make_key_pair("mic-7", tmp_path / "keys")
    assert (public.name, secret.name) == ("mic-7.key", "mic-7.key_secret")
    key, secret_key = load_certificate(secret)
    assert secret_key is not None
    assert zmq.curve_public(secret_key) == key
    assert load_certificate(public) == (key, None)
    assert read_public_key(public).encode() == key
    assert tuple(map(str.encode, read_key_pair(secret))) == (key, secret_key)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "keys", secret)] == [0o700, 0o600]


@pytest.mark.parametrize("name", ["mic.key", "mic.key_secret"])
def test_no_file_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(InvalidInput):
        make_key_pair("mic", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["", "../mic", "a b", "x" * 65, "default"])
def test_a_name_is_also_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidInput):
        make_key_pair(name, tmp_path)


@pytest.mark.parametrize(
    ("options", "role", "streams"),
    [
        ([], Role.PRODUCER, ("007", "007-*")),
        (["--streams", "a*", "--streams", "b"], Role.PRODUCER, ("a*", "b")),
        (["--role", "node"], Role.NODE, ("*",)),
    ],
)
def test_the_command_prints_a_line_that_the_file_of_peers_takes(
    tmp_path: Path, options: list[str], role: Role, streams: tuple[str, ...]
) -> None:
    new = CliRunner().invoke(app, ["keys", "new", "007", "--output", str(tmp_path), *options])
    (tmp_path / "peers.yaml").write_text(new.stdout)
    (tmp_path / "peers.yaml").chmod(0o600)
    principal = Principals.read(tmp_path / "peers.yaml").by_name["007"]
    assert (principal.role, principal.streams) == (role, streams)
    assert principal.key == read_public_key(tmp_path / "007.key")


def test_the_command_prints_the_settings_of_a_server(tmp_path: Path) -> None:
    new = CliRunner().invoke(app, ["keys", "new", "s", "--role", "server", "--output", str(tmp_path)])
    assert str(tmp_path / "s.key_secret") in new.stdout
    assert CliRunner().invoke(app, ["keys", "new", "t", "--role", "server", "--streams", "a"]).exit_code == 2


def make_bad(path: Path, kind: str) -> None:
    secret = path.read_text()
    if kind == "others can read it":
        path.chmod(0o644)
    elif kind == "a folder":
        path.unlink()
        path.mkdir()
    elif kind == "a pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "no key":
        path.write_text(secret.replace("-key", "-word"))
    elif kind == "a public key":
        path.write_text("".join(line for line in secret.splitlines(True) if "secret-key" not in line))
    elif kind == "too long":
        path.write_text(secret + "#" * MAX_FILE_BYTES)
    elif kind == "no text":
        path.write_bytes(secret.encode() + b"\xff")
    else:
        path.write_text(secret.replace('"', '"x'))


@pytest.mark.parametrize(
    "kind",
    ["others can read it", "a folder", "a pipe", "no key", "a public key", "too long", "no text", "a key too long"],
)
def test_a_secret_file_that_is_not_one_is_refused_with_nothing_of_it(tmp_path: Path, kind: str) -> None:
    ring = KeyRing(tmp_path, mic={})
    path = tmp_path / "server.key_secret"
    secret = load_certificate(path)[1]
    assert secret is not None
    make_bad(path, kind)
    with pytest.raises(InvalidInput) as refused:
        ServerKeys.read(TransportConfig(**ring.transport))
    assert str(path) in str(refused.value)
    assert secret.decode()[1:6] not in str(refused.value)


def test_the_content_of_a_key_file_is_told_before_its_rights(tmp_path: Path) -> None:
    public, _ = make_key_pair("mic", tmp_path)
    with pytest.raises(InvalidInput, match="key_secret"):
        read_key_pair(public)


def test_the_group_may_read_a_secret_of_root_alone(tmp_path: Path) -> None:
    secret = make_key_pair("mic", tmp_path)[1]
    secret.chmod(0o440)
    if secret.stat().st_uid == 0:
        assert read_key_pair(secret)
    else:
        with pytest.raises(InvalidInput):
            read_key_pair(secret)


@pytest.mark.parametrize("text", ["", "# mic-1: gone\n"])
def test_an_empty_file_of_peers_admits_nobody(tmp_path: Path, text: str) -> None:
    file = tmp_path / "peers.yaml"
    file.write_text(text)
    file.chmod(0o600)
    assert not Principals.read(file).by_key


def test_a_secret_where_a_public_key_belongs_is_refused_with_nothing_of_it(tmp_path: Path) -> None:
    _, secret = make_key_pair("mic", tmp_path)
    with pytest.raises(InvalidInput) as refused:
        read_public_key(secret)
    assert read_key_pair(secret)[1] not in str(refused.value)


def test_a_file_is_read_even_where_its_name_could_be_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    public, secret = make_key_pair("server", tmp_path)
    monkeypatch.chdir(tmp_path)
    name = "x" * 36 + ".key"
    public.rename(name)
    found = read_client_keys(secret, name)
    assert found is not None
    assert found[0] == read_public_key(Path(name))
    assert found[2] not in repr(ServerKeys(found[2], Principals({}, {})))


def test_all_problems_of_a_file_of_peers_are_told(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path, mic={"role": "king"}, other={"streams": 5, "quotas": {"frames_per_s": True}})
    with pytest.raises(InvalidInput) as refused:
        ServerKeys.read(TransportConfig(**ring.transport))
    found = str(refused.value).splitlines()
    assert len(found) == 3
    for name in ("mic.role", "other.streams", "other.quotas.frames_per_s"):
        assert any(name in problem for problem in found), found


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("mic: {role: producer}", "mic.key"),
        ("mic: {role: producer, streams: []}", "mic.streams"),
        ("mic: {role: producer, streams: ''}", "mic.streams"),
        ("mic: {role: producer, models: []}", "mic.models"),
        ("mic: {key: 'secret-of-mine', role: producer}", "mic.key"),
        ("mic: {'secret-of-mine': 1}", "mic.key"),
        ("mic: {role: reader, quotas: {'secret-of-mine': 1}}", "mic.quotas"),
        ("mic: {}\nother: {}\nmic: {}", "line 3"),
        ("default: {role: reader}", "default"),
        ("'a b': {}", "name"),
        ("007: {}", "name"),
        ("[secret-of-mine]", "NAME"),
        ("secret-of-mine: [", "line 1"),
        ("&a [*a, *a]", "NAME"),
        ("curve\n    secret-key = 'secret-of-mine'", "NAME"),
        ("[" * 5000, "YAML"),
    ],
)
def test_a_file_of_peers_that_is_not_one_is_refused_with_nothing_of_it(tmp_path: Path, text: str, named: str) -> None:
    file = tmp_path / "peers.yaml"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(InvalidInput) as refused:
        Principals.read(file)
    assert named in str(refused.value)
    assert "secret-of-mine" not in str(refused.value)


def test_two_with_one_key_are_refused_and_so_is_a_file_that_others_can_change(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path, mic={})
    ring.write(mic={}, other={"key": ring.make("mic")[0]})
    with pytest.raises(InvalidInput, match="mic and other"):
        Principals.read(ring.peers_file)
    ring.write(mic={})
    ring.peers_file.chmod(0o666)
    with pytest.raises(InvalidInput):
        Principals.read(ring.peers_file)


def test_quotas_of_all_hold_where_there_are_no_own_ones(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path, mic={"quotas": {"streams": 5}, "streams": "mic-*", "models": ["ears"]}, other={})
    ring.peers_file.write_text(ring.peers_file.read_text() + "default: {quotas: {streams: 9, connections: 2}}\n")
    found = Principals.read(ring.peers_file).by_name
    assert {name: (each.quotas.streams, each.quotas.connections) for name, each in found.items()} == {
        "mic": (5, 2),
        "other": (9, 2),
    }
    assert (found["mic"].streams, found["mic"].models) == (("mic-*",), frozenset({"ears"}))
    assert (found["other"].streams, found["other"].models) == (("*",), None)


@pytest.mark.parametrize("words", [["--check"], []])
def test_a_server_does_not_start_with_keys_that_it_cannot_use(tmp_path: Path, words: list[str]) -> None:
    ring = KeyRing(tmp_path, mic={"role": "king"})
    settings = [word for key, file in ring.transport.items() for word in ("--set", f"transport.{key}={file}")]
    ended = CliRunner().invoke(app, ["serve", "--demo", *settings, *words])
    assert ended.exit_code == 2
    assert "mic.role" in ended.stderr
