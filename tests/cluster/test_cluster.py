"""A cluster of real processes under load: every output of every stream is the network's, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil

from tests.cluster.cluster import Cluster, ClusterLoad


@asynccontextmanager
async def under_load(folder: Path, **size: Any) -> AsyncIterator[tuple[Cluster, ClusterLoad]]:
    """A cluster that serves; at the end, all outputs, recordings and copies are checked."""
    async with Cluster(folder, **size) as cluster:
        load = ClusterLoad(cluster.shards)
        async with cluster.connect() as client, asyncio.TaskGroup() as tasks:
            running = tasks.create_task(load.run(client))
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
        (stepping,) = cluster.server_of(2).children()
        stepping.kill()
        await load.progress()
        await cluster.until_whole()
        assert [shard["term"] for shard in cluster.status()] == [1] * cluster.shards


async def test_a_lost_node_and_its_return(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        lost = cluster.nodes[1]
        shards = [shard["shard"] for shard in cluster.status() if shard["server"] == lost.name]
        lost.kill()
        await load.progress()
        status = cluster.status()
        assert [status[shard]["server"] for shard in shards] == ["n0"] * len(shards)
        assert [status[shard]["term"] for shard in shards] == [2] * len(shards)
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


async def test_the_directory_away_stops_nothing(tmp_path: Path) -> None:
    async with under_load(tmp_path) as (cluster, load):
        before = cluster.status()
        cluster.kill_directory()
        await load.progress()
        cluster.server_of(0, before).kill()  # it begins again when there is a directory
        await asyncio.sleep(0.5)
        cluster.start_directory()
        await load.progress()
        assert [(each["term"], each["server"]) for each in cluster.status()] == [
            (each["term"], each["server"]) for each in before
        ]


async def test_moves_and_a_drained_node(tmp_path: Path) -> None:
    async with under_load(tmp_path, nodes=3) as (cluster, load):
        shard = cluster.status()[0]
        (third,) = {node.name for node in cluster.nodes} - {shard["server"], shard["copy"]}
        for target in (shard["copy"], third):
            cluster.ask("move", 0, target)
            await cluster.until(lambda shards: not shards[0]["target"])
            assert cluster.status()[0]["server"] == target
            await load.progress()
        await cluster.until_whole()
        cluster.ask("drain", "n1")
        await cluster.until(lambda shards: all("n1" not in (each["server"], each["copy"]) for each in shards))
        assert cluster.node("n1").stop() == 0
        await load.progress()
        cluster.node("n1").start()
        cluster.ask("undrain", "n1")
        await cluster.until(lambda shards: any(each["server"] == "n1" for each in shards))
