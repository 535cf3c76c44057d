"""The same cluster on Ray: a head with the directory, and nodes with an agent each, all on one machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import psutil

from instep.cluster.ray import PORT, RESOURCE
from instep.cluster.talk import Caller, NoAnswer
from instep_client import AsyncClient
from tests.cluster.cluster import DEAD_S, Cluster, ClusterNode

_FIRST_PORT: Final = 5757


class RayNode(ClusterNode):
    """A node of Ray with an agent, and everything that they fork."""

    def __init__(self, cluster: RayCluster, name: str, address: str) -> None:
        super().__init__(cluster, name, _FIRST_PORT)
        self.address = address
        self.folder = cluster.folder / "recordings" / name
        self._ray_cluster = cluster.ray
        self._ray: Any = None

    def start(self) -> None:
        if self._ray is None:
            own = {"node_ip_address": self.address, "node_name": self.name, "resources": {RESOURCE: 1}}
            self._ray = self._ray_cluster.add_node(**_SMALL, **own)

    def processes(self) -> list[psutil.Process]:
        return [] if self._ray is None else _processes(self._ray)

    def kill(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._ray is not None:
            self._ray_cluster.remove_node(self._ray, allow_graceful=False)
        self._ray = None

    def kill_agent(self) -> None:
        """Its actor starts it again."""
        _programs(self.processes(), "agent")[0].kill()


class RayCluster(Cluster):
    """A directory on Ray's head, and nodes `n0`, `n1`, … with agents. Each has a loopback address of its own."""

    def __init__(
        self, folder: Path, nodes: int = 2, shards: int = 4, copies: int = 1, arguments: Sequence[str] = ()
    ) -> None:
        from ray.cluster_utils import Cluster as Ray

        super().__init__(folder, 0, shards, copies, arguments)
        self._caller.close()
        self.ray = Ray()
        self._addresses = f"127.{os.getpid() >> 8 & 0xFF}.{os.getpid() & 0xFF}."
        self.directory = f"{self._addresses}2:{PORT}"
        self._caller = Caller(f"tcp://{self.directory}")
        self._temporary = os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(dir="/tmp")  # paths of sockets are short
        os.mkdir(f"{self._temporary}/ray")
        for _ in range(nodes):
            self.add()

    def add(self) -> RayNode:
        """One more node, which is to be started."""
        node = RayNode(self, f"n{len(self.nodes)}", f"{self._addresses}{3 + len(self.nodes)}")
        self.nodes.append(node)
        return node

    def connect(self) -> AsyncClient:
        """A client without keys, which this cluster does not have."""
        return self._connect()

    def start_directory(self, *arguments: str) -> None:
        """Start Ray's head; where it runs, Ray starts the directory by itself."""
        if not self.ray.list_all_nodes():
            own = {"node_ip_address": f"{self._addresses}2", "include_dashboard": False}
            self._head = self.ray.add_node(**_SMALL, **own)
            self.up()

    def kill_directory(self) -> None:
        self.kill_actor(_processes(self._head), "directory")

    def kill_actor(self, processes: Sequence[psutil.Process], program: str) -> None:
        """Ray starts it again."""
        for process in _programs(processes, program):
            if (actor := process.parent()) is not None:
                actor.kill()

    def up(self) -> subprocess.CompletedProcess[str]:
        """`instep cluster ray up`."""
        settings = {"transport.allow_plaintext": "true", "http.endpoint": "off", "cluster.dead_s": str(DEAD_S)}
        settings |= {"recording.recovery_target_s": "0.05", "cluster.copy_timeout_s": "1"}
        settings |= {"log.file": str(self.folder / "cluster.log")}
        return self.run(
            *("ray", "up", str(self.folder / "model"), "--record", str(self.folder / "recordings")),
            *(f"--shards={self.shards}", f"--copies={self.copies}"),
            *(f"--set={key}={text}" for key, text in settings.items()),
            *self.arguments,
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command of `instep cluster`, on Ray."""
        command = [sys.executable, "-m", "instep", "cluster", *arguments]
        environment = {**os.environ, "RAY_ADDRESS": self.ray.address}
        return subprocess.run(command, env=environment, text=True, capture_output=True, timeout=100, check=False)

    def programs(self) -> list[psutil.Process]:
        """What runs on the head and on nodes besides Ray."""
        return _programs([*_processes(self._head), *(process for node in self.nodes for process in node.processes())])

    def ask(self, verb: str, *arguments: Any) -> Any:
        for _ in range(10 * (verb == "status")):  # a request is not answered that finds the directory ending
            with contextlib.suppress(NoAnswer):
                return self._caller.ask(verb, within_s=3.0)
        return super().ask(verb, *arguments)

    async def __aexit__(self, *error: object) -> None:
        await super().__aexit__(*error)
        self.ray.shutdown()
        shutil.rmtree(self._temporary, ignore_errors=True)


_SMALL: Final = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


def _processes(node: Any) -> list[psutil.Process]:
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [raylet, *raylet.children(recursive=True)]


def _programs(processes: Sequence[psutil.Process], *named: str) -> list[psutil.Process]:
    """The processes in which actors run the directory or an agent, and what these fork."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[4 : 5 + len(named)] == ["cluster", *named]:
                found.append(process)
    return found
