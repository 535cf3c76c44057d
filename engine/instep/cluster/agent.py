"""The agent of a node: it has the models in memory, and forks what the directory wants the node to be.

That is a server or a process with a copy for each shard, and a process that talks to the directory. The agent itself
has no threads and no sockets of ZeroMQ, because it forks.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

import msgpack
import numpy as np

from instep.cluster.admin import serve_admin
from instep.cluster.copies import MAX_MESSAGE_BYTES, CopiedShard, hold_copy, positions, settle
from instep.cluster.directory import DirectoryClient
from instep.cluster.rules import NodeReport, ShardRole
from instep.cluster.shards import claim, folder_of_sockets
from instep.cluster.talk import Caller, NoAnswer, Rejected, keys_for
from instep.config import Config
from instep.frontends import CannotListen
from instep.frontends.shards import Shard
from instep.interrupts import end_with_parent, signal_name
from instep.recording.errors import RecordingError
from instep.security.keys import ServerKeys
from instep.server.checks import CannotServe, before_loading
from instep.server.log import make_log
from instep.server.serve import Kept, Launch, ServiceManager, launching, serve_one
from instep.server.supervisor import MOST_RESTARTS, WITHIN_S
from instep_client.protocol.errors import InvalidInput
from instep_client.protocol.wire import ShardTable

HEARD_EVERY_S: Final = 0.3
DIRECTORY: Final = "directory"
"""The directory's name in the files of peers."""
_VERSION: Final = 1
"""Of the messages between nodes."""
_LOOK_EVERY_S: Final = 0.1
_MOST_BYTES: Final = 2**21
_HELPS: Final = ShardRole(-1, 0)
"""The role of the process that talks to the directory, and of the admin server."""


class _Forked(BaseException):
    """Leaves the agent's loop in a process that was forked."""

    def __init__(self, task: Callable[[], int]) -> None:
        self.task = task


@dataclass(slots=True, eq=False)
class NodeProcess:
    """A process that an agent has forked, and the agent's end of a pipe to it."""

    pid: int
    pipe: socket.socket
    role: ShardRole
    endpoint: str = ""
    was_told_to_end: bool = False
    told: str = ""
    """The version of the role that it has got."""

    def tell(self, message: Any) -> bool:
        """Send a message, and return whether there was room for it."""
        try:
            return self.pipe.send(msgpack.packb(message), socket.MSG_DONTWAIT) > 0
        except OSError:
            return False


def received(pipe: socket.socket) -> list[Any]:
    """The messages that have arrived; none if the other end is closed."""
    found = []
    with suppress(OSError):
        while message := pipe.recv(_MOST_BYTES, socket.MSG_DONTWAIT):
            found.append(msgpack.unpackb(message))
    return found


class Agent:
    """Does what the directory wants of this node.

    Args:
        launch: the models and the configuration. Shard k is served at the port of `transport.endpoint` + k, and takes
            copies at that port + the number of shards; `recording.file` is a folder.
        shards: how many the cluster has.
        name: the node's name.
        host: where others reach the node.
        directory: the directory's endpoint.
        sockets: a folder for the sockets of the servers' admin servers.
    """

    def __init__(self, launch: Launch, shards: int, name: str, host: str, directory: str, sockets: Path) -> None:
        assert launch.config.recording.file is not None
        self._launch, self._shards, self._name, self._host, self._directory = launch, shards, name, host, directory
        self._log, self._sockets = launch.log, sockets
        self._folder = launch.config.recording.file
        self._port = int(launch.config.transport.endpoint.rpartition(":")[2])
        self._relay = self._admin = NodeProcess(0, socket.socket(), _HELPS)
        self._processes: dict[int, NodeProcess] = {}
        self._roles: dict[int, ShardRole] = {}
        self._told = ""
        """The version of the roles."""
        self._table: list[Any] = [[], []]
        self._has: dict[int, tuple[int, int]] = {}
        self._ended: set[tuple[int, int]] = set()
        """Shards and terms whose servers have ended in order; said until they are served elsewhere."""
        self._deaths: dict[tuple[int, int], deque[float]] = {}
        self._kept: dict[int, Kept] = {}
        self._refusal = ""
        self._has_failed = False
        """Whether a server did not end in order."""
        self._stops = 0

    def run(self) -> int:
        """Take part until SIGTERM or SIGINT.

        Returns:
            The exit status; in a process that was forked, that of its task.

        Raises:
            CannotServe: the directory does not let the node take part.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._reload)
        try:
            return self._loop()
        except _Forked as forked:
            task = forked.task
        try:
            return task()
        except (CannotServe, CannotListen, InvalidInput, RecordingError, OSError) as error:
            self._log.error("failed", reasons=str(error).splitlines())
            return 2
        except Exception as error:
            self._log.error("bug in a process of the node", exc_info=error)
            return 1

    def _loop(self) -> int:
        say_at = 0.0
        self._relay, self._admin = self._fork(_HELPS, self._talk), self._fork(_HELPS, self._administer)
        self._has = self._find_recordings()
        while not self._stops:
            wait([each.pipe for each in (self._relay, *self._processes.values())], _LOOK_EVERY_S)
            has_changed = self._bury() | self._hear_processes() | self._hear_directory() | self._follow()
            if self._refusal and not self._told:
                raise CannotServe(self._refusal)
            self._tell_roles()
            if has_changed or time.monotonic() > say_at:
                say_at = time.monotonic() + HEARD_EVERY_S
                self._say()
        return self._end()

    def _say(self) -> None:
        models = sorted(each.model.name for each in self._launch.prepared)
        numerics = {each.arithmetic for each in self._launch.prepared}
        about = NodeReport(
            self._name,
            f"{self._host}:{self._port}",
            f"version {_VERSION} of messages and the models {', '.join(models)}",
            ", ".join(sorted(numerics)),
        )
        has = [(shard, *found) for shard, found in self._has.items()]
        news = {
            "serves": [(k, each.role.term, each.endpoint) for k, each in self._processes.items() if each.endpoint],
            "ended": sorted(self._ended),
            "gone": [(role.shard, role.term) for role in self._roles.values() if self._is_gone(role)],
        }
        self._relay.tell(["heard", [*about[:-1], has], news, self._told])

    def _hear_directory(self) -> bool:
        has_changed = False
        for is_granted, value in received(self._relay.pipe):
            if value == []:  # it is about to find out who has what
                self._has = self._find_recordings()
            elif is_granted and value is not None:
                has_changed = True
                self._told, roles, *self._table = value
                self._roles = {role.shard: role for role in (ShardRole(*each) for each in roles)}
            refusal = "" if is_granted else value
            if refusal != self._refusal and refusal:
                self._log.error("refused by the directory", reason=refusal)
            self._refusal = refusal
        return has_changed

    def _hear_processes(self) -> bool:
        has_changed = False
        for process in self._processes.values():
            for endpoint in received(process.pipe):
                has_changed, process.endpoint = True, endpoint
                if not endpoint and process.was_told_to_end:
                    self._ended.add((process.role.shard, process.role.term))
                self._has = self._find_recordings()
        return has_changed

    def _tell_roles(self) -> None:
        """Send each server its newest role and the table, again where there was no room before."""
        for shard, process in self._processes.items():
            if process.role.is_server and process.told != self._told and (role := self._roles.get(shard)) is not None:
                process.told = self._told if process.tell([role, *self._table]) else ""

    # What becomes of processes.

    def _follow(self) -> bool:
        """Kill what is not wanted any more, and fork what is."""
        before = {each.pid for each in self._processes.values()}
        for shard, process in list(self._processes.items()):
            wanted = self._roles.get(shard)
            if wanted is None or wanted[:3] != process.role[:3]:
                self._kill(shard)
        for shard, role in self._roles.items():
            of = shard, role.term
            if shard in self._processes:
                process = self._processes[shard]
                if role.ends and process.endpoint and not process.was_told_to_end:
                    process.was_told_to_end = True
                    os.kill(process.pid, signal.SIGTERM)
            elif not (of in self._ended and role.ends) and not self._is_gone(role) and self._may_begin(of):
                self._ended.discard(of)
                self._kept.setdefault(shard, Kept())
                self._processes[shard] = self._fork(role, self._serve if role.is_server else self._hold)
        self._ended = {of for of in self._ended if of[0] in self._roles}
        self._kept = {shard: kept for shard, kept in self._kept.items() if shard in self._roles}
        return before != {each.pid for each in self._processes.values()}

    def _is_gone(self, role: ShardRole) -> bool:
        """Whether the server of a shard cannot begin here: its recording is not there, or it has died too often."""
        is_lost = role.begun and role.shard not in (*self._has, *self._processes)
        return role.is_server and (is_lost or (role.shard, role.term) in self._given_up())

    def _may_begin(self, of: tuple[int, int]) -> bool:
        """Whether a process that has died may be started again now, which is later with each death."""
        deaths = self._deaths.get(of)
        if deaths is None or len(deaths) < 2:
            return True
        return len(deaths) <= MOST_RESTARTS and time.monotonic() > deaths[-1] + len(deaths) / 2

    def _fork(self, role: ShardRole, run: Callable[..., int]) -> NodeProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for each in (ours, theirs):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MOST_BYTES)
        agent = os.getpid()
        if pid := os.fork():
            theirs.close()
            return NodeProcess(pid, ours, role)
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        end_with_parent(agent, signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # until it has a handler
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        ours.close()
        raise _Forked(lambda: run(role, theirs))

    def _kill(self, shard: int) -> None:
        process = self._processes[shard]
        os.kill(process.pid, signal.SIGKILL)
        os.waitpid(process.pid, 0)
        self._remove(process)

    def _remove(self, process: NodeProcess) -> None:
        del self._processes[process.role.shard]
        process.pipe.close()
        (self._sockets / str(process.role.shard)).unlink(missing_ok=True)
        self._has = self._find_recordings()

    def _bury(self) -> bool:
        """Forget the processes that have ended."""
        has_changed = False
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:  # as PID 1, also of those whose parents have died
                has_changed |= self._forget(*ended)
        return has_changed

    def _forget(self, pid: int, status: int) -> bool:
        if pid == self._relay.pid:
            self._relay.pipe.close()
            self._relay = self._fork(_HELPS, self._talk)
        elif pid == self._admin.pid:
            self._admin.pid = 0  # as it is to be without http.endpoint, or where that cannot be used
            if os.WIFSIGNALED(status):
                self._admin = self._fork(_HELPS, self._administer)
        for process in list(self._processes.values()):
            if process.pid == pid:
                self._remove(process)
                self._note_end(process, status)
                return True
        return False

    def _note_end(self, process: NodeProcess, status: int) -> None:
        of = process.role.shard, process.role.term
        if status == 0 and process.was_told_to_end:
            self._ended.add(of)
        if self._stops or of in self._ended:
            self._has_failed |= status != 0
            return
        self._deaths = {each: deaths for each, deaths in self._deaths.items() if each[0] != of[0] or each == of}
        deaths = self._deaths.setdefault(of, deque(maxlen=MOST_RESTARTS + 1))
        deaths.append(time.monotonic())
        while deaths[0] < deaths[-1] - WITHIN_S:
            deaths.popleft()
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal_name(-code)}" if code < 0 else f"ended with status {code}"
        reason = f"its {'server' if process.role.is_server else 'copy'} {how}"
        if len(deaths) > MOST_RESTARTS:
            reason += f", {MOST_RESTARTS} restarts within a minute have not helped"
        self._log.error("failed" if len(deaths) > MOST_RESTARTS else "restarting", shard=of[0], reason=reason)

    # Signals.

    def _stop(self, *_: object) -> None:
        self._stops += 1

    def _reload(self, *_: object) -> None:
        self._signal_servers(signal.SIGHUP)

    def _signal_servers(self, number: int) -> None:
        for each in self._processes.values():
            if each.role.is_server:
                os.kill(each.pid, number)

    def _end(self) -> int:
        """End the servers in order, then everything else; a second signal does not wait."""
        self._log.info("stopping", hint="ending servers in order; interrupt again to force")
        self._signal_servers(signal.SIGTERM)
        while self._stops == 1 and any(each.role.is_server for each in self._processes.values()):
            time.sleep(_LOOK_EVERY_S)
            self._bury()
            self._say()  # it is not lost, and still has copies
        for shard in list(self._processes):
            self._kill(shard)
        if self._stops > 1:
            return 130
        return int(self._has_failed or bool(self._given_up()))

    def _given_up(self) -> list[tuple[int, int]]:
        return [of for of, deaths in self._deaths.items() if len(deaths) > MOST_RESTARTS]

    # What the forked processes do.

    def _talk(self, role: ShardRole, pipe: socket.socket) -> int:
        """Pass messages on between the agent and the directory."""
        caller = self._call(self._directory, DIRECTORY)
        while True:
            for message in received(pipe):
                with suppress(NoAnswer):
                    caller.send(*message)
            try:
                if (answer := caller.receive(60.0, pipe)) is not None:
                    pipe.send(msgpack.packb([True, answer[1]]))
            except Rejected as error:
                pipe.send(msgpack.packb([False, str(error)]))
            except NoAnswer:
                continue  # the agent says everything again
            except BrokenPipeError:
                return 0  # the agent has ended

    def _serve(self, role: ShardRole, pipe: socket.socket) -> int:
        log, config = self._log.bind(shard=role.shard), self._launch.config
        table, admin = _as_table(*self._table), self._sockets / str(role.shard)
        place = Shard(role.shard, self._shards, role.term, table, admin=admin)
        copied = CopiedShard(
            place,
            self._name,
            self._folder_of(role.shard),
            DirectoryClient(self._call(self._directory, DIRECTORY), log),
            lambda role: self._call(role.address, role.other),
            config.recording.durability,
            log,
            config.cluster.copy_timeout_s,
        )
        if role.begun:
            copied.begin()

        def on_ready(endpoint: str) -> None:
            copied.start()
            pipe.send(msgpack.packb(f"tcp://{self._host}:{endpoint.rpartition(':')[2]}"))
            asyncio.get_running_loop().add_reader(pipe, hear)

        def hear() -> None:
            for role, *table in received(pipe):
                place.table = _as_table(*table)
                copied.follow(ShardRole(*role))

        def reread() -> Config:  # models stay: the next process of any shard here is a fork that has these
            return self._launch.reread().model_copy(update={"model": config.model}).of_shard(role.shard)

        launch = replace(
            self._launch,
            config=config.of_shard(role.shard),
            reread=reread,
            log=log,
            service_manager=ServiceManager({}, log, self._shards),
            shard=place,
        )
        status = serve_one(launch, self._kept[role.shard], on_ready)
        if status == 0:
            pipe.send(msgpack.packb(""))  # before the interpreter has ended, which takes longer
        return status

    def _hold(self, role: ShardRole, pipe: socket.socket) -> int:
        transport = self._launch.config.of_shard(self._shards + role.shard).node_transport
        hold_copy(transport, ServerKeys.read(transport), self._folder_of(role.shard), role.term)

    def _administer(self, role: ShardRole, pipe: socket.socket) -> int:
        return asyncio.run(serve_admin(self._launch.config.http, self._sockets, self._log))

    def _call(self, endpoint: str, name: str) -> Caller:
        """A connection to the directory, or to the copy on the node of this name."""
        return Caller(endpoint, keys_for(self._launch.config.node_transport, name), MAX_MESSAGE_BYTES)

    def _folder_of(self, shard: int) -> Path:
        return self._folder / f"shard-{shard}"

    def _find_recordings(self) -> dict[int, tuple[int, int]]:
        """The term and the position of each shard's recordings here."""
        found = {}
        for shard, folder in ((shard, self._folder_of(shard)) for shard in range(self._shards)):
            if shard not in self._processes:
                settle(folder)
            if files := positions(folder):
                found[shard] = _term(folder), sum(max(0, position) for position in files.values())
        return found


def _term(folder: Path) -> int:
    for note in (folder / "complete.json", folder.with_name(f".{folder.name}.json")):
        with suppress(OSError, ValueError, KeyError):
            return int(json.loads(note.read_text())["term"])
    return 0


def _as_table(terms: list[int], endpoints: list[str]) -> ShardTable:
    return ShardTable(np.array(terms, np.uint64), tuple(endpoints))


def run(config: Config, reread: Callable[[], Config], directory: str, name: str, host: str) -> int:
    """Run the agent until SIGTERM or SIGINT; return the exit status.

    Raises:
        CannotServe, InvalidInput: it cannot start.
    """
    endpoint, folder = config.transport.endpoint, config.recording.file
    directory = directory.removeprefix("tcp://")
    place = re.fullmatch(r"tcp://(.+):([0-9]+)", endpoint)
    host = host or ("" if place is None else place[1])
    if place is None or host in ("*", "0.0.0.0", "[::]"):
        raise CannotServe(
            f"others cannot reach the node at {endpoint}: give --endpoint tcp://HOST:PORT, or also --host"
        )
    if folder is None or config.recording.durability == "memory":
        raise CannotServe("a node records: give --record FOLDER, and recording.durability commit or fsync")
    log = make_log(config.log)
    caller = Caller(f"tcp://{directory}", keys_for(config.node_transport, DIRECTORY))
    try:
        shards = DirectoryClient(caller, log).shards()
    finally:
        caller.close()
    if int(place[2]) + 2 * shards > 65_536:
        raise CannotServe(
            f"{shards} servers and {shards} copies need ports from {place[2]} on, and the last one is 65535"
        )
    name = name or socket.gethostname()
    found = before_loading(config, restart=True, shards=shards)
    problems = (each for each in found if each.severity == "problem")
    with launching(config, problems, reread, supervised=True) as launch, folder_of_sockets() as sockets:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "agent.lock").open("w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # processes that are forked do not have it
            except BlockingIOError:
                raise CannotServe(f"another agent records in {folder}: each needs a folder of its own") from None
            for shard in range(shards):
                settle(folder / f"shard-{shard}")  # before `claim` makes the folders that are missing
            claim(folder, shards)
            return Agent(launch, shards, name, host, f"tcp://{directory}", sockets).run()
