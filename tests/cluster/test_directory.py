"""The directory's program: its store, what it answers to nodes and operators, and its commands."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instep.cli import app
from instep.cluster.directory import Directory, DirectoryClient, make_directory
from instep.cluster.rules import ShardRole
from instep.cluster.talk import Caller, Rejected
from instep.config import load_config
from instep.server.checks import CannotServe
from instep_client.key_files import read_client_keys
from tests.support.keys import KeyRing
from tests.support.running import log_into

LOG = log_into([])
WITHIN_S = 20.0
NEWS: dict[str, Any] = {"serves": [], "ended": [], "gone": []}


@contextmanager
def serving(folder: Path, ring: KeyRing | None = None, **options: Any) -> Iterator[Directory]:
    """A directory of three shards in a thread."""
    transport = {f"transport.{key}": str(value) for key, value in (ring.transport if ring else {}).items()}
    config = load_config(None, {"transport.endpoint": "tcp://127.0.0.1:0", "cluster.dead_s": "0.5", **transport})
    directory = make_directory(config, folder, LOG, **{"shards": 3, "copies": 1, "adopt": (), **options})
    thread = threading.Thread(target=directory.run)
    thread.start()
    try:
        yield directory
    finally:
        directory.stop()
        thread.join()


class Nodes:
    """Agents that say what a test wants, each over a connection of its own."""

    def __init__(self, directory: Directory, **keys: dict[str, Any]) -> None:
        self.endpoint, self._keys = directory.endpoint, keys
        self._callers: dict[str, Caller] = {}
        self.roles: dict[str, dict[int, ShardRole]] = {}

    def caller(self, name: str) -> Caller:
        if name not in self._callers:
            keys = read_client_keys(**self._keys[name]) if self._keys else None
            self._callers[name] = Caller(self.endpoint, keys)
        return self._callers[name]

    def say(self, name: str, **news: Any) -> Any:
        """What the directory answers to a node that says nothing new but `news`."""
        about = [name, f"127.0.0.1:{5100 if name == 'b' else 5000}", "1", "cpu", []]
        news = {**NEWS, **news}
        return self.caller(name).ask("heard", about, news, "", within_s=WITHIN_S)

    def until(self, condition: Any, *names: str) -> None:
        """Have nodes say that they are there until a condition holds for what they are to be."""
        deadline = time.monotonic() + WITHIN_S
        while True:
            for name in names:
                _, roles, *_ = self.say(name) or ("", [])
                self.roles[name] = {role[0]: ShardRole(*role) for role in roles}
            if condition(self.roles):
                return
            assert time.monotonic() < deadline, self.roles
            time.sleep(0.02)

    def close(self) -> None:
        for each in self._callers.values():
            each.close()


@contextmanager
def nodes_of(directory: Directory, **keys: dict[str, Any]) -> Iterator[Nodes]:
    nodes = Nodes(directory, **keys)
    try:
        yield nodes
    finally:
        nodes.close()


def command(directory: Directory, *arguments: str, **environment: str) -> Result:
    place = directory.endpoint.removeprefix("tcp://")
    return CliRunner().invoke(app, ["cluster", *arguments, "--directory", place], env={"COLUMNS": "80", **environment})


def have_servers(roles: dict[str, dict[int, ShardRole]]) -> bool:
    return len(servers(roles)) == 3


def servers(roles: dict[str, dict[int, ShardRole]]) -> dict[int, str]:
    return {role.shard: name for name, each in roles.items() for role in each.values() if role.is_server}


def test_nodes_get_roles_and_keep_them_when_the_directory_starts_again(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        before = nodes.roles
        joining = next(role for role in before["a"].values() if role.is_server)
        client = DirectoryClient(nodes.caller("a"), LOG)
        assert client.shards() == 3
        begun = client.begins(joining.shard, 1, "a")
        assert begun is not None
        assert begun.address == f"tcp://127.0.0.1:{5100 + 3 + joining.shard}" or begun.other == ""
        assert client.begins(joining.shard, 7, "a") is None
        assert not client.dropped(joining.shard, 7, 1)
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        assert servers(nodes.roles) == servers(before)


def test_a_store_has_one_directory_and_one_number_of_shards(tmp_path: Path) -> None:
    with serving(tmp_path):
        with pytest.raises(CannotServe), serving(tmp_path):
            pass
    with pytest.raises(CannotServe, match="3 shards, not 4"), serving(tmp_path, shards=4):
        pass
    (tmp_path / "shard-1.json").write_text("{")
    with pytest.raises(CannotServe, match=r"shard-1|store"), serving(tmp_path):
        pass


def test_what_cannot_be_stored_is_not_decided(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        stored = {file.name: file.read_text() for file in tmp_path.glob("*.json")}
        with ExitStack() as undo:
            for shard in range(3):
                (tmp_path / f"shard-{shard}.new").mkdir()
                undo.callback((tmp_path / f"shard-{shard}.new").rmdir)
            shard = next(role.shard for role in nodes.roles["a"].values() if role.is_server)
            time.sleep(1.0)  # servers are answered once nodes have had time to be heard
            with pytest.raises(Rejected):
                nodes.caller("a").ask("begins", shard, 1, "a", within_s=WITHIN_S)
            assert json.loads(command(directory, "status", "--json").stdout)["problem"]
        assert {file.name: file.read_text() for file in tmp_path.glob("*.json")} == stored
        assert nodes.caller("a").ask("begins", shard, 1, "a", within_s=WITHIN_S)


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("heard", []),
        ("heard", [["a"], {}, ""]),
        ("heard", [["a", "h:port", "1", "cpu", []], NEWS, ""]),
        ("heard", [["a", 5, "1", "cpu", []], NEWS, ""]),
        ("heard", [["a", "h:1", "1", "cpu", [[0, "x", 1]]], NEWS, ""]),
        ("heard", [["a", "h:1", "1", "cpu", []], {**NEWS, "serves": [[0, 0, 7]]}, ""]),
        ("begins", [-1, 1, "a"]),
        ("begins", [99, 1, "a"]),
        ("dropped", ["x", 1, 1]),
        ("move", [0, None]),
        ("explode", []),
    ],
)
def test_what_makes_no_sense_is_refused_and_ends_nothing(tmp_path: Path, verb: str, arguments: list[Any]) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        with pytest.raises(Rejected):
            nodes.caller("a").ask(verb, *arguments, within_s=WITHIN_S)
        nodes.until(have_servers, "a", "b")


def test_a_key_proves_the_name_of_a_node(tmp_path: Path) -> None:
    roles = {"a": {"role": "node"}, "b": {"role": "node"}, "ann": {"role": "operator"}}
    ring = KeyRing(tmp_path, **roles)
    with serving(tmp_path / "store", ring) as directory:
        with nodes_of(directory, **{name: ring.of_client(name) for name in roles}) as nodes:
            nodes.until(have_servers, "a", "b")
            shard = next(role.shard for role in nodes.roles["a"].values() if role.is_server)
            assert DirectoryClient(nodes.caller("b"), LOG).begins(shard, 1, "a") is None
            assert not DirectoryClient(nodes.caller("b"), LOG).dropped(shard, 1, 0)
            assert DirectoryClient(nodes.caller("a"), LOG).begins(shard, 1, "a") is not None
            impostor = Nodes(directory, b=ring.of_client("a"))
            with pytest.raises(Rejected):
                impostor.say("b")
            impostor.close()
            files = {name: str(file) for name, file in ring.of_client("ann").items()}
            keys = {"INSTEP_KEY_FILE": files["key_file"], "INSTEP_SERVER_KEY": files["server_key"]}
            assert command(directory, "status", **keys).exit_code == 1  # nobody serves


def test_operators_see_shards_and_nodes_and_change_what_they_may(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        for name, each in nodes.roles.items():
            nodes.say(name, serves=[(role.shard, 1, f"tcp://{name}:1") for role in each.values() if role.is_server])
        shown = json.loads(command(directory, "status", "--json").stdout)
        assert [shard["shard"] for shard in shown["shards"]] == [0, 1, 2]
        assert {node["node"] for node in shown["nodes"]} == {"a", "b"}
        assert max(map(len, command(directory, "status").stdout.splitlines())) <= 80
        nodes.until(lambda roles: True, "a", "b")
        assert command(directory, "drain", "a").exit_code == 0
        assert command(directory, "drain", "nobody").exit_code == 2
        assert command(directory, "undrain", "a").exit_code == 0
        assert command(directory, "undrain", "a").exit_code == 2
        assert command(directory, "move", "7", "a").exit_code == 2
        assert command(directory, "accept-loss", "0", "a").exit_code == 2


def test_a_shard_that_its_node_cannot_serve_is_taken_over_by_its_copy(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        time.sleep(1.0)  # servers are answered once nodes have had time to be heard
        shard = next(role.shard for role in nodes.roles["a"].values() if role.is_server)
        client = DirectoryClient(nodes.caller("a"), LOG)
        assert client.begins(shard, 1, "a") is not None
        nodes.say("a", serves=[(shard, 1, "tcp://a:1")])
        assert not json.loads(command(directory, "status", "--json").stdout)["shards"][shard]["problem"]
        nodes.say("a", gone=[(shard, 1)])
        shown = json.loads(command(directory, "status", "--json").stdout)["shards"][shard]
        assert (bool(shown["problem"]), shown["endpoint"]) == (True, "")
        assert client.begins(shard, 1, "a") is not None
        nodes.until(lambda roles: bool(roles["a"][shard].other), "a", "b")
        assert client.attached(shard, 1, nodes.roles["a"][shard].attempt)
        nodes.say("a", gone=[(shard, 1)])
        nodes.until(lambda roles: servers(roles)[shard] == "b", "a", "b")


def test_a_command_without_a_directory_says_so() -> None:
    result = CliRunner().invoke(app, ["cluster", "status", "--directory", "127.0.0.1:9"])
    assert result.exit_code == 2
