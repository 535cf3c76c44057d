"""A cluster in virtual time: the real rules of the directory and of the client, and models of everything around them.

    python -m tests.cluster.simulation --seconds 60 [--first SEED] [--without FENCE,BARRIER]

One heap of events and one seed decide everything, so a seed replays what it has found. The state of a stream is a chain
of hashes of its frames, so an output that does not rest on all of them is another number. `Broken` is raised when

* an output differs from the truth, or a frame is applied that was never sent,
* a grant is below what the client has, or the owner of a stream is refused,
* a stream is not answered again after the faults have ended.
"""

from __future__ import annotations

import argparse
import enum
import hashlib
import heapq
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from instep.cluster.rules import Assignments, ClusterRefused, NodeReport, ShardRole
from instep_client.cluster import ShardMap
from instep_client.protocol.wire import ShardTable

DEAD_S: Final = 1.5
HEARTBEAT_S: Final = 0.2
COPY_TIMEOUT_S: Final = 0.6
ASK_AGAIN_S: Final = 0.4
SILENCE_S: Final = 0.8
WINDOW: Final = 4
FIRST_PORT: Final = 5757

Row: TypeAlias = tuple[Any, ...]
Reply: TypeAlias = Callable[[Any], None]


class Rule(enum.Enum):
    """The rules that can be left out."""

    BOTH = "1: an answer waits for the copy that counts"
    FENCE = "2: a node that has become the server takes nothing more as a copy"
    ALONE = "3: a server continues without its copy only once that is stored"
    WHOLE = "4: a copy counts only once it is whole"
    STORED = "5: what the directory has decided outlives it"
    BARRIER = "6: what is said without a commit passes the copy"
    ATTEMPT = "7, first half: what a server says of its copy names the attempt"
    RISING = "7, second half: a copy takes nothing of an earlier attempt than it has seen"
    OLD_COPY = "8: an old copy stays until the new one is whole"
    BEGINS = "9, first half: a server that begins asks for its role"
    BACK = "9, second half: it answers only once its former copy is dropped"
    MORE = "9: of recording and copy, the one that has more continues"
    HIGHEST = "10: a client follows no table and stays with no server of a lower term"
    KNOWN = "11, first half: a node follows no directory with fewer changes than it has heard of"
    PROVED = "11, second half: a report that proves the store old ends the directory"
    SETTLED = "12: no server begins before the nodes of the store had time to be heard"


class Broken(Exception):
    """The cluster has not kept a promise."""


def output(name: str, before: list[int], x: int) -> int:
    """The next output of a stream."""
    rests_on = (before[-1] if before else name, x)
    return int.from_bytes(hashlib.blake2b(repr(rests_on).encode(), digest_size=8).digest())


# ── Virtual time ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Promise(Awaitable[Any]):
    """A value that comes later; the first one counts."""

    def __init__(self) -> None:
        self.is_kept = False
        self.value: Any = None
        self._then: Reply | None = None

    def __await__(self) -> Generator[Promise, Any, Any]:
        return (yield self)

    def keep(self, value: Any) -> None:
        if not self.is_kept:
            self.is_kept, self.value = True, value
            if self._then is not None:
                self._then(value)

    def then(self, act: Reply) -> None:
        if self.is_kept:
            act(self.value)
        else:
            self._then = act


@dataclass
class Machine:
    """A node, the directory or a client: what can be frozen or cut off as a whole."""

    name: str
    frozen_until: float = 0.0


@dataclass
class Line:
    """A connection: messages come in order. What is lost breaks it, unless it connects again silently."""

    is_silent: bool = False
    is_broken: bool = False
    arrives: float = 0.0


class Clock:
    """The heap of events, and the network, in which messages are late, lost and doubled."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.seen: Counter[str] = Counter()
        self.calm_until = 0.0
        self.cut: dict[frozenset[str], float] = {}
        self.catches: Counter[str] = Counter()
        """How many messages of a name are put aside, until `release`."""
        self.caught: list[tuple[Machine, Callable[[], object]]] = []
        self._events: list[tuple[float, int, Machine, Callable[[], object]]] = []
        self._count = 0

    @property
    def is_calm(self) -> bool:
        return self.now < self.calm_until

    def at(self, delay: float, machine: Machine, act: Callable[[], object]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + delay, self._count, machine, act))

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, count, machine, act = heapq.heappop(self._events)
            if machine.frozen_until > self.now:
                thaws = min(machine.frozen_until, self.now + 0.1)  # which may be earlier, if there is to be calm
                heapq.heappush(self._events, (thaws, count, machine, act))
            else:
                act()
        self.now = until

    def send(
        self, name: str, source: Machine, to: Machine, act: Callable[[], object], line: Line | None = None
    ) -> None:
        """Let something happen on another machine."""
        chance = self.random
        if line is not None and line.is_broken:
            return
        if self.catches[name] > 0:
            self.catches[name] -= 1
            self.caught.append((to, act))
            return
        is_cut = self.cut.get(frozenset((source.name, to.name)), 0.0) > self.now
        if is_cut or (not self.is_calm and chance.random() < 0.003):
            self.seen["lost messages"] += 1
            if line is not None:
                line.is_broken = not line.is_silent
            return
        delay = chance.expovariate(1 / 0.003)
        if not self.is_calm and chance.random() < 0.01:
            delay += chance.uniform(0.0, 2.0)
            self.seen["late messages"] += 1
        if line is not None:
            line.arrives = max(line.arrives + 1e-6, self.now + delay)
            delay = line.arrives - self.now
        elif not self.is_calm and chance.random() < 0.01:
            self.seen["doubled messages"] += 1
            self.at(delay + chance.uniform(0.0, 1.0), to, act)
        self.at(delay, to, act)

    def release(self) -> None:
        """Deliver what was put aside."""
        for machine, act in self.caught:
            self.at(0.0, machine, act)
        self.caught.clear()


class Process:
    """Coroutines on a machine that end when the process is killed."""

    def __init__(self, clock: Clock, machine: Machine) -> None:
        self.clock, self.machine, self.is_alive = clock, machine, True

    def start(self, coroutine: Coroutine[Promise, Any, object]) -> None:
        self._step(coroutine, None)

    def _step(self, coroutine: Coroutine[Promise, Any, object], value: Any) -> None:
        if not self.is_alive:
            return coroutine.close()
        try:
            promise = coroutine.send(value)
        except StopIteration:
            return None
        return promise.then(lambda value: self.clock.at(0.0, self.machine, lambda: self._step(coroutine, value)))

    def sleep(self, seconds: float) -> Promise:
        promise = Promise()
        self.clock.at(seconds, self.machine, lambda: promise.keep(None))
        return promise

    def ask(
        self, name: str, to: Machine, act: Callable[[Reply], None], timeout_s: float, line: Line | None = None
    ) -> Promise:
        """What another machine replies; None if nothing comes in time."""
        promise, back = Promise(), line and Line(is_silent=True)

        def reply(value: Any) -> None:
            self.clock.send(f"{name} answered", to, self.machine, lambda: promise.keep(value), back)

        self.clock.send(name, self.machine, to, lambda: act(reply), line)
        self.clock.at(timeout_s, self.machine, lambda: promise.keep(None))
        return promise


class Mailbox:
    """Messages that one coroutine takes."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._waiting: Promise | None = None

    def put(self, message: Any) -> None:
        if self._waiting is not None and not self._waiting.is_kept:
            self._waiting.keep(message)
        else:
            self._messages.append(message)

    def take(self, process: Process, timeout_s: float = float("inf")) -> Promise:
        """The next message; None if nothing comes in time."""
        promise = self._waiting = Promise()
        if self._messages:
            promise.keep(self._messages.pop(0))
        elif timeout_s < float("inf"):
            process.clock.at(timeout_s, process.machine, lambda: promise.keep(None))
        return promise

    def __len__(self) -> int:
        return len(self._messages)


# ── Directory and nodes ───────────────────────────────────────────────────────────────────────────────────────────────


class Directory:
    """The real rules, with a store that may fail, in a process that may end."""

    def __init__(self, world: World) -> None:
        self.world, self.machine = world, Machine("directory")
        self.kept: dict[str, dict[str, Any]] = {}
        self.backup: dict[str, dict[str, Any]] = {}
        self.adopt: tuple[str, ...] = ()
        """With what it is started, again and again; once there is a store, this changes nothing."""
        self.fails_until = 0.0
        self.process = Process(world.clock, self.machine)
        self.restart()

    def restart(self) -> None:
        self.process.is_alive = False
        stored = self.kept if Rule.STORED not in self.world.broken else {}
        self.fails_until = 0.0
        settings = {"dead_s": DEAD_S, "adopt": self.adopt, **self.world.settings}
        self.rules = Assignments(self.world.shards, self._store, stored, **settings)
        self.process = Process(self.world.clock, self.machine)
        self.process.start(self._decide())

    def restart_on(self, stored: dict[str, dict[str, Any]]) -> None:
        """What an operator should not do. Where no server may begin after that, the operator reads why, and adopts."""
        self.kept = dict(stored)
        self.restart()
        self.world.clock.at(3.0, self.machine, self._adopt)

    def _adopt(self) -> None:
        if not self.process.is_alive or not any(view.term for view in self.rules.shards):
            self.kept, self.adopt = {}, tuple(node.name for node in self.world.nodes)
            self.restart()
            self.world.clock.seen["stores adopted"] += 1

    def _store(self, key: str, row: Mapping[str, Any]) -> None:
        fails, chance = self.world.clock.now < self.fails_until, self.world.clock.random
        if not fails or chance.random() < 0.5:
            self.kept[key] = dict(row)  # a store may also fail once it has kept something
        if fails:
            self.world.clock.seen["decisions not stored"] += 1
            raise OSError("the store has failed")

    async def _decide(self) -> None:
        while True:
            self.try_to(lambda: self.rules.decide(self.world.clock.now))
            await self.process.sleep(0.1)

    def try_to(self, act: Callable[[], Any], reply: Reply = lambda _: None) -> None:
        if self.process.is_alive:
            with suppress(OSError):
                reply((act(),))

    def answer(self, what: str, shard: int, term: int, of: Any, reply: Reply) -> None:
        """Answer a server."""
        if Rule.ATTEMPT in self.world.broken and what in ("attached", "dropped"):
            of = self.rules.shards[shard].attempt
        if not self.rules.is_settled and Rule.SETTLED not in self.world.broken:
            return
        self.try_to(lambda: getattr(self.rules, what)(shard, term, of), reply)

    def hear(self, report: NodeReport, said: list[tuple[str, tuple[Any, ...]]], reply: Reply) -> None:
        """Answer the heartbeat of an agent with its roles, and the table for clients."""

        def take() -> Any:
            self.rules.heard(report, self.world.clock.now)
            for what, of in said:
                getattr(self.rules, what)(*of)
            return self.rules.revision, self.rules.roles(report.name), self.rules.table()

        try:
            self.try_to(take, lambda answer: reply(answer[0]))
        except ClusterRefused as error:
            self.world.clock.seen["agents refused"] += 1
            if error.code == "OLD_STORE" and Rule.PROVED not in self.world.broken:
                self.process.is_alive = False


@dataclass
class Recording:
    """A file: rows, when they were written, and the term of the server that wrote the last ones."""

    term: int
    rows: list[tuple[float, Row]] = field(default_factory=list)
    boot: int = 0
    """The start of the machine since which it has had everything."""

    @property
    def position(self) -> tuple[int, int]:
        return self.term, len(self.rows)


class Node(Machine):
    """A machine with a disk and an agent."""

    def __init__(self, world: World, name: str) -> None:
        super().__init__(name)
        self.world = world
        self.disk: dict[int, Recording] = {}
        self.attempts: dict[int, tuple[int, int]] = {}
        """The newest attempt that a copy here has seen; on disk, too."""
        self.boot = 0
        self.backup: tuple[dict[int, Recording], dict[int, tuple[int, int]]] = ({}, {})
        self.unfenced: dict[int, Holder] = {}
        self.agent = Agent(self)

    def kill(self, back_s: float) -> None:
        self.agent.kill()
        self.world.clock.at(back_s, self, self._begin_again)

    def _begin_again(self) -> None:
        if not self.agent.is_alive:
            self.agent = Agent(self)

    def lose_moments(self, seconds: float) -> None:
        """Lose what was written last, as the machine starts again."""
        self.boot += 1
        limit = self.world.clock.now - seconds
        for recording in self.disk.values():
            recording.rows = [row for row in recording.rows if row[0] <= limit]

    def back_up(self) -> None:
        """Copy the disk, to be put back one day."""
        recordings = {shard: replace(each, rows=[*each.rows]) for shard, each in self.disk.items()}
        self.backup = recordings, dict(self.attempts)

    def write(self, shard: int, row: Row) -> None:
        self.disk[shard].rows.append((self.world.clock.now, row))


class Agent(Process):
    """Starts and kills what the directory wants its node to be."""

    def __init__(self, node: Node) -> None:
        super().__init__(node.world.clock, node)
        self.node, self.world = node, node.world
        self.roles: dict[int, ShardRole] = {}
        self.table: ShardTable | None = None
        self.children: dict[int, Server | Holder] = {}
        self.ended: set[tuple[int, int]] = set()
        self.gone: set[tuple[int, int]] = set()
        self.revision = 0
        self.start(self._live())

    def kill(self) -> None:
        self.is_alive = False
        for child in self.children.values():
            child.is_alive = False

    async def _live(self) -> None:
        while True:
            self.make_so()
            answer = await self._say()
            if answer is not None and (answer[0] >= self.revision or Rule.KNOWN in self.world.broken):
                self.revision, self.table = answer[0], answer[2]
                self.roles = {role.shard: role for role in answer[1] if self._may_have(role)}
                self.make_so()
            await self.sleep(HEARTBEAT_S if answer is not None else 0.0)

    def _may_have(self, role: ShardRole) -> bool:
        own = self.node.disk.get(role.shard)
        return own is None or own.term <= role.term

    def _say(self) -> Promise:
        directory, name = self.world.directory, self.node.name
        has = {shard: recording.position for shard, recording in self.node.disk.items()}
        report = NodeReport(name, f"{name}:1", has=has, revision=self.revision)
        said: list[tuple[str, tuple[Any, ...]]] = [
            ("serves", (shard, child.term, name, f"tcp://{name}:{FIRST_PORT + shard}"))
            for shard, child in self.children.items()
            if isinstance(child, Server) and child.is_serving
        ]
        said += [("ended", each) for each in self.ended] + [("gone", each) for each in self.gone]
        return self.ask(
            f"heartbeat {name}", directory.machine, lambda reply: directory.hear(report, said, reply), ASK_AGAIN_S
        )

    def make_so(self) -> None:
        for shard, child in list(self.children.items()):
            role = self.roles.get(shard)
            if role is None or (role.term, role.is_server) != (child.term, isinstance(child, Server)):
                if isinstance(child, Holder) and Rule.FENCE in self.world.broken:
                    self.node.unfenced[shard] = child
                child.is_alive = False
            if not child.is_alive:
                del self.children[shard]
        self.gone.clear()
        for shard, role in self.roles.items():
            child_now = self.children.get(shard)
            if (shard, role.term) in self.ended and role.is_server and role.ends:
                continue
            self.ended = {each for each in self.ended if each[0] != shard}
            if child_now is not None:
                if isinstance(child_now, Server):
                    child_now.told(role)
            elif not role.is_server:
                self.children[shard] = Holder(self.node, role)
            elif role.begun and shard not in self.node.disk:
                self.gone.add((shard, role.term))
            else:
                self.children[shard] = Server(self.node, role)


class Holder(Process):
    """The process that has the copy of a shard."""

    def __init__(self, node: Node, role: ShardRole) -> None:
        super().__init__(node.world.clock, node)
        self.node, self.world, self.shard, self.term = node, node.world, role.shard, role.term
        self.attempt = (0, 0)
        self.taken = 0
        self.incoming: Recording | None = None

    def take(self, attempt: tuple[int, int], number: int, what: str, of: Any, reply: Reply) -> None:
        """Take one message of a server: the rows so far, a transaction after them, or that it is whole."""
        node = self.node
        if what == "position":
            found = node.disk.get(self.shard)
            return reply(found.position[1] if found else 0)
        if what == "rows":
            seen = node.attempts.get(self.shard, (0, 0)) if Rule.RISING not in self.world.broken else (0, 0)
            if attempt[0] < self.term or attempt <= seen:
                return reply(False)
            node.attempts[self.shard], self.attempt, self.taken = attempt, attempt, 0
            self.incoming = Recording(attempt[0], [(self.clock.now, row) for _, row in of])
            return self.clock.at(self.clock.random.uniform(0.0, 0.3), node, lambda: reply(self.is_alive))
        is_late = attempt != self.attempt
        if (is_late and Rule.RISING not in self.world.broken) or (not is_late and number != self.taken + 1):
            return reply(False)
        self.taken += not is_late
        if what == "whole" and self.incoming is not None:
            self.incoming.boot = node.boot
            node.disk[self.shard], self.incoming = self.incoming, None
        elif what == "row" and self.is_alive:
            for row in of:
                if self.incoming is not None:
                    self.incoming.rows.append((self.clock.now, row))
                else:
                    node.write(self.shard, row)
        return reply(True)


# ── Servers ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Link:
    """A server's connection to one attempt of a copy."""

    node: Node
    attempt: int
    line: Line = field(default_factory=lambda: Line(is_silent=True))
    sent: int = 0
    queue: list[Row] = field(default_factory=list)
    """Rows that were committed after those with which the copy began."""


@dataclass
class Stream:
    frames: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    epoch: int = 0
    former: int = 0
    granted: int = 0
    connection: int = 0

    @property
    def next(self) -> int:
        return len(self.frames)


class Server(Process):
    """The server of a shard: streams, a recording, and a link to the copy."""

    def __init__(self, node: Node, role: ShardRole) -> None:
        super().__init__(node.world.clock, node)
        self.node, self.world, self.role = node, node.world, role
        self.shard, self.term = role.shard, role.term
        self.is_serving = self.ends = False
        self.streams: dict[str, Stream] = {}
        self.epochs = 0
        self.link: Link | None = None
        self.joining: Link | None = None
        self.held: list[Callable[[], None]] = []
        """Answers that wait for a copy, where the cluster needs one."""
        self.work = Mailbox()
        self.start(self._live())

    async def _live(self) -> None:
        await self.sleep(self.clock.random.uniform(0.05, 0.3))
        recording = self.node.disk.setdefault(self.shard, Recording(self.term, boot=self.node.boot))
        for _, row in recording.rows:
            self._replay(row)
        while not await self._begin(recording):
            pass
        recording.term, recording.boot = self.term, self.node.boot
        self.is_serving = True
        while True:
            what, of = await self.work.take(self)
            await getattr(self, f"_{what}")(of)
            if self.ends and not len(self.work) and self.link is not None and not self.held:
                self.node.agent.ended.add((self.shard, self.term))
                await self._end("in order")

    # The copy.

    async def _begin(self, recording: Recording) -> bool:
        """Ask for the role as it is now, and see to the copy; whether this may serve."""
        if Rule.BEGINS not in self.world.broken:
            role = await self._ask_directory("begins", self.node.name)
            if role is None:
                await self._end("its term is over")
            self.role = role
        elif not self.role.counts:
            self.role = self.role._replace(attempt=self.role.attempt - 1)  # the copy is begun as soon as this serves
        if not self.role.counts or Rule.BACK in self.world.broken:
            return True
        link = Link(self.world.node(self.role.other), self.role.attempt)
        theirs = await self._to_copy(link, "position", None, number=0)
        if theirs is None and recording.boot != self.node.boot:
            return False  # the recording may lack its end, which the copy has
        if theirs and Rule.MORE not in self.world.broken and theirs > len(recording.rows):
            await self._ask_directory("behind", self.role.attempt)
            await self._end("its copy has more")
        await self._drop(link)
        return True

    def told(self, role: ShardRole) -> None:
        """The agent has a role, perhaps an old one."""
        if self.is_serving and (role.attempt > self.role.attempt or role.ends != self.ends):
            self.ends = role.ends
            self.work.put(("take_role", role))

    async def _take_role(self, role: ShardRole) -> None:
        if role.attempt <= self.role.attempt:
            return
        self.role = role
        if role.counts:
            await self._end("its role was given to another process")
        self.joining = Link(self.world.node(role.other), role.attempt) if role.other else None
        if self.joining is not None:
            self.start(self._copy(self.joining))

    async def _copy(self, link: Link) -> None:
        """Give the copy all rows, beside the server."""
        if Rule.OLD_COPY in self.world.broken and self.link is not None:
            await self._drop(self.link)
        rows = list(self.node.disk[self.shard].rows)
        if Rule.WHOLE in self.world.broken:
            await self._ask_directory("attached", link.attempt)
        is_taken = await self._to_copy(link, "rows", rows, number=0)
        self.work.put(("finish", (link, is_taken)))

    async def _finish(self, of: tuple[Link, bool]) -> None:
        """Give the copy what was committed since it began; from then on it is waited for."""
        link, is_taken = of
        if link is not self.joining:
            return
        self.joining = None
        is_whole = is_taken and await self._to_copy(link, "row", link.queue)
        if (
            is_whole
            and await self._to_copy(link, "whole", None)
            and await self._ask_directory("attached", link.attempt)
        ):
            self.link = link
            self.clock.seen["copies whole"] += 1
            self._release()
        else:
            await self._drop(link)

    async def _drop(self, link: Link) -> None:
        """Continue without the copy, if the directory permits that."""
        self.link = None if link is self.link else self.link
        if Rule.ALONE in self.world.broken:
            self.start(self._ask_directory("dropped", link.attempt))
        elif not await self._ask_directory("dropped", link.attempt):
            await self._end("its term is over")

    def _to_copy(self, link: Link, what: str, of: Any, number: int | None = None) -> Promise:
        if number is None:
            link.sent = number = link.sent + 1
        attempt, until = (self.term, link.attempt), self.clock.now + COPY_TIMEOUT_S

        def arrive(reply: Reply) -> None:
            holder = link.node.agent.children.get(self.shard)
            holder = holder if isinstance(holder, Holder) and holder.is_alive else link.node.unfenced.get(self.shard)
            if holder is not None:
                holder.take(attempt, number, what, of, reply)
            elif number == 0 and self.clock.now < until:  # the connection waits for somebody to listen
                self.clock.at(0.05, link.node, lambda: arrive(reply))

        return self.ask(f"copy {what}", link.node, arrive, COPY_TIMEOUT_S, link.line)

    async def _ask_directory(self, what: str, of: Any) -> Any:
        directory = self.world.directory
        answer = None
        while answer is None:
            answer = await self.ask(
                what,
                directory.machine,
                lambda reply: directory.answer(what, self.shard, self.term, of, reply),
                ASK_AGAIN_S,
            )
        return answer[0]

    async def _end(self, why: str) -> None:
        self.is_alive = False
        self.clock.seen[f"servers ended: {why}"] += 1
        await self.sleep(0.0)

    # Commits, one after another.

    async def _commit(self, of: tuple[Row | None, Callable[[], None]]) -> None:
        row, answer = of
        await self.sleep(self.clock.random.expovariate(1 / 0.001))
        if row is not None:
            self.node.write(self.shard, row)
            if self.joining is not None:
                self.joining.queue.append(row)
            if Rule.BOTH in self.world.broken:
                answer()
        link = self.link
        if link is not None and not await self._to_copy(link, "row", [] if row is None else [row]):
            await self._drop(link)
        if row is None or Rule.BOTH not in self.world.broken:
            self.held.append(answer)
        self._release()

    def _release(self) -> None:
        if self.link is not None or not self.role.needs_copy:
            for answer in self.held:
                answer()
            self.held.clear()

    def _say(self, answer: Callable[[], None]) -> None:
        """Answer without a commit."""
        if Rule.BARRIER in self.world.broken:
            answer()
        else:
            self.work.put(("commit", (None, answer)))

    # Streams.

    def _replay(self, row: Row) -> None:
        kind, name, *of = row
        if kind == "frame":
            self._apply(name, *of)
        else:
            stream = self.streams.setdefault(name, Stream())
            stream.epoch, stream.former, stream.granted = of
            self.epochs = max(self.epochs, stream.epoch)

    def _apply(self, name: str, seq: int, x: int) -> None:
        stream = self.streams.setdefault(name, Stream())
        if seq != stream.next:
            raise Broken(f"a recording has frame {seq} after {stream.next - 1}")
        stream.frames.append(x)
        stream.outputs.append(output(name, stream.outputs, x))

    def resume(self, name: str, have: int, epoch: int, connection: int, reply: Reply) -> None:
        """Give a stream to its owner, who has the outputs before `have`."""
        if self.ends:
            return None
        stream = self.streams.get(name)
        if stream is None and epoch:
            return self._say(lambda: reply(("refused", "UNKNOWN_STREAM")))
        stream = self.streams.setdefault(name, Stream())
        if epoch > stream.epoch or have > stream.next:
            return self._say(lambda: reply(("refused", "DATA_LOSS")))
        if connection < stream.connection:
            return None
        if epoch != stream.epoch and not (epoch == stream.former and stream.next <= stream.granted):
            return self._say(lambda: reply(("refused", "FENCED")))
        self.epochs += 1
        stream.epoch, stream.former, stream.granted, stream.connection = self.epochs, epoch, stream.next, connection
        granted = ("granted", stream.epoch, stream.next)
        return self.work.put(("commit", (("owner", name, stream.epoch, epoch, stream.next), lambda: reply(granted))))

    def step(self, name: str, epoch: int, seq: int, x: int, reply: Reply) -> None:
        """Apply a frame, or repeat its output."""
        stream = self.streams.get(name)
        if stream is None or stream.epoch != epoch:
            return self._say(lambda: reply(("gone",)))
        if seq > stream.next or (self.ends and seq == stream.next):
            return None
        row: Row | None = None
        if seq == stream.next:
            self._apply(name, seq, x)
            row = ("frame", name, seq, x)
        elif stream.frames[seq] != x:
            raise Broken(f"{name}: another frame {seq} was applied")
        answer = ("output", seq, stream.outputs[seq])
        return self.work.put(("commit", (row, lambda: reply(answer))))


# ── Clients ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Follower(ShardMap):
    """A client's map without rule 10."""

    def learn(self, shard: int, term: int, endpoint: str) -> bool:
        self.terms[shard] = 0
        return super().learn(shard, term, endpoint)


class Client(Process):
    """One stream, with frames in flight, that has to get every output once, whatever happens."""

    def __init__(self, world: World, name: str, shard: int) -> None:
        super().__init__(world.clock, Machine(f"client {name}"))
        self.world, self.name, self.shard = world, name, shard
        self.map = (Follower if Rule.HIGHEST in world.broken else ShardMap)(world.shards)
        self.epoch = self.have = self.connections = 0
        self.frames: list[int] = []
        self.truth: list[int] = []
        self.start(self._live())

    def frame(self, seq: int) -> int:
        while len(self.frames) <= seq:
            self.frames.append(self.clock.random.getrandbits(32))
            self.truth.append(output(self.name, self.truth, self.frames[-1]))
        return self.frames[seq]

    async def _live(self) -> None:
        while True:
            await self._learn()
            await self._connect()
            await self.sleep(0.05)

    async def _learn(self) -> None:
        """Ask some node for the table, which may be an old one."""
        chance, tables = self.clock.random, self.world.tables
        node = chance.choice(self.world.nodes)
        table = await self.ask("table", node, lambda reply: reply(node.agent.table), ASK_AGAIN_S)
        if table is not None and node.agent.is_alive:
            tables.append(table)
            del tables[:-200]
            long_ago = not self.clock.is_calm and chance.random() < 0.2
            self.map.take(self.world.old_table or (chance.choice(tables) if long_ago else table))

    async def _connect(self) -> None:
        """Greet the server of the shard, resume the stream and stay while there are answers."""
        endpoint = self.map.endpoints[self.shard]
        if not endpoint:
            return
        node = self.world.node(endpoint.removeprefix("tcp://").partition(":")[0])
        self.connections += 1
        connection, inbox, there, back = self.connections, Mailbox(), Line(), Line()
        found: list[Server] = []

        def reply(message: Any) -> None:
            self.clock.send(message[0], node, self.machine, lambda: inbox.put(message), back)

        def say(what: str, *of: Any) -> None:
            self.clock.send(
                what, self.machine, node, lambda: found[0].is_alive and getattr(found[0], what)(*of, reply), there
            )

        def greet() -> None:
            child = node.agent.children.get(self.shard)
            if isinstance(child, Server) and child.is_alive and child.is_serving:
                found.append(child)
                reply(("welcome", child.term))

        self.clock.send("hello", self.machine, node, greet, there)
        sent = self.have
        while message := await inbox.take(self, SILENCE_S):
            kind, *of = message
            if kind == "welcome":
                if not self.map.learn(self.shard, of[0], endpoint):
                    return
                say("resume", self.name, self.have, self.epoch, connection)
                continue
            if kind == "gone":
                return
            if kind == "refused":
                raise Broken(f"{self.name}, which has {self.have}, was refused: {of[0]}")
            if kind == "granted":
                if of[1] < self.have:
                    raise Broken(f"{self.name}: granted {of[1]} to a client that has {self.have}")
                self.epoch, sent = of[0], self.have
            else:
                seq, y = of
                self.frame(seq)
                if y != self.truth[seq]:
                    raise Broken(f"{self.name}: output {seq} differs")
                if seq == self.have:
                    self.have += 1
                    self.clock.seen["outputs"] += 1
            for seq in range(sent, self.have + WINDOW):
                say("step", self.name, self.epoch, seq, self.frame(seq))
            sent = self.have + WINDOW


# ── The world ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class World:
    """A cluster, its clients, and faults."""

    def __init__(
        self, seed: int, broken: frozenset[Rule] = frozenset(), shards: int = 3, streams: int = 6, **settings: Any
    ) -> None:
        self.clock, self.broken, self.shards, self.settings = Clock(seed), broken, shards, settings
        self.tables: list[ShardTable] = []
        self.old_table: ShardTable | None = None
        """The table that clients get instead of the newest."""
        self.directory = Directory(self)
        self.nodes = [Node(self, f"n{number}") for number in range(3)]
        self.clients = [Client(self, f"s{number}", number % shards) for number in range(streams)]

    def node(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    def server(self, shard: int) -> Server:
        """The server that the directory knows."""
        child = self.node(self.directory.rules.shards[shard].server).agent.children[shard]
        assert isinstance(child, Server)
        return child

    def run(self, seconds: float) -> None:
        self.clock.run(seconds)

    def run_until(self, reached: Callable[[], object], limit_s: float = 30.0) -> None:
        until = self.clock.now + limit_s
        while not reached():
            assert self.clock.now < until
            self.run(0.01)

    def cut(self, one: Machine, other: Machine, seconds: float) -> None:
        self.clock.cut[frozenset((one.name, other.name))] = self.clock.now + seconds

    def calm(self, seconds: float = 1e9) -> None:
        """Nothing is lost or late for a while, and no node is frozen or cut off."""
        self.clock.calm_until = self.clock.now + seconds
        self.clock.cut.clear()
        for machine in (*self.nodes, self.directory.machine):
            machine.frozen_until = min(machine.frozen_until, self.clock.now)
        self.directory.fails_until = 0.0

    def _expect(self, kept: Callable[[], bool], otherwise: str, limit_s: float) -> None:
        until = self.clock.now + limit_s
        while not kept():
            if self.clock.now > until:
                raise Broken(f"{otherwise}: {self.directory.rules.shards}")
            self.run(0.5)

    def check_alive(self, limit_s: float = 120.0) -> None:
        """Every stream is answered again, and every shard has its copy again."""
        rules, before = self.directory.rules, [client.have for client in self.clients]

        def are_answered() -> bool:
            return all(client.have > have for client, have in zip(self.clients, before, strict=True))

        def are_copied() -> bool:
            return not any(view.joining or view.target or len(view.copy) < rules.copies for view in rules.shards)

        self._expect(lambda: are_answered() and are_copied(), "streams are not answered any more", limit_s)

    def check_even(self) -> None:
        """No node has two servers more than another, once an operator's moves are not to be kept any more."""
        rules = self.directory.rules
        rules.drain("n0")
        rules.undrain("n0")

        def is_even() -> bool:
            servers = Counter(view.server for view in rules.shards)
            return max(servers.values()) - min(servers[node.name] for node in self.nodes) <= 1

        self._expect(is_even, "servers are not spread evenly", 120.0)

    def fault(self) -> None:
        """Something happens."""
        clock, chance = self.clock, self.clock.random
        if chance.random() < 0.1:
            self.directory.backup = dict(self.directory.kept)
            chance.choice(self.nodes).back_up()
        node, rules = chance.choice(self.nodes), self.directory.rules
        kind = chance.choices(
            (
                *("process", "node", "freeze", "cut", "directory", "store", "move", "drain", "power", "disk"),
                *("old disk", "own network", "old store", "no row", "no store"),
            ),
            (25, 10, 20, 20, 6, 3, 6, 3, 3, 2, 2, 3, 2, 2, 2),
        )[0]
        if kind == "process":
            children = [child for each in self.nodes for child in each.agent.children.values()]
            if children:
                chance.choice(children).is_alive = False
        elif kind == "node":
            node.kill(chance.choice((0.3, 3.0)))
        elif kind == "freeze":
            machine: Machine = chance.choice((*self.nodes, *self.nodes, self.directory.machine))
            machine.frozen_until = clock.now + chance.choice((0.3, 1.0, 3.0, 6.0))
        elif kind == "cut":
            others = [each for each in self.nodes if each is not node]
            other = chance.choice((self.directory.machine, *others, *(client.machine for client in self.clients)))
            self.cut(node, other, chance.uniform(0.3, 5.0))
        elif kind == "directory":
            self.directory.restart()
        elif kind == "store":
            self.directory.fails_until = clock.now + chance.uniform(0.3, 3.0)
        elif kind == "move":
            self._operate(lambda: rules.move(chance.randrange(self.shards), node.name))
        elif kind == "drain":
            self._operate(lambda: (rules.undrain if node.name in rules.drained else rules.drain)(node.name))
        elif kind == "own network":
            for each in self.nodes:
                self.cut(each, self.directory.machine, chance.uniform(0.3, 5.0))
        elif kind.split()[-1] in ("store", "row"):
            heard = {each.agent.revision for each in self.nodes if each.agent.is_alive}
            if heard != {rules.revision} or not all(map(self._has_second_places, self.nodes)):
                return
            self.calm(3 * DEAD_S)
            missing = f"shard-{chance.randrange(self.shards)}"
            there = {key: row for key, row in self.directory.kept.items() if key != missing}
            self.directory.restart_on({"old store": self.directory.backup, "no row": there, "no store": {}}[kind])
            if chance.random() < 0.5:
                node.kill(0.1)  # which has forgotten what it has heard
        elif self._has_second_places(node):
            # only a second failure in these seconds could lose what was answered, and that is not promised
            self.calm(3 * DEAD_S)
            if kind == "power":
                node.lose_moments(chance.uniform(0.0, 0.5))
            elif kind == "old disk":
                node.disk, node.attempts = node.backup
                node.back_up()
            else:
                node.disk.clear()
                node.attempts.clear()
            node.kill(chance.choice((0.3, 3.0)))
        else:
            return
        clock.seen[f"fault: {kind}"] += 1

    def _operate(self, act: Callable[[], object]) -> None:
        try:
            if self.directory.process.is_alive:
                act()
        except (ClusterRefused, OSError):
            self.clock.seen["operators refused"] += 1

    def _has_second_places(self, node: Node) -> bool:
        """Whether all that was answered from this node's recordings is on another node, which is well."""
        for shard, view in enumerate(self.directory.rules.shards):
            server = self.node(view.server).agent.children.get(shard) if view.server else None
            if node.name in (view.server, view.copy):
                is_linked = isinstance(server, Server) and server.is_alive and server.is_serving and server.link
                if not is_linked or not view.copy or server is None or server.term != view.term:
                    return False
            elif not isinstance(server, Server) or not server.is_serving:
                return False
        heard = self.directory.rules.nodes.values()
        return len(heard) == len(self.nodes) and all(self.clock.now - each.heard_at < 2 * HEARTBEAT_S for each in heard)


def simulate(seed: int, broken: frozenset[Rule] = frozenset(), seconds: float = 40.0) -> Counter[str]:
    """Run one cluster through faults; what was seen.

    Raises:
        Broken: a promise was not kept.
    """
    chance = random.Random(seed)
    copies = 1 if broken or chance.random() < 0.9 else 0
    settings = {"copies": copies, "needs_copy": bool(copies) and not broken and chance.random() < 0.1}
    world = World(seed, broken, **settings)
    world.run(4.0)
    while world.clock.now < seconds:
        world.run(world.clock.random.uniform(0.05, 0.6))
        if world.clock.random.random() < 0.35 and not world.clock.is_calm:
            world.fault()
    world.calm()
    world.run(5.0)  # perhaps an operator adopts what is there
    for name in world.directory.rules.drained:
        world.directory.rules.undrain(name)
    world.run(2 * DEAD_S)
    world.check_alive()
    world.check_even()
    for view in world.directory.rules.shards:
        world.clock.seen["terms"] += view.term
    return world.clock.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU time for each set of rules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--without", default="", help="rules to leave out: " + ", ".join(Rule.__members__))
    args = parser.parse_args()
    broken = frozenset(Rule[name] for name in args.without.split(",") if name)
    seen: Counter[str] = Counter()
    found, seed, until = [], args.first, time.process_time() + args.seconds
    while time.process_time() < until:
        try:
            seen += simulate(seed, broken)
        except Broken as error:
            found.append((seed, str(error)))
            sys.stdout.write(f"seed {seed}: {str(error)[:300]}\n")
        seed += 1
    sys.stdout.write(f"{seed - args.first} seeds, {len(found)} broken; {dict(sorted(seen.items()))}\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
