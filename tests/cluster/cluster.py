"""A cluster of real processes on one machine: a directory and agents, to be killed, frozen and moved under load."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

import psutil

from instep.cluster.talk import Caller, NoAnswer
from instep.models.folder import write_model
from instep_client import AsyncClient
from instep_client.key_files import read_client_keys
from instep_client.protocol.wire import shard_of
from tests.chaos.load import Load
from tests.support.keys import KeyRing
from tests.support.models import SMALL
from tests.support.warm import WarmProcess

DEAD_S: Final = 1.5
_PATIENCE_S: Final = 60.0
_STREAMS: Final = 4


class ClusterNode:
    """An agent, and everything that it forks."""

    address = "127.0.0.1"

    def __init__(self, cluster: Cluster, name: str, port: int) -> None:
        self.name, self.port = name, port
        self.folder = cluster.folder / name
        self.http = "off"
        self.config = self.folder.with_suffix(".yaml")
        self.terminal: int | None = None
        self._cluster = cluster
        self._agent: WarmProcess | None = None
        self._frozen: list[psutil.Process] = []

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.config.touch()
        self._agent = self._cluster.begin(
            self.name,
            *("agent", str(self._cluster.folder / "model"), "--record", str(self.folder)),
            *("--endpoint", f"tcp://127.0.0.1:{self.port}", "--set", f"http.endpoint={self.http}", "--name", self.name),
            *("--directory", self._cluster.directory, "--set", "recording.recovery_target_s=0.05"),
            *("--set", "cluster.copy_timeout_s=1", "--config", str(self.config)),
            terminal=self.terminal,
        )

    def processes(self) -> list[psutil.Process]:
        """The agent, and all below it."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if self._agent is not None:
                agent = psutil.Process(self._agent.pid)
                return [agent, *agent.children(recursive=True)]
        return []

    def at(self, port: int) -> psutil.Process:
        """The process that listens at a port of this node."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(each.laddr.port == port and each.status == "LISTEN" for each in process.net_connections("tcp")):
                    return process
        raise LookupError(port)

    def kill(self) -> None:
        """As a machine that is lost: SIGKILL for all."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.kill_agent()

    def kill_agent(self) -> None:
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait(_PATIENCE_S)
        self._agent = None

    def freeze(self) -> None:
        self._frozen = self.processes()
        for process in self._frozen:
            process.suspend()

    def thaw(self) -> None:
        for process in self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    @property
    def agent(self) -> WarmProcess:
        assert self._agent is not None
        return self._agent

    def reload(self) -> None:
        """SIGHUP for the agent."""
        self.agent.send_signal(signal.SIGHUP)

    def stop(self) -> int:
        """End in order; the exit status."""
        self.agent.terminate()
        return self.wait()

    def wait(self) -> int:
        """The exit status, once it has ended by itself."""
        return self.agent.wait(_PATIENCE_S)

    def log(self) -> str:
        return (self._cluster.folder / f"{self.name}.log").read_text()


class Cluster:
    """A directory and nodes `n0`, `n1`, ….

    Args:
        folder: for everything.
        nodes: how many.
        shards: how many.
        copies: of each shard.
        arguments: further ones of all commands.
    """

    def __init__(
        self, folder: Path, nodes: int = 2, shards: int = 4, copies: int = 1, arguments: Sequence[str] = ()
    ) -> None:
        self.folder, self.shards, self.copies = folder, shards, copies
        names = [f"n{k}" for k in range(nodes)]
        self.arguments = arguments
        peers = {name: {"role": "node"} for name in (*names, "directory")}
        self.ring = KeyRing(folder, mic={}, ann={"role": "operator"}, **peers)
        write_model(folder / "model", SMALL)
        each = 2 * shards + 1
        ports = _free_ports(1 + each * nodes)
        self.directory = f"127.0.0.1:{ports}"
        self.nodes = [ClusterNode(self, f"n{k}", ports + 1 + each * k) for k in range(nodes)]
        self._program: WarmProcess | None = None
        self._caller = Caller(f"tcp://{self.directory}", read_client_keys(**self.ring.of_client("ann", "directory")))

    async def __aenter__(self) -> Self:
        self.start_directory()
        for node in self.nodes:
            node.start()
        try:
            await self.until_whole()
        except BaseException as error:
            await self.__aexit__(error)
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        self._caller.close()
        for node in self.nodes:
            node.thaw()
            node.kill()
        self.kill_directory()
        if error[0] is not None:
            for file in sorted(self.folder.glob("*.log")):
                print(f"── {file.name}\n{file.read_text()[-6000:]}")  # noqa: T201

    def begin(self, name: str, *command: str, terminal: int | None = None) -> WarmProcess:
        """A command of `instep cluster` for a node or the directory, which has a key of its own beside that of servers.

        What it prints is appended to the log of that name, or goes to its terminal.
        """
        self.ring.make(name)
        keys = [*self.ring.arguments, "--set", f"cluster.key_file={self.folder / name}.key_secret"]
        with (self.folder / f"{name}.log").open("a") as log:
            words = ["cluster", *command, *self.arguments, *keys]
            return WarmProcess(words, output=terminal or log.fileno(), start_new_session=terminal is not None)

    def connect(self) -> AsyncClient:
        """A client that is given the first port of each node."""
        return self._connect(**self.ring.of_client("mic"))

    def _connect(self, **keys: Any) -> AsyncClient:
        endpoint = ",".join(f"tcp://{node.address}:{node.port}" for node in self.nodes)
        return AsyncClient(endpoint, timeout_s=5.0, reconnect_s=120.0, **keys)

    def start_directory(self, *arguments: str) -> None:
        self._program = self.begin(
            "directory",
            *("directory", "--store", str(self.folder / "store"), "--shards", str(self.shards)),
            *("--copies", str(self.copies), "--endpoint", f"tcp://{self.directory}"),
            *("--set", f"cluster.dead_s={DEAD_S}", *arguments),
        )

    def kill_directory(self) -> None:
        if self._program is not None:
            self._program.kill()
            self._program.wait(_PATIENCE_S)
        self._program = None

    def wait_for_directory(self) -> int:
        """The exit status, once it has ended by itself."""
        assert self._program is not None
        return self._program.wait(_PATIENCE_S)

    def ask(self, verb: str, *arguments: Any) -> Any:
        """What the directory answers; an earlier one's connection may be lost."""
        with contextlib.suppress(NoAnswer):
            return self._caller.ask(verb, *arguments, within_s=20.0)
        return self._caller.ask(verb, *arguments, within_s=20.0)

    def status(self) -> list[dict[str, Any]]:
        return list(self.ask("status")["shards"])

    def node(self, name: str) -> ClusterNode:
        return next(node for node in self.nodes if node.name == name)

    async def until(self, condition: Callable[[list[dict[str, Any]]], bool]) -> float:
        """Wait for a state of the shards; the seconds that it took."""
        began = time.monotonic()
        while not condition(found := await asyncio.to_thread(self.status)):
            assert time.monotonic() < began + _PATIENCE_S, found
            await asyncio.sleep(0.05)
        return time.monotonic() - began

    async def until_whole(self) -> float:
        """Until every shard is served and has its copy."""

        def is_whole(shards: list[dict[str, Any]]) -> bool:
            return all(
                each["endpoint"] and not each["problem"] and not each["target"] and (each["copy"] or not self.copies)
                for each in shards
            )

        took_s = await self.until(is_whole)
        decisions: list[tuple[int, int]] = []
        while decisions != (decisions := self._decisions()):
            await asyncio.sleep(0.7)  # shards are moved, one after another, to nodes that have fewer
            took_s += await self.until(is_whole)
        return took_s

    def _decisions(self) -> list[tuple[int, int]]:
        return [(each["term"], each["attempt"]) for each in self.status()]

    async def until_all_are_heard(self) -> None:
        """Until no node is lost."""
        await self.until(lambda _: all(node["alive"] for node in self.ask("status")["nodes"]))

    def server_of(self, shard: int, status: list[dict[str, Any]] | None = None) -> psutil.Process:
        """The process that serves a shard, or served it by an earlier status."""
        node = self.node((status or self.status())[shard]["server"])
        return node.at(node.port + shard)

    def copy_of(self, shard: int) -> psutil.Process:
        node = self.node(self.status()[shard]["copy"])
        return node.at(node.port + self.shards + shard)

    async def check_copies(self) -> None:
        """Wait until the rows of each recording and of its copy are equal in every table."""
        deadline = time.monotonic() + _PATIENCE_S
        for shard in self.status():
            server, copy = (self.node(shard[kind]).folder / f"shard-{shard['shard']}" for kind in ("server", "copy"))
            while (one := rows_in(server)) != (other := rows_in(copy)) or not one:
                assert time.monotonic() < deadline, {name: (len(one[name]), len(other.get(name, []))) for name in one}
                await asyncio.sleep(0.1)


def rows_in(folder: Path) -> dict[str, list[Any]]:
    """All rows of the recordings in a folder, by file and table."""
    found: dict[str, list[Any]] = {}
    for file in sorted(folder.glob("*.instep")):
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
                found[f"{file.name}.{table}"] = sorted(database.execute(f"SELECT * FROM {table}").fetchall())
    return found


def _free_ports(count: int) -> int:
    """The first of as many successive ports, below those that the system gives to clients."""
    random_ = random.Random(os.getpid())
    while True:
        first = random_.randrange(10_000, 30_000)
        with contextlib.ExitStack() as sockets, contextlib.suppress(OSError):
            for port in range(first, first + count):
                sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first


class ClusterLoad(Load):
    """A group of streams for each shard."""

    def __init__(self, shards: int, seed: int = 0, pause_s: float = 0.05) -> None:
        super().__init__(seed, [names_of(shard, shards) for shard in range(shards)], pause_s)

    def longest_gap(self, since: float, shard: int | None = None) -> float:
        """The longest time between two answers of a shard, of which the second came after `since`."""
        gaps = [
            after - before
            for number, times in enumerate(self.times)
            if shard in (None, number)
            for before, after in pairwise(times)
            if after > since
        ]
        return max(gaps, default=0.0)

    def check(self) -> int:
        """Compare every output and final state with the network over all that was sent; the number of outputs."""
        assert [kept.differing() for kept in self.kept] == [(0, 0)] * len(self.kept)
        return sum(kept.outputs for kept in self.kept)


def names_of(shard: int, shards: int) -> list[str]:
    """Names of streams of a shard."""
    names = (f"mic-{number}" for number in range(10_000))
    return [name for name in names if shard_of(name, shards) == shard][:_STREAMS]
