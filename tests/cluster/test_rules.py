"""The rules of the directory, one by one; what they are for in all orders of events is in test_simulation.py."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest

from instep.cluster.rules import Assignments, ClusterRefused, NodeReport, ShardRole

PAUSE_S = 0.1


class Cluster:
    """A directory whose nodes do at once what they are told."""

    def __init__(self, shards: int = 2, nodes: str = "abc", stored: Any = None, **settings: Any) -> None:
        self.kept: dict[str, Mapping[str, Any]] = stored if stored is not None else {}
        self.is_full = False
        self.rules = Assignments(shards, self._store, dict(self.kept), **settings)
        self.reports = {name: NodeReport(name, f"{name}:1") for name in nodes}
        self.now = 0.0

    def _store(self, key: str, row: Mapping[str, Any]) -> None:
        if self.is_full:
            raise OSError("no space")
        self.kept[key] = dict(row)

    def run(self, seconds: float = 10.0, silent: Collection[str] = (), serving: bool = True) -> None:
        """Let time pass; servers begin, copy, drop and end as they should, except on `silent` nodes."""
        until = self.now + seconds
        while self.now < until:
            self.now += PAUSE_S
            for report in self.reports.values():
                if report.name not in silent:
                    self.rules.heard(report, self.now)
            self.rules.decide(self.now)
            for role in self.servers() if serving else ():
                node = self.rules.shards[role.shard].server
                if node in silent:
                    continue
                if self.rules.table().endpoints[role.shard] == "":
                    assert self.rules.begins(role.shard, role.term, node) is not None
                    self.rules.serves(role.shard, role.term, node, f"tcp://{node}")
                elif role.other and role.other in silent:
                    assert self.rules.dropped(role.shard, role.term, role.attempt)
                elif role.ends:
                    self.rules.ended(role.shard, role.term)
                elif role.other and not role.counts:
                    assert self.rules.attached(role.shard, role.term, role.attempt)

    def servers(self) -> list[ShardRole]:
        return [role for name in self.rules.nodes for role in self.rules.roles(name) if role.is_server]

    def places(self) -> list[tuple[int, str, str]]:
        """Term, server and copy of each shard."""
        return [(view.term, view.server, view.copy) for view in self.rules.shards]

    def refused(self, what: str, *args: Any) -> str:
        with pytest.raises(ClusterRefused) as caught:
            getattr(self.rules, what)(*args)
        return caught.value.code


def test_servers_and_copies_are_on_different_nodes_and_evenly_many() -> None:
    cluster = Cluster(shards=6)
    cluster.run()
    for of in (1, 2):
        assert sorted(each[of] for each in cluster.places()) == ["a", "a", "b", "b", "c", "c"]
    assert all(term == 1 and server != copy for term, server, copy in cluster.places())
    assert cluster.rules.table().endpoints == tuple(f"tcp://{server}" for _, server, _ in cluster.places())
