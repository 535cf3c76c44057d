"""Which node serves each shard, and which node has its copy: rules without sockets, clocks or files.

A shard has a server and at most one copy that counts, on another node. The copy counts from when the directory has
stored that it is whole until another copy counts, or until the server has asked to continue without it and that is
stored, too. In between, the server answers nothing that its copy does not have. So either of the two nodes can continue
alone, and no other node can. The directory never gives up a copy that counts by itself: the server's recording may have
lost its last moments with the power of its machine.

Each method that changes something stores the change first. If that fails, nothing is changed, and the caller gets the
exception of the store.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from math import inf
from typing import Any, Final, NamedTuple

import numpy as np

from instep_client.protocol.wire import ShardTable

QUIET_S: Final = 60.0
"""No shard is moved for balance alone for this long after a server was lost: its node may fail again."""
MAX_AVOID_S: Final = 60.0
"""A node on which copies fail is given the next one after 1, 2, 4, … seconds, and after this long at most."""


class ClusterRefused(Exception):
    """An agent or an operator asked for something that cannot be done; the message is a sentence.

    Attributes:
        code: the reason, as `NODE_AWAY`.
    """

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


class Assignment(NamedTuple):
    """What the directory stores of one shard."""

    term: int = 0
    """Rises with each new server; 0 before the first."""
    server: str = ""
    """The node that serves the shard."""
    copy: str = ""
    """The node whose copy counts."""
    copy_attempt: int = 0
    """The number of the attempt that made this copy."""
    joining: str = ""
    """The node whose copy is being made. Once it is whole, it takes the place of the copy that counts, if any."""
    attempt: int = 0
    """The number of the newest attempt to give the shard a copy."""
    target: str = ""
    """The node that the shard is being moved to."""
    begun: bool = False
    """Whether the shard has had a recording. If so, nobody creates another one."""
    numerics: str = ""
    """The arithmetic of the nodes that may serve the shard."""
    event: str = ""
    """The last change, in words."""
    revision: int = 0
    """The number of the last change, counted over all shards."""


class ShardRole(NamedTuple):
    """What a node is to be for one shard: its server, or the node that has its copy."""

    shard: int
    term: int
    is_server: bool = False
    other: str = ""
    """The node to which a copy is being made, or else the node whose copy counts; empty if there is neither."""
    address: str = ""
    """Where that node takes copies; empty while the directory has not heard it."""
    counts: bool = False
    """Whether that copy counts. While another one is being made, the server keeps the one that it has."""
    ends: bool = False
    """Whether the server is to end in order, because its copy takes its place."""
    attempt: int = 0
    """The attempt that makes, or has made, that copy. A server follows only a higher one than before."""
    begun: bool = False
    """If not, this is the first server of the shard, which creates the recording. Otherwise the recording must exist:
    a node that does not have it says `gone`, and starts no server."""
    needs_copy: bool = False
    """Whether the server answers nothing while no copy counts."""


class NodeReport(NamedTuple):
    """What an agent says of its node. It is not stored: agents say it again."""

    name: str
    address: str
    """Where the node takes copies."""
    version: str = ""
    """Has to be equal on all nodes."""
    numerics: str = ""
    """The arithmetic of the node: nodes of the same compute the same bits."""
    has: Mapping[int, tuple[int, int]] = {}
    """The recordings that the agent found when it looked last: term and position, by shard."""
    revision: int = 0
    """The newest change of the store that the agent has heard of."""


@dataclass
class ClusterNode:
    """A node that was heard."""

    report: NodeReport
    heard_at: float
    failures: int = 0
    """Copies there that failed since one was whole."""
    avoid_until: float = 0.0


@dataclass
class Assignments:
    """The server and the copy of each shard.

    `store` keeps a row under a key for good; `stored` is all that it has kept.

    Raises:
        ClusterRefused: the store is of another number of shards.
    """

    count: int
    store: Callable[[str, Mapping[str, Any]], None]
    stored: InitVar[Mapping[str, Mapping[str, Any]]]
    copies: int = 1
    """0 or 1."""
    dead_s: float = 3.0
    """A node that was not heard for so long is lost."""
    needs_copy: bool = False
    accept_numerics_change: bool = False
    adopt: Collection[str] = ()
    """After the store was lost, all nodes that have recordings: nothing is decided before all have been heard."""
    version: int = 0
    """Rises with each change that concerns an agent or a client."""
    revision: int = 0
    """Rises with each change of a shard, and goes on in the next directory with the same store."""
    is_settled: bool = False
    """Whether each node that the store names was heard, or had `dead_s` for that; no server may begin before."""
    nodes: dict[str, ClusterNode] = field(default_factory=dict)
    _now: float = 0.0
    _decided_at: float = -inf
    _patient_until: float = 0.0
    _settles_at: float = inf
    _quiet_until: float = 0.0
    _balances: bool = True
    """Not after an operator's move, until a node comes, or is drained or used again."""
    _gone: set[int] = field(default_factory=set)
    """The shards whose servers have lost their recordings, or cannot start."""
    _alone_since: dict[int, float] = field(default_factory=dict)

    def __post_init__(self, stored: Mapping[str, Mapping[str, Any]]) -> None:
        count = stored.get("cluster", {}).get("shards", self.count)
        if count != self.count:
            raise ClusterRefused("OTHER_SHARDS", f"the store is of a cluster of {count} shards, not {self.count}")
        if "cluster" not in stored:
            self.store("cluster", {"shards": count})
        self.shards = [Assignment(**stored.get(f"shard-{shard}", {})) for shard in range(count)]
        self.revision = max(view.revision for view in self.shards)
        self._endpoints = [""] * count
        self.drained = frozenset[str](stored.get("drained", {}).get("nodes", ()))

    # What agents say.

    def heard(self, report: NodeReport, now: float) -> None:
        """The agent of a node is alive.

        Raises:
            ClusterRefused: the node may not take part.
        """
        self._now, (name, address, version, *_) = now, report
        node = self.nodes.get(name)
        if node is not None and node.report.address != address and self.is_alive(name):
            raise ClusterRefused("NAME_TAKEN", f"{name} is the node at {node.report.address}, and not at {address}")
        for other, them in self.nodes.items():
            if other != name and version != them.report.version and self.is_alive(other):
                raise ClusterRefused("OTHER_VERSION", f"{name} has {version}, and {other} {them.report.version}")
        self._check_store(report)
        self._balances |= not self.is_alive(name)
        self.version += node is None or node.report.address != address
        node = self.nodes.setdefault(name, ClusterNode(report, now))
        node.report, node.heard_at = report, now

    def _check_store(self, report: NodeReport) -> None:
        """Refuse a report of something that this store must have had before the node."""
        is_new, why = not any(view.term for view in self.shards), ""
        for shard, (term, _) in report.has.items():
            own = self._of(shard).term
            if term > own and not is_new and (own or not self.adopt):
                why = f"has a recording of term {term} of shard {shard}, and the store has term {own}"
        if is_new:
            self.revision = max(self.revision, report.revision)
        elif report.revision > self.revision:
            why = f"has heard of {report.revision} changes, and the store has {self.revision}"
        if why:
            helps = "move it away, and start the directory with --adopt and the names of all nodes that have recordings"
            raise ClusterRefused(
                "OLD_STORE",
                f"{report.name} {why}. The store is an old one: {helps}; or {report.name} has the recordings of "
                "another cluster: end its agent, and move its folder away",
            )

    def serves(self, shard: int, term: int, node: str, endpoint: str) -> None:
        """A server listens at `endpoint`."""
        view = self.shards[shard]
        if (view.term, view.server) == (term, node) and self._endpoints[shard] != endpoint:
            self._endpoints[shard] = endpoint
            self.version += 1

    def ended(self, shard: int, term: int) -> None:
        """The server has ended in order; said until the node's role is another one."""
        view = self.shards[shard]
        if view.term == term and view.target and view.copy == view.target and self.is_alive(view.copy):
            # the next server compares its recording with the former one's, since its machine may have failed meanwhile
            former = view.server if self.copies else ""
            self._begin_term(shard, view.copy, f"moved from {view.server}", copy=former)

    def gone(self, shard: int, term: int) -> None:
        """The node that is to serve a shard has lost its recording, or cannot start; said until its role is another."""
        view = self.shards[shard]
        if view.term != term or not view.begun:
            return
        self.serves(shard, term, view.server, "")
        if not self._take_over(shard, "which cannot serve it"):
            self._gone.add(shard)

    # What servers ask.

    def begins(self, shard: int, term: int, node: str) -> ShardRole | None:
        """The role of a server that has its recording and has not answered anything yet; None if its term is over.

        Messages of an earlier process about its copy may still be on their way, so the attempt gets another number.
        """
        view = self.shards[shard]
        if (view.term, view.server) != (term, node):
            return None
        if view.copy or view.joining or not view.begun:
            attempt = view.attempt + 1
            self._change(shard, "begun", joining="", attempt=attempt, copy_attempt=attempt, begun=True)
        self.serves(shard, term, node, "")
        self._gone.discard(shard)
        return self._server_role(shard)

    def attached(self, shard: int, term: int, attempt: int) -> bool:
        """Whether the copy of this attempt, which is whole, counts from now on.

        If not, the server asks `dropped`: this attempt may have counted, and the next term may have begun, before the
        answer was lost.
        """
        view = self.shards[shard]
        if view.term == term and view.joining and view.attempt == attempt:
            view = self._change(shard, f"copied to {view.joining}", copy=view.joining, copy_attempt=attempt, joining="")
        counts = view.term == term and bool(view.copy) and view.copy_attempt == attempt
        if counts and view.copy in self.nodes:
            self.nodes[view.copy].failures, self.nodes[view.copy].avoid_until = 0, 0.0
        return counts

    def dropped(self, shard: int, term: int, attempt: int) -> bool:
        """Whether a server that has lost its copy of this attempt may continue without; if not, its term is over."""
        view = self.shards[shard]
        if view.term != term:
            return False
        is_joining = bool(view.joining) and view.attempt == attempt
        lost = view.joining if is_joining else view.copy if view.copy_attempt == attempt else ""
        if lost:
            left = {"joining": ""} if is_joining else {"copy": ""}
            # a server that begins, or for which another copy is being made, need not have found anything wrong
            has_failed = is_joining or (self._endpoints[shard] and not view.joining)
            target = "" if has_failed and lost == view.target else view.target
            view = self._change(shard, f"lost the copy on {lost}", target=target, **left)
            if has_failed and (node := self.nodes.get(lost)):
                node.avoid_until = self._now + min(2.0 ** min(node.failures, 6), MAX_AVOID_S)
                node.failures += 1
        # only the process that serves now knows an attempt that was begun after the copy counted
        return not view.copy or attempt > view.copy_attempt

    def behind(self, shard: int, term: int, attempt: int) -> bool:
        """Whether the copy that counts, which has more than the server, takes its place; the server ends anyway."""
        view = self.shards[shard]
        is_newest = (view.term, view.copy_attempt) == (term, attempt)
        return is_newest and self._take_over(shard, "which had less than its copy")

    # What operators ask.

    def move(self, shard: int, node: str) -> None:
        """Make another node the server: it gets the copy, the server ends in order, and the copy takes its place.

        Raises:
            ClusterRefused: that is not possible now.
        """
        view = self._checked(shard, node)
        if view.server == node:
            raise ClusterRefused("NOT_NEEDED", f"{node} serves shard {shard} already")
        if not self.is_alive(view.server):
            raise ClusterRefused("NODE_AWAY", f"{view.server}, which serves shard {shard}, is lost")
        if view.target:
            raise ClusterRefused("BUSY", f"shard {shard} is being moved to {view.target}")
        if node in self.drained:
            raise ClusterRefused("DRAINED", f"{node} is drained: undrain it first")
        self._change(shard, f"moves to {node}", target=node)
        self._balances = False

    def drain(self, node: str) -> None:
        """Move everything away from a node, one shard after another, and give it nothing new.

        Raises:
            ClusterRefused: there is no such node.
        """
        if node not in self.nodes:
            raise ClusterRefused("UNKNOWN_NODE", f"the directory has not heard of {node}")
        self._drain(self.drained | {node})

    def undrain(self, node: str) -> None:
        """Use a node again.

        Raises:
            ClusterRefused: it is not drained.
        """
        if node not in self.drained:
            raise ClusterRefused("NOT_NEEDED", f"{node} is not drained")
        self._drain(self.drained - {node})

    def accept_loss(self, shard: int, node: str) -> None:
        """Make an older copy of a lost shard its recording; without any, `node` begins the shard anew.

        Raises:
            ClusterRefused: the shard is not lost, or another node has more of it.
        """
        view = self._checked(shard, node)
        if self.is_alive(view.server) and shard not in self._gone:
            raise ClusterRefused("NOT_NEEDED", f"{view.server} has shard {shard}")
        if self._can_take_over(view):
            raise ClusterRefused("NOT_NEEDED", f"{view.copy} has all of shard {shard} and takes it over")
        newest, best = self._newest(shard, filter(self.is_alive, self.nodes))
        has = self.nodes[node].report.has
        if has.get(shard, (0, 0)) < newest:
            raise ClusterRefused("OLDER", f"{best} has more of shard {shard} than {node}")
        self._begin_term(shard, node, "given up what was lost", begun=shard in has)

    # What the directory decides.

    def is_alive(self, node: str) -> bool:
        """Whether the node was heard in time."""
        return node in self.nodes and self._now - self.nodes[node].heard_at <= self.dead_s

    def decide(self, now: float) -> None:
        """One round of decisions; to be called several times in `dead_s`."""
        self._now = now
        if now - self._decided_at > self.dead_s / 2 or not self._is_connected():
            self._patient_until = now + self.dead_s  # also at a start: nobody was heard meanwhile
        self._decided_at, self._settles_at = now, min(self._settles_at, now + self.dead_s)
        named = {name for view in self.shards for name in (view.server, view.copy, view.joining, view.target)}
        self.is_settled |= now >= self._settles_at or self.nodes.keys() >= named - {""}
        alone = [shard for shard, view in enumerate(self.shards) if view.term and self.copies and not view.copy]
        self._alone_since = {shard: self._alone_since.get(shard, now) for shard in alone}
        may_have_lost_store = not self.adopt and self._has_only_recordings()
        if now < self._patient_until or may_have_lost_store or not self.nodes.keys() >= {*self.adopt}:
            return
        steady = [
            name
            for name, node in sorted(self.nodes.items())
            if now - node.heard_at <= self.dead_s / 3 and node.avoid_until <= now and name not in self.drained
        ]
        servers = Counter(view.server for view in self.shards)
        copies = Counter(name for view in self.shards for name in (view.copy, view.joining))
        for shard, view in enumerate(self.shards):
            if view.term:
                self._keep(shard, steady, copies)
            else:
                self._place(shard, steady, servers)
        served = [k for k, view in enumerate(self.shards) if self._endpoints[k] and self.is_alive(view.server)]
        if self._balances and not any(self.shards[k].joining or self.shards[k].target for k in served):
            self._balance(served, steady, servers, copies)

    def _is_connected(self) -> bool:
        """Whether nodes are heard; if most of them fall silent at once, the directory's own network is away."""
        ages = [self._now - node.heard_at for node in self.nodes.values()]
        heard = sum(age <= self.dead_s * 2 / 3 for age in ages)
        return heard > 0 and 2 * heard >= sum(age <= self.dead_s for age in ages)

    def _has_only_recordings(self) -> bool:
        """Whether nodes have recordings and the store has none of them."""
        return not any(view.term for view in self.shards) and any(node.report.has for node in self.nodes.values())

    def _place(self, shard: int, steady: list[str], servers: Counter[str]) -> None:
        """Give a shard its first server; with `adopt`, that is the node with its newest recording."""
        (term, _), node = self._newest(shard, self.nodes if self.adopt else ())
        if not node and len(steady) > self.copies:
            node = self._best(self.shards[shard], steady, servers)
        if node:
            self._begin_term(shard, node, "adopted" if term else "placed", term + 1, begun=bool(self.adopt))
            servers[node] += 1

    def _keep(self, shard: int, steady: list[str], copies: Counter[str]) -> None:
        """See to it that a shard has a server and a copy."""
        view = self.shards[shard]
        for kind, node in (("joining", view.joining), ("target", view.target)):
            if node and not self.is_alive(node):
                view = self._change(shard, f"gave up {node}, which is lost", **{kind: ""})
        if not self.is_alive(view.server):
            self._take_over(shard, "which is lost")
        elif view.target and view.target not in (view.copy, view.joining):
            self._join(shard, view.target, copies)
        elif self.copies and not view.copy and not view.joining:
            node = self._best(view, [name for name in steady if name != view.server], copies)
            if node:
                self._join(shard, node, copies)

    def _balance(self, served: list[int], steady: list[str], servers: Counter[str], copies: Counter[str]) -> None:
        """Move one server or one copy: away from a drained node, or to a node that has at least two fewer."""
        for kind, counts in (("server", servers), ("copy", copies)):
            holders = {shard: getattr(self.shards[shard], kind) for shard in served}
            least = min((counts[name] for name in steady), default=0)
            for shard in sorted(served, key=lambda shard: holders[shard] not in self.drained):
                view, holder = self.shards[shard], holders[shard]
                most = inf if holder in self.drained else counts[holder] - 1 if self._now >= self._quiet_until else 0
                if most <= least or not self.is_alive(holder):
                    continue
                to = [name for name in steady if counts[name] < most and name not in (holder, view.server)]
                node = self._best(view, to, counts)
                has_to_go = holder in self.drained or not self._may_serve(holder, view)
                if not node or not (self._may_serve(node, view) or (kind == "copy" and has_to_go)):
                    continue
                if kind == "server":
                    self._change(shard, f"moves to {node}", target=node)
                else:
                    self._join(shard, node, copies)
                return

    def _best(self, view: Assignment, names: Iterable[str], counts: Counter[str]) -> str:
        """Preferably a node that may serve the shard, then the one that has its copy, then the one with the fewest."""

        def rank(name: str) -> tuple[bool, bool, int]:
            return not self._may_serve(name, view), name != view.copy, counts[name]

        return min(names, key=rank, default="")

    def _may_serve(self, node: str, view: Assignment) -> bool:
        """Whether the node computes the same bits as the shard's servers so far."""
        same = not view.numerics or self.nodes[node].report.numerics == view.numerics
        return same or self.accept_numerics_change

    def _can_take_over(self, view: Assignment) -> bool:
        return self.is_alive(view.copy) and self._may_serve(view.copy, view)

    def _newest(self, shard: int, names: Iterable[str]) -> tuple[tuple[int, int], str]:
        """The highest term and position of a recording, and the node that has it."""
        found = ((self.nodes[name].report.has.get(shard, (0, 0)), name) for name in names)
        return max((each for each in found if each[0] > (0, 0)), default=((0, 0), ""))

    # Changes.

    def _change(self, shard: int, event: str, **changes: Any) -> Assignment:
        view = self.shards[shard]._replace(event=event, revision=self.revision + 1, **changes)
        self.store(f"shard-{shard}", view._asdict())  # nothing is changed if this fails
        self.shards[shard], self.revision = view, view.revision
        self.version += 1
        return view

    def _join(self, shard: int, node: str, copies: Counter[str]) -> None:
        view = self.shards[shard]
        self._change(shard, f"is copied to {node}", joining=node, attempt=view.attempt + 1)
        copies[node] += 1

    def _begin_term(
        self, shard: int, node: str, event: str, term: int = 0, *, copy: str = "", begun: bool = True
    ) -> None:
        rest = {"copy": copy, "joining": "", "target": "", "numerics": self.nodes[node].report.numerics}
        term = term or self.shards[shard].term + 1
        self._change(shard, event, term=term, server=node, begun=begun, **rest)
        self._endpoints[shard] = ""
        self._gone.discard(shard)

    def _take_over(self, shard: int, why: str) -> bool:
        """Make the copy the server, if its node is there and may serve the shard; return whether that is so."""
        view = self.shards[shard]
        if can := self._can_take_over(view):
            self._quiet_until = self._now + QUIET_S
            self._begin_term(shard, view.copy, f"taken over from {view.server}, {why}")
        return can

    def _drain(self, nodes: frozenset[str]) -> None:
        self.store("drained", {"nodes": sorted(nodes)})
        self.drained, self._balances, self._quiet_until = nodes, True, 0.0

    def _of(self, shard: int) -> Assignment:
        if not 0 <= shard < self.count:
            raise ClusterRefused("UNKNOWN_SHARD", f"there is no shard {shard}: the cluster has 0 to {self.count - 1}")
        return self.shards[shard]

    def _checked(self, shard: int, node: str) -> Assignment:
        """The assignment of a shard that an operator wants the node to serve."""
        view = self._of(shard)
        if node not in self.nodes:
            raise ClusterRefused("UNKNOWN_NODE", f"the directory has not heard of {node}")
        if not self.is_alive(node):
            raise ClusterRefused("NODE_AWAY", f"{node} was not heard in the last {self.dead_s:g} s")
        if not self._may_serve(node, view):
            sentence = f"{node} computes other bits than shard {shard} has (cluster.accept_numerics_change allows that)"
            raise ClusterRefused("OTHER_NUMERICS", sentence)
        return view

    # What the directory says.

    def roles(self, node: str) -> list[ShardRole]:
        """All that a node is to be."""
        found = []
        for shard, view in enumerate(self.shards):
            if view.term and node == view.server:
                found.append(self._server_role(shard))
            elif view.term and node in (view.copy, view.joining):
                counts = node == view.copy
                attempt = view.copy_attempt if counts else view.attempt
                found.append(ShardRole(shard, view.term, counts=counts, attempt=attempt, begun=view.begun))
        return found

    def _server_role(self, shard: int) -> ShardRole:
        term, _, copy, copy_attempt, joining, attempt, target, begun, *_ = self.shards[shard]
        other, counts, attempt = (joining, False, attempt) if joining else (copy, bool(copy), copy_attempt)
        address = self.nodes[other].report.address if other in self.nodes else ""
        ends = bool(target) and copy == target
        return ShardRole(shard, term, True, other, address, counts, ends, attempt, begun, self.needs_copy)

    def table(self) -> ShardTable:
        """Where clients find the shards; no endpoint while nobody serves one."""
        return ShardTable(np.array([view.term for view in self.shards], np.uint64), tuple(self._endpoints))

    def status(self) -> list[dict[str, Any]]:
        """The assignment of each shard with three more values, for people.

        * `endpoint`: empty while nobody serves the shard.
        * `alone_s`: seconds for which this directory has known no copy that counts; 0 if one does, or none is wanted.
        * `problem`: the reason why the shard is not served, with a remedy; empty if it is served.
        """
        found = []
        for shard, view in enumerate(self.shards):
            alone_s = self._now - self._alone_since.get(shard, self._now)
            about = {"endpoint": self._endpoints[shard], "alone_s": alone_s, "problem": self._problem(shard)}
            found.append({"shard": shard, **view._asdict(), **about})
        return found

    def _problem(self, shard: int) -> str:
        view = self.shards[shard]
        if self._has_only_recordings():
            if away := sorted({*self.adopt} - self.nodes.keys()):
                return f"waits for {', '.join(away)}, which --adopt names"
            return "nodes have recordings, and the directory's store is empty: start it with --adopt NODE,…"
        if not view.term:
            return f"the cluster begins when {1 + self.copies} nodes are there"
        if shard in self._gone:
            helps = f"bring {view.copy} back" if view.copy else "use accept-loss"
            return f"{view.server} has lost its recording or cannot start: see the log there, or {helps}"
        if self.is_alive(view.server):
            return "" if self._endpoints[shard] else f"starts on {view.server}: see the log there"
        if self.is_alive(view.copy) and not self._may_serve(view.copy, view):
            return f"waits for {view.server}: {view.copy}, which has its copy, computes other bits"
        return f"waits for {view.server}" + (f" or {view.copy}" if view.copy else "")
