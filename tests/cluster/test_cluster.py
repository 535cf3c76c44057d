"""A cluster of real processes under load: every output of every stream is the network's, whatever happens."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import psutil
import pytest

from instep.cluster.agent import NodeProcess, received
from instep.cluster.rules import ShardRole
from instep.cluster.talk import Listener
from instep.config import TransportConfig
from instep.models.folder import write_model
from instep.server.supervisor import MOST_RESTARTS
from instep_client import StreamEvicted
from instep_client.protocol.codes import Code
from tests.cluster.chaos import run
from tests.cluster.cluster import DEAD_S, Cluster, ClusterLoad, ClusterNode, names_of
from tests.support.models import SMALL
from tests.support.warm import WarmProcess


@asynccontextmanager
async def under_load(folder: Path, **size: Any) -> AsyncIterator[tuple[Cluster, ClusterLoad]]:
    """A cluster that serves; at the end, all outputs, recordings and copies are checked."""
    async with Cluster(folder, **size) as cluster:
        load = ClusterLoad(cluster.shards)
        async with cluster.connect() as client, asyncio.TaskGroup() as tasks:
            await load.open(client)
            running = tasks.create_task(load.run())
            await load.progress()
            yield cluster, load
            await load.progress()
            load.stop()
            await running
        assert load.check() > 0
        if cluster.copies:
            await cluster.until_whole()
            await cluster.check_copies()


async def test_killed_servers_copies_and_stepping_processes(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        cluster.server_of(0).kill()
        cluster.copy_of(1).kill()
        node = cluster.node(cluster.status()[3]["server"])
        (node.folder / "shard-3" / "complete.json").write_text("")  # the agent goes on, and takes part
        (stepping,) = cluster.server_of(2).children()
        stepping.kill()
        await load.progress()
        await cluster.until_whole()
        assert sum(node.log().count("was killed by SIGKILL") for node in cluster.nodes) >= 3


async def test_a_server_that_dies_again_and_again_is_replaced_by_its_copy(tmp_path: Path) -> None:
    async with under_load(tmp_path, shards=1) as (cluster, load):
        shard = cluster.status()[0]
        for _ in range(MOST_RESTARTS):
            cluster.server_of(0).kill()
            await load.progress()
        await cluster.until_whole()
        assert cluster.status()[0]["term"] == shard["term"]
        cluster.server_of(0).kill()
        await cluster.until(lambda shards: shards[0]["server"] == shard["copy"])
        await load.progress()


async def test_an_agent_that_is_ended_during_a_move_waits_for_the_server_that_drains(tmp_path: Path) -> None:
    async with under_load(tmp_path, shards=1) as (cluster, load):
        shard = cluster.status()[0]
        node = cluster.node(shard["server"])
        (stepping,) = cluster.server_of(0).children()
        stepping.suspend()
        cluster.ask("move", 0, shard["copy"])
        while "hint" not in node.log():  # the server drains
            await asyncio.sleep(0.05)
        node.agent.terminate()
        await asyncio.sleep(DEAD_S + 1)  # it is not lost meanwhile
        stepping.resume()
        assert await asyncio.to_thread(node.wait) == 0
        await load.progress()
        assert f"moved from {node.name}" in (tmp_path / "directory.log").read_text()
        node.start()


async def test_a_lost_node_and_its_return(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        lost = cluster.nodes[1]
        shards = [shard["shard"] for shard in cluster.status() if shard["server"] == lost.name]
        lost.kill()
        await load.progress()
        status = cluster.status()
        assert [status[shard]["server"] for shard in shards] == ["n0"] * len(shards)
        assert all(status[shard]["term"] > 1 for shard in shards)
        lost.start()
        await cluster.until_whole()


async def test_a_frozen_node_answers_nobody_when_it_thaws(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        frozen = cluster.nodes[1]
        servers = [cluster.server_of(shard["shard"]) for shard in cluster.status() if shard["server"] == frozen.name]
        frozen.freeze()
        await load.progress()  # by the other node
        frozen.thaw()
        gone, alive = await asyncio.to_thread(psutil.wait_procs, servers, 20)
        assert (len(gone), alive) == (len(servers), [])
        await load.progress()


@contextmanager
def directory_of(role: ShardRole, asked: list[str]) -> Iterator[str]:
    """A directory of one shard that gives every agent this role; it notes what it is asked."""
    listener = Listener(TransportConfig(endpoint="tcp://127.0.0.1:0"), None)
    ends = threading.Event()

    def answer_all() -> None:
        while not ends.is_set():
            for request in listener.requests(0.1):
                asked.append(request.verb)
                listener.answer(request, 1 if request.verb == "shards" else [1, 1, [role], [role.term], [""]])
        listener.close()

    thread = threading.Thread(target=answer_all)
    thread.start()
    try:
        yield listener.endpoint
    finally:
        ends.set()
        thread.join()


def test_a_node_whose_recording_is_of_a_later_term_serves_and_copies_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "model", SMALL)
    folder = tmp_path / "data" / "shard-0"
    folder.mkdir(parents=True)
    (folder / "gru.instep").touch()
    (tmp_path / "data" / "shards").write_text("1")
    for term, is_server, answers in ((38, True, False), (38, False, False), (3, True, True)):
        (folder / "complete.json").write_text(json.dumps({"term": term}))
        asked: list[str] = []
        role = ShardRole(0, 3, is_server, attempt=1, begun=True)
        with directory_of(role, asked) as endpoint, (tmp_path / "log").open("w") as log:
            command = ("agent", str(tmp_path / "model"), "--record", str(tmp_path / "data"), "--name", "n")
            at = ("--directory", endpoint, "--endpoint", "tcp://127.0.0.1:5999", "--http", "off")
            agent = WarmProcess(["cluster", *command, *at], output=log.fileno())
            while asked.count("heard") < 6 and "begins" not in asked:
                assert agent.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)
            agent.kill()
            agent.wait()
        assert ("begins" in asked) == answers
        assert ("role refused" in (tmp_path / "log").read_text()) != answers


async def test_the_directory_away_stops_nothing(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        before = cluster.status()
        cluster.kill_directory()
        await load.progress()
        cluster.server_of(0, before).kill()  # it begins again when there is a directory
        await asyncio.sleep(0.5)
        cluster.start_directory()
        await load.progress()


async def test_a_directory_that_has_lost_its_store_changes_nothing_by_itself(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        cluster.kill_directory()
        shutil.rmtree(tmp_path / "store")
        cluster.start_directory()
        await cluster.until(lambda shards: "--adopt" in shards[0]["problem"])
        await asyncio.sleep(DEAD_S + 1)
        assert not any(shard["term"] for shard in cluster.status())
        await load.progress()
        cluster.kill_directory()
        cluster.start_directory("--adopt", "n0,n1")
        await cluster.until_whole()
        assert all(shard["term"] >= 2 for shard in cluster.status())
        await load.progress()


async def test_a_directory_on_an_old_store_ends_and_nothing_changes(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        cluster.kill_directory()
        shutil.copytree(tmp_path / "store", tmp_path / "backup")
        cluster.start_directory()
        lost = cluster.node(cluster.status()[0]["server"])
        lost.kill()
        await load.progress()
        before = cluster.status()
        lost.start()
        await cluster.until_whole()
        cluster.kill_directory()
        (tmp_path / "store").rename(tmp_path / "newest")
        (tmp_path / "backup").rename(tmp_path / "store")
        cluster.start_directory()
        assert await asyncio.to_thread(cluster.wait_for_directory) == 2
        assert "--adopt" in (tmp_path / "directory.log").read_text()
        await load.progress()
        shutil.rmtree(tmp_path / "store")
        cluster.start_directory("--adopt", "n0,n1")
        await cluster.until_whole()
        assert all(now["term"] > then["term"] for now, then in zip(cluster.status(), before, strict=True))


async def test_moves_and_a_drained_node(tmp_path: Path) -> None:
    async with under_load(tmp_path, nodes=3) as (cluster, load):
        shard = cluster.status()[0]
        (third,) = {node.name for node in cluster.nodes} - {shard["server"], shard["copy"]}
        for target in (shard["copy"], third):
            await cluster.until_whole()
            cluster.ask("move", 0, target)
            moved = re.compile(f'shard=0 change="moved from n[0-9]" term=[0-9]+ server={target}')
            await cluster.until(lambda _: moved.search((tmp_path / "directory.log").read_text()) is not None)  # noqa: B023
            await load.progress()
        await cluster.until_whole()
        cluster.ask("drain", "n1")
        await cluster.until(lambda shards: all("n1" not in (each["server"], each["copy"]) for each in shards))
        assert cluster.node("n1").stop() == 0
        await load.progress()
        cluster.node("n1").start()
        cluster.ask("undrain", "n1")
        await cluster.until(lambda shards: any(each["server"] == "n1" for each in shards))


async def test_what_a_node_refuses_and_shows(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=2, shards=2)
    cluster.nodes[0].http = f"127.0.0.1:{cluster.nodes[0].port + 4}"
    async with cluster:
        free_port = cluster.nodes[1].port + 100

        def refused(name: str, folder: Path, http: str = "off") -> str:
            node = ClusterNode(cluster, name, free_port)
            node.folder, node.http, before = folder, http, len(node.log())
            node.start()
            assert node.wait() == 2
            return node.log()[before:]

        assert f"127.0.0.1:{cluster.nodes[0].port}" in refused("n0", tmp_path / "twin")
        other = tmp_path / "other"
        (other / "shard-0").mkdir(parents=True)
        (other / "shard-0" / "gru.instep").touch()
        (other / "shards").write_text("6")
        assert "of 6 shards, not 2" in refused("n1", other)
        assert str(cluster.nodes[0].folder) in refused("n1", cluster.nodes[0].folder)
        of_a_copy = f"127.0.0.1:{free_port + 3}"
        assert of_a_copy in refused("n1", tmp_path / "taken", of_a_copy)

        def get(path: str) -> str:
            with urlopen(f"http://{cluster.nodes[0].http}{path}", timeout=10) as answer:
                return str(answer.read().decode())

        (shard,) = (each["shard"] for each in cluster.status() if each["server"] == "n0")
        assert f'instep_shard_up{{shard="{shard}"}} 1' in await asyncio.to_thread(get, "/metrics")
        assert [each["shard"] for each in json.loads(await asyncio.to_thread(get, "/readyz"))["shards"]] == [shard]
        for node in cluster.nodes:
            node.config.write_text("log: {level: debug}")
            node.reload()
            while "reloaded" not in node.log():
                await asyncio.sleep(0.05)
        cluster.ask("drain", "n0")
        await cluster.until(lambda shards: all(each["server"] == "n1" for each in shards))
        while "shard_up" in await asyncio.to_thread(get, "/metrics"):  # the node forgets it a moment later
            await asyncio.sleep(0.05)
        while " debug configuration " not in cluster.nodes[1].log():  # of a server that begins after the reload
            await asyncio.sleep(0.05)

        stranger = ClusterNode(cluster, "stranger", free_port)  # whose key nobody knows
        stranger.start()
        assert await asyncio.to_thread(stranger.wait) == 2
        cluster.kill_directory()
        while "waits for the directory" not in cluster.nodes[0].log():
            await asyncio.sleep(0.05)


async def test_a_first_start_that_fails_loses_nothing(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=2, shards=1)
    try:
        cluster.start_directory()
        cluster.nodes[0].start()
        await cluster.until(lambda _: bool(cluster.ask("status")["nodes"]))
        with socket.create_server(("127.0.0.1", cluster.nodes[0].port)):
            cluster.nodes[1].start()
            await cluster.until(lambda _: "restarting" in cluster.nodes[0].log())
        await cluster.until_whole()
    finally:
        await cluster.__aexit__(None)


async def test_a_shard_that_is_lost_is_not_begun_anew_by_itself(tmp_path: Path) -> None:
    async with Cluster(tmp_path, nodes=2, shards=2, copies=0) as cluster, cluster.connect() as client:
        name = names_of(0, 2)[0]
        stream = await client.open(name)
        await stream.step(np.zeros(5, np.float32))
        lost = cluster.node(cluster.status()[0]["server"])
        lost.kill()
        (lost.folder / "shard-0").rename(lost.folder / ".shard-0.old")  # a new copy was about to replace it
        shutil.copytree(lost.folder / ".shard-0.old", lost.folder / "shard-0.bak")
        lost.start()
        await stream.step(np.zeros(5, np.float32))
        lost.kill()
        shutil.rmtree(lost.folder)
        lost.start()
        await cluster.until(lambda shards: "lost its recording" in shards[0]["problem"])
        cluster.ask("accept_loss", 0, lost.name)
        await cluster.until(lambda shards: not shards[0]["problem"])
        with pytest.raises(StreamEvicted) as refused:
            await stream.step(np.zeros(5, np.float32))
        assert refused.value.code is Code.UNKNOWN_STREAM


async def test_agents_that_are_ended_while_the_directory_is_away_do_not_wait_for_it(tmp_path: Path) -> None:
    async with Cluster(tmp_path, nodes=2, shards=1) as cluster, cluster.connect() as client:
        stream = await client.open(names_of(0, 1)[0])
        shard = cluster.status()[0]
        server, copy = (cluster.node(shard[kind]) for kind in ("server", "copy"))
        cluster.kill_directory()
        assert await asyncio.to_thread(copy.stop) == 0
        step = asyncio.create_task(stream.step(np.zeros(5, np.float32)))
        while "copy lost" not in server.log():
            await asyncio.sleep(0.05)
        assert await asyncio.to_thread(server.stop) == 1
        assert "draining took longer" not in server.log()
        cluster.start_directory()
        server.start()
        copy.start()
        await step


async def test_an_agent_whose_terminal_closes_ends_its_servers_in_order(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, nodes=1, shards=1, copies=0)
    terminal, cluster.nodes[0].terminal = pty.openpty()
    async with cluster:
        os.close(cluster.nodes[0].terminal)
        os.close(terminal)
        assert await asyncio.to_thread(cluster.nodes[0].wait) == 0


def test_a_process_that_does_not_read_is_told_again() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = NodeProcess(0, ours)
        while process.tell(["a long table" * 1000]):
            pass
        assert received(theirs)
        assert process.tell(["the newest"])
        assert received(theirs)[-1] == ["the newest"]


@pytest.mark.long
@pytest.mark.timeout(1800)
async def test_fifty_faults_of_all_kinds(tmp_path: Path) -> None:
    assert len(await run(tmp_path, 50, 1, Cluster)) == 50
