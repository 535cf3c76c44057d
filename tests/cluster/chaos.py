"""Faults of all kinds, one after another, given to a cluster of three nodes under load."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

import psutil

from tests.cluster.cluster import DEAD_S, Cluster, ClusterLoad, ClusterNode

LOG: Final = ("--set", "log.format=json")


@dataclass(slots=True)
class Interruption:
    """How long a shard answered nothing after a fault, and what the time was spent on."""

    fault: str
    seconds: float
    decided_s: float | None = None
    """From the fault to the first word of the directory or of the agent about the shard."""
    started_s: float | None = None
    """From there until the new server listened."""
    resumed_s: float | None = None
    """From there to the next answer."""


class Faults:
    """Everything that happens to a cluster of three nodes; each returns once it is repaired."""

    def __init__(self, cluster: Cluster, load: ClusterLoad, random_: random.Random) -> None:
        self._cluster, self._load, self._random = cluster, load, random_
        self.shard = 0
        """The shard, or one of the shards, that it concerns."""

    async def give(self, kind: str) -> None:
        self.shard = self._random.randrange(self._cluster.shards)
        await getattr(self, kind)()

    def _view(self) -> dict[str, Any]:
        return self._cluster.status()[self.shard]

    def _node(self, kind: str) -> ClusterNode:
        return self._cluster.node(self._view()[kind])

    async def server(self) -> None:
        self._cluster.server_of(self.shard).kill()
        await self._load.progress()

    async def stepping(self) -> None:
        for process in self._cluster.server_of(self.shard).children():
            process.kill()
        await self._load.progress()

    async def copy(self) -> None:
        self._cluster.copy_of(self.shard).kill()
        await self._load.progress()

    async def agent(self) -> None:
        node = self._node("server")
        node.kill_agent()
        node.start()
        await self._load.progress()

    async def node(self) -> None:
        node = self._node("server")
        node.kill()
        await self._load.progress()
        node.start()

    async def freeze(self) -> None:
        node = self._node("server")
        shards = [each["shard"] for each in self._cluster.status() if each["server"] == node.name]
        servers = [node.at(node.port + shard) for shard in shards]
        node.freeze()
        await self._load.progress()
        node.thaw()
        thawed = time.monotonic()
        _, alive = await asyncio.to_thread(psutil.wait_procs, servers, 20)
        assert not alive, "a server that was thawed goes on"
        print(f"  thawed servers ended after {time.monotonic() - thawed:.2f} s")  # noqa: T201

    async def directory(self) -> None:
        self._cluster.kill_directory()
        await asyncio.sleep(self._random.uniform(0.2, 2))
        self._cluster.start_directory()
        await self._load.progress()

    async def move(self) -> None:
        await self._move(self._view()["copy"])

    async def move_to_third(self) -> None:
        view = self._view()
        await self._move(next(n.name for n in self._cluster.nodes if n.name not in (view["server"], view["copy"])))

    async def move_and_kill_source(self) -> None:
        await self._move(self._view()["copy"], lambda view: self._restart(self._cluster.node(view["server"])))

    async def move_and_kill_target(self) -> None:
        await self._move(self._view()["copy"], lambda view: self._restart(self._cluster.node(view["copy"])))

    async def move_and_kill_directory(self) -> None:
        await self._move(self._view()["copy"], lambda view: self.directory())

    async def _restart(self, node: ClusterNode) -> None:
        node.kill()
        await asyncio.sleep(DEAD_S + 1)  # without the node, shards that have just lost their copy cannot go on
        node.start()

    async def _move(
        self, target: str, in_the_middle: Callable[[dict[str, Any]], Awaitable[None]] | None = None
    ) -> None:
        view = self._view()
        self._cluster.ask("move", self.shard, target)
        if in_the_middle is not None:
            await asyncio.sleep(self._random.uniform(0, 0.4))
            await in_the_middle(view)
        await self._cluster.until(lambda shards: not shards[self.shard]["target"])
        await self._load.progress()


KINDS: Final = [name for name in vars(Faults) if not name.startswith("_") and name not in ("give", "shard")]


async def run(folder: Path, rounds: int, seed: int, kind_of_cluster: type[Cluster]) -> list[Interruption]:
    """Give a cluster of three nodes this number of faults; every kind comes once in as many as there are."""
    random_, found = random.Random(seed), list[Interruption]()
    order = [kind for _ in range(-(-rounds // len(KINDS))) for kind in random_.sample(KINDS, len(KINDS))][:rounds]
    async with kind_of_cluster(folder, nodes=3, arguments=LOG) as cluster:
        load = ClusterLoad(cluster.shards, seed)
        async with cluster.connect() as client, asyncio.TaskGroup() as tasks:
            await load.open(client)
            running = tasks.create_task(load.run())
            await load.progress()
            faults = Faults(cluster, load, random_)
            for number, kind in enumerate(order):
                began, began_at = time.monotonic(), time.time()
                await faults.give(kind)
                shard = max(range(cluster.shards), key=lambda shard: load.longest_gap(began, shard))
                found.append(_interruption(kind, cluster, load, shard, began, began_at))
                print(f"{number + 1:3} {kind:24} {found[-1].seconds:6.2f} s", flush=True)  # noqa: T201
                await cluster.until_all_are_heard()
                await cluster.until_whole()
            load.stop()
            await running
        outputs = load.check()
        await cluster.check_copies()
        print(f"{outputs} outputs in {rounds} rounds: none lost, none different; copies are equal")  # noqa: T201
    return found


def _interruption(
    kind: str, cluster: Cluster, load: ClusterLoad, shard: int, began: float, began_at: float
) -> Interruption:
    found = Interruption(kind, load.longest_gap(began, shard))
    events = sorted(
        (datetime.fromisoformat(line["timestamp"]).timestamp() - began_at, line["event"])
        for file in cluster.folder.glob("*.log")
        for line in map(json.loads, (text for text in file.read_text().splitlines() if text.startswith("{")))
        if line.get("shard") == shard
    )
    decided = next((at for at, _ in events if at >= 0), None)
    served = next((at for at, event in events if at >= 0 and event == "serving"), None)
    if decided is not None and served is not None:
        resumed = next((at - began for at in load.times[shard] if at - began > served), served)
        found.decided_s, found.started_s, found.resumed_s = decided, served - decided, resumed - served
    return found


def report(found: list[Interruption]) -> None:
    """Print the distribution for each kind of fault."""
    by_kind = defaultdict(list)
    for each in found:
        by_kind[each.fault].append(each)
    print(f"{'fault':24} {'n':>3} {'least':>7} {'median':>7} {'most':>7}   decided, started, resumed (medians)")  # noqa: T201
    for kind, all_of in by_kind.items():
        seconds = [each.seconds for each in all_of]
        known = [each for each in all_of if each.decided_s is not None]
        parts = [
            median(getattr(each, name) for each in known) for name in ("decided_s", "started_s", "resumed_s") if known
        ]
        shown = ", ".join(f"{part:.2f}" for part in parts)
        line = f"{kind:24} {len(all_of):3} {min(seconds):7.2f} {median(seconds):7.2f} {max(seconds):7.2f}   {shown}"
        print(line)  # noqa: T201
