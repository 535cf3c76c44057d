"""The agent of a node: it forks a server or a copy for each shard that the directory assigns to this node.

The models are loaded once, before. Two more processes talk to the directory and run the admin server. The agent itself
has no threads and no sockets of ZeroMQ, because it forks.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np

from instep.cluster.admin import serve_admin
from instep.cluster.directory import DirectoryClient
from instep.cluster.replicas import MAX_MESSAGE_BYTES, CopiedShard, hold_copy, positions, settle, term_of
from instep.cluster.rules import ShardRole
from instep.cluster.shards import claim, folder_of_sockets
from instep.cluster.talk import Caller, NoAnswer, Rejected, keys_for
from instep.config import Config, ConfigError, TransportConfig
from instep.frontends import CannotListen
from instep.frontends.shards import Shard
from instep.interrupts import ENDINGS, how_ended
from instep.recording.errors import RecordingError
from instep.security.keys import ServerKeys
from instep.security.principals import Principals
from instep.server.checks import CannotServe, before_loading, report
from instep.server.log import make_log
from instep.server.serve import Kept, Launch, ServiceManager, has_terminal, launching, serve_one
from instep.server.supervisor import Deaths, become_child, ended_processes
from instep_client.key_files import read_key_pair
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import ShardTable

HEARD_EVERY_S: Final = 0.3
DIRECTORY: Final = "directory"
"""The directory's name in the files of peers."""
_VERSION: Final = 1
"""Of the messages between nodes."""
_LOOK_EVERY_S: Final = 0.1
_REACHED_WITHIN_S: Final = 2.0
_MOST_BYTES: Final = 2**21


@dataclass(slots=True, eq=False)
class NodeProcess:
    """A process that an agent has forked, and the agent's end of a pipe to it."""

    pid: int
    pipe: socket.socket
    serves: bool = False
    """Whether it is a server that answers."""
    is_ending: bool = False
    """Whether it was told to end in order."""
    told: int = 0
    """The version of the role that it has got."""

    def tell(self, message: Any) -> bool:
        """Send a message, and return whether there was room for it."""
        with suppress(OSError):
            return self.pipe.send(msgpack.packb(message), socket.MSG_DONTWAIT) > 0
        return False


@dataclass(slots=True, eq=False)
class NodeShard:
    """The role that the directory gives a node for a shard in one term, and its process."""

    role: ShardRole
    process: NodeProcess | None = None
    has_ended: bool = False
    """Whether the server has ended in order; said until the shard is served elsewhere."""
    deaths: Deaths = field(default_factory=Deaths)


def received(pipe: socket.socket) -> list[Any]:
    """The messages that have arrived; none if the other end is closed."""
    found = []
    with suppress(OSError):
        while message := pipe.recv(_MOST_BYTES, socket.MSG_DONTWAIT):
            found.append(msgpack.unpackb(message))
    return found


@dataclass(eq=False)
class Agent:
    """Does what the directory wants of this node."""

    launch: Launch
    """The models, the configuration and the log."""
    shards: int
    """How many the cluster has."""
    name: str
    """The node's."""
    host: str
    """Where others reach the node: its server of shard k at `port` + k, its copy of it at `port` + `shards` + k."""
    port: int
    folder: Path
    """For recordings, those of shard k in `shard-k`."""
    directory: str
    """The directory's endpoint."""
    sockets: Path
    """A folder for the sockets of the servers' admin servers."""
    _roles: dict[tuple[int, int, bool], NodeShard] = field(default_factory=dict)
    """By shard, term, and whether it is the server."""
    _table: list[Any] = field(default_factory=lambda: [[], []])
    _version: int = 0
    """Of the roles and of the table."""
    _revision: int = 0
    """The newest change of the directory's store that was heard of."""
    _has: dict[int, tuple[int, int]] = field(default_factory=dict)
    _has_failed: bool = False
    """Whether a server did not end in order when the agent ended."""
    _had_terminal: bool = field(default_factory=has_terminal)
    _stops: int = 0

    def run(self) -> int:
        """Take part until SIGTERM or SIGINT, and return the exit status.

        Raises:
            CannotServe: the directory does not let the node take part.
            SystemExit: in a process that was forked, with its exit status.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
            signal.signal(signal.SIGHUP, self._hung_up)
        self._relay, self._admin = self._fork("relay", self._talk), self._fork("admin server", self._administer)
        self._has = dict.fromkeys(range(self.shards), (0, 0))  # each is looked for
        while not self._stops:
            self._has = self._find_recordings()
            self._follow()
            self._say()
            wait([self._relay.pipe, *(each.pipe for each in self._processes())], HEARD_EVERY_S)
            self._bury()
            self._hear()
        return self._end()

    def _processes(self) -> list[NodeProcess]:
        return [each.process for each in self._roles.values() if each.process is not None]

    # What is heard and said.

    def _hear(self) -> None:
        for process in self._processes():
            process.serves |= bool(received(process.pipe))
        for news in received(self._relay.pipe):
            if isinstance(news, list):
                version, revision, roles, *table = news
                if revision < self._revision:
                    reason = f"its store has {revision} changes, and this node has heard of {self._revision}"
                    self.launch.log.error("role refused", reason=f"{reason}: it is an old one")
                    continue
                self._version, self._revision, self._table = version, revision, table
                wanted = {role[:3]: role for role in (ShardRole(*each) for each in roles) if self._may_have(role)}
                for former in self._roles.keys() - wanted.keys():
                    self._kill(self._roles.pop(former))
                for kind, role in wanted.items():
                    self._roles.setdefault(kind, NodeShard(role)).role = role
            elif not self._version:
                raise CannotServe(news)

    def _may_have(self, role: ShardRole) -> bool:
        """Whether the recording here is not of a later term: what that server has acknowledged would be lost."""
        term, _ = self._has.get(role.shard, (0, 0))
        if term > role.term:
            reason = f"the recording here has term {term}: the store of the directory is an old one"
            self.launch.log.error("role refused", shard=role.shard, term=role.term, reason=reason)
        return term <= role.term

    def _say(self) -> None:
        """Give the directory a sign of life, and servers their newest roles and the table."""
        roles = self._roles.values()
        serving = [each.role[:2] for each in roles if each.process is not None and each.process.serves]
        news = {
            "serves": [(shard, term, f"tcp://{self.host}:{self.port + shard}") for shard, term in serving],
            "ended": [each.role[:2] for each in roles if each.has_ended],
            "gone": [each.role[:2] for each in roles if self._is_gone(each)],
        }
        models = ", ".join(sorted(each.model.name for each in self.launch.prepared))
        numerics = ", ".join(sorted({each.arithmetic for each in self.launch.prepared}))
        version = f"version {_VERSION} of messages and the models {models}"
        has = [(shard, *found) for shard, found in self._has.items()]
        report = [self.name, f"{self.host}:{self.port}", version, numerics, has, self._revision]  # a `NodeReport`
        self._relay.tell(["heard", report, news, self._version])
        for each in roles:
            if each.role.is_server and each.process is not None and each.process.told != self._version:
                is_told = each.process.tell([each.role, *self._table])
                each.process.told = self._version if is_told else 0

    # What becomes of processes.

    def _follow(self) -> None:
        """Begin the processes of the node's roles, and end servers whose copies take their places."""
        for each in self._roles.values():
            role, process = each.role, each.process
            if process is not None:
                if role.ends and process.serves and not process.is_ending:
                    self._end_server(process, role)
            elif not (role.ends and each.has_ended) and not self._is_gone(each) and each.deaths.are_over:
                each.has_ended = False
                run, name = (self._serve, "server") if role.is_server else (self._hold, "copy")
                each.process = self._fork(f"{name} {role.shard}", partial(run, each))

    def _is_gone(self, of: NodeShard) -> bool:
        """Whether the server of a shard cannot begin here: its recording is not there, or it has died too often."""
        is_lost = of.role.begun and of.process is None and of.role.shard not in self._has
        return of.role.is_server and (is_lost or of.deaths.are_final)

    def _fork(self, name: str, run: Callable[[socket.socket], int]) -> NodeProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
        agent, before = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, ENDINGS)  # none gets lost in the child
        if pid := os.fork():
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            return NodeProcess(pid, ours)
        become_child(agent, name, signal.SIGKILL)
        for number in ENDINGS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGHUP})  # which waits for a handler
        ours.close()
        raise SystemExit(self._status_of(partial(run, theirs)))

    def _status_of(self, task: Callable[[], int]) -> int:
        try:
            return task()
        except (CannotServe, CannotListen, InvalidInput, RecordingError, OSError) as error:
            self.launch.log.error("failed", reasons=str(error).splitlines())
            return 2
        except Exception as error:
            self.launch.log.error("bug in a process of the node", exc_info=error)
            return 1

    def _end_server(self, process: NodeProcess, role: ShardRole) -> None:
        process.is_ending = True
        process.tell([role._replace(ends=True), *self._table])
        os.kill(process.pid, signal.SIGTERM)

    def _kill(self, of: NodeShard) -> None:
        if of.process is not None:
            os.kill(of.process.pid, signal.SIGKILL)
            os.waitpid(of.process.pid, 0)
            self._remove(of, of.process)

    def _remove(self, of: NodeShard, process: NodeProcess) -> None:
        process.pipe.close()
        (self.sockets / str(of.role.shard)).unlink(missing_ok=True)
        of.process = None

    def _bury(self) -> None:
        for pid, code in ended_processes():
            if pid == self._relay.pid:
                self._relay.pipe.close()
                self._relay = self._fork("relay", self._talk)
            elif pid == self._admin.pid and code < 0:  # it ends by itself where it cannot listen, or is not to
                self._admin = self._fork("admin server", self._administer)
            for each in self._roles.values():
                if each.process is not None and each.process.pid == pid:
                    self._note_end(each, each.process, code)

    def _note_end(self, of: NodeShard, process: NodeProcess, code: int) -> None:
        self._remove(of, process)
        of.has_ended = process.is_ending and code == 0
        self._has_failed |= process.is_ending and code != 0 and self._stops > 0
        if self._stops or of.has_ended:
            return
        why = of.deaths.add()
        reason = f"its {'server' if of.role.is_server else 'copy'} {how_ended(code)}{why}"
        self.launch.log.error("failed" if why else "restarting", shard=of.role.shard, reason=reason)

    # Signals.

    def _stop(self, *_: object) -> None:
        self._stops += 1

    def _hung_up(self, *_: object) -> None:
        if self._stops:
            return
        if self._had_terminal and not has_terminal():
            self._stop()
            return
        try:
            self.launch = self.launch.reloaded()
        except ConfigError as error:
            self.launch.log.error("not reloaded", reason=str(error))
        for process in self._processes():
            with suppress(ProcessLookupError):  # it ends at this moment
                os.kill(process.pid, signal.SIGHUP)  # which processes with copies have blocked

    def _end(self) -> int:
        """End the servers in order, then everything else; a second signal does not wait."""
        self.launch.log.info("stopping", hint="ending servers in order; interrupt again to force")
        for each in self._roles.values():
            if each.process is not None and each.process.serves and not each.process.is_ending:
                self._end_server(each.process, each.role)
        waits = True
        while waits:
            waits = self._stops == 1 and any(process.is_ending for process in self._processes())
            self._say()  # it is not lost, still has copies, and servers have ended in order
            time.sleep(_LOOK_EVERY_S)
            self._bury()
        for each in self._roles.values():
            self._kill(each)
        if self._stops > 1:
            return 130
        return int(self._has_failed or any(each.deaths.are_final for each in self._roles.values()))

    # What the forked processes do.

    def _talk(self, pipe: socket.socket) -> int:
        """Pass messages to the directory, and its news and its first refusal to the agent."""
        caller, problem = self._call(self.directory, DIRECTORY), None
        while True:
            try:
                for message in received(pipe):
                    caller.send(*message, within_s=_REACHED_WITHIN_S)
                if (answer := caller.receive(60.0, pipe)) is not None:
                    problem = None
                    if answer[1]:
                        pipe.send(msgpack.packb(answer[1]))
            except (NoAnswer, Rejected) as error:  # the agent says everything again
                if type(error) is not type(problem):
                    self.launch.log.warning("waits for the directory", reason=str(error))
                    if isinstance(error, Rejected):
                        pipe.send(msgpack.packb(str(error)))
                problem = error
            except BrokenPipeError:
                return 0  # the agent has ended

    def _serve(self, of: NodeShard, pipe: socket.socket) -> int:
        role, config, log = of.role, self.launch.config, self.launch.log.bind(shard=of.role.shard)
        if (term := term_of(self._folder_of(role.shard))) > role.term:
            raise CannotServe(f"the recording of shard {role.shard} has term {term}, and the server term {role.term}")
        table, admin = _as_table(*self._table), self.sockets / str(role.shard)
        place = Shard(role.shard, self.shards, role.term, table, admin=admin)
        directory = DirectoryClient(self._call(self.directory, DIRECTORY), log)
        copied = CopiedShard(
            place,
            self.name,
            self._folder_of(role.shard),
            directory,
            lambda role: self._call(role.address, role.other),
            config.recording.durability,
            log,
            config.cluster.copy_timeout_s,
        )
        if role.begun:
            copied.begin()

        def on_ready(endpoint: str) -> None:
            copied.start()
            pipe.send(msgpack.packb("serves"))
            asyncio.get_running_loop().add_reader(pipe, hear)

        def hear() -> None:
            for heard, *table in received(pipe):
                role, place.table = ShardRole(*heard), _as_table(*table)
                directory.is_ending |= role.ends
                copied.follow(role)

        launch = replace(self.launch.of_shard(place), service_manager=ServiceManager({}, log, self.shards))
        return serve_one(launch, Kept(), on_ready)

    def _hold(self, of: NodeShard, pipe: socket.socket) -> int:
        role = of.role
        transport = self.launch.config.of_shard(self.shards + role.shard).node_transport
        hold_copy(transport, ServerKeys.read(transport), self._folder_of(role.shard), role.term)

    def _administer(self, pipe: socket.socket) -> int:
        return asyncio.run(serve_admin(self.launch.config.http, self.sockets, self.launch.log))

    def _call(self, endpoint: str, name: str) -> Caller:
        """A connection to the directory, or to the copy on the node of this name."""
        return Caller(endpoint, keys_for(self.launch.config.node_transport, name), MAX_MESSAGE_BYTES)

    def _folder_of(self, shard: int) -> Path:
        return self.folder / f"shard-{shard}"

    def _find_recordings(self) -> dict[int, tuple[int, int]]:
        """The term and the position of each shard's recordings here."""
        found, in_use = {}, {each.role.shard for each in self._roles.values() if each.process is not None}
        for shard in self._has.keys() | {each.role.shard for each in self._roles.values()}:
            folder = self._folder_of(shard)
            try:
                if shard not in in_use:
                    settle(folder)
                if files := positions(folder):
                    found[shard] = term_of(folder), sum(max(0, position) for position in files.values())
            except (OSError, ValueError):  # a copy is being put in place at this moment, or a file is damaged
                if shard in self._has:
                    found[shard] = self._has[shard]
        return found


def _as_table(terms: list[int], endpoints: list[str]) -> ShardTable:
    return ShardTable(np.array(terms, np.uint64), tuple(endpoints))


def node_name(name: str, transport: TransportConfig) -> str:
    """The name of the node's key, which `name` must be if it is given; without keys `name`, or that of the machine.

    Raises:
        CannotServe: the key has another name, or none.
        InvalidInput: a file of keys cannot be used.
    """
    if transport.key_file is None or transport.peers_file is None:
        return name or socket.gethostname()
    peer = Principals.read(transport.peers_file).by_key.get(read_key_pair(transport.key_file)[0])
    if peer is None:
        raise CannotServe(f"transport.peers_file {transport.peers_file} does not have the key {transport.key_file}")
    if name not in ("", peer.name):
        raise CannotServe(f"{transport.key_file} is the key of {peer.name}: leave out --name {name}, or use its key")
    return peer.name


def run(config: Config, reread: Callable[[], Config], directory: str, name: str, host: str) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit status.

    Raises:
        CannotServe, InvalidInput: it cannot start.
    """
    endpoint, folder = config.transport.endpoint, config.recording.path
    name, directory = node_name(name, config.node_transport), f"tcp://{directory.removeprefix('tcp://')}"
    place = re.fullmatch(r"tcp://(.+):([0-9]+)", endpoint)
    host, port = (host, 0) if place is None else (host or place[1], int(place[2]))
    if not port or host in ("*", "0.0.0.0", "[::]"):
        raise CannotServe(
            f"others cannot reach the node at {endpoint}: give --endpoint tcp://HOST:PORT, or also --host"
        )
    if folder is None or config.recording.durability == "memory":
        raise CannotServe("a node records: give --record FOLDER, and recording.durability commit or fsync")
    log = make_log(config.log)
    with closing(Caller(directory, keys_for(config.node_transport, DIRECTORY))) as caller:
        shards = DirectoryClient(caller, log).shards()
    report(before_loading(config, restart=True, shards=shards, copies=shards), log)

    def reread_rest() -> Config:  # models stay: the next process of any shard here is a fork that has these
        return reread().model_copy(update={"model": config.model})

    with launching(config, reread_rest, supervised=True) as launch, folder_of_sockets() as sockets:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "agent.lock").open("w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # processes that are forked do not have it
            except BlockingIOError:
                raise CannotServe(f"another agent records in {folder}: each needs a folder of its own") from None
            for shard in range(shards):
                settle(folder / f"shard-{shard}")  # before `claim` makes the folders that are missing
            claim(folder, shards)
            return Agent(launch, shards, name, host, port, folder, directory, sockets).run()
