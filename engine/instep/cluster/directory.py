"""The directory: the rules of `instep.cluster.rules` with a clock, a store and a socket."""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partialmethod
from pathlib import Path
from typing import Any, Final

import structlog

from instep.cluster.rules import Assignments, ClusterRefused, NodeReport, ShardRole
from instep.cluster.talk import Caller, Listener, NoAnswer, NodeRequest, Rejected
from instep.config import Config
from instep.frontends import CannotListen
from instep.security.keys import ServerKeys
from instep.security.principals import Principals
from instep.server.checks import CannotServe
from instep.server.log import make_log
from instep_client.files import write_file
from instep_client.protocol.errors import InvalidInput

TICK_S: Final = 0.1
_BY_SERVERS: Final = ("begins", "attached", "dropped", "behind")
_BY_OPERATORS: Final = ("move", "drain", "undrain", "accept_loss")
_ASK_WITHIN_S: Final = 2.0
_PATIENCE_S: Final = 3.0
"""A server that ends waits so long for an answer."""
STORE_FILE: Final = "decisions.sqlite"
_ADOPT: Final = ", and --adopt with the names of all nodes that have recordings"
_MOST_REFUSED: Final = 32


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Replace a file by one that a loss of power leaves whole.

    Raises:
        OSError: the file may still be the former one.
    """
    write_file(file, json.dumps(values).encode())


class Store:
    """A database of rows in JSON, which only one directory uses at a time.

    Raises:
        CannotServe: the folder cannot be used.
    """

    def __init__(self, folder: Path, log: structlog.stdlib.BoundLogger) -> None:
        self._file, self._log = folder / STORE_FILE, log
        self.problem = ""
        """Why the newest row could not be stored; empty if it was."""
        if (folder / "cluster.json").exists():
            raise CannotServe(f"{folder} is the store of an earlier version: use another folder{_ADOPT}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._database = sqlite3.connect(self._file, 1.0, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA synchronous = EXTRA")
            self._database.execute("CREATE TABLE IF NOT EXISTS decisions (key TEXT PRIMARY KEY, row TEXT NOT NULL)")
            found = self._database.execute("SELECT key, row FROM decisions")
            self.rows = {key: dict(json.loads(row)) for key, row in found}
        except BlockingIOError:
            os.close(self._descriptor)
            raise CannotServe(f"another directory uses {folder}: a cluster has one") from None
        except (OSError, ValueError, TypeError, sqlite3.Error) as error:
            raise CannotServe(f"the store of the directory, {self._file}, cannot be read: {error}{_ADOPT}") from None
        self._inode = self._file.stat().st_ino

    def check_is_there(self) -> None:
        """End the directory if its store was moved, replaced or deleted.

        Raises:
            CannotServe: it was.
        """
        with suppress(OSError):
            if self._file.stat().st_ino == self._inode:
                return
        raise CannotServe(f"{self._file} was taken away: put this very file back, or use another folder{_ADOPT}")

    def put(self, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row for good.

        Raises:
            OSError: it may not be kept.
        """
        try:
            self._database.execute("REPLACE INTO decisions VALUES (?, ?)", (key, json.dumps(row)))
        except sqlite3.Error as error:
            before, self.problem = self.problem, f"the directory cannot store what it decides: {error}"
            if self.problem != before:
                self._log.error("not stored", reason=self.problem)
            raise OSError(self.problem) from None
        self.check_is_there()  # else nothing was stored for good
        self.problem = ""
        if event := row.get("event"):
            about = {name: row[name] for name in ("term", "server", "copy", "joining", "target") if row[name]}
            self._log.info("decided", shard=int(key.removeprefix("shard-")), change=event, **about)

    def close(self) -> None:
        """Let another directory use the folder."""
        self._database.close()
        os.close(self._descriptor)


class Directory:
    """Answers agents, servers and operators, and decides ten times a second; see `Assignments` for its arguments.

    Raises:
        CannotServe, InvalidInput: it cannot start.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        log: structlog.stdlib.BoundLogger,
        shards: int,
        copies: int,
        adopt: Collection[str],
    ) -> None:
        self._store, self._log = Store(folder, log), log
        try:
            self._rules = Assignments(
                shards,
                self._store.put,
                self._store.rows,
                copies=copies,
                dead_s=config.cluster.dead_s,
                needs_copy=config.cluster.needs_copy,
                accept_numerics_change=config.cluster.accept_numerics_change,
                adopt=adopt,
                version=secrets.randbits(48),  # no agent takes it for one of an earlier directory
            )
            keys = ServerKeys.read(config.node_transport)
            self._listener = Listener(config.node_transport, keys, frozenset({"status", *_BY_OPERATORS}))
        except (OSError, CannotListen, ClusterRefused) as error:
            self._store.close()
            raise CannotServe(str(error)) from None
        self.endpoint = self._listener.endpoint
        """Where it listens."""
        self._agents: dict[str, bytes] = {}
        """The connection of each node's agent."""
        self._refused: dict[str, tuple[str, str]] = {}
        """Name and reason, by the address of the node."""
        self._told = self._rules.version
        self._decide_at = 0.0
        self._ends = False

    def run(self) -> None:
        """Serve until `stop` is called.

        Raises:
            CannotServe: the store is gone, or an old one.
        """
        try:
            while not self._ends:
                self._serve_round()
        finally:
            self._listener.close()
            self._store.close()
        self._log.info("stopped")

    def _serve_round(self) -> None:
        for request in self._listener.requests(TICK_S):
            self._take(request)
        if (now := time.monotonic()) >= self._decide_at:
            self._decide_at = now + TICK_S
            self._store.check_is_there()
            with suppress(OSError):  # the store has said so
                self._rules.decide(now)
        if failures := self._listener.failures():
            self._log.warning("handshakes failed", **failures)
        if self._told != self._rules.version:
            self._told = self._rules.version
            for node, connection in self._agents.items():
                self._listener.tell(connection, self._news(node))

    def stop(self) -> None:
        """End soon; servers go on, and only changes wait until there is a directory again."""
        self._ends = True

    def admit(self, peers_file: Path) -> None:
        """Read the file of peers again; a broken one changes nothing."""
        try:
            self._listener.admit(Principals.read(peers_file))
            self._log.info("peers reloaded")
        except InvalidInput as error:
            self._log.error("peers not reloaded", reason=str(error))

    def _take(self, request: NodeRequest) -> None:
        try:
            self._listener.answer(request, self._answer(request))
        except ClusterRefused as error:
            if error.code == "OLD_STORE":
                raise CannotServe(str(error)) from None  # without an answer, which would end an agent that starts
            self._listener.refuse(request, str(error))
        except OSError:
            self._listener.refuse(request, self._store.problem)
        except (TypeError, ValueError, IndexError, KeyError) as error:
            sentence = f"{request.verb!r:.40} is not a request of this version with these arguments"
            self._log.warning("malformed request", reason=sentence, principal=request.principal, error=repr(error))
            self._listener.refuse(request, sentence)

    def _answer(self, request: NodeRequest) -> Any:
        verb, arguments = request.verb, request.arguments
        if verb == "heard":
            return self._hear(request, *arguments)
        if verb == "status":
            return self._status()
        if not all(type(each) is str or (type(each) is int and each >= 0) for each in arguments):
            raise TypeError("not numbers and names")
        if verb == "shards":
            return self._rules.count
        if (verb in _BY_SERVERS or verb == "accept_loss") and not self._rules.is_settled:
            raise ClusterRefused("TOO_EARLY", "the directory has just started, and has not heard all nodes")
        if verb in _BY_SERVERS:
            shard = arguments[0]
            if request.principal not in ("", self._rules.shards[shard].server):
                return None if verb == "begins" else False
            answer = getattr(self._rules, verb)(*arguments)
            return _with_port(answer, self._rules.count) if isinstance(answer, ShardRole) else answer
        if verb in _BY_OPERATORS:
            self._log.info("asked", verb=verb, arguments=arguments, principal=request.principal or "local")
            return getattr(self._rules, verb)(*arguments)
        raise ValueError("unknown verb")

    def _hear(self, request: NodeRequest, about: list[Any], news: dict[str, Any], told: int) -> Any:
        name, address, version, numerics, has, revision = about
        texts = [*about[:4], *(endpoint for _, _, endpoint in news["serves"])]
        if not all(type(each) is str and each for each in texts) or not re.fullmatch(r".+:[0-9]{1,5}", address):
            raise TypeError("not names and addresses")
        recordings = {int(shard): (int(term), int(position)) for shard, term, position in has}
        try:
            if request.principal not in ("", name):
                sentence = f"the key is that of {request.principal}, and the node is called {name}"
                raise ClusterRefused("OTHER_NAME", sentence)
            report = NodeReport(name, address, version, numerics, recordings, int(revision))
            self._rules.heard(report, time.monotonic())
        except ClusterRefused as error:
            self._refused = dict([*self._refused.items(), (address, (name, str(error)))][-_MOST_REFUSED:])
            raise
        self._refused.pop(address, None)
        self._agents[name] = request.connection
        for shard, term, endpoint in news["serves"]:
            self._rules.serves(shard, term, name, endpoint)
        for decide, found_here in ((self._rules.ended, news["ended"]), (self._rules.gone, news["gone"])):
            for shard, term in found_here:
                if self._rules.shards[shard].server == name:
                    decide(shard, term)
        return self._news(name) if told != self._rules.version else None

    def _status(self) -> dict[str, Any]:
        shards = self._rules.status()
        servers = Counter(each["server"] for each in shards)
        copies = Counter(each["copy"] or each["joining"] for each in shards)
        nodes = [
            {
                "node": name,
                "address": node.report.address,
                "numerics": node.report.numerics,
                "alive": self._rules.is_alive(name),
                "drained": name in self._rules.drained,
                "refused": "",
                "servers": servers[name],
                "copies": copies[name],
            }
            for name, node in sorted(self._rules.nodes.items())
            if self._rules.is_alive(name) or name not in self._rules.drained or servers[name] or copies[name]
        ]
        blank = ("alive", "drained", "servers", "copies")
        refused = [
            {"node": name, "address": address, "refused": reason, **dict.fromkeys(blank, 0)}
            for address, (name, reason) in self._refused.items()
        ]
        return {"shards": shards, "nodes": nodes + refused, "problem": self._store.problem}

    def _news(self, node: str) -> list[Any]:
        """The roles of a node and the table; empty while nothing is decided, because the store may have been lost."""
        if not any(view.term for view in self._rules.shards):
            return []
        table = self._rules.table()
        roles = [_with_port(role, self._rules.count) for role in self._rules.roles(node)]
        return [self._rules.version, self._rules.revision, roles, table.terms.tolist(), table.endpoints]


def _with_port(role: ShardRole, count: int) -> ShardRole:
    """The role with the endpoint at which the other node takes copies of the shard: above the ports of servers."""
    host, _, port = role.address.rpartition(":")
    return role._replace(address=f"tcp://{host}:{int(port) + count + role.shard}") if host else role


def run(config: Config, folder: Path, shards: int, copies: int, adopt: Collection[str]) -> int:
    """Serve as the directory until SIGTERM or SIGINT; return the exit status.

    Raises:
        CannotServe, InvalidInput: it cannot start.
    """
    log = make_log(config.log)
    directory = Directory(config, folder, log, shards, copies, adopt)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: directory.stop())
    peers_file = config.transport.peers_file
    signal.signal(signal.SIGHUP, lambda *_: None if peers_file is None else directory.admit(peers_file))
    log.info("directory", endpoint=directory.endpoint, shards=shards, copies=copies, store=str(folder))
    directory.run()
    return 0


class DirectoryClient:
    """Asks the directory on behalf of a server, in any thread. Each method waits for the answer; see `Assignments`."""

    def __init__(self, caller: Caller, log: structlog.stdlib.BoundLogger) -> None:
        self._caller, self._log = caller, log
        self._asking = threading.Lock()
        self.is_ending = False
        """Whether the server ends, and takes a silent directory for one that refuses."""

    def shards(self) -> int:
        """The number of shards of the cluster."""
        return int(self._ask("shards"))

    def begins(self, shard: int, term: int, node: str) -> ShardRole | None:
        """The role of the server."""
        role = self._ask("begins", shard, term, node)
        return None if role is None else ShardRole(*role)

    def _ask(self, verb: str, *arguments: Any) -> Any:
        reported, until_s = False, time.monotonic() + _PATIENCE_S
        while True:
            try:
                with self._asking:
                    return self._caller.ask(verb, *arguments, within_s=_ASK_WITHIN_S)
            except (NoAnswer, Rejected) as error:
                if not reported:
                    self._log.warning("waits for the directory", asks=verb, reason=str(error))
                reported = True
                if self.is_ending and time.monotonic() > until_s:
                    return None  # it may be over, so the server answers nothing more
                time.sleep(TICK_S)

    attached = partialmethod(_ask, "attached")
    dropped = partialmethod(_ask, "dropped")
    behind = partialmethod(_ask, "behind")
