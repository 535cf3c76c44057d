"""The directory's program: its store, what it answers to nodes and operators, and its commands."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from instep.cluster.agent import node_name
from instep.cluster.directory import STORE_FILE, Directory, DirectoryClient
from instep.cluster.rules import ShardRole
from instep.cluster.talk import Caller, NoAnswer, Rejected
from instep.config import TransportConfig, load_config
from instep.program import app
from instep.server.checks import CannotServe
from instep_client.key_files import read_client_keys
from tests.support.keys import KeyRing
from tests.support.running import log_into

LINES: list[dict[str, Any]] = []
LOG = log_into(LINES)
WITHIN_S = 20.0
NEWS: dict[str, Any] = {"serves": [], "ended": [], "gone": []}


@contextmanager
def serving(folder: Path, ring: KeyRing | None = None, **options: Any) -> Iterator[Directory]:
    """A directory of three shards in a thread."""
    transport = {f"transport.{key}": str(value) for key, value in (ring.transport if ring else {}).items()}
    config = load_config(None, {"transport.endpoint": "tcp://127.0.0.1:0", "cluster.dead_s": "0.5", **transport})
    directory = Directory(config, folder, LOG, **{"shards": 3, "copies": 1, "adopt": (), **options})

    def serve() -> None:
        try:
            directory.run()
        except CannotServe as error:
            LINES.append({"event": "ended", "reason": str(error)})

    thread = threading.Thread(target=serve)
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
        version, has, revision = news.pop("version", "1"), news.pop("has", []), news.pop("revision", 0)
        about = [name, f"127.0.0.1:{5100 if name == 'b' else 5000}", version, "cpu", has, revision]
        news = {**NEWS, **news}
        return self.caller(name).ask("heard", about, news, "", within_s=WITHIN_S)

    def until(self, condition: Any, *names: str) -> None:
        """Have nodes say that they are there until a condition holds for what they are to be."""
        deadline = time.monotonic() + WITHIN_S
        while True:
            for name in names:
                _, _, roles, *_ = self.say(name) or ("", 0, [])
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


def status(directory: Directory) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command(directory, "status", "--json").stdout)
    return found


def have_servers(roles: dict[str, dict[int, ShardRole]]) -> bool:
    return len(servers(roles)) == 3


def first_server(nodes: Nodes, name: str) -> int:
    """A shard that this node is to serve, once all have servers."""
    nodes.until(have_servers, "a", "b")
    return min(role.shard for role in nodes.roles[name].values() if role.is_server)


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
    store, broken = tmp_path / "store", tmp_path / "broken"
    with serving(store), pytest.raises(CannotServe, match="another directory"), serving(store):
        pass
    assert LINES[-1]["event"] == "stopped"
    broken.mkdir()
    (broken / STORE_FILE).write_text("a text that is no database, and longer than its header" * 9)
    with pytest.raises(CannotServe, match=r"cannot be read.*--adopt"), serving(broken):
        pass
    (broken / "cluster.json").write_text("{}")
    with pytest.raises(CannotServe, match=r"earlier version.*--adopt"), serving(broken):
        pass
    with pytest.raises(CannotServe, match="3 shards, not 4"), serving(store, shards=4):
        pass


def test_what_cannot_be_stored_is_not_decided(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        shard = first_server(nodes, "a")
        with closing(sqlite3.connect(tmp_path / STORE_FILE, isolation_level=None)) as other:
            stored = other.execute("SELECT * FROM decisions").fetchall()
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(Rejected):
                nodes.caller("a").ask("begins", shard, 1, "a", within_s=WITHIN_S)
            assert status(directory)["problem"]
            assert other.execute("SELECT * FROM decisions").fetchall() == stored
        assert nodes.caller("a").ask("begins", shard, 1, "a", within_s=WITHIN_S)


def test_a_store_that_vanishes_ends_the_directory(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        (tmp_path / STORE_FILE).unlink()
        assert "--adopt" in how_it_ended()


@pytest.mark.parametrize("news", [{"has": [(0, 38, 1)]}, {"revision": 1000}])
def test_a_report_that_proves_the_store_old_ends_the_directory(tmp_path: Path, news: dict[str, Any]) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        with pytest.raises(NoAnswer):
            nodes.say("b", **news)
        assert "--adopt" in how_it_ended()


def how_it_ended() -> str:
    deadline = time.monotonic() + WITHIN_S
    while LINES[-1]["event"] != "ended":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return str(LINES[-1]["reason"])


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("heard", []),
        ("heard", [["a"], {}, ""]),
        ("heard", [["a", "h:port", "1", "cpu", [], 0], NEWS, ""]),
        ("heard", [["a", 5, "1", "cpu", [], 0], NEWS, ""]),
        ("heard", [["a", "h:1", "1", "cpu", [[0, "x", 1]], 0], NEWS, ""]),
        ("heard", [["a", "h:1", "1", "cpu", [], "x"], NEWS, ""]),
        ("heard", [["a", "h:1", "1", "cpu", [], 0], {**NEWS, "serves": [[0, 0, 7]]}, ""]),
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
    roles = {"a": {"role": "node"}, "b": {"role": "node"}}
    ring = KeyRing(tmp_path, **roles)
    with serving(tmp_path / "store", ring) as directory:
        with nodes_of(directory, **{name: ring.of_client(name) for name in roles}) as nodes:
            shard = first_server(nodes, "a")
            assert DirectoryClient(nodes.caller("b"), LOG).begins(shard, 1, "a") is None
            assert not DirectoryClient(nodes.caller("b"), LOG).dropped(shard, 1, 0)
            assert DirectoryClient(nodes.caller("a"), LOG).begins(shard, 1, "a") is not None
            impostor = Nodes(directory, b=ring.of_client("a"))
            with pytest.raises(Rejected):
                impostor.say("b")
            impostor.close()

            keys = {f"INSTEP_{name.upper()}": str(file) for name, file in ring.of_client("ann").items()}
            ring.write(**roles, ann={"role": "operator"})
            assert command(directory, "status", **keys).exit_code == 2
            directory.admit(ring.peers_file)
            ring.peers_file.write_text("[")
            directory.admit(ring.peers_file)
            assert command(directory, "status", **keys).exit_code == 1  # nobody serves


def test_a_node_has_the_name_of_its_key(tmp_path: Path) -> None:
    ring = KeyRing(tmp_path, n1={"role": "node"})

    def named(name: str, key: str) -> str:
        keys = TransportConfig(key_file=tmp_path / f"{key}.key_secret", peers_file=ring.peers_file)
        return node_name(name, keys)

    assert [named("", "n1"), named("n1", "n1"), node_name("n2", TransportConfig())] == ["n1", "n1", "n2"]
    for name, key in (("n2", "n1"), ("", "server")):
        with pytest.raises(CannotServe):
            named(name, key)


def test_operators_see_shards_and_nodes_and_change_what_they_may(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        for name, each in nodes.roles.items():
            nodes.say(name, serves=[(role.shard, 1, f"tcp://{name}:1") for role in each.values() if role.is_server])
        found = status(directory)
        assert [shard["shard"] for shard in found["shards"]] == [0, 1, 2]
        assert {node["node"] for node in found["nodes"]} == {"a", "b"}
        shown = command(directory, "status").stdout
        assert {shard["endpoint"] for shard in found["shards"]} == {"tcp://a:1", "tcp://b:1"} <= {*shown.split()}
        assert max(map(len, shown.splitlines())) <= 80
        nodes.until(lambda roles: True, "a", "b")
        nodes.until(lambda _: command(directory, "status", "--check").exit_code == 1, "a", "b")  # without copies
        assert command(directory, "status").exit_code == 0
        asked = ("drain a", "drain nobody", "undrain a", "undrain a", "move 7 a", "accept-loss 0 a")
        assert [command(directory, *each.split()).exit_code for each in asked] == [0, 2, 0, 2, 2, 2]


def test_a_lost_node_is_shown_until_it_is_drained(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        nodes.say("c")
        nodes.until(lambda _: {"c": False}.items() <= alive(directory).items(), "a", "b")
        assert command(directory, "drain", "c").exit_code == 0
        nodes.until(lambda _: alive(directory) == {"a": True, "b": True}, "a", "b")
        nodes.say("c")
        assert alive(directory)["c"]


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_drain_may_wait_until_nothing_is_left_that_another_node_can_take(
    monkeypatch: pytest.MonkeyPatch, nodes: int
) -> None:
    idle = {"shard": 7, "server": "n0", "copy": "n1", "joining": "", "target": ""}
    served, moving = idle | {"server": "n2"}, idle | {"target": "n2"}
    seen = [[served], [idle, moving], [idle | {"copy": "n2"}], [idle]]
    names = ("n0", "n2", "n1")[:nodes]
    there = [{"node": name, "alive": True, "drained": name == "n2"} for name in names]
    answers = [None, *({"nodes": there, "shards": each} for each in seen)]
    asked: list[str] = []

    def ask(directory: str, verb: str, *arguments: Any) -> Any:
        asked.append(verb)
        return answers.pop(0)

    monkeypatch.setattr("instep.cluster.app._ask", ask)
    monkeypatch.setattr("instep.cluster.app._LOOK_S", 0.0)
    result = CliRunner().invoke(app, ["cluster", "drain", "n2", "--wait"])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "n2 may be stopped")
    # With no second node for the copy, it stays: nothing is gained by waiting for it.
    assert asked == ["drain", *["status"] * (4 if nodes == 3 else 3)]


def alive(directory: Directory) -> dict[str, bool]:
    return {node["node"]: node["alive"] for node in status(directory)["nodes"]}


def test_a_refused_node_is_shown_with_the_reason(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        nodes.until(have_servers, "a", "b")
        with pytest.raises(Rejected) as refused:
            nodes.caller("c").ask("heard", ["c", "h:1", "other", "cpu", [], 0], NEWS, 0, within_s=WITHIN_S)
        assert {"c": str(refused.value), "a": ""}.items() <= reasons(directory).items()
        shown = command(directory, "status").stdout
        assert "refused" in shown
        assert max(map(len, shown.splitlines())) <= 80
        nodes.caller("c").ask("heard", ["c", "h:1", "1", "cpu", [], 0], NEWS, 0, within_s=WITHIN_S)
        assert reasons(directory)["c"] == ""


def reasons(directory: Directory) -> dict[str, str]:
    return {node["node"]: node["refused"] for node in status(directory)["nodes"]}


def test_a_shard_that_its_node_cannot_serve_is_taken_over_by_its_copy(tmp_path: Path) -> None:
    with serving(tmp_path) as directory, nodes_of(directory) as nodes:
        shard = first_server(nodes, "a")
        client = DirectoryClient(nodes.caller("a"), LOG)
        assert client.begins(shard, 1, "a") is not None
        for news, endpoint in (("serves", "tcp://a:1"), ("gone", "")):
            nodes.say("b", gone=[(shard, 1)])  # which is not for this node to say
            nodes.say("a", **{news: [(shard, 1, endpoint)[: 2 + bool(endpoint)]]})
            found = status(directory)["shards"][shard]
            assert (found["endpoint"], bool(found["problem"])) == (endpoint, not endpoint)
        assert client.begins(shard, 1, "a") is not None
        nodes.until(lambda roles: bool(roles["a"][shard].other), "a", "b")
        assert client.attached(shard, 1, nodes.roles["a"][shard].attempt)
        nodes.say("a", gone=[(shard, 1)])
        nodes.until(lambda roles: servers(roles)[shard] == "b", "a", "b")


def test_a_command_without_a_directory_says_so() -> None:
    result = CliRunner().invoke(app, ["cluster", "status", "--directory", "127.0.0.1:9"])
    assert result.exit_code == 2
