"""`instep cluster ray up`: what it refuses, and a cluster that loses programs, actors and a node under load."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from instep.cluster.ray import ProgramActor
from instep.cluster.talk import Caller, NoAnswer
from instep.config import Config
from instep.program import app
from instep_client import AsyncClient
from tests.cluster.cluster import ClusterLoad
from tests.cluster.ray_cluster import RayCluster

UP = ("cluster", "ray", "up", "--shards", "2")
PLAIN = ("--set", "transport.allow_plaintext=true")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("model", "--record", "r"), "transport.allow_plaintext"),
        ((*PLAIN, "--record", "r"), "--record"),
        ((*PLAIN, "model"), "--record"),
        ((*PLAIN, "model", "--record", "r"), "instep[cluster]"),
    ],
    ids=["keys", "model", "recordings", "ray"],
)
def test_what_is_missing(arguments: tuple[str, ...], named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    result = CliRunner().invoke(app, [*UP, *arguments])
    assert result.exit_code == 2
    assert named in " ".join(result.stderr.split())


def test_an_actor_runs_a_program_until_it_is_stopped(tmp_path: Path) -> None:
    store, endpoint = tmp_path / "made" / "store", f"ipc://{tmp_path}/directory"
    arguments = ["directory", "--store", str(store), "--shards", "1", "--endpoint", endpoint]
    actor, caller = ProgramActor(str(store), arguments, Config().model_dump_json()), Caller(endpoint)
    assert caller.ask("shards", within_s=30.0) == 1
    actor.stop()
    with pytest.raises(NoAnswer):
        caller.ask("shards", within_s=1.0)
    caller.close()


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: instep[cluster]")
async def test_programs_actors_and_nodes_end_and_no_output_is_lost(tmp_path: Path) -> None:
    async with RayCluster(tmp_path) as cluster:
        load = ClusterLoad(cluster.shards, pause_s=0.1)
        endpoints = ",".join(shard["endpoint"] for shard in cluster.status())
        async with AsyncClient(endpoints, timeout_s=5.0, reconnect_s=100.0) as client, asyncio.TaskGroup() as tasks:
            await load.open(client)
            running = tasks.create_task(load.run())
            await load.progress()
            assert (await asyncio.to_thread(cluster.up)).returncode == 2  # it is up

            cluster.nodes[0].kill_agent()
            cluster.kill_directory()
            await load.progress()
            await cluster.until_whole()
            assert (await asyncio.to_thread(cluster.run, "status", "--directory", "ray")).returncode == 0

            cluster.kill_actor(cluster.nodes[1].processes(), "agent")
            await load.progress()
            await cluster.until_whole()

            cluster.add().start()
            await cluster.until(lambda shards: any(shard["server"] == "n2" for shard in shards))
            await cluster.until_whole()
            cluster.nodes[0].kill()
            await load.progress()
            cluster.nodes[0].start()
            await cluster.until_whole()

            assert (await asyncio.to_thread(cluster.run, "ray", "down")).returncode == 0
            assert cluster.programs() == []
            assert (
                await asyncio.to_thread(cluster.run, "status", "--directory", "ray")
            ).returncode == 2  # it is not up
            assert (await asyncio.to_thread(cluster.up)).returncode == 0
            await load.progress()
            load.stop()
            await running
        assert load.check() > 0
        await cluster.until_whole()
        await cluster.check_copies()
