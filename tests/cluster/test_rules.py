"""The rules of the directory, one by one; what they are for in all orders of events is in test_simulation.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest

from instep.cluster.rules import Assignments, ClusterRefused, NodeReport, ShardRole

PAUSE_S = 0.1


class Cluster:
    """A directory whose nodes do at once what they are told."""

    def __init__(self, shards: int = 2, nodes: str = "abc", kept: Any = None, **settings: Any) -> None:
        self.kept: dict[str, Mapping[str, Any]] = {} if kept is None else kept
        self.is_full = False
        self.joined: list[str] = []
        self.rules = Assignments(shards, self._store, dict(self.kept), **settings)
        self.reports: dict[str, NodeReport] = {}
        self.add(*nodes)
        self.now = 0.0
        self.most_moves = 0
        self.stuck: set[int] = set()
        """Shards whose servers do not begin."""

    def _store(self, key: str, row: Mapping[str, Any]) -> None:
        if self.is_full:
            raise OSError("no space")
        self.kept[key] = dict(row)
        self.joined.append(row.get("joining", ""))

    def run(self, seconds: float = 30.0, silent: str = "") -> None:
        """Let time pass; servers begin, copy, drop and end as they should, except on `silent` nodes."""
        until = self.now + seconds
        while self.now < until:
            self.now += PAUSE_S
            for report in self.reports.values():
                if report.name not in silent:
                    self.rules.heard(report, self.now)
            self.rules.decide(self.now)
            self.most_moves = max(self.most_moves, sum(bool(view.target) for view in self.rules.shards))
            for node in self.rules.nodes.keys() - set(silent):
                for role in self.rules.roles(node):
                    if role.is_server:
                        self._serve(node, role, silent)

    def _serve(self, node: str, role: ShardRole, silent: str) -> None:
        rules, (shard, term) = self.rules, role[:2]
        if shard in self.stuck:
            return
        if not rules.table().endpoints[shard]:
            begun = rules.begins(shard, term, node)
            assert begun is not None
            if begun.counts:
                assert rules.dropped(shard, term, begun.attempt)
            rules.serves(shard, term, node, f"tcp://{node}")
        elif role.other and role.other in silent:
            assert rules.dropped(shard, term, role.attempt)
        elif role.ends:
            rules.ended(shard, term)
        elif role.other and not role.counts:
            assert rules.attached(shard, term, role.attempt)

    def places(self) -> list[tuple[int, str, str]]:
        """Term, server and copy of each shard."""
        return [(view.term, view.server, view.copy) for view in self.rules.shards]

    def counts(self) -> tuple[list[int], list[int]]:
        """How many servers and copies the nodes have, the fewest first."""
        views = self.rules.shards
        alive = [name for name in self.rules.nodes if self.rules.is_alive(name)]
        servers, copies = Counter(view.server for view in views), Counter(view.copy for view in views)
        return sorted(servers[name] for name in alive), sorted(copies[name] for name in alive)

    def add(self, *names: str, **about: Any) -> None:
        """Have nodes report this from now on."""
        for name in names:
            self.reports[name] = NodeReport(name, f"{name}:1", **about)


@contextmanager
def refused(code: str, *names: str) -> Iterator[None]:
    with pytest.raises(ClusterRefused) as caught:
        yield
    assert caught.value.code == code
    assert all(name in str(caught.value) for name in names)


def running(**settings: Any) -> Cluster:
    cluster = Cluster(**settings)
    cluster.run()
    return cluster


def test_servers_and_copies_are_on_different_nodes_and_evenly_many() -> None:
    cluster = running(shards=6)
    assert cluster.counts() == ([2, 2, 2], [2, 2, 2])
    assert all(term == 1 and server != copy for term, server, copy in cluster.places())
    assert cluster.rules.table().endpoints == tuple(f"tcp://{server}" for _, server, _ in cluster.places())
    assert cluster.rules.table().terms.tolist() == [1] * 6


def test_copies_take_the_place_of_lost_servers_and_other_nodes_that_of_lost_copies() -> None:
    cluster = running(shards=6)
    before = cluster.places()
    cluster.run(silent="a")
    for (_, server, copy), (term, now, other) in zip(before, cluster.places(), strict=True):
        assert (term, now) == ((2, copy) if server == "a" else (1, server))
        assert other in {"b", "c"} - {now}


def test_nothing_is_decided_before_all_nodes_had_time_to_be_heard() -> None:
    cluster = running()
    before = cluster.places()
    cluster.now += 60.0  # the directory was stopped
    cluster.run(1.0, silent="a")
    assert [each[:2] for each in cluster.places()] == [each[:2] for each in before]
    again = Cluster(kept=cluster.kept)
    again.run(2.5, silent="a")
    assert [each[:2] for each in again.places()] == [each[:2] for each in before]


def test_a_directory_whose_network_was_away_takes_nobody_for_lost() -> None:
    cluster = running(shards=6)
    before = cluster.places()
    for first in "abc":
        cluster.run(6.0, silent="abc")
        cluster.run(1.0, silent="abc".replace(first, ""))
        cluster.run(1.0)
        assert [each[:2] for each in cluster.places()] == [each[:2] for each in before]
    cluster.run()
    before = cluster.places()
    cluster.run(8.0, silent="ab")
    assert all(
        server == "c" for (_, _, copy), (_, server, _) in zip(before, cluster.places(), strict=True) if copy == "c"
    )


def test_no_server_begins_before_the_nodes_of_the_store_had_time_to_be_heard() -> None:
    before = running()
    cluster = Cluster(kept=before.kept)
    cluster.run(2.5, silent="a")
    assert not cluster.rules.is_settled
    cluster.run(0.2)
    assert cluster.rules.is_settled
    late = Cluster(kept=before.kept)
    late.run(3.5, silent="a")
    assert late.rules.is_settled


def test_a_store_without_the_row_of_a_shard_is_an_old_one() -> None:
    cluster = running()
    del cluster.kept["shard-0"]
    again = Cluster(kept=cluster.kept)
    again.add("a", has={0: (1, 5)})
    with refused("OLD_STORE", "a"):
        again.run(1.0)


def test_the_number_of_changes_goes_on_in_the_next_directory_and_where_the_store_is_lost() -> None:
    cluster = running()
    assert Cluster(kept=cluster.kept).rules.revision == cluster.rules.revision > 0
    lost = Cluster(adopt=("a",))
    lost.add("a", has={0: (1, 5)}, revision=70)
    lost.run(4.0)
    assert lost.rules.revision > 70


def test_a_new_node_gets_its_share_by_one_move_after_another() -> None:
    cluster = running(shards=8, nodes="ab")
    assert cluster.counts() == ([4, 4], [4, 4])
    cluster.add("c", "d")
    cluster.run(120.0)
    assert cluster.counts() == ([2, 2, 2, 2], [2, 2, 2, 2])
    assert cluster.most_moves == 1
    settled = cluster.rules.version
    cluster.run()
    assert cluster.rules.version == settled


def test_a_drained_node_ends_up_with_nothing_and_gets_nothing() -> None:
    cluster = running(shards=6)
    cluster.rules.drain("b")
    cluster.run(120.0)
    assert cluster.counts() == ([0, 3, 3], [0, 3, 3])
    assert cluster.most_moves == 1
    assert Cluster(shards=6, kept=cluster.kept).rules.drained == {"b"}
    cluster.run(silent="c")
    assert all(server == "a" and copy == "" for _, server, copy in cluster.places())
    with refused("NOT_NEEDED", "a"):
        cluster.rules.undrain("a")
    cluster.rules.undrain("b")
    cluster.run(120.0)
    assert cluster.counts() == ([2, 2, 2], [2, 2, 2])


def test_a_shard_that_cannot_begin_does_not_keep_others_from_being_moved() -> None:
    cluster = Cluster(shards=6)
    cluster.stuck = {0}
    cluster.run()
    cluster.rules.drain("b")
    cluster.run()
    assert all("b" not in place for place in cluster.places()[1:])


def test_a_node_that_is_silent_and_not_lost_yet_gets_no_copy() -> None:
    cluster = running(shards=6, dead_s=3.0)
    cluster.joined.clear()
    cluster.run(2.8, silent="b")
    assert {*cluster.joined} == {"", "a", "c"}


def test_a_shard_stays_where_an_operator_moved_it_until_a_node_comes() -> None:
    cluster = running(shards=6)
    (shard, at), *_ = ((k, view.server) for k, view in enumerate(cluster.rules.shards) if view.server != "a")
    cluster.rules.move(shard, "a")
    cluster.run()
    assert cluster.places()[shard][1] == "a"
    assert cluster.counts()[0] == [1, 2, 3]
    cluster.run(10.0, silent=at)
    cluster.run(50.0)
    assert cluster.counts()[0] == [0, 3, 3], "its node was lost a moment ago"
    cluster.run()
    assert cluster.counts()[0] == [2, 2, 2]


def test_a_node_that_was_drained_and_is_used_again_gets_copies_at_once() -> None:
    cluster = running(shards=8, nodes="ab")
    cluster.rules.drain("a")
    cluster.run(60.0)
    assert cluster.counts() == ([0, 8], [0, 4]), "copies for which there is no other node stay"
    cluster.rules.undrain("a")
    cluster.run(1.0)
    assert all(copy for _, _, copy in cluster.places())


def test_a_shard_is_moved_through_its_copy() -> None:
    cluster = running(shards=1, nodes="ac")
    cluster.add("b")
    cluster.run(1.0)
    _, server, copy = cluster.places()[0]
    cluster.rules.drain(server)  # else it would be balanced again
    third = ({*"abc"} - {server, copy}).pop()
    cluster.run(1.0)
    cluster.run()
    assert cluster.places() == [(2, copy, third)]
    for code, named, shard, node in (
        ("NOT_NEEDED", copy, 0, copy),
        ("UNKNOWN_SHARD", "1", 1, third),
        ("UNKNOWN_NODE", "d", 0, "d"),
        ("DRAINED", server, 0, server),
    ):
        with refused(code, named):
            cluster.rules.move(shard, node)
    cluster.rules.move(0, third)
    with refused("BUSY", third):
        cluster.rules.move(0, server)


def test_an_older_copy_counts_until_the_next_one_is_whole() -> None:
    cluster = running(shards=1)
    term, server, copy = cluster.places()[0]
    third = ({*"abc"} - {server, copy}).pop()
    rules = cluster.rules
    rules.move(0, third)
    rules.decide(cluster.now)
    view = rules.shards[0]
    assert (view.copy, view.joining) == (copy, third)
    roles = {name: rules.roles(name)[0] for name in "abc"}
    assert (roles[server].other, roles[server].counts, roles[server].attempt) == (third, False, view.attempt)
    assert (roles[copy].counts, roles[copy].attempt) == (True, view.copy_attempt)
    rules.shards[0] = view._replace(attempt=view.attempt + 1)  # it was given up, and is made once more
    assert rules.dropped(0, term, view.attempt), "the server has the older one"
    rules.shards[0] = view
    assert rules.attached(0, term, view.attempt)
    assert (rules.shards[0].copy, rules.shards[0].joining) == (third, "")
    assert not rules.dropped(0, term, view.copy_attempt), "another copy counts"
    assert not rules.dropped(0, term - 1, view.attempt)


def test_a_copy_that_fails_again_and_again_is_tried_less_and_less_often() -> None:
    cluster = running(shards=1, nodes="ab")
    cluster.rules.dropped(0, 1, cluster.rules.shards[0].copy_attempt)
    cluster.stuck = {0}
    attempts = []
    for _ in range(1000):
        cluster.run(PAUSE_S)
        if (view := cluster.rules.shards[0]).joining:
            attempts.append(cluster.now)
            assert cluster.rules.dropped(0, 1, view.attempt)
    pauses = [round(after - before) for before, after in pairwise(attempts)]
    assert pauses[:4] == [2, 4, 8, 16]
    cluster.rules.nodes["b"].failures = 5000  # as after days with a full disk
    while not (view := cluster.rules.shards[0]).joining:
        cluster.run(PAUSE_S)
    assert cluster.rules.dropped(0, 1, view.attempt)


def test_a_server_that_begins_gets_another_number_and_one_of_a_former_term_none() -> None:
    cluster = running(shards=1)
    term, server, copy = cluster.places()[0]
    attempt = cluster.rules.shards[0].attempt
    role = cluster.rules.begins(0, term, server)
    assert role is not None
    assert (role.other, role.counts) == (copy, True)
    assert role.attempt > attempt
    assert not cluster.rules.dropped(0, term, attempt), "the copy counts in another attempt"
    assert cluster.rules.table().endpoints == ("",), "an earlier process had it"
    assert cluster.rules.behind(0, term, role.attempt)
    assert cluster.rules.shards[0][:2] == (term + 1, copy)
    assert cluster.rules.begins(0, term, server) is None
    assert cluster.rules.begins(0, term + 1, server) is None
    assert not cluster.rules.behind(0, term, role.attempt)


def test_a_server_that_begins_and_makes_its_copy_anew_blames_no_node_and_is_still_moved() -> None:
    cluster = running(shards=1, nodes="ab")
    term, server, copy = cluster.places()[0]
    cluster.rules.move(0, copy)
    role = cluster.rules.begins(0, term, server)
    assert role is not None
    assert cluster.rules.dropped(0, term, role.attempt)
    cluster.run(2 * PAUSE_S)
    assert (cluster.rules.shards[0].target, cluster.rules.shards[0].copy) == (copy, copy)
    assert cluster.rules.nodes[copy].failures == 0


def test_a_store_that_fails_changes_nothing() -> None:
    cluster = running(shards=1)
    before, version = cluster.places(), (cluster.rules.version, cluster.rules.revision)
    cluster.is_full = True
    term, server, copy = before[0]
    for act in (
        lambda: cluster.rules.begins(0, term, server),
        lambda: cluster.rules.dropped(0, term, cluster.rules.shards[0].copy_attempt),
        lambda: cluster.rules.move(0, copy),
        lambda: cluster.rules.drain("a"),
    ):
        with pytest.raises(OSError, match="no space"):
            act()
    assert (cluster.places(), cluster.rules.drained) == (before, frozenset())
    assert (cluster.rules.version, cluster.rules.revision) == version, "nodes would hold the store for an old one"


def test_a_recording_that_is_gone_is_never_begun_anew_by_itself() -> None:
    cluster = running(shards=1)
    term, server, copy = cluster.places()[0]
    cluster.rules.gone(0, term - 1)
    assert cluster.places() == [(term, server, copy)]
    cluster.rules.gone(0, term)
    assert cluster.places() == [(term + 1, copy, "")]
    cluster.rules.gone(0, term + 1)
    cluster.run(1.0, silent="abc")
    assert cluster.rules.shards[0].begun
    assert copy in cluster.rules.status()[0]["problem"]
    cluster.add(server, has={0: (term, 70)})
    cluster.run(0.1, silent=copy)
    with refused("OLDER", server):
        cluster.rules.accept_loss(0, copy)
    cluster.rules.accept_loss(0, server)
    assert cluster.rules.shards[0][:2] == (term + 2, server)
    assert cluster.rules.shards[0].begun
    with refused("NOT_NEEDED", server):
        cluster.rules.accept_loss(0, copy)


def test_a_lost_shard_without_any_recording_is_begun_anew_when_an_operator_says_so() -> None:
    cluster = running(shards=1, nodes="a", copies=0)
    cluster.rules.gone(0, 1)
    cluster.rules.accept_loss(0, "a")
    assert cluster.rules.shards[0][:2] == (2, "a")
    assert not cluster.rules.shards[0].begun


def test_a_directory_whose_store_is_lost_adopts_the_newest_recordings() -> None:
    has = {"a": {0: (3, 10), 1: (4, 90)}, "b": {0: (3, 20), 1: (5, 1)}, "c": {}}
    lost = Cluster()
    for name, found in has.items():
        lost.add(name, has=found)
    lost.run()
    assert [term for term, _, _ in lost.places()] == [0, 0]
    assert "--adopt" in lost.rules.status()[0]["problem"]
    again = Cluster(adopt=("a", "b"))
    again.reports = lost.reports
    again.run(silent="b")
    assert [term for term, _, _ in again.places()] == [0, 0]
    assert "waits for b" in again.rules.status()[0]["problem"]
    again.run(0.2)
    assert [each[:2] for each in again.places()] == [(4, "b"), (6, "b")]


def test_a_shard_without_a_recording_is_not_begun_when_the_others_are_adopted() -> None:
    cluster = Cluster(adopt=("a",))
    cluster.add("a", has={0: (3, 10)})
    cluster.run(4.0)
    assert cluster.rules.shards[0][:2] == (4, "a")
    assert cluster.rules.shards[1].begun


def test_nodes_that_compute_other_bits_hold_copies_where_there_is_no_other_and_do_not_serve() -> None:
    cluster = Cluster(shards=6, nodes="")
    cluster.add(*"abc", numerics="cpu")
    cluster.run()
    cluster.add("g", numerics="cuda")
    cluster.run()
    assert cluster.counts() == ([0, 2, 2, 2], [0, 2, 2, 2])
    with refused("OTHER_NUMERICS", "g"):
        cluster.rules.move(0, "g")
    cluster.run(silent="c")
    assert cluster.counts() == ([0, 3, 3], [0, 3, 3])
    cluster.run(silent="bc")
    assert {(server, copy) for _, server, copy in cluster.places()} == {("a", "g")}
    cluster.run(silent="abc")
    assert all(server == "a" for _, server, _ in cluster.places())
    assert all("other bits" in each["problem"] for each in cluster.rules.status())
    cluster.run()
    assert cluster.counts()[0] == [0, 2, 2, 2]
    for node in "bc":
        cluster.rules.drain(node)
        cluster.run(60.0)
    assert {(server, copy) for _, server, copy in cluster.places()} == {("a", "g")}
    cluster.add("h", numerics="cuda")
    cluster.run()
    assert cluster.counts()[1] == [0, 0, 0, 3, 3]


def test_numerics_may_change_where_that_is_accepted() -> None:
    cluster = Cluster(shards=1, nodes="", accept_numerics_change=True)
    cluster.add("a", numerics="cpu")
    cluster.run()
    assert cluster.places() == [(0, "", "")], "a cluster begins when there is a node for the copy, too"
    cluster.add("g", numerics="cuda")
    cluster.run()
    cluster.run(silent="a")
    assert cluster.places()[0][:2] == (2, "g")


def test_what_does_not_fit_is_refused() -> None:
    cluster = running()
    for code, named, report in (
        ("NAME_TAKEN", ("a:1", "elsewhere:1"), NodeReport("a", "elsewhere:1")),
        ("OTHER_VERSION", ("d", "2"), NodeReport("d", "d:1", version="2")),
        ("OLD_STORE", ("a", "--adopt"), NodeReport("a", "a:1", has={0: (7, 1)})),
        ("OLD_STORE", ("a", "--adopt"), NodeReport("a", "a:1", revision=cluster.rules.revision + 1)),
        ("UNKNOWN_SHARD", ("4",), NodeReport("a", "a:1", has={4: (1, 1)})),
    ):
        with refused(code, *named):
            cluster.rules.heard(report, cluster.now)
    with refused("OTHER_SHARDS", "2", "3"):
        Cluster(shards=3, kept=cluster.kept)
    with refused("UNKNOWN_NODE", "x"):
        cluster.rules.drain("x")
    cluster.run(silent="a")
    cluster.rules.heard(NodeReport("a", "elsewhere:1"), cluster.now)
    assert cluster.rules.is_alive("a")


def test_a_cluster_without_copies_waits_for_lost_nodes_and_moves_shards() -> None:
    cluster = running(shards=2, nodes="ab", copies=0)
    before = cluster.places()
    cluster.run(silent="a")
    assert cluster.places() == before
    assert "a" in next(each["problem"] for each in cluster.rules.status() if each["server"] == "a")
    cluster.run()
    cluster.rules.drain("a")
    cluster.run(60.0)
    assert [(server, copy) for _, server, copy in cluster.places()] == [("b", ""), ("b", "")]


def test_a_move_that_waits_for_a_lost_node_does_not_keep_others_from_being_moved() -> None:
    cluster = running(shards=6, copies=0)
    cluster.rules.move(next(k for k, (_, server, _) in enumerate(cluster.places()) if server == "b"), "a")
    cluster.run(10.0, silent="b")
    cluster.rules.drain("c")
    cluster.run(silent="b")
    assert cluster.counts()[0] == [0, 4]


def test_status_says_how_long_a_shard_has_been_alone() -> None:
    cluster = running(shards=1, nodes="ab", needs_copy=True)
    assert cluster.rules.status()[0]["alone_s"] == 0.0
    assert cluster.rules.roles(cluster.places()[0][1])[0].needs_copy
    copy = cluster.places()[0][2]
    cluster.run(20.0, silent=copy)
    status = cluster.rules.status()[0]
    assert status["alone_s"] == pytest.approx(20.0, abs=0.5)
    assert copy in status["event"]
